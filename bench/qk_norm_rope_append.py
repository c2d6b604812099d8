"""QK-RMSNorm + RoPE + KV append from the fused projection, forward into slabs; forward with backward for training.

diffusers' sequence concatenates the cache and rotates all of its keys anew, as it does in every step.

python -m bench.qk_norm_rope_append [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels import FarLayout
from anyflow_kernels.triton_ops.qk_norm_rope_append import bytes_moved, flops
from anyflow_kernels.triton_ops.qk_norm_rope_append_backward import bytes_moved as backward_bytes_moved

from .kernel_bench import Case, model_cases, run


def case(name: str, heads: int, head_dim: int, layout: FarLayout, dtype: torch.dtype, backward: bool) -> Case:
    tokens, width = layout.num_query_tokens, heads * head_dim

    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        qkv = torch.randn(1, tokens, 3 * width, generator=generator).to(device, dtype).requires_grad_(backward)
        weights = [torch.rand(width, generator=generator).to(device, dtype).requires_grad_(backward) for _ in range(2)]
        angle = torch.randn(tokens, head_dim // 2, generator=generator).to(device)
        slabs: dict[str, Any] = {}
        if not backward:
            k, v = (
                torch.zeros(1, layout.num_key_tokens, heads, head_dim, dtype=dtype, device=device) for _ in range(2)
            )
            slabs = {"k_cache": k, "v_cache": v, "offset": layout.cache_offset}
        return (qkv, *weights, (angle.cos(), angle.sin()), heads, 1e-6), slabs

    qkv = torch.empty(1, tokens, 3 * width, dtype=dtype, device="meta")
    moved = bytes_moved(qkv, heads) + (backward_bytes_moved(qkv) if backward else 0)
    work = (3 if backward else 1) * flops(qkv)
    writes = () if backward else ("k_cache", "v_cache")
    return Case(name, make, moved, elementwise_flops=work, backward=backward, writes=writes)


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    found = []
    for name, size, layout in model_cases(tiny):
        found.append(case(name, size["heads"], size["head_dim"], layout, dtype, layout.clean))
        if name.endswith("chunk 0"):
            found.append(case(f"{name} fwd+bwd", size["heads"], size["head_dim"], layout, dtype, True))
    return found


if __name__ == "__main__":
    run("qk_norm_rope_append", __doc__, cases)
