"""`stream(...)`, the presets, and a rollout of 500 chunks."""

from __future__ import annotations

import gc
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow_runtime.decoders import PixelDecoderConfig
from anyflow_runtime.encoders import Encoder, EncoderConfig, PixelEncoderConfig
from anyflow_runtime.schedulers import FlowMapEulerSchedulerConfig
from anyflow_runtime.streaming import (
    PRESETS,
    AnyFlowFARStream,
    AnyFlowFARStreamConfig,
    Change,
    DiffusionModelConfig,
    PrintableConfig,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    derive_config,
    preset,
    stream,
)

from .streaming_models import TEXT_DIM, random_model, text_of
from .streaming_toys import toy_pipeline

PARTITION, SIDE = (1, 2, 2, 1), 4
CHANNELS = 12  # latents of 2 x 2 RGB pixels


class Letters(Encoder):
    """An embedding per prompt, without a text encoder; counts its calls."""

    calls = 0

    def forward(self, input: Any) -> Tensor:
        self.calls += 1
        prompts = [input] if isinstance(input, str) else list(input)
        return torch.cat([text_of(sum(map(ord, prompt))) for prompt in prompts])


def pixel_pipeline(profile: bool = False, steps: int = 2, **stream_config: Any) -> StreamInferencePipeline:
    """A small FAR model that works on pixels, with text prompts."""
    sizes = {"height": SIDE, "width": SIDE, "chunk_partition": PARTITION}
    transformer = AnyFlowFARStreamConfig(**(sizes | stream_config))
    config = StreamInferencePipelineConfig(
        name="pixels",
        diffusion_model=DiffusionModelConfig(
            transformer=transformer, scheduler=FlowMapEulerSchedulerConfig(num_inference_steps=steps)
        ),
        decoder=PixelDecoderConfig(block=2),
        enable_sync_and_profile=profile,
    )
    model = random_model(in_channels=CHANNELS, out_channels=CHANNELS, num_layers=1)
    with torch.no_grad():
        model.proj_out.weight.mul_(0.05)  # so that pixels stay within the decoder's range
        model.proj_out.bias.zero_()
    return config.setup(transformer=transformer.setup(model=model, context_encoder=Letters(EncoderConfig())))


@pytest.fixture(scope="module")
def pipeline() -> StreamInferencePipeline:
    return pixel_pipeline()


def noise_of(frames: int = sum(PARTITION)) -> Tensor:
    return 0.15 * torch.randn(1, CHANNELS, frames, SIDE, SIDE, generator=torch.Generator().manual_seed(2))


def test_yields_the_frames_of_every_chunk(pipeline):
    shapes = [tuple(frames.shape) for frames in stream(pipeline, "a fox", seed=0)]
    assert shapes == [(1, n, 3, 2 * SIDE, 2 * SIDE) for n in PARTITION]


def test_equals_the_pipeline_driven_by_hand(pipeline):
    cache = pipeline.initialize_cache({"prompt": "a fox"}, seed=4)
    for i, frames in enumerate(stream(pipeline, "a fox", seed=4)):
        assert torch.equal(frames, pipeline.generate(i, cache))
        pipeline.finalize(i, cache)
    assert i == len(PARTITION) - 1


