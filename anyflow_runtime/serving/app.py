"""The web server of the live view: the page, a websocket for every browser, uploads, and the finished videos."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import re
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, HTMLResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.websockets import WebSocket, WebSocketDisconnect

from .errors import RequestError
from .guard import LOOPBACK, HostGuard
from .limits import Limits, check_change, check_start
from .rollouts import Message, Rollout, RolloutQueue
from .uploads import UploadStore, check_upload
from .videos import VideoStore

MAX_MESSAGE = 16384  # characters of a message from the browser


def create_app(
    run: Callable[[Rollout], None],
    partition: Sequence[int] | None,
    videos: VideoStore,
    limits: Limits,
    hosts: Iterable[str] = LOOPBACK,
) -> Starlette:
    """The application.

    Args:
        run: makes the video of a rollout, see `StreamEngine.run`; called on one thread, one rollout at a time.
        partition: latent frames per chunk that the model was trained with; None for a bidirectional one.
        videos: where `run` keeps the files; closed with the application.
        limits: of what a browser may ask for.
        hosts: names this server goes by.
    """
    queue = RolloutQueue(run, limits.max_waiting)
    uploads = UploadStore()
    page = files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    page_headers = {"Content-Security-Policy": _policy(page), **_HEADERS}

    async def index(request: Request) -> Response:
        return HTMLResponse(page, headers=page_headers)

    async def video(request: Request) -> Response:
        path = videos.get(request.path_params["token"])
        if path is None:
            return PlainTextResponse("no such video, or it has made way for newer ones", status_code=404)
        return FileResponse(path, media_type="video/mp4", filename="anyflow.mp4", headers=_HEADERS)

    async def upload(request: Request) -> Response:
        try:
            data = await _body(request, limits.max_upload)
            if data is None:
                message = f"upload: got more bytes than expected, which is at most {limits.max_upload}"
                return JSONResponse({"message": message}, status_code=413, headers=_HEADERS)
            checked = await asyncio.to_thread(check_upload, data, limits.max_frames)
        except RequestError as error:
            return JSONResponse({"message": str(error)}, status_code=422, headers=_HEADERS)
        except ClientDisconnect:
            return Response(status_code=400)
        return JSONResponse({"token": uploads.add(checked), "frames": checked.frames}, headers=_HEADERS)

    async def live(websocket: WebSocket) -> None:
        await _Session(websocket, queue, limits, partition, uploads).serve()

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        queue.start()
        try:
            yield
        finally:
            await asyncio.to_thread(queue.close)
            videos.close()

    return Starlette(
        routes=[
            Route("/", index),
            Route("/videos/{token}", video),
            Route("/uploads", upload, methods=["POST"]),
            WebSocketRoute("/live", live),
        ],
        middleware=[Middleware(HostGuard, hosts=hosts)],
        lifespan=lifespan,
    )


class _Session:
    """One browser: what it sends is checked and passed on, what its rollout emits is sent in order."""

    def __init__(
        self,
        websocket: WebSocket,
        queue: RolloutQueue,
        limits: Limits,
        partition: Sequence[int] | None,
        uploads: UploadStore,
    ) -> None:
        self._websocket, self._queue, self._limits, self._partition = websocket, queue, limits, partition
        self._uploads = uploads
        self._loop = asyncio.get_running_loop()
        self._outbox: asyncio.Queue[Message] = asyncio.Queue()
        self._rollout: Rollout | None = None

    async def serve(self) -> None:
        """Until the browser leaves, which also ends its rollout."""
        await self._websocket.accept()
        self._outbox.put_nowait(self._limits.hello() | {"causal": self._partition is not None})
        sender = asyncio.create_task(self._send())
        try:
            while (text := await self._receive()) is not None:
                try:
                    self._handle(text)
                except RequestError as error:
                    busy = self._rollout is not None
                    self._outbox.put_nowait({"type": "refused", "message": str(error), "busy": busy})
        finally:
            if self._rollout is not None:
                self._queue.cancel(self._rollout)
                self._rollout = None
            sender.cancel()
            with suppress(asyncio.CancelledError):
                await sender

    async def _receive(self) -> str | None:
        """The next message, or None when the browser has gone."""
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            return None
        return message.get("text") or ""

    async def _send(self) -> None:
        # A browser that leaves is noticed where messages are received.
        with suppress(WebSocketDisconnect, RuntimeError):
            while True:
                message = await self._outbox.get()
                if isinstance(message, bytes):
                    await self._websocket.send_bytes(message)
                else:
                    await self._websocket.send_json(message)

    def _handle(self, text: str) -> None:
        message = _parse(text)
        kind = message.get("type")
        if kind == "start":
            if self._rollout is not None:
                raise RequestError("start: a video is being made already, expected stop first")
            if self._outbox.qsize() > self._limits.max_frames:
                raise RequestError("start: the pictures of the last video are still on their way to this browser")
            self._start(message)
        elif kind not in ("change", "stop"):
            raise RequestError(f"type: got {str(kind)[:40]!r}, expected start, change or stop")
        elif self._rollout is None:
            raise RequestError(f"{kind}: no video is being made")
        elif kind == "change":
            if self._partition is None:
                raise RequestError("change: this model makes a whole video at once, in which nothing can change")
            self._rollout.change(check_change(message, self._limits, self._rollout.request))
        elif self._queue.cancel(self._rollout):
            self._rollout = None
            self._outbox.put_nowait({"type": "done", "frames": 0, "stopped": True, "video": None})

    def _start(self, message: dict[str, Any]) -> None:
        request = check_start(message, self._limits, self._partition, self._uploads.get)
        rollout = Rollout(request, lambda emitted: self._emit(rollout, emitted))
        self._rollout = rollout
        try:
            self._queue.submit(rollout)
        except RequestError:
            self._rollout = None
            raise

    def _emit(self, rollout: Rollout, message: Message) -> None:
        """Called by the worker, so on another thread."""

        def take() -> None:
            if self._rollout is not rollout:  # cancelled, and the browser told so
                return
            if isinstance(message, dict) and message["type"] in ("done", "error"):
                self._rollout = None
            self._outbox.put_nowait(message)

        with suppress(RuntimeError):  # the loop is closed: the server has ended
            self._loop.call_soon_threadsafe(take)


async def _body(request: Request, limit: int) -> bytes | None:
    """The bytes of a request, or None once there are more than `limit`."""
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > limit:
            return None
    return bytes(data)


def _parse(text: str) -> dict[str, Any]:
    if len(text) > MAX_MESSAGE:
        raise RequestError(f"message: got {len(text)} characters, expected at most {MAX_MESSAGE}")
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        message = None
    if not isinstance(message, dict):
        raise RequestError("message: expected a JSON object")
    return message


_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "Cache-Control": "no-store"}


def _policy(page: str) -> str:
    """A content security policy that allows the page's own script and style, by their hashes, and nothing else."""
    hashes = {}
    for tag in ("script", "style"):
        found = re.findall(rf"<{tag}>(.*?)</{tag}>", page, flags=re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in found)
        hashes[tag] = " ".join(f"'sha256-{digest}'" for digest in digests)
    return (
        f"default-src 'none'; script-src {hashes['script']}; style-src {hashes['style']}; connect-src 'self'; "
        "img-src 'self' data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )
