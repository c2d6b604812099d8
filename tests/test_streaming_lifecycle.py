"""Pipeline lifecycle: order of calls, misuse, retries, profiling. Its toy parts serve the other streaming tests."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from torch import Tensor, nn

from anyflow_runtime.decoders.base import DecoderConfig, StreamingDecoder, StreamingDecoderCache
from anyflow_runtime.encoders.base import EncoderConfig, NullEncoderConfig, StreamingEncoder, StreamingEncoderCache
from anyflow_runtime.schedulers import FlowMapEulerSchedulerConfig, FlowMatchSchedulerConfig, SchedulerConfig
from anyflow_runtime.streaming import (
    DiffusionModelConfig,
    LifecycleError,
    NonFiniteError,
    RollingKVCache,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    Transformer,
    TransformerAutoregressiveCache,
    TransformerConfig,
    derive_config,
)

FRAMES, CHANNELS, SIDE = 2, 3, 4
STAGE_KEYS = {"encode_ms", "diffuse_ms", "decode_ms", "finalize_ms", "total_ms", "total_ms_wo_finalize"}


class Breaks(RuntimeError):
    """What a toy part raises when told to."""


@dataclass(frozen=True, kw_only=True)
class ToyTransformerConfig(TransformerConfig):
    _target: type = field(default_factory=lambda: ToyTransformer)
    batch: int = 1


class ToyCache(TransformerAutoregressiveCache):
    """One rolling layer, and a log of what was called."""

    def __init__(self, batch: int, width: int, tokens: int) -> None:
        self.kv = RollingKVCache(batch, 1, width, sink=tokens, window=2 * tokens, chunk=tokens)
        self.log: list[Any] = []

    def start(self, autoregressive_index: int) -> None:
        self.log.append(("start", autoregressive_index))
        self.kv.before_update(autoregressive_index)

    def finalize(self, autoregressive_index: int) -> None:
        self.log.append(("finalize", autoregressive_index))
        self.kv.after_update(autoregressive_index)


class ToyTransformer(Transformer[ToyCache]):
    """One attention layer over 2 x 2 patches, in the manner of a streaming Wan; `breaks` makes it fail."""

    def __init__(self, config: ToyTransformerConfig) -> None:
        super().__init__(config)
        width = 4 * CHANNELS
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, width, width, generator=generator) / width**0.5)
        self.breaks = False
        self.timesteps: list[Tensor] = []

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.config.batch, FRAMES * SIDE * SIDE // 4, 4 * CHANNELS)

    def initialize_autoregressive_cache(self, **context: Any) -> ToyCache:
        return ToyCache(self.config.batch, self.latent_shape[2], self.latent_shape[1])

    def predict_flow(self, noisy_latent: Tensor, timestep: Tensor, cache: ToyCache, input: Any = None) -> Tensor:
        cache.log.append(("flow", float(timestep)))
        self.timesteps.append(timestep)
        if self.breaks:
            raise Breaks("transformer")
        x = noisy_latent if input is None else noisy_latent + input
        q, k, v = (x @ weight for weight in self.weight)
        cache.kv.update(k.unsqueeze(2).float(), v.unsqueeze(2).float())
        k, v = (part.squeeze(2).to(q.dtype) for part in (cache.kv.cached_k(), cache.kv.cached_v()))
        attention = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
        return attention + timestep.to(x.dtype) / 1000

    def patchify_and_maybe_split_cp(self, x: Any) -> Any:
        b, t, c, h, w = x.shape
        patches = x.reshape(b, t, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return patches.reshape(b, t * h * w // 4, c * 4)

    def unpatchify_and_maybe_gather_cp(self, x: Tensor) -> Tensor:
        patches = x.reshape(x.shape[0], FRAMES, SIDE // 2, SIDE // 2, CHANNELS, 2, 2)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], FRAMES, CHANNELS, SIDE, SIDE)


@dataclass
class CountingEncoderCache(StreamingEncoderCache):
    """Both kinds of state a retry has to find as it was."""

    calls: int = 0
    seen: list[int] = field(default_factory=list)


class CountingEncoder(StreamingEncoder[CountingEncoderCache]):
    """Adds the number of calls, so a call too many shows in the output."""

    breaks = False

    def initialize_autoregressive_cache(self, **context: Any) -> CountingEncoderCache:
        return CountingEncoderCache(**context)

    def forward(
        self, input: Tensor, autoregressive_index: int = 0, cache: CountingEncoderCache | None = None
    ) -> Tensor:
        assert cache is not None and cache.calls == autoregressive_index
        cache.calls += 1
        cache.seen.append(autoregressive_index)
        if self.breaks:
            raise Breaks("encoder")
        return input + 0.1 * cache.calls


@dataclass(frozen=True, kw_only=True)
class CountingEncoderConfig(EncoderConfig):
    _target: type = field(default_factory=lambda: CountingEncoder)


@dataclass
class SumDecoderCache(StreamingDecoderCache):
    total: Tensor | float = 0.0


class SumDecoder(StreamingDecoder[SumDecoderCache]):
    """Adds up the latents of all chunks so far, so a chunk decoded twice shows in the output."""

    breaks = False

    def initialize_autoregressive_cache(self, **context: Any) -> SumDecoderCache:
        return SumDecoderCache(**context)

    def forward(self, *, input: Tensor, autoregressive_index: int, cache: SumDecoderCache) -> Tensor:  # type: ignore[override]
        cache.total = cache.total + input
        if self.breaks:
            raise Breaks("decoder")
        return cache.total


@dataclass(frozen=True, kw_only=True)
class SumDecoderConfig(DecoderConfig):
    _target: type = field(default_factory=lambda: SumDecoder)


def toy_config(
    encoder: EncoderConfig | None = None,
    decoder: DecoderConfig | None = None,
    profile: bool = False,
    scheduler: SchedulerConfig | None = None,
    **model: Any,
) -> StreamInferencePipelineConfig:
    return StreamInferencePipelineConfig(
        name="toy",
        diffusion_model=DiffusionModelConfig(
            transformer=ToyTransformerConfig(), scheduler=scheduler or FlowMapEulerSchedulerConfig(), **model
        ),
        encoder=encoder,
        decoder=decoder,
        enable_sync_and_profile=profile,
    )


def toy_pipeline(**kwargs: Any) -> StreamInferencePipeline:
    return toy_config(**kwargs).setup()


def control(index: int) -> Tensor:
    """The encoder's input for a chunk."""
    shape = (1, FRAMES, CHANNELS, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def rollout(pipeline: StreamInferencePipeline, chunks: int, seed: int | None = 0) -> list[Tensor]:
    """All chunks of an undisturbed rollout."""
    cache = pipeline.initialize_cache(seed=seed)
    outputs = []
    for i in range(chunks):
        outputs.append(pipeline.generate(i, cache, None if pipeline.encoder is None else control(i)))
        pipeline.finalize(i, cache)
    return outputs


def test_output_without_a_decoder_is_the_unpatchified_latent():
    pipeline = toy_pipeline()
    output = pipeline.generate(0, pipeline.initialize_cache(seed=0))
    assert output.shape == (1, FRAMES, CHANNELS, SIDE, SIDE)
    assert torch.isfinite(output).all() and not output.requires_grad


def test_later_chunks_depend_on_earlier_ones():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    shape = (1, FRAMES, CHANNELS, SIDE, SIDE)
    outputs = []
    for i in range(2):
        outputs.append(pipeline.generate(i, cache, noise=torch.ones(shape)))
        pipeline.finalize(i, cache)
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("index", [-1, 1, 2])
def test_first_chunk_must_be_zero(index):
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match=f"got {index}, expected 0"):
        pipeline.generate(index, cache)
    pipeline.generate(0, cache)


@pytest.mark.parametrize("index", [0, 2])
def test_index_must_follow(index):
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    with pytest.raises(AssertionError, match="expected 1"):
        pipeline.generate(index, cache)
    pipeline.generate(1, cache)


def test_next_chunk_before_finalize_is_refused():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    with pytest.raises(LifecycleError, match="chunk 0 is not finalized"):
        pipeline.generate(1, cache)
    pipeline.finalize(0, cache)
    pipeline.generate(1, cache)


def test_finalize_consumes_the_state():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    assert cache.final_state is None
    with pytest.raises(AssertionError, match="nothing to finalize"):
        pipeline.finalize(0, cache)


def test_finalize_wants_the_index_of_the_latest_generate():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match="nothing to finalize"):
        pipeline.finalize(0, cache)
    pipeline.generate(0, cache)
    with pytest.raises(AssertionError, match="got 1 to finalize, expected chunk 0"):
        pipeline.finalize(1, cache)
    pipeline.finalize(0, cache)


def test_input_without_an_encoder_is_refused():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match="no encoder"):
        pipeline.generate(0, cache, input=control(0))
    pipeline.generate(0, cache)


def test_encoder_without_an_input_is_refused():
    pipeline = toy_pipeline(encoder=CountingEncoderConfig())
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match="input: got None"):
        pipeline.generate(0, cache)
    pipeline.generate(0, cache, control(0))


