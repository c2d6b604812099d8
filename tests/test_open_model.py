"""`open_model`: every source gives the same pipeline, what contradicts it is refused, progress is told per step."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, accelerate, open_model, stream
from anyflow_runtime.streaming import (
    AnyFlowFARStream,
    AnyFlowFARStreamConfig,
    Decoded,
    Denoised,
    Step,
)

from .opened import PARTITION, SIZE, loaded, save_models, video

pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


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
    with pytest.raises(ValueError, match="offload: got it with a loaded source"):
        open_model(loaded(models, "far"), offload=True)


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


def test_what_contradicts_a_loaded_source_is_refused_before_it_is_touched(models):
    pipe = loaded(models, "bidirectional")
    kind = type(pipe.transformer)
    for settings, message in (
        ({"dtype": torch.bfloat16}, "dtype: got torch.bfloat16"),
        ({"match_diffusers_padding": True}, "match_diffusers_padding: got True with a bidirectional model"),
        ({"device": "cuda"}, "device: got cuda, expected cpu"),
    ):
        if "device" in settings and torch.cuda.is_available():
            continue
        with pytest.raises(ValueError, match=re.escape(message)):
            open_model(pipe, **settings)
    assert type(pipe.transformer) is kind


def test_a_schedule_that_is_not_said_is_that_of_diffusers(models, tmp_path):
    """Its class has shift 1; the released models say 5."""
    directory = tmp_path / "far"
    shutil.copytree(models / "far", directory)
    file = directory / "scheduler" / "scheduler_config.json"
    file.write_text('{"_class_name": "FlowMapEulerDiscreteScheduler"}')
    assert open_model(directory, device="cpu", text=False).config.diffusion_model.scheduler.shift == 1.0
    file.write_text('{"shift": null}')
    with pytest.raises(ValueError, match=r"scheduler_config\.json: shift: got None, expected a number above 0"):
        open_model(directory, device="cpu", text=False)


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_pickled_weights_are_refused(component, models, tmp_path):
    directory = tmp_path / "far"
    shutil.copytree(models / "far", directory)
    [file] = (directory / component).glob("*.safetensors")
    name = {"vae": "diffusion_pytorch_model.bin", "text_encoder": "pytorch_model.bin"}[component]
    torch.save(load_file(file), directory / component / name)
    file.unlink()
    with pytest.raises((ValueError, FileNotFoundError), match="does not load"):
        open_model(directory, device="cpu")


def test_a_predict_flow_of_ones_own_is_used(models):
    """The fused step must not go round a subclass that predicts in another way."""

    class Mine(AnyFlowFARStream):
        calls = 0

        def predict_flow(self, *arguments: Any, **keywords: Any) -> Tensor:
            self.calls += 1
            return super().predict_flow(*arguments, **keywords)

    pipeline: Any = open_model(models / "far", device="cpu", steps=2)
    expected = video(pipeline)
    theirs = pipeline.diffusion_model.transformer
    config = AnyFlowFARStreamConfig()
    pipeline.diffusion_model.transformer = mine = Mine(config, theirs.model, theirs.context_encoder)
    torch.testing.assert_close(video(pipeline), expected, rtol=1e-5, atol=1e-5)
    assert mine.calls == 2 * len(PARTITION)


def test_after_the_only_chunk_a_change_ends_a_bidirectional_video(models):
    """Nothing is left that it could change: the generator is at its end, as after the last chunk of a causal one."""
    for name, chunks in (("bidirectional", 1), ("far", 2)):
        pipeline = open_model(models / name, device="cpu", steps=1)
        partition = (1, 1) if chunks == 2 else (2,)
        made = stream(pipeline, "a cat", chunk_partition=partition, height=32, width=48, seed=0)
        for _ in range(chunks):
            next(made)
        with pytest.raises(StopIteration):
            made.send("a dog")
