"""The live view's videos: the frames are those of the streaming pipeline, begun, changed and stopped as asked."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("starlette")
pytest.importorskip("PIL")

from starlette.testclient import TestClient

from anyflow_runtime.serving import engine
from anyflow_runtime.serving.app import create_app
from anyflow_runtime.serving.engine import StreamEngine
from anyflow_runtime.serving.limits import Limits, check_start
from anyflow_runtime.serving.rollouts import Rollout
from anyflow_runtime.serving.uploads import check_upload
from anyflow_runtime.serving.videos import VideoStore
from anyflow_runtime.streaming import Change, open_model, stream
from anyflow_runtime.video_io import read_video

from .serving import LIMITS, PARTITION, START, client_of, clip, connect, load, picture, receive, save_models, until


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def pipe(models: Path) -> Any:
    return load(models / "far")


@pytest.fixture
def client(pipe: Any) -> Iterator[TestClient]:
    with engine_client(pipe) as client:
        yield client


@contextmanager
def engine_client(pipe: Any) -> Iterator[TestClient]:
    """The application with the real engine."""
    videos = VideoStore(keep=2)
    engine = StreamEngine(pipe, videos, LIMITS)
    with client_of(create_app(engine.run, engine.partition, videos, LIMITS)) as client:
        yield client


def test_frames_and_file_are_those_of_the_streaming_pipeline(client, pipe, tmp_path):
    from PIL import Image

    with connect(client) as live:
        assert receive(live)["type"] == "hello"
        live.send_json(START)
        done, messages = until(live, "done")
    pictures = [np.asarray(Image.open(io.BytesIO(m))) for m in messages if isinstance(m, bytes)]
    chunks = [m for m in messages if isinstance(m, dict) and m["type"] == "chunk"]
    parts = stream(pipe, "a red fox", chunk_partition=(1, 3, 1), seed=5, height=32, width=48)
    frames = ((torch.cat([part[0] for part in parts]) + 1) / 2).clamp(0, 1)
    assert [chunk["frames"] for chunk in chunks] == [1, 12, 4] and len(pictures) == 17
    shown = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2) / 255
    assert float((shown - frames).abs().mean()) < 0.06  # JPEG on noise, with halved chroma
    luma = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert float(((shown - frames) * luma).sum(1).abs().mean()) < 0.02
    assert done["frames"] == 17 and not done["stopped"]

    response = client.get(f"/videos/{done['video']}")
    assert response.headers["content-type"] == "video/mp4" and "attachment" in response.headers["content-disposition"]
    (tmp_path / "o.mp4").write_bytes(response.content)
    assert float((read_video(tmp_path / "o.mp4") - frames).abs().mean()) < 0.06


def test_prompt_and_steps_change_from_the_next_chunk_on(models, pipe, monkeypatch):
    """The rollout is the library's under the same changes: pixels of every chunk are equal."""
    from anyflow_runtime.serving import engine as module

    published: list[tuple[dict[str, Any], torch.Tensor]] = []

    def publish(rollout: Rollout, writer: Any, message: dict[str, Any], pixels: torch.Tensor) -> None:
        published.append((message, pixels))
        writer.write(pixels)

    videos = VideoStore()
    engine = module.StreamEngine(pipe, videos, LIMITS)
    monkeypatch.setattr(module, "_publish", publish)
    rollout = Rollout(check_start(START, LIMITS, PARTITION), lambda message: None)
    denoise, generated = engine._pipeline.denoise, []

    def watched(index: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
        generated.append(index)
        if index == 0:  # while the first chunk is made
            rollout.change(Change(prompt="a blue whale"))
            rollout.change(Change(steps=3))
        return denoise(index, *arguments, **keywords)

    monkeypatch.setattr(engine._pipeline, "denoise", watched)
    engine.run(rollout)
    videos.close()
    assert generated == [0, 1, 2]
    assert [(m["prompt"], m["steps"]) for m, _ in published] == [("a red fox", 1)] + [("a blue whale", 3)] * 2

    chunks = stream(pipe, "a red fox", chunk_partition=(1, 3, 1), seed=5, height=32, width=48)
    expected = [next(chunks), chunks.send(Change(prompt="a blue whale", steps=3)), next(chunks)]
    for (_, pixels), frames in zip(published, expected, strict=True):
        assert torch.equal(pixels, module._pixels(frames))


def test_a_typo_while_a_video_streams_does_not_end_it():
    """The words of a change are known only to the model: it is refused, and the video goes on as it was."""
    pipe, messages = open_model("demo", steps=1), []
    limits = Limits(max_height=16, max_width=16, max_frames=7, height=16, width=16, frames=7, steps=1,
        temporal_ratio=1, size_multiple=4)  # fmt: skip
    videos = VideoStore()
    engine = StreamEngine(pipe, videos, limits)
    start = {"type": "start", "prompt": "a red circle moves up over grey", "seed": 5, "frames": 7}

    def emit(message: Any) -> None:
        messages.append(message)
        if isinstance(message, dict) and message["type"] == "started":
            rollout.change(Change(prompt="a yelow triangle moves left over navy"))

    rollout = Rollout(check_start(start, limits, engine.partition), emit)
    engine.run(rollout)
    videos.close()
    told = {message["type"]: message for message in messages if isinstance(message, dict)}
    assert "yelow" in told["refused"]["message"] and told["refused"]["busy"]
    assert told["done"]["frames"] == 7 and told["chunk"]["prompt"] == start["prompt"]


def test_stop_ends_after_the_chunk_and_keeps_what_there_is(client, tmp_path):
    with connect(client) as live:
        receive(live)
        live.send_json({**START, "frames": 41, "steps": 3})
        until(live, "chunk")
        live.send_json({"type": "stop"})
        done, _ = until(live, "done")
    assert done["stopped"] and 1 <= done["frames"] < 41
    (tmp_path / "o.mp4").write_bytes(client.get(f"/videos/{done['video']}").content)
    assert len(read_video(tmp_path / "o.mp4")) == done["frames"]


def test_one_video_after_the_other_can_be_made(client):
    """Without a seed the server picks one and says which."""
    with connect(client) as live:
        receive(live)
        for _ in range(2):
            live.send_json({"type": "start", "prompt": "x", "steps": 1, "frames": 1})
            started, _ = until(live, "started")
            assert isinstance(started["seed"], int) and started["frames"] == 1
            assert until(live, "done")[0]["frames"] == 1


def test_old_videos_make_way(client):
    with connect(client) as live:
        receive(live)
        tokens = []
        for _ in range(3):
            live.send_json({**START, "frames": 1})
            tokens.append(until(live, "done")[0]["video"])
    assert [client.get(f"/videos/{token}").status_code for token in tokens] == [404, 200, 200]


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: try a smaller size or fewer frames"),
        (OSError(28, "No space left on device", "/secret"), "the video could not be written: No space left on device"),
    ],
)
def test_what_was_made_before_a_failure_can_be_downloaded(error, expected, pipe, monkeypatch):
    denoise = pipe.denoise

    def failing(index: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if index == 2:
            raise error
        return denoise(index, *arguments, **keywords)

    monkeypatch.setattr(pipe, "denoise", failing)
    videos = VideoStore()
    emitted: list[Any] = []
    StreamEngine(pipe, videos, LIMITS).run(Rollout(check_start(START, LIMITS, PARTITION), emitted.append))
    assert emitted[-1]["type"] == "error" and emitted[-1]["message"] == expected
    path = videos.get(emitted[-1]["video"])
    assert path is not None and len(read_video(path)) == 13
    videos.close()
    assert not path.exists()


@pytest.mark.parametrize(
    "path", ["/videos/1.mp4", "/videos/..%2f..%2fetc%2fpasswd", "/videos/%2fetc%2fpasswd", "/etc/passwd", "/page.html"]
)
def test_no_path_reaches_the_file_system(path, client):
    with connect(client) as live:
        receive(live)
        live.send_json({**START, "frames": 1})
        until(live, "done")
    response = client.get(path)
    assert response.status_code == 404 and "root:" not in response.text


def pixels_of(pipe: Any, **settings: Any) -> list[torch.Tensor]:
    """What the engine should show: the library's frames of the same video."""
    parts = stream(pipe, "a red fox", seed=5, height=32, width=48, **settings)
    return [engine._pixels(frames) for frames in parts]


def made(pipe: Any, monkeypatch: pytest.MonkeyPatch, upload: Any = None, **message: Any) -> list[torch.Tensor]:
    """Pixels of every chunk that the engine makes of a "start" message."""
    published: list[torch.Tensor] = []
    emitted: list[Any] = []

    def publish(rollout: Rollout, writer: Any, message: dict[str, Any], pixels: torch.Tensor) -> None:
        published.append(pixels)
        writer.write(pixels)

    monkeypatch.setattr(engine, "_publish", publish)
    videos = VideoStore()
    maker = StreamEngine(pipe, videos, LIMITS)
    given = {} if upload is None else {"context": "token"}
    request = check_start({**START, **given, **message}, LIMITS, maker.partition, {"token": upload}.get)
    maker.run(Rollout(request, emitted.append))
    videos.close()
    assert emitted[-1]["type"] == "done", emitted
    return published


def equal(got: list[torch.Tensor], expected: list[torch.Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


def test_guidance_and_negative_prompt_are_the_librarys(pipe, monkeypatch):
    got = made(pipe, monkeypatch, guidance=3, negative_prompt="blurry")
    expected = pixels_of(pipe, chunk_partition=(1, 3, 1), guidance_scale=3.0, negative_prompt="blurry")
    assert equal(got, expected) and not equal(got, pixels_of(pipe, chunk_partition=(1, 3, 1)))


@pytest.mark.parametrize(("form", "count"), [("PNG", 1), ("mp4", 13)])
def test_a_video_begins_with_the_upload(form, count, pipe, monkeypatch):
    """An image becomes the first frame, of a clip as many frames as end with a chunk; both are cropped to the size."""
    torch.manual_seed(0)
    data = picture(torch.rand(3, 40, 48), "PNG") if form == "PNG" else clip(torch.rand(15, 3, 40, 48), form)
    upload = check_upload(data, 41)
    video = upload.read(count, (32, 48))
    assert video.shape == (count, 3, 32, 48)
    expected = pixels_of(pipe, chunk_partition=(1, 3, 1), context_video=video[None])
    got = made(pipe, monkeypatch, upload)
    assert equal(got, expected) and not equal(got[:1], pixels_of(pipe, chunk_partition=(1, 3, 1))[:1])


@pytest.mark.parametrize("begun", [False, True], ids=["text", "image"])
def test_a_bidirectional_model_makes_the_video_as_one_chunk(begun, models, monkeypatch):
    pipe = load(models / "bidirectional")
    upload = check_upload(picture(torch.rand(3, 32, 48), "PNG"), 41) if begun else None
    context = {"context_video": upload.read(1, (32, 48))[None]} if upload else {}
    expected = pixels_of(pipe, chunk_partition=(5,), **context)
    got = made(pipe, monkeypatch, upload)
    assert len(got) == 1 and len(got[0]) == 17 and equal(got, expected)


def test_an_upload_is_used_over_the_wire(client):
    with connect(client) as live:
        receive(live)
        token = client.post("/uploads", content=picture(torch.rand(3, 32, 48), "JPEG")).json()["token"]
        live.send_json({**START, "frames": 5, "context": token})
        assert until(live, "done")[0]["frames"] == 5
