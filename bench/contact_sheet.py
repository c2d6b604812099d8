"""A picture of videos that a person can judge at a glance: captions above, a strip of frames per row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

ZOOM, GAP, LABEL, TITLE = 4, 2, 58, 22


def contact_sheet(rows: Mapping[str, Tensor], captions: Sequence[str], columns: int = 2) -> Image.Image:
    """One panel per caption: a labelled row of frames for each entry of `rows`.

    Args:
        rows: videos (B, F, 3, H, W) in [0, 1] by label, B as `captions`.
        columns: panels side by side.

    Raises:
        ValueError: if there are not as many videos as captions.
    """
    sizes = {tuple(video.shape) for video in rows.values()}
    if len(sizes) != 1 or next(iter(sizes))[0] != len(captions):
        raise ValueError(f"rows: got shapes {sorted(sizes)}, expected one, of {len(captions)} videos")
    _, frames, _, height, width = next(iter(sizes))
    cell_w, cell_h = width * ZOOM + GAP, height * ZOOM + GAP
    panel_w, panel_h = LABEL + frames * cell_w + 12, TITLE + len(rows) * cell_h + 10
    lines = -(-len(captions) // columns)
    sheet = Image.new("RGB", (columns * panel_w, lines * panel_h), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(13)
    for i, caption in enumerate(captions):
        left, top = i % columns * panel_w + 6, i // columns * panel_h + 4
        draw.text((left, top), caption, fill="black", font=font)
        for r, (label, video) in enumerate(rows.items()):
            y = top + TITLE + r * cell_h
            draw.text((left, y + height * ZOOM // 2 - 8), label, fill="#444444", font=font)
            for f in range(frames):
                sheet.paste(_tile(video[i, f]), (left + LABEL + f * cell_w, y))
    return sheet


def _tile(frame: Tensor) -> Image.Image:
    pixels = (frame.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return Image.fromarray(np.ascontiguousarray(pixels)).resize(
        (pixels.shape[1] * ZOOM, pixels.shape[0] * ZOOM), Image.Resampling.NEAREST
    )
