"""The FFN's first GEMM with bias and tanh-GELU.

python -m bench.linear_gelu [--dtype float32|bfloat16] [--repeats N] [--json FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels.triton_ops.linear_gelu import bytes_moved, flops

from .kernel_bench import Case, model_cases, run


def case(name: str, tokens: int, dim: int, ffn: int, dtype: torch.dtype, backward: bool) -> Case:
    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        x = torch.randn(1, tokens, dim, generator=generator)
        weight = torch.randn(ffn, dim, generator=generator) * dim**-0.5
        bias = torch.randn(ffn, generator=generator)
        return tuple(t.to(device, dtype).requires_grad_(backward) for t in (x, weight, bias)), {}

    # A backward is two GEMMs of the forward's size.
    work = flops(tokens, dim, ffn) * (3 if backward else 1)
    itemsize = torch.empty(0, dtype=dtype).element_size()
    moved = bytes_moved(tokens, ffn, itemsize) + (bytes_moved(tokens, ffn, itemsize, backward=True) if backward else 0)
    return Case(name, make, moved, work, backward)


def cases(dtype: torch.dtype) -> list[Case]:
    return [
        case(name, layout.num_query_tokens, size["dim"], size["ffn"], dtype, layout.clean)
        for name, size, layout in model_cases()
    ]


if __name__ == "__main__":
    run("linear_gelu", __doc__, cases)