def test_seed_decides_the_video(pipeline):
    first, again, other = (torch.cat([*stream(pipeline, "a fox", seed=s)], 1) for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_noise_of_the_whole_video_is_split_over_the_chunks(pipeline):
    noise, start = noise_of(), 0
    cache = pipeline.initialize_cache({"prompt": "a fox"})
    for i, frames in enumerate(stream(pipeline, "a fox", noise=noise)):
        chunk = noise[:, :, start : start + PARTITION[i]].transpose(1, 2)
        assert torch.equal(frames, pipeline.generate(i, cache, noise=chunk))
        pipeline.finalize(i, cache)
        start += PARTITION[i]


@pytest.mark.parametrize("how", ["send", "send a change", "function"])
def test_prompt_changes_between_chunks(pipeline, how):
    noise = noise_of()
    if how == "function":
        frames = [*stream(pipeline, lambda i: {0: "a fox", 2: "a dog"}.get(i), noise=noise)]
    else:
        generator = stream(pipeline, "a fox", noise=noise)
        frames = [next(generator), next(generator)]
        frames.append(generator.send("a dog" if how == "send" else Change(prompt="a dog")))
        frames.extend(generator)
    kept = [*stream(pipeline, "a fox", noise=noise)]
    assert len(frames) == len(PARTITION)
    assert all(torch.equal(*pair) for pair in zip(frames[:2], kept[:2], strict=True))
    encoder = PixelEncoderConfig(block=2).setup()
    latents = torch.cat([encoder(chunk) for chunk in frames[:2]], dim=1)
    fresh = [*stream(pipeline, "a dog", noise=noise, context_latents=latents)]
    torch.testing.assert_close(frames[2:], fresh[2:])
    assert not torch.allclose(frames[2], kept[2])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (Change(steps=0), "num_inference_steps"),
        (Change(guidance_scale=3.0), "guidance"),
        (["a dog", "a cat"], "batch"),
        (torch.zeros(1, 3, 5), "got"),
        ({"steps": 3}, "change: got dict"),
        (Change(prompt="a yelow dog", steps=1), "yelow"),
    ],
    ids=str,
)
@pytest.mark.parametrize("overlap", [False, True])
def test_a_refused_change_leaves_the_video_running(pipeline, monkeypatch, change, error, overlap):
    encoder = pipeline.diffusion_model.transformer.context_encoder
    encode = type(encoder).forward

    def words_it_knows(self, prompts, *rest):
        if "yelow" in str(prompts):
            raise ValueError(f"caption: got unknown words in {prompts!r}, expected others")
        return encode(self, prompts, *rest)

    monkeypatch.setattr(type(encoder), "forward", words_it_knows)
    video = stream(pipeline, "a fox", noise=noise_of(), overlap=overlap)
    frames = [next(video)]
    with pytest.raises((ValueError, TypeError), match=error):
        video.send(change)
    frames += video
    want = [*stream(pipeline, "a fox", noise=noise_of())]
    assert all(torch.equal(*pair) for pair in zip(frames, want, strict=True))


def test_unchanged_prompt_is_not_encoded_again(pipeline):
    letters = pipeline.diffusion_model.transformer.context_encoder
    before = letters.calls
    for _ in stream(pipeline, lambda i: "a fox", seed=0):
        pass
    assert letters.calls == before + 1


def test_steps_change_on_the_fly(pipeline):
    noise = noise_of()
    generator = stream(pipeline, "a fox", noise=noise, steps=2)
    frames = [next(generator), generator.send(Change(steps=1))]
    two, one = ([*stream(pipeline, "a fox", noise=noise, steps=s)] for s in (2, 1))
    assert torch.equal(frames[0], two[0]) and not torch.equal(frames[1], two[1])
    assert not torch.equal(one[0], two[0])


def test_guidance_uses_the_empty_prompt_unless_told_otherwise(pipeline):
    plain, default, empty, other = (
        next(stream(pipeline, "a fox", noise=noise_of(), **settings))
        for settings in (
            {},
            {"guidance_scale": 2.0},
            {"guidance_scale": 2.0, "negative_prompt": ""},
            {"guidance_scale": 2.0, "negative_prompt": "a cat"},
        )
    )
    assert torch.equal(default, empty) and not torch.equal(default, plain) and not torch.equal(default, other)


def test_several_prompts_make_several_videos(pipeline):
    both = next(stream(pipeline, ["a fox", "a dog"], noise=noise_of().repeat(2, 1, 1, 1, 1)))
    single = next(stream(pipeline, "a dog", noise=noise_of()))
    torch.testing.assert_close(both[1:], single)


