"""`open_model`: every source gives the same pipeline; offloading moves what has no turn; progress is told per step."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, accelerate, open_model, stream
from anyflow_runtime.models.base import AnyFlowModel
from anyflow_runtime.streaming import Decoded, Denoised, Step, video_noise
from anyflow_runtime.streaming.offload import OnTurn, Turns
from bench.tiny_pipeline import tiny_pipeline

diffusers = pytest.importorskip("diffusers")
PARTITION, SIZE = (1, 2, 1), {"height": 32, "width": 48}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, causal in (("far", True), ("bidirectional", False)):
        tiny_pipeline(causal, heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4).save_pretrained(root / name)
    return root


def partition(name: str) -> tuple[int, ...]:
    return PARTITION if name == "far" else (sum(PARTITION),)


def video(pipeline: Any, name: str = "far", prompt: Any = "a cat", **settings: Any) -> Tensor:
    """(1, T, 3, H, W) of one video, or (1, F, C, h, w) without a decoder."""
    size = SIZE if pipeline.decoder is not None else {side: pixels // 8 for side, pixels in SIZE.items()}
    noise = video_noise(pipeline, sum(PARTITION), **size, seed=7)
    chunks = partition(name)
    return torch.cat([*stream(pipeline, prompt, noise=noise, chunk_partition=chunks, **size, **settings)], dim=1)


def loaded(models: Path, name: str) -> Any:
    pipe = getattr(diffusers, "AnyFlowFARPipeline" if name == "far" else "AnyFlowPipeline").from_pretrained(
        models / name
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", ["far", "bidirectional"])
def test_a_directory_and_a_loaded_pipeline_give_the_same_video(name, models):
    from_directory = open_model(models / name, device="cpu", steps=2)
    pipe = loaded(models, name)
    from_pipe = open_model(pipe, steps=2)
    weight = pipe.transformer.blocks[0].ffn.net[2].weight
    assert from_pipe.diffusion_model.transformer.model.blocks[0].ffn.net[2].weight is weight  # shared, not copied
    torch.testing.assert_close(video(from_directory, name), video(from_pipe, name), rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"dtype: got torch\.bfloat16 for a source of torch\.float32"):
        open_model(pipe, dtype=torch.bfloat16)


@pytest.mark.parametrize("name", ["far", "bidirectional"])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_latents_are_those_of_diffusers_for_a_seed(guidance, name, models):
    """Witness: the pipeline of diffusers, accelerated; the same noise, schedule, guidance and text encoder."""
    pipe = accelerate(loaded(models, name))
    call = {"chunk_partition": list(PARTITION)} if name == "far" else {}
    expected = pipe(
        "a cat",
        negative_prompt="blurry" if guidance > 1 else None,
        num_frames=13,
        num_inference_steps=2,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **SIZE,
        **call,
    ).frames
    pipeline = open_model(models / name, device="cpu", steps=2, decode=False)
    settings = {"guidance_scale": guidance, "negative_prompt": "blurry"} if guidance > 1 else {}
    torch.testing.assert_close(video(pipeline, name, **settings).transpose(1, 2), expected, rtol=2e-5, atol=2e-5)


def test_a_transformer_alone_makes_latents_of_embeddings(models):
    model = AnyFlowFARTransformer3DModel.from_pretrained(models / "far", subfolder="transformer")
    pipeline = open_model(model, steps=1)
    assert pipeline.decoder is None
    latents = video(pipeline, prompt=torch.zeros(1, 4, 16))
    assert latents.shape == (1, 4, 16, 4, 6)
    with pytest.raises(ValueError, match="prompt: got one, but there is no context_encoder"):
        video(pipeline)


@pytest.mark.parametrize("source", ["demo", "anyflow-demo"])
def test_the_demo_opens_by_its_names(source):
    pipeline = open_model(source, device="cpu", steps=1)
    frames = [*stream(pipeline, "a red circle moves right over black", seed=0)]
    assert [part.shape[1] for part in frames] == [1, 2, 2, 2] and frames[0].shape[2:] == (3, 16, 16)


def test_a_preset_that_is_nowhere_names_the_repository(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises((FileNotFoundError, ValueError), match="nvidia/AnyFlow-FAR"):
        open_model("anyflow-far-wan2.1-1.3b", device="cpu", text=False)


def test_sources_that_cannot_be_are_named(models, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"model: no directory {tmp_path / 'nowhere'}"):
        open_model(tmp_path / "nowhere")
    with pytest.raises(TypeError, match="pipe: got int"):
        open_model(7)
    with pytest.raises(ValueError, match="offload: got True with a loaded source"):
        open_model(loaded(models, "far"), offload=True)


@pytest.mark.parametrize("begins", ["text", "image", "embeddings"])
def test_offloading_gives_each_part_its_turn_and_the_same_video(begins, models, monkeypatch):
    """cpu:0 stands in for the GPU: what is moved there, and back to the CPU, in order."""
    settings: dict[str, Any] = {}
    if begins == "image":
        torch.manual_seed(0)
        settings["context_video"] = torch.rand(1, 1, 3, 32, 48)
    text = begins != "embeddings"
    prompt = "a cat" if text else torch.zeros(1, 4, 16)
    expected = video(open_model(models / "far", device="cpu", steps=1, text=text), prompt=prompt, **settings)
    pipeline: Any = open_model(models / "far", device="cpu:0", steps=1, text=text, offload=True)
    transformer = pipeline.diffusion_model.transformer
    assert isinstance(transformer.context_encoder, OnTurn) == text
    moves: list[str] = []
    to = torch.nn.Module.to

    def watched(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> torch.nn.Module:
        if isinstance(module, AnyFlowModel) or type(module).__name__ in ("UMT5TextEncoder", "WanVAEEncoder"):
            moves.append(f"{type(module).__name__} {arguments[0]}")
        return to(module, *arguments, **keywords)

    monkeypatch.setattr(torch.nn.Module, "to", watched)
    torch.testing.assert_close(video(pipeline, prompt=prompt, **settings), expected, rtol=0, atol=0)
    model = "AnyFlowFARTransformer3DModel"
    turn = {
        "text": ["UMT5TextEncoder cpu:0", "UMT5TextEncoder cpu"],
        "image": ["WanVAEEncoder cpu:0", "WanVAEEncoder cpu", "UMT5TextEncoder cpu:0", "UMT5TextEncoder cpu"],
        "embeddings": [],
    }[begins]
    assert moves == [*turn, f"{model} cpu:0"]
    moves.clear()
    video(pipeline, prompt=prompt, guidance_scale=2.0, negative_prompt=prompt)  # both prompts in one turn
    if text:
        both = ["UMT5TextEncoder cpu:0", "UMT5TextEncoder cpu"]
        assert moves == [f"{model} cpu", *both, *both, f"{model} cpu:0"]
    else:
        assert moves == []


def test_what_has_no_turn_lies_on_the_cpu():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    turns = Turns(torch.device("meta"), [a])
    turns.settle()
    assert a.weight.is_meta
    a.to_empty(device="cpu")
    turns = Turns(torch.device("cpu"), [a])
    with turns.lend(copy.deepcopy(b)) as device:
        assert device == torch.device("cpu")


def test_every_step_and_chunk_is_told(models):
    """Progress per denoising step; a chunk's latents come before its frames, which those are decoded from."""
    told: list[Any] = []
    pipeline = open_model(models / "far", device="cpu", steps=2)
    frames = video(pipeline, on_event=told.append)
    names = [(type(event).__name__, event.index) for event in told]
    chunk = ["Step", "Step", "Denoised", "Decoded"]
    assert names == [(name, index) for index in range(3) for name in chunk]
    assert [event.number for event in told if isinstance(event, Step)] == [1, 2] * 3
    latents = torch.cat([event.latents for event in told if isinstance(event, Denoised)], dim=1)
    assert latents.shape == (1, 4, 16, 4, 6) and frames.shape == (1, 13, 3, 32, 48)
    assert all(event.seconds > 0 for event in told if isinstance(event, (Denoised, Decoded)))


def test_a_model_of_ours_keeps_its_settings(models):
    pipe = accelerate(loaded(models, "far"), match_diffusers_padding=True, backend="reference", cuda_graphs=False)
    model = open_model(pipe).diffusion_model.transformer.model
    assert (model.phantom_padding, model.ops.backend, model.cuda_graphs) == (True, "reference", False)
    open_model(pipe, backend="torch", match_diffusers_padding=False)
    assert (model.phantom_padding, model.ops.backend, model.cuda_graphs) == (False, "torch", False)
