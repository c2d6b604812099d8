"""Open the live view: a page on localhost that shows frames while the model makes them.

Type a prompt and watch; prompt, steps and guidance may change from chunk to chunk, and a video may begin with a picture
or clip of yours. One video is made at a time, further ones wait in a queue. The model is a pipeline directory in
diffusers' format; a bidirectional one makes the whole video before the first frame is shown. Anyone who can reach the
address can use the page, so think before you bind to another one than localhost.
"""

from __future__ import annotations

import argparse
import socket
import sys
from typing import TYPE_CHECKING, Any

from . import UsageError
from .arguments import (
    frame_size,
    guidance_scale,
    machine_arguments,
    model_directory,
    model_options,
    open_pipeline,
    resolve_device,
    resolve_dtype,
    whole_number,
)

if TYPE_CHECKING:
    from ..serving.limits import Limits
    from ..streaming.model_directory import ModelDirectory

MAX_CONNECTIONS = 64
_ANY_ADDRESS = ("", "0.0.0.0", "::")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = whole_number(1)
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help='pipeline directory in diffusers\' format, a hub id (owner/name), a preset, or "demo"',
    )

    server = parser.add_argument_group("server")
    server.add_argument("--host", default="127.0.0.1", help="address to bind to; default 127.0.0.1, this machine only")
    server.add_argument(
        "--port", type=whole_number(0), default=8000, metavar="N", help="default 8000; 0 takes any free one"
    )
    server.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a further name that browsers reach this server by, may be given again",
    )
    server.add_argument(
        "--max-waiting", type=whole_number(0), default=8, metavar="N", help="videos in the queue; default 8"
    )
    server.add_argument(
        "--max-upload", type=whole, default=32, metavar="MIB", help="of a picture or clip to begin with; default 32"
    )

    video = parser.add_argument_group("video")
    video.add_argument(
        "--size", type=frame_size, metavar="HxW", help="at first; default 480x832, or what the model says"
    )
    video.add_argument("--max-size", type=frame_size, metavar="HxW", help="largest sides; default: that of --size")
    video.add_argument("--frames", type=whole, metavar="N", help="at first, 4n + 1; default 81, demo: its own")
    video.add_argument("--max-frames", type=whole, default=241, metavar="N", help="longest video; default 241")
    video.add_argument("--steps", type=whole, default=4, metavar="N", help="denoising steps at first; default 4")
    video.add_argument("--max-steps", type=whole, default=16, metavar="N", help="default 16")
    video.add_argument(
        "--guidance", type=guidance_scale, default=1.0, metavar="X", help="at first; default 1, which is off"
    )
    video.add_argument("--fps", type=whole, metavar="N", help="frames per second; default 16, or what the model says")

    machine_arguments(parser)


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise UsageError(f"serve needs a web server: pip install 'anyflow-kernels[serve]' ({error})") from error
    from anyflow_kernels import load_ops

    device = resolve_device(args.device)
    load_ops(args.backend)  # raises, with the reason, if it cannot run here
    model = model_directory(args.model)
    limits = _limits(args, model)
    dtype = resolve_dtype(args.dtype, device)
    # Before the model: an address in use should not cost the minutes of loading it.
    with _bound(args.host, args.port) as listener:
        app = build_app(args, limits, model, device, dtype)
        host = f"[{args.host}]" if ":" in args.host else args.host
        if model.licence is not None:
            print(f"anyflow serve: the weights' licence is {model.licence}")
        listener.listen()  # whoever follows the address at once waits for the server instead of being refused
        print(f"anyflow serve: http://{host}:{listener.getsockname()[1]}  (Ctrl-C ends it)", flush=True)
        config = uvicorn.Config(
            app,
            log_level="warning",
            ws="websockets-sansio",
            ws_max_size=2**16,
            limit_concurrency=MAX_CONNECTIONS,
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        try:
            uvicorn.Server(config).run(sockets=[listener])
        except KeyboardInterrupt:  # raised again once everything has been shut down
            print("anyflow serve: ended", file=sys.stderr)
    return 0


def build_app(args: argparse.Namespace, limits: Limits, model: Any, device: Any, dtype: Any) -> Any:
    """Load the model and put the web application around it."""
    from ..serving.app import create_app
    from ..serving.engine import StreamEngine
    from ..serving.guard import LOOPBACK
    from ..serving.videos import VideoStore

    pipeline = open_pipeline(
        model,
        (limits.max_height, limits.max_width),
        device=device,
        dtype=dtype,
        backend=args.backend,
        steps=args.steps,
        compile=args.compile,
        **model_options(args, model, device),
    )
    videos = VideoStore()
    engine = StreamEngine(pipeline, videos, limits, model.default_zoom)
    own_names = () if args.host in _ANY_ADDRESS else (args.host,)
    return create_app(engine.run, engine.partition, videos, limits, (*LOOPBACK, *own_names, *args.allow_host))


def _limits(args: argparse.Namespace, model: ModelDirectory) -> Limits:
    from ..causal_time import total_pixel_frames
    from ..serving.errors import RequestError
    from ..serving.limits import Limits

    size = args.size or model.default_size
    height, width = args.max_size or size
    own = sum(model.chunk_partition) if model.pixels is not None else 21
    try:
        return Limits(
            max_height=height,
            max_width=width,
            max_frames=args.max_frames,
            max_steps=args.max_steps,
            max_waiting=args.max_waiting,
            max_upload=args.max_upload * 2**20,
            height=size[0],
            width=size[1],
            frames=args.frames or total_pixel_frames(own, model.temporal_ratio),
            steps=args.steps,
            guidance=args.guidance,
            fps=args.fps or model.default_fps,
            temporal_ratio=model.temporal_ratio,
            size_multiple=model.size_multiple,
        )
    except RequestError as error:
        raise UsageError(f"--size, --frames, --steps and their --max-...: {error}") from error


def _bound(host: str, port: int) -> socket.socket:
    """A socket bound to the address."""
    if port > 65535:
        raise UsageError(f"--host, --port: got port {port}, expected at most 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
    except OSError as error:
        raise UsageError(f"--host, --port: got {host!r} and {port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise UsageError(f"--host, --port: cannot listen at {host!r}, port {port}: {error.strerror}") from error
    return listener
