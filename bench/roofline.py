"""A roofline picture: measured rate over arithmetic intensity, under the machine's measured ceilings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any


def draw_roofline(rows: Sequence[dict[str, Any]], bandwidth: float, flop_rate: float, path: str | Path) -> None:
    """Write a PNG or SVG.

    Args:
        rows: one per measurement, with `contestant`, `shape`, `ms`, `flops` and `bytes`.
        bandwidth: bytes per second of a large copy, the slope of the roof.
        flop_rate: FLOP per second of a large matrix product, its flat part.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [row for row in rows if row["flops"] and row["bytes"]]
    if not points:
        raise ValueError("rows: got none with FLOPs and bytes, expected at least one measurement")
    intensities = [row["flops"] / row["bytes"] for row in points]
    span = (min(*intensities, flop_rate / bandwidth) / 3, max(*intensities, flop_rate / bandwidth) * 3)
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    ridge = flop_rate / bandwidth
    roof = [bandwidth * span[0], flop_rate, flop_rate]
    axes.loglog([span[0], ridge, span[1]], [rate / 1e12 for rate in roof], color="black", linewidth=1)
    for contestant in dict.fromkeys(row["contestant"] for row in points):
        own = [row for row in points if row["contestant"] == contestant]
        rates = [row["flops"] / row["ms"] / 1e9 for row in own]
        axes.loglog([row["flops"] / row["bytes"] for row in own], rates, "o", markersize=5, label=contestant)
    axes.set_xlabel("FLOP per byte of the least traffic")
    axes.set_ylabel("TFLOP/s")
    axes.set_title(f"{points[0]['operation']}: copy {bandwidth / 1e9:.0f} GB/s, GEMM {flop_rate / 1e12:.2f} TFLOP/s")
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
