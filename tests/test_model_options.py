"""What the pipelines of diffusers have, in `open_model`, `stream` and `generate`: LoRA, group offload, quantised
checkpoints, VAE tiles. Witness: diffusers' own pipeline of the same files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers import AnyFlowFARPipeline

from anyflow_runtime import accelerate, open_model
from anyflow_runtime.cli import main
from anyflow_runtime.models import AnyFlowModel
from anyflow_runtime.streaming import Change, stream, video_noise
from bench.tiny_pipeline import tiny_pipeline

from .group_offload import poison_offloaded
from .parity import FP32_TOLERANCE, relative_error
from .test_accelerate import lora_state

CHUNKS = (1, 2, 1)
SIZE = {"height": 32, "width": 48}
LATENT = {"height": 4, "width": 6}  # what `stream` takes without a decoder


@pytest.fixture(scope="module")
def far(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with two adapters beside it."""
    root = tmp_path_factory.mktemp("far")
    pipe = tiny_pipeline(True, heads=2, head_dim=16, layers=2, text_dim=16, vae_dim=4)
    pipe.save_pretrained(root / "model")
    for name, seed in (("ink", 0), ("fog", 1)):
        save_file(lora_state(pipe, seed), root / f"{name}.safetensors")
    return root


def streamed(pipeline: Any, *changes: Change | None) -> list[torch.Tensor]:
    noise = video_noise(pipeline, sum(CHUNKS), **LATENT, seed=3)
    video = stream(pipeline, "a cat", chunk_partition=CHUNKS, noise=noise, **LATENT)
    return [next(video), *(video.send(change) for change in changes or (None, None))]


def diffusers_latents(far: Path, weights: dict[str, float]) -> torch.Tensor:
    pipe = AnyFlowFARPipeline.from_pretrained(far / "model")
    for name in weights:
        pipe.load_lora_weights(str(far / f"{name}.safetensors"), adapter_name=name)
    if weights:
        pipe.set_adapters(list(weights), list(weights.values()))
    accelerate(pipe)
    call = {"num_inference_steps": 1, "chunk_partition": list(CHUNKS), "num_frames": 13, "output_type": "latent"}
    generator = torch.Generator().manual_seed(3)
    return pipe("a cat", generator=generator, **call, **SIZE).frames


def opened(far: Path, **options: Any) -> Any:
    return open_model(far / "model", device="cpu", steps=1, decode=False, **options)


@pytest.mark.parametrize("fuse", [False, True], ids=["adapters", "fused"])
def test_several_adapters_as_in_diffusers(far: Path, fuse: bool) -> None:
    weights = {"ink": 0.7, "fog": 0.4}
    files = {name: far / f"{name}.safetensors" for name in weights}
    pipeline = opened(far, lora=files, lora_weights=weights, fuse_lora=fuse)
    latents = torch.cat(streamed(pipeline), dim=1)
    want = diffusers_latents(far, weights).transpose(1, 2)
    assert relative_error(latents, want.reshape_as(latents)) < FP32_TOLERANCE
    assert relative_error(latents, torch.cat(streamed(opened(far)), dim=1)) > 1e-3
    assert bool(getattr(pipeline.diffusion_model.transformer.model, "peft_config", {})) is not fuse


def test_adapters_switch_between_chunks(far: Path) -> None:
    """What follows is what the new weights make of the same context: nothing that the old ones encoded is kept."""
    files = {name: far / f"{name}.safetensors" for name in ("ink", "fog")}
    pipeline = opened(far, lora=files, lora_weights={"ink": 1.0})
    switched = streamed(pipeline, Change(lora={"fog": 0.5}), None)
    other = opened(far, lora=files, lora_weights={"fog": 0.5})
    noise = video_noise(other, sum(CHUNKS), **LATENT, seed=3)
    fresh = [*stream(other, "a cat", chunk_partition=CHUNKS, noise=noise, context_latents=switched[0], **LATENT)]
    torch.testing.assert_close(switched[1:], fresh[1:])
    kept = streamed(opened(far, lora=files, lora_weights={"ink": 1.0}))
    assert torch.equal(switched[0], kept[0]) and not torch.allclose(switched[1], kept[1])


def test_an_adapter_that_is_not_there_leaves_the_video_running(far: Path) -> None:
    pipeline = opened(far, lora={"ink": far / "ink.safetensors"})
    video = stream(pipeline, "a cat", chunk_partition=CHUNKS, seed=3, **LATENT)
    next(video)
    with pytest.raises(ValueError, match="lora: got rain, expected some of ink"):
        video.send(Change(lora={"rain": 1.0}))
    assert len([*video]) == 2