def test_image_is_the_first_frame_of_its_video(pipeline):
    image = torch.rand(1, 1, 3, 2 * SIDE, 2 * SIDE) * 2 - 1
    encoder = PixelEncoderConfig(block=2).setup()
    frames = [*stream(pipeline, "a fox", seed=0, context_video=image, video_encoder=encoder)]
    torch.testing.assert_close(frames[0], image)
    assert len(frames) == len(PARTITION)


def test_stopping_early_leaves_the_pipeline_ready(pipeline):
    expected = [*stream(pipeline, "a fox", seed=3)]
    generator = stream(pipeline, "a fox", seed=3)
    next(generator)
    generator.close()
    for _ in stream(pipeline, "a fox", seed=9):
        break
    assert all(torch.equal(*pair) for pair in zip(stream(pipeline, "a fox", seed=3), expected, strict=True))


def test_last_chunk_is_not_made_context(pipeline, monkeypatch):
    finalized: list[int] = []
    finalize = pipeline.finalize
    monkeypatch.setattr(pipeline, "finalize", lambda i, cache: (finalized.append(i), finalize(i, cache))[1])
    for _ in stream(pipeline, "a fox", seed=0):
        pass
    assert finalized == [0, 1, 2]


def test_stats_of_every_chunk_arrive():
    stats: dict[int, dict[str, float]] = {}
    for _ in stream(pixel_pipeline(profile=True), "a fox", seed=0, on_stats=stats.__setitem__):
        pass
    assert list(stats) == [0, 1, 2, 3]
    assert all(s["diffuse_ms"] > 0 for s in stats.values()) and stats[3]["finalize_ms"] == 0.0


@pytest.mark.parametrize(("count", "sizes"), [(1, [1]), (3, [1, 2, 2]), (4, [1, 2, 2, 1]), (6, [1, 2, 2, 2, 2, 2])])
def test_number_of_chunks_shortens_or_continues_the_partition(pipeline, count, sizes):
    """The short chunk that ends the default must not stand in the middle of a longer video."""
    assert [frames.shape[1] for frames in stream(pipeline, "a fox", num_chunks=count, steps=1, seed=0)] == sizes


def test_size_in_pixels_is_that_of_the_frames(pipeline):
    assert next(stream(pipeline, "a fox", height=16, width=24)).shape[-2:] == (16, 24)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_chunks": 2, "chunk_partition": (1, 2)}, "num_chunks, chunk_partition: got 2"),
        ({"num_chunks": 0}, "num_chunks: got 0"),
        ({"num_chunks": 3, "endless": True}, "num_chunks: got 3 with endless"),
        ({"noise": torch.zeros(1, CHANNELS, 5, SIDE, SIDE)}, r"expected \(B, C, T, H, W\) = \(1, 12, 6, 4, 4\)"),
        ({"noise": noise_of(), "endless": True}, "noise: got noise for a whole video with endless"),
        ({"height": 7}, "height: got 7, expected a positive multiple of 2"),
        ({"steps": 0}, "num_inference_steps"),
        ({"context_video": torch.zeros(1, 1, 3, 8, 8)}, "context_video: got it for a pipeline without a video encoder"),
        ({"context_latents": torch.zeros(1, 2, CHANNELS, SIDE, SIDE)}, "only partly"),
    ],
)
def test_bad_arguments_are_refused_before_the_first_frame_is_asked_for(pipeline, settings, message):
    with pytest.raises(ValueError, match=message):
        stream(pipeline, "a fox", **settings)


def test_other_transformers_are_refused():
    with pytest.raises(TypeError, match="transformer is ToyTransformer"):
        stream(toy_pipeline(), "a fox")


