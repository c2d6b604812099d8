"""Roofs: what a card's data sheet allows, and a picture of measured rates under the machine's measured ceilings.

An operation that only copies has no intensity: the picture is its bandwidth over the bytes of a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anyflow_kernels import launch_configs
from anyflow_kernels.pipe_model import CHIPS, Chip, chip_of

ELSEWHERE = "H100"  # whose roofs are printed where there is no GPU


def chip_here() -> Chip:
    """The card of this machine; one of its architecture if it is not known; `ELSEWHERE` without a GPU."""
    if not torch.cuda.is_available():
        return CHIPS[ELSEWHERE]
    name = torch.cuda.get_device_name()
    found = [chip for chip in CHIPS.values() if chip.name in name]
    return max(found, key=lambda chip: len(chip.name)) if found else chip_of(launch_configs.architecture("cuda"))


def peak(chip: Chip) -> float:
    """Multiply-adds of bf16 matrix products a second, at boost clock."""
    return chip.products * chip.multiprocessors * chip.clock_ghz * 1e9


def roof_seconds(chip: Chip, moved: float, flops: float = 0.0, itemsize: int = 2) -> float:
    """No less by the data sheet: of bytes moved and FLOPs of matrix products. In fp32 those run as TF32, at half the
    rate."""
    return max(moved / (chip.dram_gb_s * 1e9), flops / 2 / peak(chip) * (2 if itemsize == 4 else 1))


def draw_roofline(rows: Sequence[dict[str, Any]], bandwidth: float, flop_rate: float, path: str | Path) -> None:
    """Write a PNG or SVG.

    Args:
        rows: one per measurement, with `operation`, `contestant`, `shape`, `ms`, `flops` and `bytes`.
        bandwidth: bytes per second of a large copy, the slope of the roof.
        flop_rate: FLOP per second of a large matrix product, its flat part.

    Raises:
        ValueError: if there are no rows.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    if not rows:
        raise ValueError("rows: got none, expected at least one measurement")
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    title = f"{rows[0]['operation']}: copy {bandwidth / 1e9:.0f} GB/s"
    if all(row["flops"] for row in rows):
        ridge = flop_rate / bandwidth
        intensities = [row["flops"] / row["bytes"] for row in rows]
        span = (min(*intensities, ridge) / 3, max(*intensities, ridge) * 3)
        roof = [bandwidth * span[0] / 1e12, flop_rate / 1e12, flop_rate / 1e12]
        axes.loglog([span[0], ridge, span[1]], roof, color="black", linewidth=1)
        axes.set_xlabel("FLOP per byte of the least traffic")
        axes.set_ylabel("TFLOP/s")
        title += f", GEMM {flop_rate / 1e12:.2f} TFLOP/s"
        points = [(row["contestant"], row["flops"] / row["bytes"], row["flops"] / row["ms"] / 1e9) for row in rows]
    else:
        axes.axhline(bandwidth / 1e9, color="black", linewidth=1)
        axes.set_xlabel("least bytes of a call")
        axes.set_ylabel("GB/s")
        points = [(row["contestant"], row["bytes"], row["bytes"] / row["ms"] / 1e6) for row in rows]
    for contestant in dict.fromkeys(row["contestant"] for row in rows):
        own = [(x, y) for name, x, y in points if name == contestant]
        axes.loglog([x for x, _ in own], [y for _, y in own], "o", markersize=5, label=contestant)
    axes.set_title(title)
    axes.legend()
    figure.savefig(path)
    pyplot.close(figure)