@pytest.mark.parametrize("name", ["nowhere.safetensors", "text.safetensors", "foreign.safetensors"])
def test_a_file_that_is_no_lora_of_the_model_is_named(far: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "text.safetensors").write_text("no tensors")
    save_file({"transformer.else.lora_A.weight": torch.zeros(2, 2)}, tmp_path / "foreign.safetensors")
    with pytest.raises((FileNotFoundError, ValueError), match=f"lora: .*{name}"):
        opened(far, lora={"x": tmp_path / name})


def test_group_offload_streams_the_blocks(far: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU stands for the GPU: weights that are away are NaN."""
    want = streamed(opened(far))
    groups = poison_offloaded(monkeypatch)
    made = streamed(opened(far, offload="group"))
    torch.testing.assert_close(made, want)
    assert len(set(groups)) == 3  # two blocks, and the rest


def test_a_quantised_checkpoint_is_read_as_diffusers_reads_it(far: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    from diffusers import AnyFlowFARTransformer3DModel, TorchAoConfig
    from torchao.quantization import Int8WeightOnlyConfig

    pipe = AnyFlowFARPipeline.from_pretrained(far / "model")
    config = TorchAoConfig(Int8WeightOnlyConfig())
    pipe.transformer = AnyFlowFARTransformer3DModel.from_pretrained(
        far / "model", subfolder="transformer", quantization_config=config
    )
    pipe.save_pretrained(tmp_path / "int8", safe_serialization=False)
    pipeline = open_model(tmp_path / "int8", device="cpu", steps=1, decode=False)
    weight = pipeline.diffusion_model.transformer.model.blocks[0].attn1.to_q.weight
    assert type(weight) is not torch.nn.Parameter
    plain = torch.cat(streamed(opened(far)), dim=1)
    assert 1e-5 < relative_error(torch.cat(streamed(pipeline), dim=1), plain) < 0.2


def test_vae_tiles_are_those_asked_for(far: Path) -> None:
    decoder: Any = open_model(far / "model", device="cpu", steps=1, vae_tile_size=64).decoder
    assert (decoder.config.tile_size, decoder.config.tile_stride) == (64, 48)
    with pytest.raises(ValueError, match="vae_tile_size: got 64 for a model without a VAE"):
        open_model("demo", device="cpu", vae_tile_size=64)


def test_generate_takes_adapters(far: Path, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video = ["--size", "32x48", "--chunks", "1,2,1", "--seed", "3"]
    command = ["generate", "a cat", "--model", str(far / "model"), *video]
    lora = ["--lora", f"{far / 'ink.safetensors'}=0.7", "--lora", f"{far / 'fog.safetensors'}=0.4", "--steps", "1"]
    saved = tmp_path / "l.safetensors"
    output = ["--out", str(tmp_path / "o.mp4"), "--save-latents", str(saved), "--device", "cpu"]
    assert main([*command, *lora, *output]) == 0
    weights = {"ink": 0.7, "fog": 0.4}
    files = {name: far / f"{name}.safetensors" for name in weights}
    want = torch.cat(streamed(opened(far, lora=files, lora_weights=weights)), dim=1).transpose(1, 2)
    torch.testing.assert_close(load_file(saved)["latents"], want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lora", "x=y"], "argument --lora: got 'x=y', expected FILE or FILE=WEIGHT with a number"),
        (["--lora", "nowhere.safetensors"], "--lora: no file nowhere.safetensors"),
        (["--lora", "a/x.safetensors", "--lora", "b/x.safetensors"], "--lora: got x, x, expected files of different"),
        (["--fuse-lora"], "--fuse-lora: got without --lora"),
        (["--offload", "group"], "--offload: got with --device cpu"),
        (["--offload", "layers"], "argument --offload: invalid choice: 'layers'"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_refused(far: Path, tmp_path: Path, capfd: Any, options: Any, message: str) -> None:
    command = ["generate", "a cat", "--model", str(far / "model"), "--device", "cpu", "--out", str(tmp_path / "o.gif")]
    assert main([*command, "--size", "32x48", "--chunks", "1,2", *options]) == 2
    error = capfd.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not (tmp_path / "o.gif").exists()


def test_a_loaded_source_keeps_its_own_adapters(far: Path) -> None:
    pipe = AnyFlowFARPipeline.from_pretrained(far / "model")
    with pytest.raises(ValueError, match="lora: got it with a loaded source"):
        open_model(pipe, lora={"ink": far / "ink.safetensors"})
    assert not isinstance(pipe.transformer, AnyFlowModel)
