"""Make a video from a prompt, and from a picture or a clip that it is to continue.

The model is a pipeline directory in diffusers' format, causal (FAR) or bidirectional, or "demo", the small one that
comes with this package. What is not given follows from the model: a FAR model makes the video its chunks add up to, in
those chunks, and each chunk is in the file as soon as it is made. Ctrl-C ends the video with the last finished one.
"""

from __future__ import annotations

import argparse
import json
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from .arguments import BACKENDS, chunk_partition, dtype_name, frame_size, guidance_scale, whole_number

if TYPE_CHECKING:
    from torch import Tensor

    from .generate_processes import Processes
    from .generate_request import GenerateRequest
    from .stages import StageClock

_CHUNK_STAGES = ("denoise", "decode", "write")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = whole_number(1)
    parser.add_argument("prompt_text", nargs="?", metavar="TEXT", help="the prompt, as --prompt")
    parser.add_argument(
        "--model", required=True, metavar="DIR", help='pipeline directory in diffusers\' format, or "demo"'
    )
    parser.add_argument("--out", required=True, metavar="FILE", help=".mp4, .gif, or .png for a sheet of frames")

    condition = parser.add_argument_group("condition")
    condition.add_argument("--prompt", metavar="TEXT", help="the prompt, or a .txt file that holds it")
    condition.add_argument(
        "--prompt-embeds",
        metavar="FILE",
        help="safetensors with prompt_embeds (tokens, text_dim), and negative_prompt_embeds for guidance, in place of "
        "a prompt; the text encoder is not loaded",
    )
    condition.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    given = condition.add_mutually_exclusive_group()
    given.add_argument("--image", metavar="FILE", help="the first frame")
    given.add_argument("--video", metavar="FILE", help="the first frames, ending with a chunk")
    condition.add_argument("--context-frames", type=whole, metavar="N", help="take the first N frames of --video")

    video = parser.add_argument_group("video")
    video.add_argument(
        "--frames", type=whole, metavar="N", help="4n + 1, context included; default: that of the model, or 81"
    )
    video.add_argument(
        "--size", type=frame_size, metavar="HxW", help="multiples of 16; default 480x832, or what the model says"
    )
    video.add_argument("--chunks", type=chunk_partition, metavar="1,3,3,...", help="latent frames per chunk (FAR)")
    video.add_argument("--fps", type=whole, metavar="N", help="frames per second of the file; default 16, demo 4")
    video.add_argument("--zoom", type=whole, metavar="N", help="show every pixel as N x N; default 1, demo 16")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--steps", type=whole, default=4, metavar="N", help="denoising steps; default 4")
    sampling.add_argument("--seed", type=whole_number(0), default=0, metavar="N", help="of the noise; default 0")
    sampling.add_argument(
        "--guidance",
        type=guidance_scale,
        default=1.0,
        metavar="X",
        help="classifier-free guidance scale; default 1, off",
    )
    sampling.add_argument(
        "--match-diffusers-padding",
        action="store_true",
        help="reproduce the zero keys that diffusers' FAR inference adds to every softmax, to compare with it",
    )

    machine = parser.add_argument_group("machine")
    machine.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    machine.add_argument("--dtype", type=dtype_name, help="bf16, fp16 or fp32; default: bf16 on a GPU, fp32 on a CPU")
    machine.add_argument("--backend", choices=BACKENDS, default="auto", help="see anyflow info; default auto")
    machine.add_argument("--offload", action="store_true", help="keep on the GPU only the models that are running")
    machine.add_argument(
        "--context-parallel",
        choices=("auto", "ulysses", "ring"),
        default="auto",
        help="how the processes of torchrun share attention: by heads (ulysses), by passing keys round (ring), or by "
        "heads where they divide (auto, the default)",
    )
    machine.add_argument("--compile", action="store_true", help="compile the transformer blocks (torch.compile)")

    machine.add_argument(
        "--check-finite",
        action="store_true",
        help="stop at the first weight, embedding, latent or frame that is NaN or infinite; slower",
    )
    machine.add_argument(
        "--overlap",
        action=argparse.BooleanOptionalAction,
        help="decode a chunk while the next one is denoised (FAR); default: on a GPU, as both want all of a CPU",
    )

    output = parser.add_argument_group("further output")
    output.add_argument("--stats", metavar="FILE", help="JSON: settings, seconds per stage and chunk, peak memory")
    output.add_argument("--save-latents", metavar="FILE", help="safetensors: latents (1, C, F, H/8, W/8), as denoised")


