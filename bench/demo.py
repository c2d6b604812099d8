"""`make demo`: the bundled model makes videos at 1, 2, 4 and 8 steps, and what they show is measured from the pixels.

    python -m bench.demo [--out DIR] [--model DIR] [--videos 64]

It is a FAR model of 1.5 million parameters, trained by this package (`scripts/train_demo.sh`), on moving shapes whose
captions say what must be seen. Captions of the table and of the sheet were never seen in training.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from anyflow_runtime.streaming.pixel_model import DEMO_MODEL, read_index
from anyflow_runtime.training.demo.any_step import HeldOut, continuation, evaluate, load, sample
from anyflow_runtime.training.demo.shapes import AMPLITUDE, parse_caption
from anyflow_runtime.video_io import VideoWriter

from .common import machine_line
from .contact_sheet import contact_sheet

STEPS = (1, 2, 4, 8)
CAPTIONS = (
    "a red circle moves left over black",
    "a blue square moves slowly right over navy",
    "a yellow square moves quickly up over grey",
    "a green triangle moves down over navy",
    "a white circle moves quickly left over grey",
    "a red triangle moves left and a white circle moves right over grey",
)
COLUMNS = {
    "found": "found",
    "shape_right": "shape",
    "colour_right": "colour",
    "direction_right": "direction",
    "direction_error": "angle, deg",
    "speed_error": "speed off",
    "residual": "residual",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo_out"))
    parser.add_argument("--model", type=Path, default=DEMO_MODEL, help="directory of a pixel model")
    parser.add_argument("--videos", type=int, default=64, help="held-out captions of the table")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    print(machine_line())
    pipeline, index = load(args.model), read_index(args.model)
    size = sum(p.numel() for p in pipeline.parameters()) / 1e6
    print(f"{args.model.name}: {size:.2f} million parameters, {index.width}x{index.height}\n")

    videos: dict[int, Tensor] = {}
    for steps in STEPS:
        start = time.perf_counter()
        videos[steps] = sample(pipeline, CAPTIONS, steps, args.seed) / AMPLITUDE
        seconds = time.perf_counter() - start
        print(f"{len(CAPTIONS)} videos of {videos[steps].shape[1]} frames at {steps} steps: {seconds:.2f} s")
    write_media(args.out, videos, index.fps)

    print(f"\n{args.videos} captions that training has not seen: share of objects that are right, and mean errors")
    held_out, two = HeldOut.draw(args.videos), HeldOut.draw(args.videos // 2, objects=2)
    print(f"{'':<22}" + "".join(f"{title:>11}" for title in COLUMNS.values()))
    rows = {name_of(steps): row for steps, row in evaluate(pipeline, held_out, STEPS, args.seed).items()}
    rows["real videos"] = held_out.real()
    rows["two objects, 4 steps"] = evaluate(pipeline, two, (4,), args.seed)[4]
    for name, row in rows.items():
        print(f"{name:<22}" + "".join(f"{row[key]:11.3f}" for key in COLUMNS))
    print("\ngoing on from given frames, 4 steps: RMS distance from the real video's objects, pixels")
    for given, name in ((1, "one frame (I2V)"), (3, "three frames (V2V)")):
        row = continuation(pipeline, held_out, given, 4, args.seed)
        print(f"{name:<22}{row['error']:11.2f}   (objects that stood still: {row['standing_still']:.2f})")
    print(f"\nwrote {args.out}/: contact_sheet.png, and a GIF per caption with 1, 2, 4 and 8 steps side by side")


def name_of(steps: int) -> str:
    return f"{steps} step{'s' * (steps > 1)}"


def write_media(out: Path, videos: dict[int, Tensor], fps: int) -> None:
    """The sheet, and for each caption a GIF.

    Args:
        videos: (B, F, 3, H, W) in [0, 1] by number of steps, B as `CAPTIONS`.
    """
    rows = {name_of(steps): video for steps, video in videos.items()}
    contact_sheet(rows, CAPTIONS).save(out / "contact_sheet.png")
    for i, caption in enumerate(CAPTIONS):
        scene = parse_caption(caption)
        name = "_and_".join(f"{o.colour}_{o.shape}" for o in scene.objects)
        gap = torch.ones_like(next(iter(videos.values()))[i][..., :1])
        parts = [part for video in videos.values() for part in (video[i], gap)][:-1]
        with VideoWriter(out / f"{name}.gif", fps=fps, zoom=8) as writer:
            writer.write(torch.cat(parts, dim=-1))


if __name__ == "__main__":
    main()
