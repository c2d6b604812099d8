"""Train the demo model for about a minute, then sample from it in any number of steps.

    python examples/train_demo_minute.py [--out runs/minute] [--steps 150]

Flow matching first, then the flow map, on moving shapes that are made on the fly: the demo's recipe, made short. You
see the losses fall, and at the end a picture: one caption at 1, 2 and 4 steps, a row each, frames from left to right. A
minute gives the background and a blob that is not yet the right one; the bundled model took an hour. Run again with the
same arguments, it continues where it was.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch: threads that spin are slow on a busy machine

import torch

from anyflow_runtime import open_model, stream
from anyflow_runtime.training import load_recipe, train
from anyflow_runtime.video_io import VideoWriter

CAPTION = "a red circle moves right over navy"


def main(argv: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/minute"))
    parser.add_argument("--steps", type=int, default=150, help="of training, two thirds of them flow matching")
    parser.add_argument("--batch", type=int, default=16)
    args = parser.parse_args(argv)

    first = max(1, 2 * args.steps // 3)
    phases = [
        {"objective": "flow_matching", "iterations": first, "lr": 2e-3, "warmup": min(20, first)},
        {"objective": "flow_map", "iterations": max(1, args.steps - first), "lr": 1e-3, "warmup": min(10, first)},
    ]
    changes = {"phases": phases, "batch_size": args.batch, "sample_every": None, "plot": False}
    changes["ema"] = {"decay": 0.95, "warmup": min(20, first)}
    model = train(load_recipe("demo", changes), args.out)

    pipeline = open_model(model)
    rows = []
    for steps in (1, 2, 4):
        chunks = stream(pipeline, CAPTION, steps=steps, seed=0)
        frames = torch.cat([chunk[0].float().cpu() for chunk in chunks])  # (T, 3, H, W) in [-1, 1]
        rows.append(torch.cat(list(frames), dim=-1))
    sheet = args.out / "any_step.png"
    with VideoWriter(sheet, zoom=8) as writer:
        writer.write((torch.cat(rows, dim=-2)[None] + 1) / 2)
    print(f"{sheet}: {CAPTION!r}, from the top 1, 2 and 4 steps")
    return sheet


if __name__ == "__main__":
    main()
