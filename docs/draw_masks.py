"""Draws the attention masks that the page of `far_attention` shows: `python docs/draw_masks.py` from the root.

The layouts are those of the released causal models at 480 x 832, after five chunks; `FarLayout.draw` does the work.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from anyflow_kernels import FarLayout

CHUNKS, HEIGHT, WIDTH = (1, 3, 3, 3, 3), 60, 104
LAYOUTS = {
    "inference": {"mode": "inference"},
    "prefill": {"mode": "prefill", "cached": 2},
    "train": {"mode": "train"},
    "train_clean": {"mode": "train", "clean": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "masks")
    parser.add_argument("--width", type=int, default=640, help="of a picture, in pixels")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, settings in LAYOUTS.items():
        layout = FarLayout(CHUNKS, HEIGHT, WIDTH, **settings)
        layout.draw(args.out / f"{name}.png", size=args.width)
        print(f"{args.out / name}.png\n{layout}\n")


if __name__ == "__main__":
    main()
