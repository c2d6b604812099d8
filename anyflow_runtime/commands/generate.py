"""Make a video from a prompt, and from a picture or a clip that it is to continue.

The model is a pipeline directory in diffusers' format, causal (FAR) or bidirectional. What is not given follows from
the model: a FAR model makes the video its chunks add up to, in those chunks.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from .arguments import BACKENDS, chunk_partition, dtype_name, frame_size, guidance_scale, whole_number

if TYPE_CHECKING:
    from .generate_request import GenerateRequest
    from .stages import StageClock


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = whole_number(1)
    parser.add_argument("prompt_text", nargs="?", metavar="TEXT", help="the prompt, as --prompt")
    parser.add_argument("--model", required=True, metavar="DIR", help="pipeline directory in diffusers' format")
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
        "--size", type=frame_size, default=(480, 832), metavar="HxW", help="multiples of 16; default 480x832"
    )
    video.add_argument("--chunks", type=chunk_partition, metavar="1,3,3,...", help="latent frames per chunk (FAR)")
    video.add_argument("--fps", type=whole, default=16, metavar="N", help="frames per second of the file; default 16")

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
    machine.add_argument("--offload", action="store_true", help="keep on the GPU only the model that is running")
    machine.add_argument("--compile", action="store_true", help="compile the transformer blocks (torch.compile)")

    output = parser.add_argument_group("further output")
    output.add_argument("--stats", metavar="FILE", help="JSON: settings, seconds per stage and chunk, peak memory")
    output.add_argument("--save-latents", metavar="FILE", help="safetensors: latents (1, C, F, H/8, W/8), as denoised")


def run(args: argparse.Namespace) -> int:
    from .generate_request import check_request
    from .stages import StageClock

    request = check_request(args)
    clock = StageClock(request.device)
    steps = _generate(request, clock)
    memory = clock.peak_memory()
    print(_summary(request, clock.seconds, memory))
    if request.stats is not None:
        request.stats.write_text(json.dumps(_stats(request, clock.seconds, memory, steps), indent=1) + "\n")
    return 0


def _generate(request: GenerateRequest, clock: StageClock) -> list[float]:
    """All stages; the seconds since the start of denoising at which each of its steps was done."""
    from ..video_io import VideoWriter
    from . import generate_stages as stages

    with clock("load"):
        pipe = stages.load(request)
    with clock("text"):
        prompt_embeds, negative_prompt_embeds = stages.encode_text(pipe, request)
    context_latents = None
    if request.context is not None:
        with clock("context"):
            context_latents = stages.encode_context(pipe, request)
    steps: list[float] = []
    with clock("denoise"):
        start = clock.now()
        latents = stages.denoise(
            pipe,
            request,
            prompt_embeds,
            negative_prompt_embeds,
            context_latents,
            on_step=lambda: steps.append(clock.now() - start),
        )
    if request.save_latents is not None:
        from safetensors.torch import save_file

        save_file({"latents": latents.cpu().contiguous()}, request.save_latents)
    parts = stages.decode(pipe, latents)
    with VideoWriter(request.out, request.fps, pixel_range="signed") as writer:
        while True:
            with clock("decode"):
                frames = next(parts, None)
            if frames is None:
                break
            with clock("write"):
                writer.write(frames)
        with clock("write"):
            writer.close()
    return steps


def _summary(request: GenerateRequest, seconds: dict[str, float], memory: dict[str, int]) -> str:
    height, width = request.size
    chunks = f", chunks {','.join(map(str, request.chunks))}" if request.chunks else ""
    context = f", {request.context.shape[1]} of them given" if request.context is not None else ""
    sampling = f"{request.steps} steps, seed {request.seed}"
    lines = [f"{request.out}: {request.frames} frames{context}, {height}x{width}{chunks}, {sampling}"]
    lines += [f"  {stage:12}{value:9.2f} s" for stage, value in {**seconds, "total": sum(seconds.values())}.items()]
    lines += [f"  peak memory {size / 2**30:9.2f} GiB ({where})" for where, size in memory.items()]
    return "\n".join(lines)


def _stats(
    request: GenerateRequest, seconds: dict[str, float], memory: dict[str, int], steps: list[float]
) -> dict[str, Any]:
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
        "torch": torch.__version__,
    }
    return {
        "settings": settings,
        "seconds": seconds,
        "peak_memory_bytes": memory,
        "chunks": _chunk_seconds(request, steps),
    }


def _chunk_seconds(request: GenerateRequest, steps: list[float]) -> list[dict[str, Any]]:
    """Seconds of each generated chunk, from the end of the one before, so with the encoding of that into the cache."""
    chunks = request.chunks or (request.latent_frames,)
    done = steps[request.steps - 1 :: request.steps]
    first = len(chunks) - len(done)
    return [
        {"chunk": first + i, "latent_frames": chunks[first + i], "seconds": end - (done[i - 1] if i else 0.0)}
        for i, end in enumerate(done)
    ]
