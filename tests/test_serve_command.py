"""`anyflow serve`: its arguments, and the page over a real connection and in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("diffusers")
pytest.importorskip("starlette")
pytest.importorskip("PIL")

from anyflow_runtime.cli import build_parser, main
from anyflow_runtime.commands import serve
from anyflow_runtime.serving.limits import check_start
from anyflow_runtime.serving.rollouts import Rollout
from anyflow_runtime.streaming import ModelDirectory
from anyflow_runtime.streaming.pixel_model import CLASS_NAME, PixelModelIndex
from anyflow_runtime.video_io import read_video

from .serving import save_models


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("--model {}/nowhere", "no directory {}/nowhere"),
        ("--guidance 21", "guidance: got '21.0', expected a number from 1 to 20"),
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

    monkeypatch.setattr("anyflow_runtime.streaming.open_model", load)
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


def test_a_pixel_model_brings_its_own_sizes_and_rate(tmp_path):
    """Its frames are its latent frames, and its sides far below those of a model with a VAE."""
    index = PixelModelIndex(height=32, width=48, shift=5.0, latent_range=(-1.0, 1.0), fps=4)
    config = {"chunk_partition": (1, 2, 2), "patch_size": (1, 2, 2)}
    model = ModelDirectory(tmp_path, CLASS_NAME, config, index)
    limits = serve._limits(build_parser().parse_args(["serve", "--model", "x", "--max-upload", "1"]), model)
    assert (limits.height, limits.width, limits.max_height, limits.max_width) == (32, 48, 32, 48)
    assert (limits.frames, limits.temporal_ratio, limits.size_multiple, limits.fps) == (5, 1, 2, 4)
    assert limits.max_upload == 2**20
    assert check_start({"prompt": "x", "frames": 4}, limits, (1, 2, 2)).frames == 4
