"""Clips with captions as training data: captions found, clips encoded once, and what is wrong with them."""

from __future__ import annotations

import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from anyflow_runtime.encoders import UMT5TextEncoderConfig
from anyflow_runtime.training import GlobalBatch, distributed
from anyflow_runtime.training.config import DataSettings
from anyflow_runtime.training.data import encode_videos
from anyflow_runtime.training.data import videos as data_videos
from anyflow_runtime.training.data.files import SafetensorsSource
from anyflow_runtime.training.data.videos import Clip, find_clips, open_videos, read_clip
from anyflow_runtime.training.trainer.trainer import train
from anyflow_runtime.video_io import VideoReadError, VideoWriter, read_video
from anyflow_runtime.wan_vae import WanVAEEncoderConfig

from .trainer_runs import FAR, assert_same_bits, checkpoint, tiny, write_video_model

pytest.importorskip("diffusers")
pytest.importorskip("av")

CLIP = Path(__file__).parent / "data" / "clip.mp4"  # 33 frames of 90 x 160 at 16 per second


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    write_video_model(directory)
    return directory


@pytest.fixture
def clips(tmp_path) -> Path:
    """Two clips, one captioned by a line, one in a subdirectory by the file beside it."""
    directory = tmp_path / "clips"
    (directory / "more").mkdir(parents=True)
    shutil.copy(CLIP, directory / "a.mp4")
    with VideoWriter(directory / "more" / "b.mp4", fps=16) as writer:
        writer.write(read_video(CLIP, 12).flip(0))
    (directory / "metadata.jsonl").write_text(json.dumps({"file_name": "a.mp4", "text": "a red ball"}) + "\n")
    (directory / "more" / "b.txt").write_text("a blue ball\n")
    return directory


def settings(clips: Path, directory: Path, **changes) -> DataSettings:
    changes = {"frames": 9, "height": 64, "width": 64, "text_length": 5, "model": str(directory)} | changes
    return DataSettings("video", str(clips), **changes)


def opened(clips: Path, model: Path, **changes) -> SafetensorsSource:
    return open_videos(settings(clips, model, **changes), seed=0, stream=io.StringIO())


def refuse_to_encode(monkeypatch) -> None:
    def refuse(*_):
        raise AssertionError("encoded again")

    monkeypatch.setattr(data_videos, "_Encoders", refuse)


def test_clips_and_captions_are_paired(clips) -> None:
    """Lines of `metadata.jsonl` and files beside the video; a swap would train on wrong captions."""
    assert find_clips(clips) == [Clip(clips / "a.mp4", "a red ball"), Clip(clips / "more" / "b.mp4", "a blue ball")]


def test_captions_jsonl_is_read_too(clips) -> None:
    (clips / "metadata.jsonl").rename(clips / "captions.jsonl")
    assert find_clips(clips)[0].caption == "a red ball"


def test_samples_are_what_the_encoders_make_of_clips_and_captions(clips, model) -> None:
    source = opened(clips, model)
    assert source.shapes == ((3, 3, 8, 8), (5, 8))
    vae = WanVAEEncoderConfig(path=str(model), pixel_range="unit").setup()
    text = UMT5TextEncoderConfig(path=str(model), max_length=5).setup()
    batch = source.samples(0, GlobalBatch(2))
    assert batch.text is not None and source.negative is not None
    for name, latents, embedding in zip(batch.names, batch.latents, batch.text, strict=True):
        clip = next(c for c in find_clips(clips) if name.startswith(f"{c.path.stem}-"))
        torch.testing.assert_close(latents, vae(read_video(clip.path, 9, (64, 64))))
        torch.testing.assert_close(embedding, text(clip.caption)[0])
    torch.testing.assert_close(source.negative, text(data_videos.WAN_NEGATIVE_PROMPT)[0])


def test_frames_follow_the_rate_asked_for() -> None:
    """At 8 frames a second every other one of a clip with 16; at 6 the nearest."""
    whole = read_video(CLIP, size=(16, 16))
    assert torch.equal(read_clip(CLIP, 5, (16, 16), 8.0), whole[:10:2])
    assert torch.equal(read_clip(CLIP, 4, (16, 16), 6.0), whole[[0, 3, 5, 8]])
    assert torch.equal(read_clip(CLIP, 5, (16, 16)), whole[:5])


def test_a_second_opening_encodes_nothing(clips, model, monkeypatch) -> None:
    first = opened(clips, model).samples(0, GlobalBatch(2))
    refuse_to_encode(monkeypatch)
    second = opened(clips, model).samples(0, GlobalBatch(2))
    assert first.names == second.names and torch.equal(first.latents, second.latents)


@pytest.mark.parametrize("change", ["clip", "caption", "size", "rate", "negative", "model"])
def test_what_has_changed_is_encoded_again(change, clips, model, monkeypatch, tmp_path) -> None:
    """A stale sample would silently train on the old clip, caption or encoder."""
    opened(clips, model)
    changes: dict = {}
    if change == "clip":
        with VideoWriter(clips / "a.mp4", fps=16) as writer:
            writer.write(read_video(CLIP, 12).flip(1))
    elif change == "caption":
        (clips / "more" / "b.txt").write_text("a green ball")
    elif change == "model":
        copy = tmp_path / "model"
        shutil.copytree(model, copy)
        file = copy / "vae" / "diffusion_pytorch_model.safetensors"
        content = bytearray(file.read_bytes())
        content[-1] ^= 1
        file.write_bytes(content)
        model = copy
    else:
        changes = {"size": {"height": 32}, "rate": {"fps": 14.0}, "negative": {"negative_prompt": "fog"}}[change]
    refuse_to_encode(monkeypatch)
    with pytest.raises(AssertionError, match="encoded again"):
        opened(clips, model, **changes)


def test_a_killed_encoding_goes_on_where_it_stopped(clips, model, monkeypatch) -> None:
    """A clip is in the cache whole or not at all, and is not encoded twice."""
    encoded = []
    original = data_videos._Encoders.video

    def dying(self, path):
        if encoded:
            raise KeyboardInterrupt
        encoded.append(path.name)
        return original(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(data_videos._Encoders, "video", dying)
        with pytest.raises(KeyboardInterrupt):
            opened(clips, model)
    monkeypatch.setattr(data_videos._Encoders, "video", lambda self, p: encoded.append(p.name) or original(self, p))
    assert len(opened(clips, model).files) == 2 and encoded == ["a.mp4", "b.mp4"]


def test_processes_share_out_the_encoding(clips, model, monkeypatch) -> None:
    """Of two processes each encodes one clip, and both open both."""
    rank, encoded = 0, []
    original = data_videos._Encoders.video

    def wait_for_the_other() -> None:
        nonlocal rank
        if rank == 0:
            rank = 1
            assert len(opened(clips, model).files) == 2
            rank = 0

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: rank)
    monkeypatch.setattr(data_videos, "barrier", wait_for_the_other)
    monkeypatch.setattr(
        data_videos._Encoders, "video", lambda self, p: encoded.append((rank, p.name)) or original(self, p)
    )
    assert len(opened(clips, model).files) == 2 and encoded == [(0, "a.mp4"), (1, "b.mp4")]


def test_training_on_clips_continues_to_the_same_bits(clips, model, tmp_path) -> None:
    """The cache lies elsewhere, is also a data set of shards, and a run that is continued meets the same samples."""
    data = {"kind": "video", "path": str(clips), "model": str(model), "cache": str(tmp_path / "cache")}
    data |= {"frames": 9, "height": 64, "width": 64, "text_length": 5}
    run = tiny(FAR, data=data, checkpoint_every=1, keep_checkpoints=9)
    stream = io.StringIO()
    train(run, tmp_path / "whole", stream)
    assert "encoded 2/2 clips" in stream.getvalue() and not (clips / ".encoded").exists()
    train(run, tmp_path / "again", io.StringIO())
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step-00000002")
    train(run, tmp_path / "again", io.StringIO())
    assert_same_bits(checkpoint(tmp_path / "again", 2), checkpoint(tmp_path / "whole", 2))
    (shards,) = (tmp_path / "cache").iterdir()
    train(tiny(FAR, data={"kind": "safetensors", "path": str(shards)}), tmp_path / "shards", io.StringIO())


