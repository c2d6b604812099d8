"""Open the live view: a page on localhost that shows frames while the model makes them.

Type a prompt and watch; prompt and steps may change from chunk to chunk. One video is made at a time, further ones wait
in a queue. The model is a causal (FAR) pipeline directory in diffusers' format. Anyone who can reach the address can
use the page, so think before you bind to another one than localhost.
"""

from __future__ import annotations

import argparse
import socket
import sys
from typing import TYPE_CHECKING, Any

from . import UsageError
from .arguments import BACKENDS, dtype_name, frame_size, resolve_device, whole_number

if TYPE_CHECKING:
    from ..serving.limits import Limits

MAX_CONNECTIONS = 64
_ANY_ADDRESS = ("", "0.0.0.0", "::")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = whole_number(1)
    parser.add_argument("--model", required=True, metavar="DIR", help="causal pipeline directory, diffusers' format")

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

    video = parser.add_argument_group("video")
    video.add_argument("--size", type=frame_size, default=(480, 832), metavar="HxW", help="at first; default 480x832")
    video.add_argument("--max-size", type=frame_size, metavar="HxW", help="largest sides; default: that of --size")
    video.add_argument("--frames", type=whole, default=81, metavar="N", help="at first, 4n + 1; default 81")
    video.add_argument("--max-frames", type=whole, default=241, metavar="N", help="longest video; default 241")
    video.add_argument("--steps", type=whole, default=4, metavar="N", help="denoising steps at first; default 4")
    video.add_argument("--max-steps", type=whole, default=16, metavar="N", help="default 16")
    video.add_argument("--fps", type=whole, default=16, metavar="N", help="frames per second; default 16")

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    machine.add_argument("--dtype", type=dtype_name, help="bf16, fp16 or fp32; default: bf16 on a GPU, fp32 on a CPU")
    machine.add_argument("--backend", choices=BACKENDS, default="auto", help="see anyflow info; default auto")
    machine.add_argument("--compile", action="store_true", help="compile the transformer blocks (torch.compile)")


def run(args: argparse.Namespace) -> int:
    try:
        import uvicorn
    except ImportError as error:
        raise UsageError(f"serve needs a web server: pip install 'anyflow-kernels[serve]' ({error})") from error
    import torch

    from anyflow_kernels import load_ops

    from .model_directory import read_model_directory

    limits = _limits(args)
    device = resolve_device(args.device)
    load_ops(args.backend)  # raises, with the reason, if it cannot run here
    model = read_model_directory(args.model)
    if not model.causal:
        raise UsageError(f"--model: {model.path} holds {model.pipeline}, expected a causal (FAR) model")
    dtype = getattr(torch, args.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    # Before the model: an address in use should not cost the minutes of loading it.
    with _bound(args.host, args.port) as listener:
        app = build_app(args, limits, model, device, dtype)
        host = f"[{args.host}]" if ":" in args.host else args.host
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
    from .generate_stages import load_pipeline
    from .generate_stream import streaming_pipeline

    pipe = load_pipeline(model, device=device, dtype=dtype, backend=args.backend, compile=args.compile)
    pipeline = streaming_pipeline(pipe, args.steps, prompts=True, decode=True)
    videos = VideoStore()
    engine = StreamEngine(pipeline, videos, limits)
    own_names = () if args.host in _ANY_ADDRESS else (args.host,)
    return create_app(engine.run, engine.partition, videos, limits, (*LOOPBACK, *own_names, *args.allow_host))


def _limits(args: argparse.Namespace) -> Limits:
    from ..serving.limits import Limits, RequestError

    height, width = args.max_size or args.size
    try:
        return Limits(
            max_height=height,
            max_width=width,
            max_frames=args.max_frames,
            max_steps=args.max_steps,
            max_waiting=args.max_waiting,
            height=args.size[0],
            width=args.size[1],
            frames=args.frames,
            steps=args.steps,
            fps=args.fps,
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