def test_null_encoder_in_the_pipeline_passes_the_input_on():
    given, none = toy_pipeline(encoder=NullEncoderConfig()), toy_pipeline()
    zero = torch.zeros(1, FRAMES, CHANNELS, SIDE, SIDE)
    caches = given.initialize_cache(seed=3), none.initialize_cache(seed=3)
    torch.testing.assert_close(given.generate(0, caches[0], zero), none.generate(0, caches[1]), rtol=0, atol=0)
    caches = given.initialize_cache(seed=3), none.initialize_cache(seed=3)
    assert not torch.allclose(given.generate(0, caches[0], control(0)), none.generate(0, caches[1]))


def test_one_shot_encoder_in_the_pipeline_is_refused_at_construction():
    with pytest.raises(TypeError, match="encoder: got Encoder, expected a streaming encoder"):
        toy_pipeline(encoder=EncoderConfig())


def test_contexts_reach_their_parts_and_are_ignored_without_them():
    both = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig())
    cache = both.initialize_cache(encoder_context={"calls": 7}, decoder_context={"total": 2.0})
    assert cache.encoder_cache.calls == 7 and cache.decoder_cache.total == 2.0
    cache = toy_pipeline().initialize_cache(encoder_context={"calls": 7}, decoder_context={"total": 2.0})
    assert cache.encoder_cache is None and cache.decoder_cache is None


def test_order_of_calls_within_a_chunk():
    pipeline = toy_pipeline(scheduler=FlowMatchSchedulerConfig(num_inference_steps=2, denoising_timesteps=(1000, 500)))
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    kinds = [entry if entry[0] != "flow" else "flow" for entry in cache.transformer_cache.log]
    assert kinds == [("start", 0), "flow", "flow", "flow", ("finalize", 0)]
    assert cache.transformer_cache.log[3] == ("flow", 0.0)  # the cache update runs on the clean chunk


@pytest.mark.parametrize("part", ["encoder", "transformer", "decoder"])
def test_failed_generate_leaves_no_trace(part):
    """A retry gives the very output the chunk would have had: noise, encoder and decoder state are rewound."""
    pipeline = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig())
    expected = rollout(pipeline, 3)
    cache = pipeline.initialize_cache(seed=0)
    breaking = {"transformer": pipeline.diffusion_model.transformer}.get(part) or getattr(pipeline, part)
    for i in range(3):
        breaking.breaks = True
        with pytest.raises(Breaks, match=part):
            pipeline.generate(i, cache, control(i))
        breaking.breaks = False
        assert cache.final_state is None and cache.next_index == i
        torch.testing.assert_close(pipeline.generate(i, cache, control(i)), expected[i], rtol=0, atol=0)
        pipeline.finalize(i, cache)
    assert cache.encoder_cache.seen == [0, 1, 2]


