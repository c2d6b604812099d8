"""A video whose prompt changes while it is made, written chunk by chunk.

    python examples/stream_prompt_change.py [--model demo] [--out change.gif]

The bundled model makes nine chunks: a red circle moves right; after three chunks it is told to move left, after six to
move up, with eight steps a chunk instead of two. You see a line per chunk as soon as its frames are there, then a file
in which the circle turns twice. Another --model (a preset's name or a directory) takes --prompt texts of yours.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence

from anyflow_runtime import open_model, stream
from anyflow_runtime.streaming import Change
from anyflow_runtime.video_io import VideoWriter

PROMPTS = (
    "a red circle moves right over black",
    "a red circle moves left over black",
    "a red circle moves up over black",
)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="demo, a preset's name, or a directory")
    parser.add_argument("--prompt", nargs="+", default=PROMPTS, help="one after the other")
    parser.add_argument("--chunks", type=int, default=3, help="of each prompt")
    parser.add_argument("--steps", type=int, default=2, help="of the first prompts; the last takes four times as many")
    parser.add_argument("--out", default="change.gif", help=".gif, .mp4, or .png for a sheet of frames")
    args = parser.parse_args(argv)

    pipeline = open_model(args.model, steps=args.steps)
    num_chunks = args.chunks * len(args.prompt)
    video = stream(pipeline, args.prompt[0], num_chunks=num_chunks, seed=0)
    zoom = 8 if args.model == "demo" else 1
    shown = 0
    start = time.perf_counter()
    with VideoWriter(args.out, fps=4 if args.model == "demo" else 16, zoom=zoom) as writer:
        change = None
        for index in range(num_chunks):
            frames = video.send(change)  # (1, T, 3, H, W) in [-1, 1]; send(None) asks for the next chunk
            writer.write((frames[0].float().cpu() + 1) / 2)
            shown += frames.shape[1]
            prompt = args.prompt[index // args.chunks]
            print(f"{time.perf_counter() - start:6.2f} s  chunk {index}: {frames.shape[1]} frames of {prompt!r}")
            following, place = divmod(index + 1, args.chunks)
            change = None
            if place == 0 and following < len(args.prompt):
                last = following == len(args.prompt) - 1
                change = Change(prompt=args.prompt[following], steps=4 * args.steps if last else None)
    print(f"{args.out}: {shown} frames")
    return shown


if __name__ == "__main__":
    main()
