"""AnyFlow-FAR as a streaming transformer: given context, changed prompts, windows, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import derive_config
from anyflow_runtime.encoders import NullEncoderConfig
from anyflow_runtime.schedulers import (
    FlowMapEulerSchedulerConfig,
    FlowMatchSchedulerConfig,
    FlowMatchUniPCSchedulerConfig,
)
from anyflow_runtime.streaming import (
    AnyFlowFARStreamConfig,
    DiffusionModelConfig,
    LifecycleError,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
)

from .parity import FP32_TOLERANCE, relative_error
from .streaming_models import (
    HEIGHT,
    PARTITION,
    WIDTH,
    context_of,
    noise_of,
    pipeline_of,
    random_model,
    rollout,
    text_of,
)


def test_phantom_padding_is_off_unless_asked_for():
    model = random_model()
    plain = rollout(pipeline_of(model), noise_of(), text_embeddings=text_of(1))
    padded = rollout(pipeline_of(model, phantom_padding=True), noise_of(), text_embeddings=text_of(1))
    assert model.phantom_padding and relative_error(plain, padded) > 1e-4
    again = rollout(pipeline_of(model, phantom_padding=False), noise_of(), text_embeddings=text_of(1))
    assert torch.equal(again, plain)


def test_given_chunks_come_back_unchanged_and_take_no_noise():
    pipeline = pipeline_of(random_model(), model_config={"seed": 1})
    context = context_of(3)
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1), "context_latents": context})
    before = pipeline.diffusion_model.rng.get_state()
    for i, frames in enumerate((context[:, :1], context[:, 1:])):
        assert torch.equal(pipeline.generate(i, cache), frames)
        pipeline.finalize(i, cache)
    assert torch.equal(pipeline.diffusion_model.rng.get_state(), before)


def test_given_chunks_are_encoded_in_one_pass(monkeypatch):
    pipeline = pipeline_of(random_model())
    transformer = pipeline.diffusion_model.transformer
    encoded: list[int] = []
    encode = transformer.encode_context
    monkeypatch.setattr(transformer, "encode_context", lambda cache, c: (encoded.append(len(c)), encode(cache, c))[1])
    rollout(pipeline, noise_of(), text_embeddings=text_of(1), context_latents=context_of(6))
    assert encoded == [4]  # four given chunks at once, and nothing after the last chunk


def test_generated_chunks_are_context_as_given_ones_are():
    """The state depends on the latents alone, not on how they came about."""
    pipeline = pipeline_of(random_model())
    full = rollout(pipeline, noise_of(), text_embeddings=text_of(1))
    given = rollout(pipeline, noise_of(), text_embeddings=text_of(1), context_latents=full[:, :5])
    assert relative_error(given, full) < FP32_TOLERANCE


@pytest.mark.parametrize("frames", [2, 4, 7])
def test_partly_covered_chunk_is_refused(frames):
    pipeline = pipeline_of(random_model())
    with pytest.raises(ValueError, match=rf"got {frames} frames, .*partly; expected one of \[1, 3, 5, 6, 8\]"):
        pipeline.initialize_cache({"text_embeddings": text_of(1), "context_latents": context_of(frames)})


def test_all_chunks_may_be_given():
    pipeline = pipeline_of(random_model())
    context = context_of(sum(PARTITION))
    latents = rollout(pipeline, noise_of(), text_embeddings=text_of(1), context_latents=context)
    assert torch.equal(latents, context)


def test_one_step_and_other_partitions_work():
    pipeline = pipeline_of(random_model(), steps=1)
    partition = (2, 1, 3)
    latents = rollout(pipeline, noise_of(6), text_embeddings=text_of(1), chunk_partition=partition)
    assert latents.shape == (1, 6, 16, HEIGHT, WIDTH) and torch.isfinite(latents).all()


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchSchedulerConfig(num_inference_steps=2, denoising_timesteps=(1000, 500)),
        FlowMatchUniPCSchedulerConfig(num_inference_steps=2),
    ],
)
def test_other_schedulers_run_the_model(scheduler):
    pipeline = pipeline_of(random_model())
    config = StreamInferencePipelineConfig(
        name="other",
        diffusion_model=DiffusionModelConfig(transformer=AnyFlowFARStreamConfig(), scheduler=scheduler, seed=0),
    )
    pipeline = config.setup(transformer=pipeline.diffusion_model.transformer)
    latents = rollout(pipeline, noise_of(), text_embeddings=text_of(1))
    assert torch.isfinite(latents).all()


def changed_prompt_rollout(
    pipeline: StreamInferencePipeline, at: int, before_finalize: bool, guidance: float
) -> Tensor:
    """Prompt 1 for the chunks before `at`, prompt 2 from there on."""
    negative = {"negative_text_embeddings": text_of(9), "guidance_scale": guidance}
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1), **negative})
    state, transformer = cache.transformer_cache, pipeline.diffusion_model.transformer
    chunks, start = [], 0
    for i in range(len(PARTITION)):
        end = start + PARTITION[i]
        chunks.append(pipeline.generate(i, cache, noise=noise_of()[:, :, start:end].transpose(1, 2)))
        start = end
        actions = [
            lambda: transformer.change_condition(
                state, transformer.make_condition(None, text_of(2), None, text_of(9), None, guidance)
            ),
            lambda i=i: pipeline.finalize(i, cache),
        ]
        for action in actions if before_finalize else reversed(actions):
            if action is not actions[0] or i + 1 == at:
                action()
    return torch.cat(chunks, dim=1)


@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("before_finalize", [False, True])
def test_changed_prompt_is_a_fresh_rollout_with_the_same_frames_given(before_finalize, guidance):
    """The old prompt leaves nothing behind in the cache."""
    pipeline = pipeline_of(random_model())
    latents = changed_prompt_rollout(pipeline, 3, before_finalize, guidance)
    prompts = {"text_embeddings": text_of(2), "negative_text_embeddings": text_of(9), "guidance_scale": guidance}
    fresh = rollout(pipeline, noise_of(), context_latents=latents[:, :5], **prompts)
    assert relative_error(latents, fresh) < FP32_TOLERANCE
    same = rollout(pipeline, noise_of(), **(prompts | {"text_embeddings": text_of(1)}))
    assert torch.equal(same[:, :5], latents[:, :5]) and relative_error(same[:, 5:], latents[:, 5:]) > 1e-3


def test_changed_prompt_must_fit_the_rollout():
    pipeline = pipeline_of(random_model())
    transformer = pipeline.diffusion_model.transformer
    state = pipeline.initialize_cache({"text_embeddings": text_of(1)}).transformer_cache
    with pytest.raises(ValueError, match="got batch 2, guidance False"):
        transformer.change_condition(state, transformer.make_condition(text_embeddings=text_of(2, batch=2)))


def test_window_keeps_sink_and_latest_chunks_and_nothing_else():
    """After the window has moved on, the next chunk is that of a fresh rollout with the kept chunks given."""
    pipeline = pipeline_of(random_model(), max_context_chunks=3, sink_chunks=1, chunk_partition=(1, 2))
    noise = noise_of(15)
    latents = rollout(pipeline, noise, stop=8, text_embeddings=text_of(1), endless=True)
    kept = torch.cat([latents[:, :1], latents[:, 9:13]], dim=1)
    fresh = pipeline_of(random_model(), chunk_partition=(1, 2, 2, 2))
    last = torch.cat([noise[:, :, :5], noise[:, :, 13:15]], dim=2)
    expected = rollout(fresh, last, text_embeddings=text_of(1), context_latents=kept)
    assert relative_error(latents[:, 13:], expected[:, 5:]) < FP32_TOLERANCE


def test_window_that_is_never_reached_changes_nothing():
    noise, text = noise_of(), text_of(1)
    windowed = pipeline_of(random_model(), max_context_chunks=5)
    assert torch.equal(
        rollout(windowed, noise, text_embeddings=text),
        rollout(pipeline_of(random_model()), noise, text_embeddings=text),
    )


def test_an_endless_video_goes_on_with_the_largest_chunk():
    """A default that ends in a short chunk does not put it in the middle of a video."""
    stream = pipeline_of(random_model()).diffusion_model.transformer

    def sizes(**context: Any) -> list[int]:
        cache = stream.initialize_autoregressive_cache(text_embeddings=text_of(1), endless=True, **context)
        return [cache.frames_in_chunk(index) for index in range(6)]

    assert sizes(chunk_partition=(1, 3, 2)) == [1, 3, 2, 3, 3, 3]
    stream.config = derive_config(stream.config, chunk_partition=(1, 3, 2))
    assert sizes() == [1, 3, 3, 3, 3, 3]


def test_window_allocates_once():
    pipeline = pipeline_of(random_model(), steps=1, max_context_chunks=3, chunk_partition=(1, 2))
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1), "endless": True})
    state = cache.transformer_cache
    slabs = [(k.data_ptr(), v.data_ptr()) for k, v in state.far.slabs]
    for i in range(7):
        pipeline.generate(i, cache)
        pipeline.finalize(i, cache)
    assert slabs == [(k.data_ptr(), v.data_ptr()) for k, v in state.far.slabs]
    assert len(state.finished) == 3 and state.num_finished == 7


def test_noisy_context_changes_the_following_chunks_only():
    clean = rollout(pipeline_of(random_model()), noise_of(), text_embeddings=text_of(1))
    noisy_pipeline = pipeline_of(random_model(), model_config={"context_noise": 200, "seed": 0})
    noisy = rollout(noisy_pipeline, noise_of(), text_embeddings=text_of(1))
    assert torch.equal(noisy[:, :1], clean[:, :1]) and relative_error(noisy[:, 1:], clean[:, 1:]) > 1e-3


def test_noisy_context_is_encoded_at_its_timestep(monkeypatch):
    """Each finished chunk keeps the timestep it was noised to, t = r; given ones are noised as well."""
    pipeline = pipeline_of(random_model(), model_config={"context_noise": 200, "seed": 0})
    model, times = pipeline.diffusion_model.transformer.model, []
    encode = model.encode_pending

    def recorded(cache: Any) -> None:
        if cache.pending is not None:
            times.append(tuple(cache.pending.times.tolist()))
        encode(cache)

    monkeypatch.setattr(model, "encode_pending", recorded)
    rollout(pipeline, noise_of(), stop=3, text_embeddings=text_of(1))
    assert times == [([[200.0] * n], [[200.0] * n]) for n in (1, 3, 5)]


def test_failed_chunk_and_failed_finalize_can_be_repeated(monkeypatch):
    """Out of memory in the second block, when the first has already written its keys: the retry starts afresh."""
    pipeline = pipeline_of(random_model())
    expected = rollout(pipeline, noise_of(), text_embeddings=text_of(1))
    block = pipeline.diffusion_model.transformer.model.blocks[1]

    def breaks(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")

    def fails(action: Any, *args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
            patch.setattr(block, "forward", breaks)
            action(*args, **kwargs)

    cache = pipeline.initialize_cache({"text_embeddings": text_of(1)})
    start = 0
    for i, frames in enumerate(PARTITION):
        end = start + frames
        noise = noise_of()[:, :, start:end].transpose(1, 2)
        fails(pipeline.generate, i, cache, noise=noise)
        assert torch.equal(pipeline.generate(i, cache, noise=noise), expected[:, start:end])
        if i + 1 < len(PARTITION):  # nothing runs after the last chunk
            fails(pipeline.finalize, i, cache)
        pipeline.finalize(i, cache)
        start = end


def test_chunks_out_of_order_are_refused_by_the_cache_itself():
    """Without the pipeline around it, too."""
    model = pipeline_of(random_model()).diffusion_model
    cache = model.transformer.initialize_autoregressive_cache(text_embeddings=text_of(1))
    with pytest.raises(AssertionError, match="got 1, but 0 chunks are finalized"):
        model.generate(1, cache)
    with pytest.raises(LifecycleError, match="got 0, expected 0"):
        cache.finalize(0)


def test_rollout_ends_with_the_partition():
    pipeline = pipeline_of(random_model(), chunk_partition=(1,))
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1)})
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    with pytest.raises(AssertionError, match=r"got 1, expected 0 to 0: chunks \[1\]"):
        pipeline.generate(1, cache)


def test_bidirectional_model_has_one_chunk():
    pipeline = pipeline_of(random_model(causal=False))
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1)})
    assert pipeline.generate(0, cache).shape == (1, 8, 16, HEIGHT, WIDTH)
    pipeline.finalize(0, cache)
    with pytest.raises(AssertionError, match="there is one chunk"):
        pipeline.generate(1, cache)


def test_latent_shape_is_known_after_initialisation_and_follows_the_chunks():
    pipeline = pipeline_of(random_model())
    transformer = pipeline.diffusion_model.transformer
    with pytest.raises(LifecycleError, match="no rollout"):
        _ = transformer.latent_shape
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1, batch=2)})
    assert transformer.latent_shape == (2, 1, 16, HEIGHT, WIDTH)
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    assert transformer.latent_shape == (2, 2, 16, HEIGHT, WIDTH)


def test_null_context_encoder_takes_embeddings_as_the_prompt():
    pipeline = pipeline_of(random_model(), context_encoder=NullEncoderConfig().setup())
    latents = rollout(pipeline, noise_of(), prompt=text_of(1))
    assert torch.equal(latents, rollout(pipeline, noise_of(), text_embeddings=text_of(1)))


@pytest.mark.parametrize(
    ("context", "message"),
    [
        ({}, "prompt, text_embeddings: got neither"),
        ({"prompt": "x"}, "there is no context_encoder"),
        ({"text_embeddings": torch.zeros(1, 5, 7)}, r"text_embeddings: got \(1, 5, 7\), expected \(B, S, 24\)"),
        (
            {"text_embeddings": text_of(1), "guidance_scale": 2.0},
            "negative_prompt, negative_text_embeddings: got neither",
        ),
        ({"text_embeddings": text_of(1), "height": 9}, "height: got 9, expected a positive multiple of the patch, 2"),
        ({"text_embeddings": text_of(1), "chunk_partition": (1, 0)}, "chunk_partition: got"),
        ({"text_embeddings": text_of(1), "image_embeddings": torch.zeros(1, 2, 3)}, "image_embeddings: got"),
        ({"text_embeddings": text_of(1), "context_latents": torch.zeros(1, 1, 3, 8, 12)}, "context_latents: got"),
        ({"text_embeddings": text_of(1), "context_latents": context_of(1), "height": 4}, "context_latents: got"),
    ],
)
def test_contexts_that_do_not_fit_are_refused(context, message):
    with pytest.raises(ValueError, match=message):
        pipeline_of(random_model()).initialize_cache(context)


def test_input_per_chunk_is_refused():
    transformer = AnyFlowFARStreamConfig(height=HEIGHT, width=WIDTH, chunk_partition=PARTITION)
    config = StreamInferencePipelineConfig(
        name="controlled",
        diffusion_model=DiffusionModelConfig(transformer=transformer, scheduler=FlowMapEulerSchedulerConfig()),
        encoder=NullEncoderConfig(),
    )
    pipeline = config.setup(transformer=transformer.setup(model=random_model()))
    cache = pipeline.initialize_cache({"text_embeddings": text_of(1)})
    with pytest.raises(ValueError, match="takes no input per chunk"):
        pipeline.generate(0, cache, torch.zeros(1))


def test_model_must_come_from_exactly_one_place():
    with pytest.raises(ValueError, match="model, path: got neither"):
        AnyFlowFARStreamConfig().setup()
    with pytest.raises(ValueError, match="model, path: got both"):
        AnyFlowFARStreamConfig(path="x").setup(model=random_model())
    with pytest.raises(TypeError, match="got AnyFlowTransformer3DModel, expected AnyFlowFARTransformer3DModel"):
        AnyFlowFARStreamConfig().setup(model=random_model(causal=False))


def test_model_is_loaded_from_a_directory(tmp_path):
    model = random_model()
    model.save_pretrained(tmp_path / "transformer")
    config = AnyFlowFARStreamConfig(
        path=str(tmp_path),
        dtype=torch.bfloat16,
        phantom_padding=True,
        height=HEIGHT,
        width=WIDTH,
        chunk_partition=(1, 2),
    )
    stream = config.setup()
    assert stream.dtype == torch.bfloat16 and stream.model.phantom_padding
    pipeline = StreamInferencePipelineConfig(
        name="loaded",
        diffusion_model=DiffusionModelConfig(transformer=config, scheduler=FlowMapEulerSchedulerConfig(), seed=0),
    ).setup()
    latents = rollout(pipeline, noise_of(3), text_embeddings=text_of(1))
    assert latents.dtype == torch.bfloat16 and torch.isfinite(latents).all()


def test_missing_directory_is_named():
    with pytest.raises(FileNotFoundError, match="no directory"):
        AnyFlowFARStreamConfig(path="/nowhere/at/all").setup()
