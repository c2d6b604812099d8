"""Offloading: each part has its turn on the device, the video is the same, and nothing computes with what has left.

The CPU stands in for the GPU: weights that have left it are NaN there.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import open_model, stream
from anyflow_runtime.models.base import AnyFlowModel
from anyflow_runtime.streaming import Change
from anyflow_runtime.streaming.offload import OnTurn, Turns
from bench.tiny_pipeline import tiny_pipeline

from .opened import save_models, video

pytest.importorskip("diffusers")
CpuOffload = pytest.importorskip("accelerate.hooks").CpuOffload
SIZE = {"height": 32, "width": 48, "seed": 1, "num_chunks": 4}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


def offloaded(models: Path) -> Any:
    """A pipeline whose residents are NaN while they are away."""
    pipeline: Any = open_model(models / "far", device="cpu:0", steps=1, offload=True)
    turns, kept = pipeline.diffusion_model.transformer.turns, {}

    def move(device: torch.device) -> None:
        for parameter in (p for module in turns._residents for p in module.parameters()):
            if device == torch.device("cpu"):
                kept[id(parameter)] = parameter.data
                parameter.data = torch.full_like(parameter.data, torch.nan)
            elif id(parameter) in kept:
                parameter.data = kept.pop(id(parameter))

    turns._move = move
    return pipeline


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
    both = ["UMT5TextEncoder cpu:0", "UMT5TextEncoder cpu"]
    assert moves == ([f"{model} cpu", *both, f"{model} cpu:0"] if text else [])


@pytest.mark.parametrize("overlap", [False, True])
def test_a_changed_prompt_waits_for_what_is_being_decoded(overlap, models):
    pipeline = offloaded(models)
    decode, encode = pipeline.decoder.forward, pipeline.diffusion_model.transformer.context_encoder.module.forward

    def slow(*arguments: Any, **keywords: Any) -> Tensor:
        time.sleep(0.05)  # longer than the host needs to come to the next prompt
        return decode(*arguments, **keywords)

    def long(*arguments: Any) -> Tensor:
        time.sleep(0.1)
        return encode(*arguments)

    pipeline.decoder.forward = slow
    pipeline.diffusion_model.transformer.context_encoder.module.forward = long
    frames = stream(pipeline, "a", overlap=overlap, **SIZE)
    made = [next(frames), *(frames.send(prompt) for prompt in "bcd")]
    assert all(part.isfinite().all() for part in made)


def test_a_prompt_that_fails_leaves_other_rollouts_their_model(models):
    pipeline = offloaded(models)
    frames = stream(pipeline, "a", **SIZE)
    next(frames)
    with pytest.raises(TypeError):
        stream(pipeline, ["x", 3], **SIZE)
    assert next(frames).isfinite().all()
    with pytest.raises(ValueError, match="context_latents"):
        stream(pipeline, "b", context_video=torch.rand(1, 1, 3, 64, 48), **SIZE)
    assert next(frames).isfinite().all()


def test_another_guidance_alone_encodes_nothing_anew(models):
    pipeline = offloaded(models)
    encoder = pipeline.diffusion_model.transformer.context_encoder.module
    frames = stream(pipeline, "a", guidance_scale=2.0, **SIZE)
    next(frames)
    encoder.forward = None  # must not be called
    assert frames.send(Change(guidance_scale=3.0)).isfinite().all()


def test_a_guest_that_does_not_fit_leaves_nothing_behind():
    """Out of memory while it is fetched: what has come goes back."""

    class Fails(torch.nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.moves: list[str] = []

        def to(self, *arguments: Any, **keywords: Any) -> Any:
            self.moves.append(str(arguments[0]))
            if len(self.moves) == 1:
                raise torch.OutOfMemoryError("simulated")
            return self

    guest, turns = Fails(), Turns(torch.device("cpu", 0), [])
    with pytest.raises(torch.OutOfMemoryError), turns.lend(guest):
        raise AssertionError("it has no turn")
    assert guest.moves == ["cpu:0", "cpu"]


def test_a_pipeline_that_offloads_itself_can_be_streamed_before_and_after_use(monkeypatch):
    """accelerate's hooks bring the transformer before its cache is made, also when the pipe has taken it away."""
    pipe = tiny_pipeline(heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4)
    pipe.enable_model_cpu_offload(device="cpu")
    pipeline = open_model(pipe, steps=1)
    brought: list[str] = []
    bring = CpuOffload.pre_forward

    def watched(hook: Any, module: torch.nn.Module, *arguments: Any, **keywords: Any) -> Any:
        brought.append(type(module).__name__)
        return bring(hook, module, *arguments, **keywords)

    monkeypatch.setattr(CpuOffload, "pre_forward", watched)
    initialize = pipeline.diffusion_model.transformer.make_condition

    def made(*arguments: Any, **keywords: Any) -> Any:
        condition = initialize(*arguments, **keywords)
        assert brought[-1] == "AnyFlowFARTransformer3DModel"  # the cache is made next
        return condition

    monkeypatch.setattr(pipeline.diffusion_model.transformer, "make_condition", made)
    for _ in range(2):
        brought.clear()
        assert torch.cat([*stream(pipeline, "a", **SIZE)], dim=1).isfinite().all()
        pipe("a", height=32, width=48, num_frames=13, num_inference_steps=1, chunk_partition=[1, 3])


def test_sequential_offload_is_refused_by_name():
    pipe = tiny_pipeline(heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(ValueError, match="source: got weights under sequential offload"):
        open_model(pipe)
