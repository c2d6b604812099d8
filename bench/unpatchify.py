"""Tokens of the output head to latents: the C++ extension against one large permuted copy.

python -m bench.unpatchify [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from .kernel_bench import Case, layouts, run

CHANNELS, PATCH = 16, (1, 2, 2)
SHAPES = {"chunk, 1 frame": 1, "chunk, 3 frames": 3, "bidirectional, 21 frames": 21}


def case(name: str, grid: tuple[int, int, int], dtype: torch.dtype) -> Case:
    shape = (1, grid[0] * grid[1] * grid[2], CHANNELS * PATCH[1] * PATCH[2])

    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        return (torch.randn(shape, generator=generator).to(device, dtype), grid, PATCH, CHANNELS), {}

    return Case(name, make, 2 * shape[1] * shape[2] * torch.empty(0, dtype=dtype).element_size())


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    rows, columns = layouts(tiny)["chunk 0"].full_grid
    return [case(("tiny " if tiny else "") + name, (n, rows, columns), dtype) for name, n in SHAPES.items()]


if __name__ == "__main__":
    run("unpatchify", __doc__, cases)
