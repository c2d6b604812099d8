"""The live view: what a browser may ask for, the queue, and that the frames are those of the streaming pipeline."""

from __future__ import annotations

import io
import json
import re
import shutil
import threading
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
from starlette.websockets import WebSocketDisconnect

from anyflow_runtime.cli import build_parser, main
from anyflow_runtime.commands import serve
from anyflow_runtime.commands.generate_stream import streaming_pipeline
from anyflow_runtime.commands.model_directory import read_model_directory
from anyflow_runtime.serving.app import create_app
from anyflow_runtime.serving.limits import Limits, RequestError, check_start, chunks_of
from anyflow_runtime.serving.rollouts import Rollout, RolloutQueue
from anyflow_runtime.serving.videos import VideoStore
from anyflow_runtime.streaming import Change, stream
from anyflow_runtime.video_io import read_video
from bench.tiny_pipeline import tiny_pipeline

HOST = "127.0.0.1:8000"
PARTITION = (1, 3, 3, 2)
LIMITS = Limits(
    max_height=48, max_width=64, max_frames=41, max_steps=3, max_waiting=2, height=32, width=48, frames=29, steps=2
)
START = {"type": "start", "prompt": "a red fox", "steps": 1, "seed": 5, "frames": 17}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a causal and a bidirectional model."""
    root = tmp_path_factory.mktemp("models")
    for name, causal in (("far", True), ("bidirectional", False)):
        tiny_pipeline(causal, heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4).save_pretrained(root / name)
    return root


@pytest.fixture(scope="module")
def pipe(models: Path) -> Any:
    """The causal one, loaded as the command does."""
    from anyflow_runtime.commands.generate_stages import load_pipeline

    model = read_model_directory(models / "far")
    return load_pipeline(model, device=torch.device("cpu"), dtype=torch.float32, backend="auto")


@contextmanager
def client_of(app: Any) -> Iterator[TestClient]:
    with TestClient(app, base_url=f"http://{HOST}") as client:
        yield client


@pytest.fixture
def client(pipe: Any) -> Iterator[TestClient]:
    """The application with the real engine on the tiny model."""
    from anyflow_runtime.serving.engine import StreamEngine

    videos = VideoStore(keep=2)
    engine = StreamEngine(streaming_pipeline(pipe, 1, prompts=True, decode=True), videos, LIMITS)
    with client_of(create_app(engine.run, engine.partition, videos, LIMITS)) as client:
        yield client


def connect(client: TestClient, **headers: str) -> Any:
    return client.websocket_connect(f"ws://{HOST}/live", headers={"origin": f"http://{HOST}", **headers})


def receive(live: Any) -> Any:
    """The next message: a dictionary, or the bytes of a picture."""
    message = live.receive()
    assert message["type"] == "websocket.send", message
    return json.loads(message["text"]) if message.get("text") is not None else message["bytes"]


def until(live: Any, *kinds: str) -> tuple[dict[str, Any], list[Any]]:
    """The next message of these kinds, and all those before."""
    before: list[Any] = []
    while True:
        message = receive(live)
        if isinstance(message, dict) and message["type"] in kinds:
            return message, before
        before.append(message)


class Gate:
    """An engine whose rollouts wait: releasing `chunks` lets the running one make as many."""

    def __init__(self) -> None:
        self.chunks = threading.Semaphore(0)
        self.prompts: list[str] = []

    def run(self, rollout: Rollout) -> None:
        self.prompts.append(rollout.request.prompt)
        rollout.emit({"type": "started"})
        for index in range(len(rollout.request.chunks)):
            while not rollout.stopping and not self.chunks.acquire(timeout=0.02):
                pass
            if rollout.stopping:
                break
            rollout.emit({"type": "chunk", "index": index})
        rollout.emit({"type": "done", "stopped": rollout.stopping})


@pytest.fixture
def gate() -> Gate:
    return Gate()


def gated(gate: Gate, limits: Limits = LIMITS) -> Any:
    return create_app(gate.run, PARTITION, VideoStore(), limits)


def test_frames_and_file_are_those_of_the_streaming_pipeline(client, pipe, tmp_path):
    from PIL import Image

    with connect(client) as live:
        assert receive(live)["type"] == "hello"
        live.send_json(START)
        done, messages = until(live, "done")
    pictures = [np.asarray(Image.open(io.BytesIO(m))) for m in messages if isinstance(m, bytes)]
    chunks = [m for m in messages if isinstance(m, dict) and m["type"] == "chunk"]
    pipeline = streaming_pipeline(pipe, 1, prompts=True, decode=True)
    parts = stream(pipeline, "a red fox", chunk_partition=(1, 3, 1), seed=5, height=32, width=48)
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


def test_a_picture_is_sent_before_the_video_is_finished(gate):
    """Chunk messages arrive while the engine still waits to make the next chunk."""
    with client_of(gated(gate)) as client, connect(client) as live:
        receive(live)
        live.send_json(START)
        until(live, "started")
        gate.chunks.release()
        assert receive(live) == {"type": "chunk", "index": 0}


def test_prompt_and_steps_change_from_the_next_chunk_on(models, pipe, monkeypatch):
    """The rollout is the library's under the same changes: pixels of every chunk are equal."""
    from anyflow_runtime.serving import engine as module

    published: list[tuple[dict[str, Any], torch.Tensor]] = []

    def publish(rollout: Rollout, writer: Any, message: dict[str, Any], pixels: torch.Tensor) -> None:
        published.append((message, pixels))
        writer.write(pixels)

    videos = VideoStore()
    engine = module.StreamEngine(streaming_pipeline(pipe, 1, prompts=True, decode=True), videos, LIMITS)
    monkeypatch.setattr(module, "_publish", publish)
    rollout = Rollout(check_start(START, LIMITS, PARTITION), lambda message: None)
    generate, generated = engine._pipeline.generate, []

    def watched(index: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
        generated.append(index)
        if index == 0:  # while the first chunk is made
            rollout.change(serve_change(prompt="a blue whale"))
            rollout.change(serve_change(steps=3))
        return generate(index, *arguments, **keywords)

    monkeypatch.setattr(engine._pipeline, "generate", watched)
    engine.run(rollout)
    videos.close()
    assert generated == [0, 1, 2]
    assert [(m["prompt"], m["steps"]) for m, _ in published] == [("a red fox", 1)] + [("a blue whale", 3)] * 2

    pipeline = streaming_pipeline(pipe, 1, prompts=True, decode=True)
    chunks = stream(pipeline, "a red fox", chunk_partition=(1, 3, 1), seed=5, height=32, width=48)
    expected = [next(chunks), chunks.send(Change(prompt="a blue whale", steps=3)), next(chunks)]
    for (_, pixels), frames in zip(published, expected, strict=True):
        assert torch.equal(pixels, module._pixels(frames))


def serve_change(**change: Any) -> Any:
    from anyflow_runtime.serving.limits import Change as PageChange

    return PageChange(**change)


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
    "seed": ({**START, "seed": -1}, "seed: got -1, expected a whole number from 0 to"),
    "change of nothing": ({"type": "change", "steps": 2}, "change: no video is being made"),
    "stop of nothing": ({"type": "stop"}, "stop: no video is being made"),
}


