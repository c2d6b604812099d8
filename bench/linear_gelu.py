"""The FFN's first GEMM with bias and tanh-GELU.

python -m bench.linear_gelu [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels.triton_ops.linear_gelu import flops

from .kernel_bench import Case, model_cases, run


def case(name: str, tokens: int, dim: int, ffn: int, dtype: torch.dtype, backward: bool) -> Case:
    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        x = torch.randn(1, tokens, dim, generator=generator)
        weight = torch.randn(ffn, dim, generator=generator) * dim**-0.5
        bias = torch.randn(ffn, generator=generator)
        return tuple(t.to(device, dtype).requires_grad_(backward) for t in (x, weight, bias)), {}

    # A backward is two GEMMs of the forward's size.
    gemms = 3 if backward else 1
    itemsize = torch.empty(0, dtype=dtype).element_size()
    moved = gemms * (tokens * dim + dim * ffn + tokens * ffn) * itemsize
    return Case(name, make, moved, gemms * flops(tokens, dim, ffn), backward=backward)


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    return [
        case(name, layout.num_query_tokens, size["dim"], size["ffn"], dtype, layout.clean)
        for name, size, layout in model_cases(tiny)
    ]


if __name__ == "__main__":
    run("linear_gelu", __doc__, cases)
