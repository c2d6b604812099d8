"""RMSNorm over all channels, as of the queries of cross-attention.

python -m bench.rms_norm [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels.triton_ops.rms_norm import bytes_moved, flops

from .kernel_bench import Case, model_cases, run


def case(name: str, tokens: int, width: int, dtype: torch.dtype, backward: bool) -> Case:
    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        x = torch.randn(1, tokens, width, generator=generator).to(device, dtype).requires_grad_(backward)
        weight = torch.rand(width, generator=generator).to(device, dtype).requires_grad_(backward)
        return (x, weight, 1e-6), {}

    x = torch.empty(1, tokens, width, dtype=dtype, device="meta")
    passes = (False, True) if backward else (False,)
    moved, work = (sum(count(x, backward=b) for b in passes) for count in (bytes_moved, flops))
    return Case(name, make, moved, elementwise_flops=work, backward=backward)


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    return [
        case(name, layout.num_query_tokens, size["dim"], dtype, layout.clean)
        for name, size, layout in model_cases(tiny)
    ]


if __name__ == "__main__":
    run("rms_norm", __doc__, cases)
