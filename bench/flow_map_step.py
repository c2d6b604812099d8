"""A flow-map step on latents at 480p: a chunk, guided and not, and a whole bidirectional video.

python -m bench.flow_map_step [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]
"""

from __future__ import annotations

from typing import Any

import torch

from anyflow_kernels.triton_ops.flow_map_step import bytes_moved, flops

from .kernel_bench import Case, layouts, run

SHAPES = {"chunk, 1 frame": 1, "chunk, 3 frames": 3, "bidirectional, 21 frames": 21}


def case(name: str, shape: tuple[int, ...], guided: bool, dtype: torch.dtype) -> Case:

    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        x, u, u_uncond = (torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3))
        sigma_t, sigma_r = (torch.full(shape[:2], s, device=device) for s in (0.9, 0.6))
        return (x, u, sigma_t, sigma_r), {"u_uncond": u_uncond, "guidance": 5.0} if guided else {}

    x = torch.empty(shape, dtype=dtype, device="meta")
    title = name + (", guided" if guided else "")
    return Case(title, make, bytes_moved(x, guided), elementwise_flops=flops(x, guided))


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    latents = layouts(tiny)["chunk 0"]
    return [
        case(("tiny " if tiny else "") + name, (1, frames, 16, latents.height, latents.width), guided, dtype)
        for name, frames in SHAPES.items()
        for guided in (False, True)
    ]


if __name__ == "__main__":
    run("flow_map_step", __doc__, cases)
