"""What a pipeline tells of a chunk: timings when profiling, the first value that is not finite, its config."""

from __future__ import annotations

import logging

import pytest
import torch

from anyflow_runtime.streaming import (
    NonFiniteError,
    RollingKVCache,
    Transformer,
    TransformerAutoregressiveCache,
    TransformerConfig,
    derive_config,
)

from .streaming_toys import (
    STAGE_KEYS,
    CountingEncoderConfig,
    SumDecoderConfig,
    ToyTransformer,
    ToyTransformerConfig,
    control,
    toy_config,
    toy_pipeline,
)


def test_profiling_gives_the_specified_keys_and_one_log_line_per_chunk(caplog):
    pipeline = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig(), profile=True)
    cache = pipeline.initialize_cache()
    with caplog.at_level(logging.INFO, logger="anyflow_runtime.streaming.pipeline"):
        for i in range(2):
            pipeline.generate(i, cache, control(i))
            stats = pipeline.finalize(i, cache)
            assert set(stats) == STAGE_KEYS
            parts = [stats[f"{name}_ms"] for name in ("encode", "diffuse", "decode", "finalize")]
            assert min(parts) > 0 and stats["total_ms"] == pytest.approx(sum(parts))
            assert stats["total_ms_wo_finalize"] == pytest.approx(sum(parts[:3]))
    assert [record.message.split(":")[0] for record in caplog.records] == ["toy chunk 0", "toy chunk 1"]


def test_profile_has_all_stages_without_encoder_and_decoder():
    pipeline = toy_pipeline(profile=True)
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    assert set(pipeline.finalize(0, cache)) == STAGE_KEYS


@pytest.mark.gpu
def test_profile_on_cuda_has_the_memory_keys():
    pipeline = toy_pipeline(profile=True).cuda()
    cache = pipeline.initialize_cache()
    cache.transformer_cache.kv = RollingKVCache(1, 1, 12, sink=8, window=16, chunk=8, device="cuda")
    pipeline.generate(0, cache)
    stats = pipeline.finalize(0, cache)
    assert set(stats) == STAGE_KEYS | {"mem_alloc_gib", "mem_reserved_gib", "mem_peak_gib"}
    assert stats["diffuse_ms"] > 0 and stats["finalize_ms"] > 0


def test_finalize_returns_none_without_profiling():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    assert pipeline.finalize(0, cache) is None and cache.event_profiler is None


def test_pipeline_config_prints_and_derives():
    config = toy_config(decoder=SumDecoderConfig())
    text = str(config)
    assert text.startswith("StreamInferencePipelineConfig:") and "\n        scheduler: FlowMapEuler" in text
    fast = derive_config(config, diffusion_model={"scheduler": {"num_inference_steps": 1}})
    assert fast.setup().diffusion_model.scheduler.config.num_inference_steps == 1
    assert hash(config) != hash(fast) and config.diffusion_model.scheduler.num_inference_steps == 4


def test_abstract_transformer_cannot_be_built():
    with pytest.raises(TypeError, match="abstract"):
        TransformerConfig().setup()


def test_transformer_without_cache_of_its_own_gets_an_empty_one():
    transformer = ToyTransformer(ToyTransformerConfig())
    cache = Transformer.initialize_autoregressive_cache(transformer)
    assert type(cache) is TransformerAutoregressiveCache and cache.start(0) is None and cache.finalize(0) is None
    with pytest.raises(TypeError, match="takes no context, got prompt"):
        Transformer.initialize_autoregressive_cache(transformer, prompt="x")


def test_check_finite_names_the_weight():
    pipeline = toy_pipeline(check_finite=True)
    with torch.no_grad():
        pipeline.diffusion_model.transformer.weight[1, 2, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"weight transformer.weight: 1 NaN .* at \(1, 2, 3\)"):
        pipeline.initialize_cache()


def test_check_finite_names_the_latent_and_the_chunk_can_be_retried():
    pipeline = toy_pipeline(check_finite=True)
    cache = pipeline.initialize_cache(seed=0)
    transformer = pipeline.diffusion_model.transformer
    before = transformer.weight.detach().clone()
    with torch.no_grad():
        transformer.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="flow of chunk 0, network call 0"):
        pipeline.generate(0, cache)
    with torch.no_grad():
        transformer.weight.copy_(before)
    assert torch.isfinite(pipeline.generate(0, cache)).all()


def test_non_finite_values_pass_when_nobody_asked():
    pipeline = toy_pipeline()
    with torch.no_grad():
        pipeline.diffusion_model.transformer.weight[0, 0, 0] = float("nan")
    cache = pipeline.initialize_cache()
    assert torch.isnan(pipeline.generate(0, cache)).any()
