"""Gated residual + LayerNorm + modulation at the uses of a block, forward, and forward with backward for training.

python -m bench.gated_residual_layer_norm [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels import FarLayout
from anyflow_kernels.triton_ops.gated_residual_layer_norm import bytes_moved, flops
from anyflow_kernels.triton_ops.gated_residual_layer_norm_backward import bytes_moved as backward_bytes_moved

from .kernel_bench import Case, model_cases, run

USES = {
    "first norm": ("shift", "scale"),
    "gated + norm2": ("branch", "gate", "weight", "bias"),
    "residual + modulated": ("branch", "shift", "scale"),
    "gated + next norm": ("branch", "gate", "shift", "scale"),
}


def case(name: str, width: int, layout: FarLayout, use: str, dtype: torch.dtype, backward: bool) -> Case:
    terms, tokens = USES[use], layout.num_query_tokens
    frames = sum(f for f, _ in layout.frame_map)

    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        x, branch = (torch.randn(1, tokens, width, generator=generator).to(device, dtype) for _ in range(2))
        # A projection in the compute dtype, kept in fp32.
        modulation = torch.randn(1, frames, 6, width, generator=generator).to(device, dtype).float()
        tensors = {
            "branch": branch,
            "shift": modulation[:, :, 0],
            "scale": modulation[:, :, 1],
            "gate": modulation[:, :, 2],
            "weight": torch.ones(width, device=device),
            "bias": torch.zeros(width, device=device),
        }
        chosen = {name: tensors[name].requires_grad_(backward) for name in terms}
        return (x.requires_grad_(backward), layout.frame_map), chosen

    x = torch.empty(1, tokens, width, dtype=dtype, device="meta")
    moved = bytes_moved(x, frames, "branch" in terms, len({"gate", "shift", "scale"} & set(terms)))
    if backward:
        moved += backward_bytes_moved(x, "gate" in terms, "branch" in terms)
    return Case(f"{name}, {use}", make, moved, elementwise_flops=(3 if backward else 1) * flops(x), backward=backward)


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    found = []
    for name, size, layout in model_cases(tiny):
        found += [case(name, size["dim"], layout, use, dtype, layout.mode == "train" and layout.clean) for use in USES]
        if name.endswith("chunk 0"):
            found.append(case(f"{name} fwd+bwd", size["dim"], layout, "gated + next norm", dtype, True))
    return found


if __name__ == "__main__":
    run("gated_residual_layer_norm", __doc__, cases)
