"""Dual timestep embedding: one distinct (t, r), a guided pair, and one per frame of a training sample.

    python -m bench.dual_timestep_embedding [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]

`--dtype` is that of the projection; the MLPs are fp32, as checkpoints load them. diffusers repeats the rows to every
token: each (t, r) stands for one frame.
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels import TimestepMLP
from anyflow_kernels.triton_ops.dual_timestep_embedding import FREQ_DIM, bytes_moved, flops

from . import diffusers_eager
from .kernel_bench import Case, layouts, models, run

ROWS = {"one (t, r)": 1, "two": 2, "training, 21 frames": 21}


def case(name: str, rows: int, dim: int, tokens_per_frame: int, dtype: torch.dtype) -> Case:
    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        def weight(*shape: int) -> torch.Tensor:
            return (torch.randn(*shape, generator=generator) * shape[-1] ** -0.5).to(device)

        def mlp() -> TimestepMLP:
            return TimestepMLP(weight(dim, FREQ_DIM), weight(dim), weight(dim, dim), weight(dim))

        t, r = (torch.rand(rows, generator=generator).to(device) * 1000 for _ in range(2))
        return (t, r, mlp(), mlp(), weight(6 * dim, dim).to(dtype), weight(6 * dim).to(dtype), 0.25), {}

    itemsize = torch.empty(0, dtype=dtype).element_size()
    return Case(
        name,
        make,
        bytes_moved(dim, FREQ_DIM, 4, itemsize),
        elementwise_flops=flops(rows, dim, FREQ_DIM),
        rival=diffusers_eager.dual_timestep_embedding(tokens_per_frame),
    )


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    rows, columns = layouts(tiny)["chunk 0"].full_grid
    return [
        case(f"{model} {name}", count, size["dim"], rows * columns, dtype)
        for model, size in models(tiny).items()
        for name, count in ROWS.items()
    ]


if __name__ == "__main__":
    run("dual_timestep_embedding", __doc__, cases)
