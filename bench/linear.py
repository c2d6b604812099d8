"""The linears of a block: fused projection, output, second of the FFN. On a CPU: oneDNN against torch's MKL.

    python -m bench.linear [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]

"eager" is torch's own choice; `torch` takes oneDNN for fp32 on a CPU. diffusers has three projections for our one.
"""

from __future__ import annotations

from typing import Any

import torch

from .kernel_bench import Case, model_cases, run

USES = {"qkv": ("dim", 3), "out": ("dim", 1), "FFN down": ("ffn", 1)}  # width in, outputs of width D


def case(name: str, tokens: int, width_in: int, width_out: int, dtype: torch.dtype, backward: bool) -> Case:
    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        x = torch.randn(1, tokens, width_in, generator=generator)
        weight = torch.randn(width_out, width_in, generator=generator) * width_in**-0.5
        bias = torch.randn(width_out, generator=generator)
        return tuple(t.to(device, dtype).requires_grad_(backward) for t in (x, weight, bias)), {}

    gemms = 3 if backward else 1  # a backward is two of the forward's size
    itemsize = torch.empty(0, dtype=dtype).element_size()
    moved = gemms * (tokens * width_in + width_in * width_out + tokens * width_out) * itemsize
    return Case(name, make, moved, gemms * 2 * tokens * width_in * width_out, backward=backward)


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    return [
        case(f"{name}, {use}", layout.num_query_tokens, size[width], outputs * size["dim"], dtype, layout.clean)
        for name, size, layout in model_cases(tiny)
        for use, (width, outputs) in USES.items()
    ]


if __name__ == "__main__":
    run("linear", __doc__, cases)
