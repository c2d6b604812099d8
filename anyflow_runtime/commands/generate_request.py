"""The arguments of `anyflow generate`, all checked before a model is loaded."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from anyflow_kernels import load_ops

from ..causal_time import context_lengths, partition_for, total_latent_frames, total_pixel_frames
from ..streaming.model_directory import ModelDirectory
from ..video_io import read_image, read_video
from . import UsageError
from .arguments import model_directory, model_options, resolve_device, resolve_dtype

OUTPUTS = (".mp4", ".gif", ".png")
_DEFAULT_FRAMES = 81


@dataclass(frozen=True)
class GenerateRequest:
    """What to generate, from arguments that fit together.

    Attributes:
        prompt, negative_prompt: texts; None where embeddings are given, or none is wanted.
        embeds: "prompt_embeds" and maybe "negative_prompt_embeds", (1, S, text_dim) each, or empty.
        context: (1, T, 3, height, width) in [0, 1], the frames the video begins with, or None.
        chunks: latent frames per chunk, or None for a model that is not causal.
        frames: of the video, context included.
        size: height and width in pixels.
        overlap: decode chunks while later ones are denoised.
        zoom: side of the square that the file shows for each pixel.
    """

    model: ModelDirectory
    prompt: str | None
    negative_prompt: str | None
    embeds: dict[str, Tensor]
    context: Tensor | None
    chunks: tuple[int, ...] | None
    frames: int
    size: tuple[int, int]
    steps: int
    seed: int
    guidance: float
    dtype: torch.dtype
    device: torch.device
    backend: str
    match_diffusers_padding: bool
    options: dict[str, Any]
    compile: bool
    out: Path
    fps: int
    zoom: int
    stats: Path | None
    save_latents: Path | None
    check_finite: bool
    overlap: bool

    @property
    def latent_frames(self) -> int:
        return total_latent_frames(self.frames, self.model.temporal_ratio)

    def generated_chunks(self, given: int) -> int:
        """Chunks that are not given, for a video that begins with `given` latent frames."""
        return sum(1 for end in accumulate(self.chunks or (self.latent_frames,)) if end > given)


def check_request(args: argparse.Namespace) -> GenerateRequest:
    """The request, or an error that names the argument, what came and what was expected.

    Raises:
        UsageError, OSError, ValueError: on anything that cannot work; nothing has been loaded or written then.
    """
    device = resolve_device(args.device)
    load_ops(args.backend)  # raises, with the reason, if it cannot run here
    out = Path(args.out)
    if out.suffix.lower() not in OUTPUTS:
        raise UsageError(f"--out: got {args.out!r}, expected a name that ends in {', '.join(OUTPUTS)}")
    written = {"--out": args.out, "--stats": args.stats, "--save-latents": args.save_latents}
    for name, path in written.items():
        _check_writable(name, path)
    _check_apart(written, {"--image": args.image, "--video": args.video, "--prompt-embeds": args.prompt_embeds})
    prompt = _prompt(args)
    model = model_directory(args.model, text=args.prompt_embeds is None)
    if args.match_diffusers_padding and not model.causal:
        raise UsageError(f"--match-diffusers-padding: got with {model.pipeline}, expected a causal (FAR) model")
    size = args.size or model.default_size
    if any(side % model.size_multiple for side in size):
        raise UsageError(f"--size: got {size[0]}x{size[1]}, expected multiples of {model.size_multiple}")
    frames, chunks = _frames_and_chunks(args, model)
    return GenerateRequest(
        model=model,
        prompt=prompt,
        negative_prompt=args.negative_prompt,
        embeds=_embeds(args, model),
        context=_context(args, frames, chunks, size, model.temporal_ratio),
        chunks=chunks,
        frames=frames,
        size=size,
        steps=args.steps,
        seed=args.seed,
        guidance=args.guidance,
        dtype=resolve_dtype(args.dtype, device),
        device=device,
        backend=args.backend,
        match_diffusers_padding=args.match_diffusers_padding,
        options=model_options(args, model, device),
        compile=args.compile,
        out=out,
        fps=args.fps or model.default_fps,
        zoom=args.zoom or model.default_zoom,
        stats=Path(args.stats) if args.stats else None,
        save_latents=Path(args.save_latents) if args.save_latents else None,
        check_finite=args.check_finite,
        overlap=_overlap(args.overlap, model, device),
    )


def _overlap(asked: bool | None, model: ModelDirectory, device: torch.device) -> bool:
    if asked and not model.causal:
        raise UsageError(f"--overlap: got with {model.pipeline}, which has no chunks; expected a causal (FAR) model")
    return model.causal and (device.type == "cuda" if asked is None else asked)


def _check_writable(name: str, path: str | None) -> None:
    if path is None:
        return
    if Path(path).is_dir():
        raise UsageError(f"{name}: got the directory {path}, expected a file")
    parent = Path(path).absolute().parent
    if not parent.is_dir():
        raise UsageError(f"{name}: no directory {parent}")
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{name}: cannot write to {parent}")


def _check_apart(written: Mapping[str, str | None], read: Mapping[str, str | None]) -> None:
    """No file is written twice, or over one that is read."""
    names: dict[Path, str] = {}
    for name, path in [*read.items(), *written.items()]:
        if path is None:
            continue
        other = names.setdefault(Path(path).resolve(), name)
        if other != name and name in written:
            raise UsageError(f"{name}: got {path}, the file of {other}, expected another one")


def _prompt(args: argparse.Namespace) -> str | None:
    given = [text for text in (args.prompt_text, args.prompt, args.prompt_embeds) if text is not None]
    if len(given) != 1:
        raise UsageError(f"prompt: got {len(given)} of them, expected one: TEXT, --prompt TEXT or --prompt-embeds FILE")
    if args.negative_prompt is not None:
        if args.prompt_embeds is not None:
            raise UsageError("--negative-prompt: got with --prompt-embeds, expected negative_prompt_embeds in its file")
        if args.guidance == 1.0:
            raise UsageError("--negative-prompt: has no effect at --guidance 1, expected --guidance above 1")
    prompt = args.prompt if args.prompt is not None else args.prompt_text
    if prompt is None or not prompt.endswith(".txt"):
        return prompt
    path = Path(prompt)
    if not path.is_file():
        raise UsageError(f"--prompt: no file {path}")
    try:
        text = path.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        raise UsageError(f"--prompt: {path} is not UTF-8 text ({error})") from error
    if not text:
        raise UsageError(f"--prompt: {path} is empty")
    return text


def _embeds(args: argparse.Namespace, model: ModelDirectory) -> dict[str, Tensor]:
    """The tensors of --prompt-embeds that are needed, each (1, S, text_dim)."""
    if args.prompt_embeds is None:
        return {}
    path = Path(args.prompt_embeds)
    if not path.is_file():
        raise UsageError(f"--prompt-embeds: no file {path}")
    needed = ["prompt_embeds"] + (["negative_prompt_embeds"] if args.guidance > 1 else [])
    try:
        with safe_open(path, framework="pt") as file:
            missing = sorted(set(needed) - set(file.keys()))
            if missing:
                have = ", ".join(file.keys()) or "nothing"
                raise UsageError(f"--prompt-embeds: {path} holds {have}, expected {', '.join(needed)}")
            embeds = {name: file.get_tensor(name) for name in needed}
    except SafetensorError as error:
        raise UsageError(f"--prompt-embeds: {path} is not a readable safetensors file ({error})") from error
    width = model.transformer.get("text_dim", 4096)
    for name, tensor in embeds.items():
        shape = tuple(tensor.shape)
        embeds[name] = tensor[None] if tensor.ndim == 2 else tensor
        if embeds[name].ndim != 3 or embeds[name].shape[0] != 1 or shape[-1] != width or not shape[-2]:
            raise UsageError(f"--prompt-embeds: {name} is {shape}, expected (tokens, {width}) or (1, tokens, {width})")
        if not tensor.is_floating_point():
            raise UsageError(f"--prompt-embeds: {name} is {tensor.dtype}, expected floating point")
    if len({tensor.shape for tensor in embeds.values()}) > 1:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in embeds.items())
        raise UsageError(f"--prompt-embeds: got {shapes}, expected one shape: guidance runs both in one batch")
    return embeds


def _frames_and_chunks(args: argparse.Namespace, model: ModelDirectory) -> tuple[int, tuple[int, ...] | None]:
    """Frames of the video and its chunks. What is not given follows from the other, or from the model."""
    if args.chunks is not None and not model.causal:
        raise UsageError(f"--chunks: got with {model.pipeline}, which has none; expected a causal (FAR) model")
    own, ratio = model.chunk_partition, model.temporal_ratio
    if args.frames:
        frames = args.frames
    else:
        frames = total_pixel_frames(sum(args.chunks or own), ratio) if args.chunks or own else _DEFAULT_FRAMES
    try:
        latent_frames = total_latent_frames(frames, ratio)
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    if not model.causal:
        return frames, None
    if args.chunks is not None:
        total = sum(args.chunks)
        if total != latent_frames:
            raise UsageError(
                f"--chunks: got {list(args.chunks)}, which sums to {total}, expected the {latent_frames} latent frames "
                f"of {frames} frames"
            )
        return frames, args.chunks
    if sum(own) < latent_frames:
        raise UsageError(
            f"--chunks: needed, for the model's own {list(own)} cover {sum(own)} of the {latent_frames} latent frames "
            f"of {frames} frames"
        )
    return frames, partition_for(latent_frames, own)


def _context(
    args: argparse.Namespace, frames: int, chunks: tuple[int, ...] | None, size: tuple[int, int], ratio: int
) -> Tensor | None:
    """The given frames, (1, T, 3, H, W) in [0, 1]."""
    if args.context_frames is not None and args.video is None:
        raise UsageError("--context-frames: got without --video, of which it takes the first frames")
    if args.image is None and args.video is None:
        return None
    name, path = ("--image", args.image) if args.image is not None else ("--video", args.video)
    if not Path(path).is_file():
        raise UsageError(f"{name}: no file {path}")
    if args.image is not None:
        context = read_image(path, size)[None]
    else:
        context = _read_video(path, args.context_frames, frames, size)
    count = len(context)
    allowed = context_lengths(total_latent_frames(frames, ratio), chunks, ratio)
    if count not in allowed:
        cure = " (--context-frames takes the first ones of a longer video)" if args.video is not None else ""
        got = f"{count}{' or more' if count == frames else ''} frames"
        which = f"{frames} frames" + (f" in chunks {list(chunks)}" if chunks else "")
        lengths = ", ".join(map(str, allowed)) or "none"
        raise UsageError(
            f"{name}: got {got} as context of {which}, expected one of: {lengths}{cure}; "
            + ("context ends with a chunk" if chunks else f"context is {ratio}n + 1 frames")
            + " and is shorter than the video"
        )
    return context[None]


def _read_video(path: str, wanted: int | None, frames: int, size: tuple[int, int]) -> Tensor:
    """The first frames of a video, or all, but no more than the video to generate has: a film would fill the memory."""
    if wanted is not None:
        return read_video(path, wanted, size)
    try:
        return read_video(path, frames, size)
    except ValueError:  # it is shorter, as it should be, or damaged, which shows again
        return read_video(path, None, size)
