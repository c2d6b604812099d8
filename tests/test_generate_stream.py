"""`anyflow generate` with a causal model: every chunk is in the file before the next is begun, and is not lost."""

from __future__ import annotations

import errno
import json
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_runtime.cli import main
from anyflow_runtime.streaming import StreamInferencePipeline
from anyflow_runtime.video_io import VideoWriter, read_video
from anyflow_runtime.wan_vae import WanVAEStreamDecoder

pytest.importorskip("diffusers")
pytest.importorskip("av")

from bench.tiny_pipeline import tiny_pipeline

VIDEO = ["a cat", "--size", "32x48", "--chunks", "1,2,1,1", "--steps", "1", "--seed", "7", "--device", "cpu"]
FRAMES = [1, 8, 4, 4]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a causal and a bidirectional model."""
    root = tmp_path_factory.mktemp("models")
    for name, causal in (("far", True), ("bidirectional", False)):
        tiny_pipeline(causal, heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4).save_pretrained(root / name)
    return root


def generate(models: Path, out: Path, *arguments: str) -> int:
    extra = ["--save-latents", str(out.with_suffix(".safetensors")), "--stats", str(out.with_suffix(".json"))]
    return main(["generate", "--model", str(models / "far"), "--out", str(out), *VIDEO, *extra, *arguments])


def watch_decoding(monkeypatch: pytest.MonkeyPatch, before: Callable[[int], None]) -> None:
    """Call `before` with the index of every chunk that is about to be decoded."""
    decode = WanVAEStreamDecoder.forward

    def watched(self: Any, input: torch.Tensor, autoregressive_index: int = 0, cache: Any = None) -> torch.Tensor:
        before(autoregressive_index)
        return decode(self, input, autoregressive_index, cache)

    monkeypatch.setattr(WanVAEStreamDecoder, "forward", watched)


def watch_denoising(monkeypatch: pytest.MonkeyPatch, after: Callable[[int, torch.Tensor], None]) -> None:
    """Call `after` with index and latents of every chunk, once these have been handed over."""
    denoise = StreamInferencePipeline.denoise

    def watched(self: Any, index: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
        latents = denoise(self, index, *arguments, **keywords)
        after(index, latents)
        return latents

    monkeypatch.setattr(StreamInferencePipeline, "denoise", watched)


def fail_at(monkeypatch: pytest.MonkeyPatch, index: int, error: BaseException) -> None:
    """Make the decoding of one chunk raise."""

    def failing(chunk: int) -> None:
        if chunk == index:
            raise error

    watch_decoding(monkeypatch, failing)


def test_a_chunk_is_written_before_the_next_is_denoised(models, tmp_path, monkeypatch):
    events: list[str] = []
    write = VideoWriter.write

    def traced_write(self: VideoWriter, frames: torch.Tensor) -> None:
        write(self, frames)
        events.append(f"wrote {len(frames)}")

    watch_denoising(monkeypatch, lambda index, latents: events.append(f"denoised {latents.shape[1]}"))
    monkeypatch.setattr(VideoWriter, "write", traced_write)
    assert generate(models, tmp_path / "o.mp4") == 0
    expected = [
        f"{what} {n}"
        for pair in zip([1, 2, 1, 1], FRAMES, strict=True)
        for what, n in zip(("denoised", "wrote"), pair, strict=True)
    ]
    assert events == expected


def test_the_file_can_be_played_while_it_is_made(models, tmp_path, monkeypatch):
    """At one frame a second every frame is a fragment of its own, but for those that wait in the encoder."""
    playable: list[int] = []

    def watched(index: int) -> None:
        if index == 3:
            playable.append(len(read_video(tmp_path / "o.partial.mp4")))

    watch_decoding(monkeypatch, watched)
    assert generate(models, tmp_path / "o.mp4", "--fps", "1") == 0
    assert 6 <= playable[0] <= 13
    assert not (tmp_path / "o.partial.mp4").exists()


@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_ctrl_c_leaves_the_finished_chunks(overlap, models, tmp_path, monkeypatch, capfd):
    """Video, latents and stats, each as those of the whole video begin."""
    assert generate(models, tmp_path / "whole.mp4") == 0
    fail_at(monkeypatch, 2, KeyboardInterrupt())
    assert generate(models, tmp_path / "cut.mp4", overlap) == 130
    assert "stopped after chunk 1, 9 generated frames" in capfd.readouterr().out
    cut, whole = read_video(tmp_path / "cut.mp4"), read_video(tmp_path / "whole.mp4")
    assert len(whole) == 17 and len(cut) == 9
    # The encoder looks ahead, so the bits it spends on a frame depend on what follows.
    assert float((cut - whole[:9]).abs().mean()) < 0.02
    stats = json.loads((tmp_path / "cut.json").read_text())
    assert not stats["complete"] and [chunk["chunk"] for chunk in stats["chunks"]] == [0, 1]
    finished = load_file(tmp_path / "cut.safetensors")["latents"]
    assert finished.shape[2] == (5 if overlap == "--overlap" else 4)  # what was denoised, but not decoded, included
    assert torch.equal(finished, load_file(tmp_path / "whole.safetensors")["latents"][:, :, : finished.shape[2]])


def test_ctrl_c_while_denoising_still_writes_what_is_being_decoded(models, tmp_path, monkeypatch, capfd):
    def interrupted(index: int, latents: torch.Tensor) -> None:
        if index == 2:
            raise KeyboardInterrupt

    watch_denoising(monkeypatch, interrupted)
    assert generate(models, tmp_path / "o.mp4", "--overlap") == 130
    assert "stopped after chunk 1, 9 generated frames" in capfd.readouterr().out
    assert len(read_video(tmp_path / "o.mp4")) == 9


def test_overlap_decodes_beside_denoising_and_makes_the_same_file(models, tmp_path, monkeypatch):
    """From the second on a chunk is decoded only once the next one is denoised; latents and frames stay the same."""
    pixels: list[torch.Tensor] = []
    write = VideoWriter.write

    def kept(self: VideoWriter, frames: torch.Tensor) -> None:
        pixels.append(frames.clone())
        write(self, frames)

    monkeypatch.setattr(VideoWriter, "write", kept)
    assert generate(models, tmp_path / "a.mp4") == 0
    denoised = [threading.Event() for _ in FRAMES]
    watch_denoising(monkeypatch, lambda index, latents: denoised[index].set())

    def watched(index: int) -> None:
        assert index == 0 or denoised[min(index + 1, len(FRAMES) - 1)].wait(20)

    watch_decoding(monkeypatch, watched)
    assert generate(models, tmp_path / "b.mp4", "--overlap") == 0
    a, b = (load_file(tmp_path / f"{name}.safetensors")["latents"] for name in "ab")
    assert torch.equal(a, b) and len(read_video(tmp_path / "b.mp4")) == sum(FRAMES)
    # Not to the bit: how a convolution is cut up depends on where its memory lies.
    for alone, beside in zip(pixels[: len(FRAMES)], pixels[len(FRAMES) :], strict=True):
        assert torch.allclose(alone, beside, atol=1e-4)
    stats = json.loads((tmp_path / "b.json").read_text())
    assert stats["settings"]["overlap"] and [chunk["frames"] for chunk in stats["chunks"]] == FRAMES
    parts = [chunk["decode_seconds"] for chunk in stats["chunks"]]
    assert min(parts) > 0 and abs(sum(parts) - stats["seconds"]["decode"]) < 1e-6


@pytest.mark.parametrize("overlap", ["--no-overlap", "--overlap"])
def test_an_error_in_decoding_names_the_chunk(overlap, models, tmp_path, monkeypatch, capfd):
    fail_at(monkeypatch, 2, RuntimeError("out of ideas"))
    assert generate(models, tmp_path / "o.mp4", overlap) == 2
    assert capfd.readouterr().err == "anyflow generate: error: out of ideas (while decoding chunk 2)\n"
    assert len(read_video(tmp_path / "o.mp4")) == 9


def test_ctrl_c_before_the_first_chunk_leaves_no_file(models, tmp_path, monkeypatch, capfd):
    fail_at(monkeypatch, 0, KeyboardInterrupt())
    assert generate(models, tmp_path / "o.mp4") == 130
    assert capfd.readouterr() == ("", "anyflow generate: interrupted\n")
    assert not list(tmp_path.glob("o*.mp4"))


def test_a_full_disk_is_one_line_and_loses_nothing_finished(models, tmp_path, monkeypatch, capfd):
    from anyflow_runtime import video_io

    add = video_io._Mp4Sink.add
    added: list[Any] = []

    def full(self: Any, frame: Any) -> None:
        if len(added) == 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        added.append(frame)
        add(self, frame)

    monkeypatch.setattr(video_io._Mp4Sink, "add", full)
    assert generate(models, tmp_path / "o.mp4") == 2
    error = capfd.readouterr().err
    assert "No space left on device; of 10 frames written, the first 10 can be played from" in error
    assert error.count("\n") == 1
    assert len(read_video(tmp_path / "o.partial.mp4")) == 10
    assert load_file(tmp_path / "o.safetensors")["latents"].shape[2] == 4


def test_stats_tell_of_every_chunk(models, tmp_path):
    assert generate(models, tmp_path / "o.mp4") == 0
    stats = json.loads((tmp_path / "o.json").read_text())
    chunks = stats["chunks"]
    assert stats["complete"]
    assert [(chunk["latent_frames"], chunk["frames"]) for chunk in chunks] == list(
        zip([1, 2, 1, 1], FRAMES, strict=True)
    )
    for stage, key in (("denoise", "seconds"), ("decode", "decode_seconds"), ("write", "write_seconds")):
        parts = [chunk[key] for chunk in chunks]
        assert min(parts) > 0 and sum(parts) <= stats["seconds"][stage]
    ends = [chunk["written_after_seconds"] for chunk in chunks]
    assert ends == sorted(ends)
    for before, chunk in zip([0.0, *ends], chunks, strict=False):
        took = chunk["seconds"] + chunk["decode_seconds"] + chunk["write_seconds"]
        assert took <= chunk["written_after_seconds"] - before


def test_stats_of_a_bidirectional_model_are_one_chunk(models, tmp_path):
    arguments = ["--model", str(models / "bidirectional"), "--out", str(tmp_path / "o.png"), "--frames", "9"]
    video = [argument for argument in VIDEO if argument not in ("--chunks", "1,2,1,1")]
    assert main(["generate", *video, *arguments, "--stats", str(tmp_path / "o.json")]) == 0
    stats = json.loads((tmp_path / "o.json").read_text())
    assert [(chunk["latent_frames"], chunk["frames"]) for chunk in stats["chunks"]] == [(3, 9)]


@pytest.mark.parametrize(
    ("model", "component", "weight", "named"),
    [
        (
            "far",
            "text_encoder",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
            "transformer.context_encoder.text_encoder.encoder.block.0.",
        ),
        (
            "bidirectional",
            "text_encoder",
            "encoder.final_layer_norm.weight",
            "transformer.context_encoder.text_encoder.encoder.final_layer_norm",
        ),
        ("far", "transformer", "blocks.0.attn1.to_q.weight", "transformer.model.blocks.0."),
        ("far", "vae", "decoder.conv_in.weight", "decoder.decoder.conv_in.weight"),
        ("bidirectional", "transformer", "blocks.0.attn1.to_q.weight", "transformer.model.blocks.0."),
    ],
)
def test_check_finite_names_the_weight(model, component, weight, named, models, tmp_path, capfd):
    import shutil

    directory = tmp_path / "damaged"
    shutil.copytree(models / model, directory)
    [file] = (directory / component).glob("*.safetensors")
    weights = load_file(file)
    weights[weight].view(-1)[3] = float("nan")
    save_file(weights, file, metadata={"format": "pt"})
    chunks = [] if model == "far" else ["--frames", "9"]
    video = [argument for argument in VIDEO if model == "far" or argument not in ("--chunks", "1,2,1,1")]
    arguments = ["--model", str(directory), "--out", str(tmp_path / "o.mp4"), *chunks]
    assert main(["generate", *video, *arguments, "--check-finite"]) == 2
    error = capfd.readouterr().err
    assert f"weight {named}" in error and "1 NaN and 0 infinite" in error and error.count("\n") == 1
    assert not (tmp_path / "o.mp4").exists()


def test_frames_that_are_not_finite_are_noticed_without_a_flag(monkeypatch, tmp_path, capfd):
    from anyflow_runtime.decoders.pixels import PixelDecoder

    decode, made = PixelDecoder.forward, []

    def broken(self, *arguments, **keywords):
        frames = decode(self, *arguments, **keywords)
        made.append(frames)
        return frames * float("nan") if len(made) == 3 else frames

    monkeypatch.setattr(PixelDecoder, "forward", broken)
    out = tmp_path / "o.gif"
    command = ["generate", "--model", "demo", "a red circle moves up over grey", "--steps", "1", "--out", str(out)]
    assert main(command) != 0
    captured = capfd.readouterr()
    assert "chunk 2: its frames hold NaN or infinite values; --check-finite" in captured.err
    assert "stopped after chunk 1, 3 generated frames" in captured.out and out.exists()


def test_sigterm_keeps_the_finished_chunks(monkeypatch, tmp_path, capfd):
    write, stats = VideoWriter.write, tmp_path / "s.json"

    def signalled(self, frames):
        write(self, frames)
        if self.frames_written == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(VideoWriter, "write", signalled)
    command = ["generate", "--model", "demo", "a red circle moves up over grey", "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "o.mp4"), "--stats", str(stats)]) == 143
    captured = capfd.readouterr()
    assert captured.err.endswith("anyflow generate: terminated\n")
    assert len(read_video(tmp_path / "o.mp4")) == 3 and not json.loads(stats.read_text())["complete"]
    assert not [*tmp_path.glob("*partial*")]


@pytest.mark.parametrize("name", ["prompt_embeds", "negative_prompt_embeds"])
def test_check_finite_names_the_embedding(name, models, tmp_path, capfd):
    embeds = {key: torch.zeros(4, 16) for key in ("prompt_embeds", "negative_prompt_embeds")}
    embeds[name][1, 2] = float("inf")
    save_file(embeds, tmp_path / "e.safetensors")
    arguments = ["--model", str(models / "far"), "--out", str(tmp_path / "o.mp4"), "--guidance", "2", "--check-finite"]
    assert main(["generate", *VIDEO[1:], *arguments, "--prompt-embeds", str(tmp_path / "e.safetensors")]) == 2
    assert f"error: {name}: 0 NaN and 1 infinite of 64 values, the first at (0, 1, 2)" in capfd.readouterr().err


def test_overlap_without_chunks_is_refused(models, tmp_path, capfd):
    arguments = ["--model", str(models / "bidirectional"), "--out", str(tmp_path / "o.mp4"), "--overlap"]
    assert main(["generate", "a cat", *arguments]) == 2
    assert "--overlap: got with AnyFlowPipeline" in capfd.readouterr().err