def test_failed_finalize_can_be_repeated():
    pipeline = toy_pipeline(context_noise=100)
    expected = rollout(pipeline, 2)
    cache = pipeline.initialize_cache(seed=0)
    pipeline.generate(0, cache)
    pipeline.diffusion_model.transformer.breaks = True
    with pytest.raises(Breaks):
        pipeline.finalize(0, cache)
    pipeline.diffusion_model.transformer.breaks = False
    pipeline.finalize(0, cache)
    torch.testing.assert_close(pipeline.generate(1, cache), expected[1], rtol=0, atol=0)


def test_interleaved_rollouts_do_not_disturb_each_other():
    pipeline = toy_pipeline(decoder=SumDecoderConfig())
    expected = rollout(pipeline, 3, seed=1), rollout(pipeline, 3, seed=2)
    caches = pipeline.initialize_cache(seed=1), pipeline.initialize_cache(seed=2)
    for i in range(3):
        for cache, outputs in zip(caches, expected, strict=True):
            torch.testing.assert_close(pipeline.generate(i, cache), outputs[i], rtol=0, atol=0)
            pipeline.finalize(i, cache)


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


class Lifecycle(RuleBasedStateMachine):
    """Any order of right, wrong and failing calls: whatever succeeds is what an undisturbed rollout gives."""

    LENGTH = 5
    pipeline = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig(), context_noise=50)
    expected = rollout(pipeline, LENGTH)

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.pipeline.initialize_cache(seed=0)
        self.done = 0  # chunks generated
        self.finalized = 0

    @property
    def parts(self) -> dict[str, Any]:
        model = self.pipeline.diffusion_model.transformer
        return {"encoder": self.pipeline.encoder, "transformer": model, "decoder": self.pipeline.decoder}

    @precondition(lambda self: self.done < self.LENGTH)
    @rule(offset=st.integers(-2, 2), with_input=st.booleans())
    def generate(self, offset: int, with_input: bool) -> None:
        index = self.done + offset
        given = control(index) if with_input else None
        if offset == 0 and self.done == self.finalized and with_input:
            output = self.pipeline.generate(index, self.cache, given)
            torch.testing.assert_close(output, self.expected[index], rtol=0, atol=0)
            self.done += 1
        else:
            with pytest.raises(AssertionError):
                self.pipeline.generate(index, self.cache, given)

    @precondition(lambda self: self.done == self.finalized and self.done < self.LENGTH)
    @rule(part=st.sampled_from(["encoder", "transformer", "decoder"]))
    def fail_to_generate(self, part: str) -> None:
        self.parts[part].breaks = True
        try:
            with pytest.raises(Breaks):
                self.pipeline.generate(self.done, self.cache, control(self.done))
        finally:
            self.parts[part].breaks = False

    @rule(offset=st.integers(-2, 1))
    def finalize(self, offset: int) -> None:
        index = self.done + offset
        if offset == -1 and self.finalized < self.done:
            self.pipeline.finalize(index, self.cache)
            self.finalized += 1
        else:
            with pytest.raises(AssertionError):
                self.pipeline.finalize(index, self.cache)

    @precondition(lambda self: self.finalized < self.done)
    @rule()
    def fail_to_finalize(self) -> None:
        self.parts["transformer"].breaks = True
        try:
            with pytest.raises(Breaks):
                self.pipeline.finalize(self.done - 1, self.cache)
        finally:
            self.parts["transformer"].breaks = False

    @rule()
    def new_rollout(self) -> None:
        self.cache = self.pipeline.initialize_cache(seed=0)
        self.done = self.finalized = 0

    @invariant()
    def cache_tells_where_it_is(self) -> None:
        assert self.cache.next_index == self.done
        assert (self.cache.final_state is None) == (self.done == self.finalized)
        assert self.cache.encoder_cache.seen == list(range(self.done))


TestLifecycleOrders = Lifecycle.TestCase
TestLifecycleOrders.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