def test_clips_are_encoded_ahead_of_training(clips, model, monkeypatch, capsys, tmp_path) -> None:
    data = {"kind": "video", "path": str(clips), "model": str(model)}
    data |= {"frames": 9, "height": 64, "width": 64, "text_length": 5}
    (tmp_path / "config.json").write_text(json.dumps({**FAR, "data": data}))
    monkeypatch.setattr(sys, "argv", ["encode_videos", str(tmp_path / "config.json"), "--set", "data.fps=16"])
    encode_videos.main()
    directory = Path(capsys.readouterr().out.strip())
    refuse_to_encode(monkeypatch)
    assert {file.parent for file in opened(clips, model, fps=16.0).files} == {directory}


# Mistakes


def test_a_clip_without_caption_is_named(clips) -> None:
    (clips / "more" / "b.txt").unlink()
    with pytest.raises(ValueError, match=r"b\.mp4: missing caption: expected a line of .* or b\.txt"):
        find_clips(clips)


def test_a_bad_line_of_captions_is_named(clips) -> None:
    (clips / "metadata.jsonl").write_text('{"file_name": "a.mp4", "text": "x"}\n{"file_name": "a.mp4"}\n')
    with pytest.raises(ValueError, match=r"metadata\.jsonl:2: got .*expected JSON with file_name and text"):
        find_clips(clips)
    (clips / "metadata.jsonl").write_text('{"file_name": "c.mp4", "text": "x"}\n')
    with pytest.raises(FileNotFoundError, match=r"metadata\.jsonl:1: no file .*c\.mp4"):
        find_clips(clips)


def test_a_directory_without_videos_is_named(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no video in"):
        find_clips(tmp_path)
    with pytest.raises(FileNotFoundError, match="no directory"):
        find_clips(tmp_path / "absent")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"frames": 17}, r"b\.mp4: has 12 frames, expected at least 17 for data.frames = 17"),
        ({"fps": 4.0}, r"b\.mp4: has 12 frames, expected at least 33"),
        ({"fps": 24.0}, r"a\.mp4: has 16 frames per second, expected at least data.fps = 24"),
        ({"frames": 8}, r"data.frames: got 8, expected 4n \+ 1"),
        ({"height": 60}, r"data.height, data.width: got 60 x 64, expected multiples of 8"),
        ({"model": "nowhere"}, r"data.model: nowhere lacks \['vae/config.json', 'text_encoder/config.json'"),
    ],
)
def test_what_cannot_be_encoded_is_named(changes, message, clips, model) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        open_videos(settings(clips, model, **changes), seed=0, stream=io.StringIO())
    assert not list(clips.glob(".encoded/*/*-*"))


def test_a_truncated_video_is_named_and_no_sample(clips, model) -> None:
    """Cut in its header, or in its frames, which only decoding shows."""
    (clips / "more" / "b.mp4").unlink()
    whole = (clips / "a.mp4").read_bytes()
    (clips / "a.mp4").write_bytes(whole[:200])
    with pytest.raises(VideoReadError, match=r"a\.mp4: has no video stream"):
        opened(clips, model)
    (clips / "a.mp4").write_bytes(whole[: 2 * len(whole) // 3])
    with pytest.raises(VideoReadError, match=r"a\.mp4: not a video, truncated or damaged"):
        opened(clips, model, frames=33)
    assert not list(clips.glob(".encoded/*/a-*"))
