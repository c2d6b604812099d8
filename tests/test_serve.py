"""The live view's protocol: what a browser may ask for, the queue, uploads, and who may ask."""

from __future__ import annotations

import json
import re
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("starlette")
pytest.importorskip("PIL")
pytest.importorskip("av")

from starlette.websockets import WebSocketDisconnect

from anyflow_runtime.serving import uploads
from anyflow_runtime.serving.app import create_app
from anyflow_runtime.serving.errors import RequestError
from anyflow_runtime.serving.limits import Limits, check_change, check_start
from anyflow_runtime.serving.rollouts import Rollout, RolloutQueue
from anyflow_runtime.serving.videos import VideoStore

from .serving import LIMITS, PARTITION, START, Gate, client_of, clip, connect, gated, picture, receive, until


@pytest.fixture
def gate() -> Gate:
    return Gate()


def test_a_picture_is_sent_before_the_video_is_finished(gate):
    """Chunk messages arrive while the engine still waits to make the next chunk."""
    with client_of(gated(gate)) as client, connect(client) as live:
        receive(live)
        live.send_json(START)
        until(live, "started")
        gate.chunks.release()
        assert receive(live) == {"type": "chunk", "index": 0}


BAD = {
    "no JSON": ("{", "message: expected a JSON object"),
    "no object": ("[1]", "message: expected a JSON object"),
    "too long": ('"' + "x" * 20000 + '"', "message: got 20002 characters, expected at most 16384"),
    "deep": ("[" * 9000, "message: expected a JSON object"),
    "no type": ("{}", "type: got 'None', expected start, change or stop"),
    "no prompt": ({"type": "start"}, "prompt: expected some text"),
    "blank prompt": ({**START, "prompt": " \n"}, "prompt: expected some text"),
    "prompt is no text": ({**START, "prompt": ["x"]}, "prompt: expected some text"),
    "prompt too long": ({**START, "prompt": "x" * 2001}, "prompt: got 2001 characters, expected at most 2000"),
    "too many steps": ({**START, "steps": 4}, "steps: got 4, expected a whole number from 1 to 3"),
    "half a step": ({**START, "steps": 1.5}, "steps: got 1.5, expected a whole number from 1 to 3"),
    "steps true": ({**START, "steps": True}, "steps: got True, expected a whole number from 1 to 3"),
    "too many frames": ({**START, "frames": 45}, "frames: got 45, expected a whole number from 1 to 41"),
    "frames": ({**START, "frames": 16}, "frames: got 16, expected 4n + 1, such as 13"),
    "too high": ({**START, "height": 64}, "height: got 64, expected a whole number from 16 to 48"),
    "odd width": ({**START, "width": 40}, "width: got 40, expected a multiple of 16"),
    "width is text": ({**START, "width": "x" * 99}, "width: got 'xxxx"),
    "guidance": ({**START, "guidance": 0.5}, "guidance: got '0.5', expected a number from 1 to 20"),
    "guidance is text": ({**START, "guidance": "2"}, "guidance: got '2', expected a number"),
    "guidance is NaN": ('{"type": "start", "prompt": "x", "guidance": NaN}', "guidance: got 'nan', expected a number"),
    "negative prompt": ({**START, "negative_prompt": "x"}, "negative_prompt: has no effect at guidance 1"),
    "context": ({**START, "context": "../../etc/passwd"}, "context: no such upload"),
    "context is no text": ({**START, "context": ["x"]}, "context: no such upload"),
    "frames of nothing": ({**START, "context_frames": 1}, "context_frames: got without context"),
    "seed": ({**START, "seed": -1}, "seed: got -1, expected a whole number from 0 to"),
    "change of nothing": ({"type": "change", "steps": 2}, "change: no video is being made"),
    "stop of nothing": ({"type": "stop"}, "stop: no video is being made"),
}


def test_bad_messages_are_refused_with_the_reason(gate):
    """None reaches the queue, and the connection goes on."""
    with client_of(gated(gate)) as client, connect(client) as live:
        receive(live)
        for name, (message, expected) in BAD.items():
            live.send_text(message if isinstance(message, str) else json.dumps(message))
            answer = receive(live)
            assert answer["type"] == "refused" and answer["message"].startswith(expected), name
            assert not answer["busy"] and len(answer["message"]) < 200
        live.send_bytes(b"\0")
        assert receive(live)["type"] == "refused"
        gate.chunks.release(1)
        live.send_json({**START, "frames": 1})
        until(live, "done")
    assert gate.prompts == [START["prompt"]]


