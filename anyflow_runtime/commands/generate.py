"""Make a video from a prompt, and from a picture or a clip that it is to continue.

The model is a pipeline directory in diffusers' format, causal (FAR) or bidirectional, such a repository on the Hugging
Face Hub, or "demo", the small one that comes with this package. What is not given follows from the model: a FAR model
makes the video its chunks add up to, in those chunks, and each chunk is in the file as soon as it is made. Ctrl-C ends
the video with the last finished one.
"""

from __future__ import annotations

import argparse
from contextlib import suppress

from .arguments import chunk_partition, frame_size, guidance_scale, machine_arguments, whole_number


def add_arguments(parser: argparse.ArgumentParser) -> None:
    whole = whole_number(1)
    parser.add_argument("prompt_text", nargs="?", metavar="TEXT", help="the prompt, as --prompt")
    parser.add_argument(
        "--model",
        required=True,
        metavar="MODEL",
        help='pipeline directory in diffusers\' format, a hub id (owner/name), a preset, or "demo"',
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

    machine = machine_arguments(parser)
    machine.add_argument(
        "--context-parallel",
        choices=("auto", "ulysses", "ring"),
        default="auto",
        help="how the processes of torchrun share attention: by heads (ulysses), by passing keys round (ring), or by "
        "heads where they divide (auto, the default)",
    )
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
    from .generate_request import check_request
    from .generate_video import GeneratedVideo

    with processes(args) as together:
        request = check_request(args)
        video = GeneratedVideo(request, together)
        if not together.first:
            video.make()
            return 0
        try:
            video.make()
        except BaseException:
            if video.chunks:
                frames = sum(chunk["frames"] for chunk in video.chunks)
                print(f"{request.out}: stopped after chunk {video.chunks[-1]['chunk']}, {frames} generated frames")
                with suppress(OSError):  # what stopped it matters more, and may be a full disk
                    video.write_stats(complete=False)
            raise
        print(video.summary())
        video.write_stats(complete=True)
    return 0