def test_bad_messages_are_refused_with_the_reason(client):
    """None reaches the queue, and the connection goes on."""
    with connect(client) as live:
        receive(live)
        for name, (message, expected) in BAD.items():
            live.send_text(message if isinstance(message, str) else json.dumps(message))
            answer = receive(live)
            assert answer["type"] == "refused" and answer["message"].startswith(expected), name
            assert not answer["busy"] and len(answer["message"]) < 200
        live.send_bytes(b"\0")
        assert receive(live)["type"] == "refused"
        live.send_json({**START, "frames": 1})
        assert until(live, "done")[0]["frames"] == 1


def test_bad_changes_leave_the_video_alone(gate):
    with client_of(gated(gate)) as client, connect(client) as live:
        receive(live)
        live.send_json(START)
        until(live, "started")
        for message, expected in (
            ({"type": "change"}, "change: got neither prompt nor steps"),
            ({"type": "change", "steps": 99}, "steps: got 99"),
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


def test_a_failure_is_told_and_the_next_video_is_made(pipe, caplog):
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


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "out of memory: try a smaller size or fewer frames"),
        (OSError(28, "No space left on device", "/secret"), "the video could not be written: No space left on device"),
    ],
)
def test_what_was_made_before_a_failure_can_be_downloaded(error, expected, pipe, monkeypatch):
    from anyflow_runtime.serving.engine import StreamEngine

    pipeline: Any = streaming_pipeline(pipe, 1, prompts=True, decode=True)
    generate = pipeline.generate

    def failing(index: int, *arguments: Any, **keywords: Any) -> torch.Tensor:
        if index == 2:
            raise error
        return generate(index, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "generate", failing)
    videos = VideoStore()
    emitted: list[Any] = []
    StreamEngine(pipeline, videos, LIMITS).run(Rollout(check_start(START, LIMITS, PARTITION), emitted.append))
    assert emitted[-1]["type"] == "error" and emitted[-1]["message"] == expected
    path = videos.get(emitted[-1]["video"])
    assert path is not None and len(read_video(path)) == 13
    videos.close()
    assert not path.exists()


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
    assert chunks_of(81, released) == released
    assert chunks_of(1, released) == (1,)
    assert chunks_of(29, released) == (1, 3, 3, 1)
    assert chunks_of(93, released) == (1, 3, 3, 3, 3, 3, 3, 3, 2)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model {}/nowhere", "no directory {}/nowhere"),
        ("--model {}/bidirectional", "holds AnyFlowPipeline, expected a causal (FAR) model"),
        ("--frames 82", "frames: got 82, expected 4n + 1, such as 81"),
        ("--steps 5 --max-steps 4", "steps: got 5, expected a whole number from 1 to 4"),
        ("--size 480x833", "width: got 833, expected a multiple of 16"),
        ("--size 480x832 --max-size 240x832", "height: got 480, expected a whole number from 16 to 240"),
        ("--port 99999999", "--host, --port: "),
        ("--port -1", "argument --port: got '-1', expected a whole number >= 0"),
        ("--host 203.0.113.7", "--host, --port: cannot listen at '203.0.113.7', port 8000"),
        ("--device abacus", "--device: got 'abacus'"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(arguments, expected, models, capfd, monkeypatch):
    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("anyflow_runtime.commands.generate_stages.load_pipeline", load)
    given = arguments.replace("{}", str(models)).split()
    assert main(["serve", "--model", str(models / "far"), *given]) == 2
    error = capfd.readouterr().err
    assert error.startswith("anyflow serve: error: ") and error.count("\n") == 1
    assert expected.replace("{}", str(models)) in error


def test_an_address_in_use_is_found_before_the_model_is_loaded(models, capfd):
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert main(["serve", "--model", str(models / "far"), "--port", str(port)]) == 2
    assert f"cannot listen at '127.0.0.1', port {port}: Address already in use" in capfd.readouterr().err


def test_without_the_web_server_the_cure_is_named(models, capfd, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", str(models / "far")]) == 2
    assert "pip install 'anyflow-kernels[serve]'" in capfd.readouterr().err


@contextmanager
def served(models: Path, *arguments: str) -> Iterator[int]:
    """`anyflow serve` in a thread, on a port of its own: uvicorn, websockets and all."""
    import uvicorn

    given = ["serve", "--model", str(models / "far"), "--device", "cpu", "--port", "0", "--size", "32x48"]
    args = build_parser().parse_args([*given, "--frames", "29", "--steps", "2", *arguments])
    servers: list[Any] = []
    ready = threading.Event()

    class Server(uvicorn.Server):
        async def startup(self, sockets: Any = None) -> None:
            servers.append((self, sockets[0].getsockname()[1]))
            await super().startup(sockets)
            ready.set()

    patch = pytest.MonkeyPatch()
    patch.setattr(uvicorn, "Server", Server)
    thread = threading.Thread(target=serve.run, args=(args,))
    thread.start()
    try:
        assert ready.wait(30)
        yield servers[0][1]
    finally:
        patch.undo()
        servers[0][0].should_exit = True
        thread.join(30)
        assert not thread.is_alive()


def test_the_command_serves_a_video_over_a_real_connection(models, tmp_path, capsys):
    import urllib.request

    from websockets.sync.client import connect as open_websocket
    from websockets.typing import Origin

    with served(models) as port:
        with open_websocket(f"ws://127.0.0.1:{port}/live", origin=Origin(f"http://127.0.0.1:{port}")) as live:
            assert json.loads(live.recv(10))["max_steps"] == 16
            live.send(json.dumps({"type": "start", "prompt": "a red fox", "frames": 5}))
            pictures = 0
            while True:
                message = live.recv(20)
                pictures += isinstance(message, bytes)
                if isinstance(message, str) and json.loads(message)["type"] == "done":
                    break
        url = f"http://127.0.0.1:{port}/videos/{json.loads(message)['video']}"
        with urllib.request.urlopen(url) as response:
            (tmp_path / "o.mp4").write_bytes(response.read())
    assert pictures == 5 and len(read_video(tmp_path / "o.mp4")) == 5
    assert f"http://127.0.0.1:{port}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_browser_shows_frames_while_they_are_made(models, tmp_path, monkeypatch):
    """Chromium: type, watch, change, download, stop, and see what was refused; the page's policy stops none of it."""
    playwright = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium on PATH")
    from anyflow_runtime.serving.engine import StreamEngine

    gate, run = threading.Semaphore(0), StreamEngine.run

    def gated_run(self: StreamEngine, rollout: Rollout) -> None:
        """Every chunk but the first waits for the gate, so that the page is seen in the middle of a video."""
        emit = rollout.emit

        def gated_emit(message: Any) -> None:
            if isinstance(message, dict) and message["type"] == "chunk" and message["index"]:
                assert gate.acquire(timeout=30)
            emit(message)

        rollout.emit = gated_emit
        run(self, rollout)

    monkeypatch.setattr(StreamEngine, "run", gated_run)
    expect = playwright.expect  # it polls from outside: the page's policy forbids evaluating strings
    with served(models) as port, playwright.sync_playwright() as automation:
        browser = automation.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        complaints: list[str] = []
        page.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.goto(f"http://127.0.0.1:{port}/")
        page.wait_for_selector("#start:enabled")
        page.fill("#prompt", "a red fox")
        page.fill("#frames", "41")
        page.click("#start")
        page.wait_for_selector("#view[data-shown='1']")
        assert page.get_attribute("#progress", "value") == "1" and page.is_disabled("#start")
        assert page.evaluate("[view.width, view.height]") == [48, 32]

        page.fill("#prompt", "a blue whale")
        page.fill("#steps", "3")
        page.click("#change")
        gate.release(4)
        expect(page.locator("#status")).to_have_text("done: 41 frames", timeout=30_000)
        with page.expect_download() as download:
            page.click("#download")
        download.value.save_as(tmp_path / "o.mp4")
        assert len(read_video(tmp_path / "o.mp4")) == 41
        page.wait_for_selector("#view[data-shown='41']")

        page.fill("#frames", "29")
        page.click("#start")
        page.wait_for_selector("#view[data-shown='1']")
        page.click("#stop")
        gate.release(4)
        expect(page.locator("#status")).to_have_text(re.compile("^stopped: "), timeout=30_000)
        page.evaluate("send({type: 'start', prompt: ''})")
        expect(page.locator("#error")).to_have_text("prompt: expected some text")
        assert complaints == []
        browser.close()