def test_bad_changes_leave_the_video_alone(gate):
    with client_of(gated(gate)) as client, connect(client) as live:
        receive(live)
        live.send_json(START)
        until(live, "started")
        for message, expected in (
            ({"type": "change"}, "change: got neither prompt nor steps"),
            ({"type": "change", "steps": 99}, "steps: got 99"),
            ({"type": "change", "guidance": 2}, "guidance: got 2, expected 1, as the video began"),
            (START, "start: a video is being made already"),
        ):
            live.send_json(message)
            answer = receive(live)
            assert answer["busy"] and answer["message"].startswith(expected)
        gate.chunks.release(3)
        assert not until(live, "done")[0]["stopped"]


def test_videos_run_in_order_and_are_told_their_place(gate):
    with client_of(gated(gate)) as client, connect(client) as a, connect(client) as b, connect(client) as c:
        for i, live in enumerate((a, b, c)):
            receive(live)
            live.send_json({**START, "prompt": f"prompt {i}"})
            assert until(live, "queued")[0]["position"] == i
            if i == 0:
                until(a, "started")
        gate.chunks.release(3)
        until(a, "done")
        until(b, "started")
        assert receive(c) == {"type": "queued", "position": 1}
        gate.chunks.release(6)
        until(b, "done")
        until(c, "done")
    assert gate.prompts == ["prompt 0", "prompt 1", "prompt 2"]


def test_a_full_queue_is_refused(gate):
    limits = Limits(**{**LIMITS.__dict__, "max_waiting": 0})
    with client_of(gated(gate, limits)) as client, connect(client) as a, connect(client) as b:
        for live in (a, b):
            receive(live)
            live.send_json(START)
            if live is a:
                until(a, "started")
        answer = receive(b)
        assert answer["type"] == "refused" and answer["message"].startswith("the queue is full")


def test_stop_while_waiting_leaves_the_queue(gate):
    with client_of(gated(gate)) as client, connect(client) as a, connect(client) as b, connect(client) as c:
        for live in (a, b, c):
            receive(live)
            live.send_json(START)
            until(live, "started" if live is a else "queued")
        b.send_json({"type": "stop"})
        assert receive(b) == {"type": "done", "frames": 0, "stopped": True, "video": None}
        assert receive(c) == {"type": "queued", "position": 1}


def test_a_browser_that_leaves_stops_its_video(gate):
    """Else a closed tab would keep the others waiting for all of it."""
    with client_of(gated(gate)) as client, connect(client) as b:
        with connect(client) as a:
            receive(a)
            a.send_json({**START, "prompt": "left", "frames": 41})
            until(a, "started")
        receive(b)
        b.send_json({**START, "prompt": "next", "frames": 1})
        gate.chunks.release(1)  # the first video has four chunks and gets one
        until(b, "started")
        gate.chunks.release(1)
        until(b, "done")
    assert gate.prompts == ["left", "next"]


def test_a_failure_is_told_and_the_next_video_is_made(caplog):
    calls: list[Rollout] = []

    def run(rollout: Rollout) -> None:
        calls.append(rollout)
        if len(calls) == 1:
            raise KeyError("/secret/path")
        rollout.emit({"type": "done", "frames": 0, "stopped": False, "video": None})

    with client_of(create_app(run, PARTITION, VideoStore(), LIMITS)) as client, connect(client) as live:
        receive(live)
        live.send_json(START)
        error, _ = until(live, "error")
        assert error["message"] == "internal error, the log of the server has the details"
        assert "/secret/path" in caplog.text
        live.send_json(START)
        until(live, "done")


def test_closing_the_queue_turns_away_what_waits_and_stops_what_runs(gate):
    queue = RolloutQueue(gate.run, max_waiting=3)
    queue.start()
    told: list[list[Any]] = [[], []]
    running, waiting = (Rollout(check_start(START, LIMITS, PARTITION), messages.append) for messages in told)
    started = threading.Event()

    def told_running(message: Any) -> None:
        told[0].append(message)
        if message["type"] == "started":
            started.set()

    running.emit = told_running
    queue.submit(running)
    assert started.wait(10)
    queue.submit(waiting)
    queue.close()
    assert told[0][-1] == {"type": "done", "stopped": True}
    assert told[1][-1]["message"] == "the server is shutting down"
    with pytest.raises(RequestError, match="shutting down"):
        queue.submit(waiting)