def tensor_bytes() -> int:
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (Tensor, nn.Parameter):  # fake tensors have no storage to count
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def test_memory_is_flat_over_500_chunks():
    """An endless video with a window holds the same tensors at chunk 100 and at chunk 500."""
    pipeline = pixel_pipeline(steps=1, max_context_chunks=3, chunk_partition=(1, 2))
    held: dict[int, tuple[int, int]] = {}
    for i, frames in enumerate(stream(pipeline, "a fox", seed=0, endless=True)):
        if i in (100, 499):
            held[i] = tensor_bytes(), resident_bytes()
        if i == 499:
            assert torch.isfinite(frames).all()
            break
    assert held[499][0] == held[100][0]
    assert held[499][1] - held[100][1] < 8 * 2**20


NAMES = {
    "anyflow-far-wan2.1-1.3b": ("nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers", "AnyFlowFARStreamConfig"),
    "anyflow-far-wan2.1-14b": ("nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers", "AnyFlowFARStreamConfig"),
    "anyflow-wan2.1-t2v-1.3b": ("nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers", "AnyFlowBidirectionalStreamConfig"),
    "anyflow-wan2.1-t2v-14b": ("nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers", "AnyFlowBidirectionalStreamConfig"),
}


@pytest.mark.parametrize("name", NAMES)
def test_preset_is_one_printable_hashable_tree(name):
    config = preset(name)
    repository, kind = NAMES[name]
    text = str(config)
    assert config.name == name and f"transformer: {kind}:" in text
    assert text.count(f"path: {repository}") == 4  # transformer, text encoder, both halves of the VAE
    assert "scheduler: FlowMapEulerSchedulerConfig:" in text and "shift: 5.0" in text
    assert hash(config) == hash(PrintableConfig.from_dict(config.to_dict()))
    assert config.diffusion_model.transformer.height * 8 == 480 and config.diffusion_model.transformer.width * 8 == 832
    assert sum(config.diffusion_model.transformer.chunk_partition) == 21


def test_presets_are_the_four_released_checkpoints_and_the_demo():
    assert set(PRESETS) == {*NAMES, "anyflow-demo"}
    with pytest.raises(KeyError, match="unknown preset 'wan', expected one of anyflow-demo, anyflow-far"):
        preset("wan")


def test_preset_can_be_derived():
    config = derive_config(
        preset("anyflow-far-wan2.1-1.3b"), diffusion_model={"seed": 3, "transformer": {"path": "here"}}
    )
    assert config.diffusion_model.transformer.path == "here" and config.diffusion_model.seed == 3


def test_preset_builds_a_pipeline_from_a_directory(tmp_path):
    """The released layout: transformer, text_encoder, tokenizer and vae side by side."""
    pytest.importorskip("diffusers")
    from anyflow_runtime.streaming import released_pipeline
    from bench.tiny_pipeline import tiny_pipeline

    pipe = tiny_pipeline(heads=2, head_dim=24, layers=1, ffn_dim=64, text_dim=TEXT_DIM, vae_dim=4)
    pipe.save_pretrained(tmp_path)
    pipeline = released_pipeline("local", str(tmp_path), causal=True, steps=1, dtype=None).setup()
    assert isinstance(pipeline.diffusion_model.transformer, AnyFlowFARStream)
    frames = [*stream(pipeline, "a red fox", num_chunks=2, height=32, width=48, seed=0)]
    assert [tuple(f.shape) for f in frames] == [(1, 1, 3, 32, 48), (1, 12, 3, 32, 48)]
    assert all(torch.isfinite(f).all() for f in frames)


def test_streaming_package_imports_nothing_heavy():
    code = (
        "import sys, anyflow_runtime.streaming as s; s.PRESETS; s.stream; s.StreamInferencePipeline;"
        "print([m for m in ('diffusers', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_every_exported_name_exists():
    import anyflow_runtime.streaming as package

    assert all(getattr(package, name) is not None for name in package.__all__)


def test_the_runtime_lists_its_names_and_says_its_version():
    import anyflow_runtime

    assert dir(anyflow_runtime) == anyflow_runtime.__all__ and "Any" not in dir(anyflow_runtime)
    assert anyflow_runtime.__version__.count(".") >= 2
    assert anyflow_runtime.DiffusionModel.FinalState is anyflow_runtime.FinalState
