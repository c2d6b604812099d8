"""Types of command line arguments, shared by the commands: each takes the text and returns the value."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..threads import suit_threads
from . import UsageError

if TYPE_CHECKING:
    import torch

    from ..streaming.model_directory import ModelDirectory
    from ..streaming.pipeline import StreamInferencePipeline

_SHORT = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
DTYPES = _SHORT | {name: name for name in _SHORT.values()}
T = TypeVar("T")
BACKENDS = ("auto", "triton", "torch", "reference")


def machine_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Add where and how a model runs, in a group that further options may join."""
    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    machine.add_argument("--dtype", type=dtype_name, help="bf16, fp16 or fp32; default: bf16 on a GPU, fp32 on a CPU")
    machine.add_argument("--backend", choices=BACKENDS, default="auto", help="see anyflow info; default auto")
    machine.add_argument("--compile", action="store_true", help="compile the transformer blocks (torch.compile)")
    machine.add_argument(
        "--offload",
        nargs="?",
        const="model",
        choices=("model", "group"),
        help="keep on the GPU only the models that are running; group: of the transformer only the blocks",
    )
    machine.add_argument(
        "--vae-tiling",
        nargs="?",
        type=whole_number(64),
        const=256,
        metavar="N",
        help="decode larger frames in tiles of N pixels; default of N 256",
    )
    adapters = parser.add_argument_group("adapters")
    adapters.add_argument(
        "--lora",
        action="append",
        default=[],
        type=lora_file,
        metavar="FILE[=WEIGHT]",
        help="a LoRA: a file, a directory or a hub id; several times for several; weight 1 by default",
    )
    adapters.add_argument("--fuse-lora", action="store_true", help="add them to the weights: as fast as without")
    return machine


def lora_file(text: str) -> tuple[str, float]:
    """`FILE[=WEIGHT]`: where an adapter lies, and its weight."""
    path, separator, weight = text.rpartition("=")
    if not separator:
        return text, 1.0
    try:
        return path, float(weight)
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected FILE or FILE=WEIGHT with a number") from None


def model_options(args: argparse.Namespace, model: ModelDirectory, device: torch.device) -> dict[str, Any]:
    """The keywords of `open_model` that stand for the options of `machine_arguments` about the model.

    Raises:
        UsageError: for options that do not fit the machine, the model or each other.
    """
    if args.offload and device.type != "cuda":
        raise UsageError(f"--offload: got with --device {device}, expected a GPU to offload from")
    if args.vae_tiling and model.pixels is not None:
        raise UsageError(f"--vae-tiling: got with {args.model}, which has no VAE")
    if args.fuse_lora and not args.lora:
        raise UsageError("--fuse-lora: got without --lora, expected an adapter to fuse")
    names = [Path(path).stem for path, _ in args.lora]
    if len(set(names)) < len(names):
        raise UsageError(f"--lora: got {', '.join(names)}, expected files of different names: they name the adapters")
    return {
        "offload": args.offload or False,
        "vae_tile_size": args.vae_tiling,
        "lora": {name: path for name, (path, _) in zip(names, args.lora, strict=True)},
        "lora_weights": {name: weight for name, (_, weight) in zip(names, args.lora, strict=True)},
        "fuse_lora": args.fuse_lora,
    }


def whole_number(minimum: int, maximum: int = 2**63 - 1) -> type:
    """The type of integers from `minimum` to `maximum`, the largest that torch takes."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if not minimum <= value <= maximum:
            limit = f" and <= {maximum}" if value > maximum else ""
            raise argparse.ArgumentTypeError(f"got {text!r}, expected a whole number >= {minimum}{limit}")
        return value

    return parse  # type: ignore[return-value]


def frame_size(text: str) -> tuple[int, int]:
    """`HxW`, as in 480x832: height and width in pixels."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected HEIGHTxWIDTH in pixels, such as 480x832")
    return int(height), int(width)


def chunk_partition(text: str) -> tuple[int, ...]:
    """`1,3,3`: latent frames per chunk."""
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected latent frames per chunk, such as 1,3,3")
    return tuple(int(part) for part in parts)


def guidance_scale(text: str) -> float:
    """A number >= 1; 1 is no guidance."""
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not 1.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number >= 1 (1: no guidance)")
    return value


def dtype_name(text: str) -> str:
    """The name of a dtype in torch, from it or its short form."""
    if text not in DTYPES:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected one of {', '.join(DTYPES)}")
    return DTYPES[text]


def resolve_device(text: str | None) -> torch.device:
    """The device named, or the first GPU, or the CPU. A GPU becomes the current one.

    Raises:
        UsageError: on a device that torch does not know or that is not here.
    """
    import torch

    if text is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(text)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UsageError(f"--device: got {text!r}, expected cpu, cuda or cuda:N")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device: got {text!r}, but torch {torch.__version__} sees {count} CUDA device(s) here")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def resolve_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The dtype of that name in torch, or the device's usual one."""
    import torch

    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def model_directory(path: str, text: bool = True) -> ModelDirectory:
    """What lies in the directory of `--model`, with its text encoder if that is needed.

    Raises:
        UsageError: if it is not there, is no AnyFlow pipeline, or lacks a component.
    """
    from ..streaming.model_directory import read_model_directory

    return _as_option(read_model_directory, path, text=text)


def open_pipeline(model: ModelDirectory, size: tuple[int, int], **settings: Any) -> StreamInferencePipeline:
    """`open_model`, whose errors name `--model`, on threads that suit videos of `size` = (height, width)."""
    from ..streaming import open_model

    suit_threads(model.chunk_tokens(size), model.channels)
    return _as_option(open_model, model, **settings)


def _as_option(function: Callable[..., T], *arguments: Any, **keywords: Any) -> T:
    try:
        return function(*arguments, **keywords)
    except (OSError, ValueError) as error:
        named = str(error).startswith(("model: ", "lora: "))
        raise UsageError(f"--{error}" if named else f"--model: {error}") from error