@pytest.mark.parametrize(
    "headers",
    [
        {"host": "evil.example"},
        {"host": "evil.example:8000"},
        {"host": "127.0.0.1.evil.example:8000"},
        {"host": "[::"},
        {"origin": "http://evil.example"},
        {"origin": "null"},
        {"origin": "http://127.0.0.1:9000"},
        {"origin": "http://127.0.0.1:8000.evil.example"},
    ],
    ids=str,
)
def test_other_hosts_and_origins_are_refused(headers, gate):
    """A page elsewhere must not drive the model through its visitor's browser, nor rebind its name to reach it."""
    with client_of(gated(gate)) as client:
        assert client.get("/", headers=headers).status_code == 403
        with pytest.raises(WebSocketDisconnect), connect(client, **headers):
            pass
    assert not gate.prompts


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:1234", "[::1]:8000", "LOCALHOST"])
def test_names_of_this_machine_are_served(host, gate):
    with client_of(gated(gate)) as client:
        assert client.get("/", headers={"host": host, "origin": f"http://{host}"}).status_code == 200


def test_page_allows_only_its_own_script(gate):
    """The policy names the hashes of what is in the page: another script, or an event handler in HTML, is not run."""
    with client_of(gated(gate)) as client:
        response = client.get("/")
    policy = response.headers["content-security-policy"]
    assert re.search(r"script-src 'sha256-[^']+'; style-src 'sha256-[^']+';", policy)
    assert "default-src 'none'" in policy and "unsafe" not in policy
    assert "innerHTML" not in response.text and not re.search(r"<[^>]+\s(on\w+|style)=", response.text)
    assert "http://" not in response.text and "https://" not in response.text  # nothing from elsewhere


def test_chunks_follow_the_model_and_end_where_the_video_does():
    released = (1, 3, 3, 3, 3, 3, 3, 2)
    limits = Limits(max_height=64, max_width=64, height=64, width=64)

    def chunks(frames: int, partition: tuple[int, ...] | None) -> tuple[int, ...]:
        return check_start({"prompt": "a fox", "frames": frames}, limits, partition).chunks

    assert chunks(81, released) == released
    assert chunks(1, released) == (1,)
    assert chunks(29, released) == (1, 3, 3, 1)
    assert chunks(93, released) == (1, 3, 3, 3, 3, 3, 3, 3, 2)
    assert chunks(81, None) == (21,)


def test_guidance_changes_only_where_there_was_some():
    """The cache of a rollout has two rows per video with guidance and one without."""
    guided = check_start({**START, "guidance": 3, "negative_prompt": " bad "}, LIMITS, PARTITION)
    assert (guided.guidance, guided.negative_prompt) == (3.0, "bad")
    assert check_change({"guidance": 2.5}, LIMITS, guided).guidance_scale == 2.5
    with pytest.raises(RequestError, match="guidance: got 1, expected above 1"):
        check_change({"guidance": 1}, LIMITS, guided)
    unguided = check_start(START, LIMITS, PARTITION)
    assert check_change({"guidance": 1, "steps": 2}, LIMITS, unguided).guidance_scale is None


def test_a_bidirectional_model_refuses_changes(gate):
    with client_of(create_app(gate.run, None, VideoStore(), LIMITS)) as client, connect(client) as live:
        assert receive(live)["causal"] is False
        live.send_json(START)
        until(live, "started")
        live.send_json({"type": "change", "steps": 2})
        assert receive(live)["message"].startswith("change: this model makes a whole video at once")


@pytest.mark.parametrize("form", ["PNG", "JPEG", "mp4", "matroska"])
def test_an_upload_is_decoded_in_memory(form, gate):
    data = clip(torch.rand(6, 3, 32, 48), form) if form.islower() else picture(torch.rand(3, 32, 48), form)
    with client_of(gated(gate)) as client:
        response = client.post("/uploads", content=data)
    assert response.status_code == 200 and response.json()["frames"] == (6 if form.islower() else 1)


