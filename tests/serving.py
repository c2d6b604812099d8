"""What the tests of the live view share: limits, tiny models, a browser's side of the conversation, and a stand-in."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from starlette.testclient import TestClient

from anyflow_runtime import StreamInferencePipeline, open_model
from anyflow_runtime.serving.app import create_app
from anyflow_runtime.serving.limits import Limits
from anyflow_runtime.serving.rollouts import Rollout
from anyflow_runtime.serving.videos import VideoStore
from bench.tiny_pipeline import tiny_pipeline

HOST = "127.0.0.1:8000"
PARTITION = (1, 3, 3, 2)
LIMITS = Limits(
    max_height=48, max_width=64, max_frames=41, max_steps=3, max_waiting=2, height=32, width=48, frames=29, steps=2
)
START = {"type": "start", "prompt": "a red fox", "steps": 1, "seed": 5, "frames": 17}


def save_models(root: Path) -> Path:
    """A folder with a causal and a bidirectional model."""
    for name, causal in (("far", True), ("bidirectional", False)):
        tiny_pipeline(causal, heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4).save_pretrained(root / name)
    return root


def picture(pixels: torch.Tensor, form: str) -> bytes:
    """(3, H, W) in [0, 1] as a file in a format of Pillow's."""
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray((pixels * 255).round().byte().permute(1, 2, 0).numpy()).save(out, format=form)
    return out.getvalue()


def clip(frames: torch.Tensor, form: str) -> bytes:
    """(T, 3, H, W) in [0, 1] as a file in a format of FFmpeg's, H.264."""
    import av

    out = io.BytesIO()
    with av.open(out, "w", format=form) as container:
        track: Any = container.add_stream("libx264", rate=16)
        track.height, track.width, track.pix_fmt = *frames.shape[-2:], "yuv420p"
        for frame in (frames * 255).round().byte().permute(0, 2, 3, 1).numpy():
            container.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(track.encode(None))
    return out.getvalue()


def load(path: Path) -> StreamInferencePipeline:
    """A model, loaded as the command does."""
    return open_model(path, device="cpu", dtype=torch.float32, steps=1)


@contextmanager
def client_of(app: Any) -> Iterator[TestClient]:
    with TestClient(app, base_url=f"http://{HOST}") as client:
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


def gated(gate: Gate, limits: Limits = LIMITS) -> Any:
    return create_app(gate.run, PARTITION, VideoStore(), limits)