def run(args: argparse.Namespace) -> int:
    from .generate_processes import processes

    with processes(args) as together:
        return _run(args, together)


def _run(args: argparse.Namespace, together: Processes) -> int:
    from .generate_request import check_request
    from .stages import StageClock

    request = check_request(args)
    clock = StageClock(request.device)
    chunks: list[dict[str, Any]] = []
    if not together.first:
        _generate(request, clock, chunks, together)
        return 0
    try:
        _generate(request, clock, chunks, together)
    except BaseException:
        if chunks:
            frames = sum(chunk["frames"] for chunk in chunks)
            print(f"{request.out}: stopped after chunk {chunks[-1]['chunk']}, {frames} generated frames")
            with suppress(OSError):  # what stopped it matters more, and may be a full disk
                _write_stats(request, clock, chunks, together.count, complete=False)
        raise
    print(_summary(request, clock))
    _write_stats(request, clock, chunks, together.count, complete=True)
    return 0


def _generate(request: GenerateRequest, clock: StageClock, chunks: list[dict[str, Any]], together: Processes) -> None:
    """All stages; every chunk that is finished is added to `chunks`."""
    from . import generate_stages as stages
    from .generate_processes import denoise_only

    with clock("load"):
        pipe = stages.load(request)
        together.share(pipe.transformer)
    with clock("text"):
        prompt_embeds, negative_prompt_embeds = stages.encode_text(pipe, request)
    if request.check_finite:
        stages.check_text(pipe, prompt_embeds, negative_prompt_embeds)
    context_latents = None
    if request.context is not None:
        with clock("context"):
            context_latents = stages.encode_context(pipe, request)
    if not together.first:
        denoise_only(pipe, request, prompt_embeds, negative_prompt_embeds, context_latents)
        return
    make = _make_whole if request.chunks is None else _make_chunks
    make(pipe, request, clock, chunks, prompt_embeds, negative_prompt_embeds, context_latents)


def _make_chunks(
    pipe: Any,
    request: GenerateRequest,
    clock: StageClock,
    chunks: list[dict[str, Any]],
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    context_latents: Tensor | None,
) -> None:
    """Denoise, decode and write the chunks in order. What is finished is kept whatever happens."""
    from tqdm import tqdm

    from ..video_io import VideoWriter
    from .generate_stream import ChunkedVideo

    given = 0 if context_latents is None else context_latents.shape[1]
    finished: list[Tensor] = []
    latent_frames = 0
    begin = clock.now()
    try:
        with (
            VideoWriter(request.out, request.fps, pixel_range="signed", zoom=request.zoom) as writer,
            tqdm(total=request.frames, unit="frame", disable=None) as progress,
        ):
            with clock("denoise"):
                video = ChunkedVideo(pipe, request)
                parts = video.latents(prompt_embeds, negative_prompt_embeds, context_latents)
            with closing(video.frames(parts, clock, finished)) as made:
                for index, (frames, spent) in enumerate(made):
                    before = clock.seconds.get("write", 0.0)
                    with clock("write"):
                        writer.write(frames)
                    spent["write"] = clock.seconds["write"] - before
                    progress.update(len(frames))
                    latent_frames += finished[index].shape[1]
                    if latent_frames > given:
                        chunks.append(_chunk(index, finished[index].shape[1], len(frames), spent, clock.now() - begin))
            with clock("write"):
                writer.close()
    except BaseException:
        with suppress(Exception):  # what stopped it matters more, and may be a full disk
            _save_latents(request, finished)
        raise
    _save_latents(request, finished)