def test_frames_beyond_the_longest_video_are_not_decoded():
    assert uploads.check_upload(clip(torch.rand(9, 3, 16, 16), "mp4"), max_frames=5).frames == 5


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", "upload: got no bytes"),
        (b"/etc/passwd", "upload: not a picture or clip in a known format, expected PNG"),
        (PLAYLIST, "upload: not a picture or clip in a known format"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "upload: not a picture or clip in a known format"),
        (b"\0\0\0\x18ftypmp42" + b"\0" * 64, "upload: not a video, truncated or damaged ("),
        (b"\x1aE\xdf\xa3" + PLAYLIST, "upload: not a video, truncated or damaged ("),
    ],
    ids=["empty", "path", "playlist", "postscript", "mp4", "webm"],
)
def test_what_is_no_picture_or_clip_is_refused(data, expected, gate):
    """A playlist would make FFmpeg read files of the server; PostScript would run a program."""
    with client_of(gated(gate)) as client:
        response = client.post("/uploads", content=data)
    assert response.status_code == 422 and response.json()["message"].startswith(expected)
    assert "0x" not in response.text and "BytesIO" not in response.text


def test_damaged_uploads_are_refused(gate):
    png, mp4 = picture(torch.rand(3, 32, 48), "PNG"), clip(torch.rand(6, 3, 32, 48), "mp4")
    playable = (Path(__file__).parent / "data" / "clip.mp4").read_bytes()  # its header comes first
    for data in (png[: len(png) // 2], mp4[: len(mp4) // 2], playable[: len(playable) * 6 // 10]):
        with pytest.raises(RequestError, match="damaged"):
            uploads.check_upload(data, 41)


def test_too_many_bytes_or_pixels_are_refused(gate, monkeypatch):
    """The body is not read to its end, the picture not decoded."""
    png, mp4 = picture(torch.rand(3, 32, 48), "PNG"), clip(torch.rand(2, 3, 32, 48), "mp4")
    with client_of(gated(gate, replace(LIMITS, max_upload=len(png) - 1))) as client:
        response = client.post("/uploads", content=png)
        assert response.status_code == 413 and "at most" in response.json()["message"]
    monkeypatch.setattr(uploads, "MAX_PIXELS", 32 * 48 - 1)
    for data in (png, mp4):
        with pytest.raises(RequestError, match="upload: got 48 x 32 pixels, expected at most 1535"):
            uploads.check_upload(data, 41)


@pytest.mark.parametrize("name", ["crafted_attribute_error.mkv", "crafted_unicode_error.mp4"])
def test_what_trips_the_parsers_is_refused(name):
    """Found by flipping bytes of good clips: PyAV raised AttributeError and UnicodeDecodeError."""
    with pytest.raises(RequestError, match="upload: the clip is damaged"):
        uploads.check_upload((Path(__file__).parent / "data" / name).read_bytes(), 41)


@pytest.mark.parametrize("size", [(3, 2, 400), (3, 400, 2)], ids=str)
def test_a_strip_is_refused_by_its_ratio(size):
    with pytest.raises(RequestError, match="expected sides of at most 16 to 1"):
        uploads.check_upload(picture(torch.rand(size), "PNG"), 41)


def test_other_origins_cannot_upload(gate):
    with client_of(gated(gate)) as client:
        assert client.post("/uploads", content=b"x", headers={"origin": "http://evil.example"}).status_code == 403


def test_old_uploads_make_way():
    store, upload = uploads.UploadStore(keep=2), uploads.Upload(b"", None, 1)
    tokens = [store.add(upload) for _ in range(3)]
    assert [store.get(token) for token in tokens] == [None, upload, upload]


@pytest.mark.parametrize(
    ("partition", "frames", "wanted", "expected"),
    [
        (PARTITION, 1, None, 1),
        (PARTITION, 13, None, 13),
        (PARTITION, 40, None, 25),
        (PARTITION, 40, 13, 13),
        (None, 12, None, 9),
        (None, 40, 5, 5),
        (PARTITION, 40, 9, "context_frames: got 9, expected one of: 1, 13, 25"),
        (PARTITION, 12, 13, "context_frames: got 13, but the upload has 12 frames"),
        ((3, 3), 1, None, "context: got 1 frames to begin with, expected one of: 9, 21"),
        (PARTITION, 40, True, "context_frames: got True"),
    ],
)
def test_context_ends_with_a_chunk(partition, frames, wanted, expected):
    """A video of 29 frames; what is not asked for is as much as there is and may be."""
    upload = uploads.Upload(b"", "mov", frames)
    message = {**START, "frames": 29, "context": "token", "context_frames": wanted}
    if isinstance(expected, str):
        with pytest.raises(RequestError, match=expected):
            check_start(message, LIMITS, partition, {"token": upload}.get)
    else:
        request = check_start(message, LIMITS, partition, {"token": upload}.get)
        assert request.context is upload and request.context_frames == expected
