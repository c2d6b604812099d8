"""Samples of the student on schedule: latents, decoded videos, and the demo's GIF."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.training import BidirectionalVelocity, GlobalBatch, far_rollout, rollout
from anyflow_runtime.training.data.open import open_source
from anyflow_runtime.training.trainer.trainer import train
from anyflow_runtime.video_io import read_video
from anyflow_runtime.wan_vae import WanVAEStreamDecoderConfig

from .trainer_runs import FAR, FAR_ONLY, tiny, write_shards, write_video_model

SEGMENTS = {1: [(1.0, 0.0)], 2: [(1.0, 5 / 6), (5 / 6, 0.0)]}  # shift 5


def run(kind: str, directory: Path, **changes):
    """A config of two steps on the shards in `directory`, with samples after the second."""
    config = tiny(FAR, data={"path": str(directory)}, sample_every=2, **changes)
    if kind == "far":
        return config
    plain = {key: value for key, value in config.model.config.items() if key not in FAR_ONLY}
    return replace(
        config, pretrain=replace(config.pretrain, far=None), model=replace(config.model, kind=kind, config=plain)
    )


@pytest.mark.parametrize("objective", ["flow_map", "flow_matching"])
@pytest.mark.parametrize("kind", ["far", "bidirectional"])
def test_samples_are_rollouts_of_the_average_from_fixed_noise(kind, objective, tmp_path) -> None:
    """For the prompts of the first batch; a flow-matching student takes Euler steps, r = t."""
    write_shards(tmp_path)
    phases = [{"objective": objective, "iterations": 2, "lr": 0.01}]
    config = run(kind, tmp_path, phases=phases)
    train(config, tmp_path / "run", io.StringIO())
    samples = load_file(tmp_path / "run" / "samples" / "step-00000002.safetensors")
    assert {name: tensor.shape for name, tensor in samples.items()} == dict.fromkeys(
        (f"steps-{n}" for n in (1, 2, 4, 8)), torch.Size([2, 3, 3, 8, 8])
    )
    first = open_source(config.data, config.seed).samples(0, GlobalBatch(2))
    assert (tmp_path / "run" / "samples" / "samples.txt").read_text() == "\n".join(first.names) + "\n"
    noise = torch.randn(2, 3, 3, 8, 8, generator=torch.Generator().manual_seed(config.seed))
    plain_times = objective == "flow_matching"
    model_class = AnyFlowFARTransformer3DModel if kind == "far" else AnyFlowTransformer3DModel
    model = model_class.from_pretrained(tmp_path / "run" / "model" / "transformer")
    for steps, segments in SEGMENTS.items():
        with torch.no_grad():
            if kind == "far":
                expected = far_rollout(model, noise, first.text, (1, 1, 1), segments, single_time=plain_times)
            else:
                velocity = BidirectionalVelocity(model, single_time=plain_times)
                expected = rollout(velocity, noise, first.text, segments)
        torch.testing.assert_close(samples[f"steps-{steps}"], expected, rtol=1e-4, atol=1e-5)


def test_sampling_leaves_the_training_as_it_is(tmp_path) -> None:
    write_shards(tmp_path)
    weights = []
    for every in (1, None):
        config = replace(run("far", tmp_path), sample_every=every)
        train(config, tmp_path / str(every), io.StringIO())
        weights.append(load_file(tmp_path / str(every) / "model/transformer/diffusion_pytorch_model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_samples_are_decoded_where_there_is_a_vae(tmp_path) -> None:
    """A row for each of two prompts, a column for each of four numbers of steps: frames of 2 * 64 x 4 * 64 pixels."""
    pytest.importorskip("diffusers")
    write_video_model(tmp_path / "model")
    write_shards(tmp_path)
    train(run("far", tmp_path), tmp_path / "latents", io.StringIO())
    train(run("far", tmp_path, sample_vae=str(tmp_path / "model")), tmp_path / "run", io.StringIO())
    video = read_video(tmp_path / "run" / "samples" / "step-00000002.mp4")
    assert video.shape == (9, 3, 128, 256)
    latents = load_file(tmp_path / "latents" / "samples" / "step-00000002.safetensors")["steps-8"][1]
    expected = WanVAEStreamDecoderConfig(path=str(tmp_path / "model")).setup()(latents)

    def brightness(frames: torch.Tensor) -> torch.Tensor:  # H.264 keeps a quarter of the colours of what is noise
        return torch.einsum("tchw,c->thw", frames.clamp(-1, 1), torch.tensor([0.2126, 0.7152, 0.0722])).flatten()

    tiles = [video[..., rows, 192:] * 2 - 1 for rows in (slice(64, None), slice(None, 64))]
    decoded, right, wrong = (brightness(frames) for frames in (expected, *tiles))
    likeness = torch.corrcoef(torch.stack([decoded, right, wrong]))[0]
    assert likeness[1] > 0.95 and likeness[2] < 0.75
    assert right.std() / decoded.std() == pytest.approx(1, abs=0.1) and (right - decoded).mean().abs() < 0.02
    assert not (tmp_path / "run" / "samples" / "step-00000002.safetensors").exists()


def test_a_vae_that_does_not_fit_is_refused_before_training(tmp_path) -> None:
    write_shards(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"sample_vae: no .*config\.json"):
        train(run("far", tmp_path, sample_vae=str(tmp_path)), tmp_path / "run", io.StringIO())
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text(json.dumps({"z_dim": 16}))
    with pytest.raises(ValueError, match="has z_dim 16, expected 3 as the latents"):
        train(run("far", tmp_path, sample_vae=str(tmp_path)), tmp_path / "run", io.StringIO())
    assert not (tmp_path / "run").exists()


def test_samples_of_the_demo_and_loss_curves_are_drawn(tmp_path) -> None:
    phases = [{"objective": "flow_matching", "iterations": 2, "lr": 0.002}]
    train(tiny(phases=phases, sample_every=2, plot=True), tmp_path, io.StringIO())
    with Image.open(tmp_path / "samples" / "step-00000002.gif") as video:
        assert video.n_frames == 3 and video.size == (4 * 8 * 4, 6 * 8 * 4)
    with Image.open(tmp_path / "loss.png") as plot:
        assert plot.size == (960, 540)