def _make_whole(
    pipe: Any,
    request: GenerateRequest,
    clock: StageClock,
    chunks: list[dict[str, Any]],
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    context_latents: Tensor | None,
) -> None:
    """Denoise the whole video, then decode and write it."""
    from ..errors import check_finite, check_finite_weights
    from ..video_io import VideoWriter
    from . import generate_stages as stages

    if request.check_finite:
        check_finite_weights("transformer", pipe.transformer)
        check_finite_weights("vae", pipe.vae)
    begin = clock.now()
    steps: list[float] = []
    with clock("denoise"):
        latents = stages.denoise(
            pipe,
            request,
            prompt_embeds,
            negative_prompt_embeds,
            context_latents,
            on_step=lambda: steps.append(clock.now() - begin),
        )
    if request.check_finite:
        check_finite("latents", latents)
    _save_latents(request, [latents.transpose(1, 2)])
    with VideoWriter(request.out, request.fps, pixel_range="signed", zoom=request.zoom) as writer:
        parts = stages.decode(pipe, latents)
        while True:
            with clock("decode"):
                frames = next(parts, None)
            if frames is None:
                break
            with clock("write"):
                writer.write(frames)
        with clock("write"):
            writer.close()
    spent = {stage: clock.seconds[stage] for stage in _CHUNK_STAGES} | {"denoise": steps[-1]}
    chunks.append(_chunk(0, request.latent_frames, request.frames, spent, clock.now() - begin))


def _chunk(index: int, latent_frames: int, frames: int, spent: dict[str, float], end: float) -> dict[str, Any]:
    """What the stats say of a chunk; `seconds` are those of denoising."""
    return {
        "chunk": index,
        "latent_frames": latent_frames,
        "frames": frames,
        "seconds": spent["denoise"],
        "decode_seconds": spent["decode"],
        "write_seconds": spent["write"],
        "written_after_seconds": end,
    }


def _save_latents(request: GenerateRequest, parts: list[Tensor]) -> None:
    """Write (1, F, C, h, w) latents of all chunks as one (1, C, F, h, w)."""
    if request.save_latents is None or not parts:
        return
    import torch
    from safetensors.torch import save_file

    save_file({"latents": torch.cat(parts, dim=1).transpose(1, 2).cpu().contiguous()}, request.save_latents)


def _summary(request: GenerateRequest, clock: StageClock) -> str:
    height, width = request.size
    chunks = f", chunks {','.join(map(str, request.chunks))}" if request.chunks else ""
    context = f", {request.context.shape[1]} of them given" if request.context is not None else ""
    sampling = f"{request.steps} steps, seed {request.seed}"
    lines = [f"{request.out}: {request.frames} frames{context}, {height}x{width}{chunks}, {sampling}"]
    seconds = {**clock.seconds, "total": clock.elapsed()}
    lines += [f"  {stage:12}{value:9.2f} s" for stage, value in seconds.items()]
    lines += [f"  peak memory {size / 2**30:9.2f} GiB ({where})" for where, size in clock.peak_memory().items()]
    return "\n".join(lines)


def _write_stats(
    request: GenerateRequest, clock: StageClock, chunks: list[dict[str, Any]], processes: int, complete: bool
) -> None:
    if request.stats is None:
        return
    import torch

    settings = {
        "model": str(request.model.path),
        "frames": request.frames,
        "context_frames": 0 if request.context is None else request.context.shape[1],
        "size": list(request.size),
        "steps": request.steps,
        "seed": request.seed,
        "guidance": request.guidance,
        "dtype": str(request.dtype).removeprefix("torch."),
        "device": str(request.device),
        "backend": request.backend,
        "processes": processes,
        "overlap": request.overlap,
        "torch": torch.__version__,
    }
    stats = {
        "settings": settings,
        "complete": complete,
        "seconds": clock.seconds,
        "peak_memory_bytes": clock.peak_memory(),
        "chunks": chunks,
    }
    request.stats.write_text(json.dumps(stats, indent=1) + "\n")
