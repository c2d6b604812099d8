"""Patch embedding into a token slab: the C++ extension against a convolution.

    python -m bench.patch_embed [--dtype float32|bfloat16] [--shape PART] [--tiny] [--plot FILE]

Latents of 16 channels, fp32 in memory as a sampler keeps them; weight, GEMM and tokens in `--dtype`. "after context":
the tokens stand behind others in the sequence, as in a cache step; diffusers concatenates them.
"""

from __future__ import annotations

from typing import Any

import torch

from .kernel_bench import Case, layouts, models, run

CHANNELS = 16
FULL, COMPRESSED = (1, 2, 2), (1, 4, 4)
# name: frames, patch, whether tokens stand before
SHAPES: dict[str, tuple[int, tuple[int, int, int], bool]] = {
    "chunk, 1 frame": (1, FULL, False),
    "chunk, 3 frames": (3, FULL, False),
    "1 frame after context": (1, FULL, True),
    "3 frames after context": (3, FULL, True),
    "compressed, 1 frame after context": (1, COMPRESSED, True),
    "compressed, 3 frames after context": (3, COMPRESSED, True),
    "bidirectional, 21 frames": (21, FULL, False),
}


def case(
    name: str, size: tuple[int, ...], patch: tuple[int, int, int], context: bool, dim: int, dtype: torch.dtype
) -> Case:
    frames, height, width = size
    tokens, features = frames * (height // patch[1]) * (width // patch[2]), CHANNELS * patch[1] * patch[2]
    offset = tokens // 2 if context else 0

    def make(generator: torch.Generator, device: str, dtype: torch.dtype) -> tuple[tuple, dict[str, Any]]:
        latents = torch.randn(1, frames, CHANNELS, height, width, generator=generator).to(device)
        weight = (torch.randn(dim, CHANNELS, *patch, generator=generator) / 8).to(device, dtype)
        bias = torch.randn(dim, generator=generator).to(device, dtype)
        slab = torch.full((1, offset + tokens, dim), float("nan"), device=device, dtype=dtype)
        slab[:, :offset] = 0  # ours stands there already: its producer wrote it into the slab
        return (latents, weight, bias, patch), {"out": slab, "offset": offset}

    itemsize = torch.empty(0, dtype=dtype).element_size()
    moved = 4 * frames * CHANNELS * height * width + itemsize * dim * (features + tokens)
    return Case(name, make, moved, 2 * tokens * features * dim)


def cases(dtype: torch.dtype, tiny: bool) -> list[Case]:
    latents = layouts(tiny)["chunk 0"]
    return [
        case(f"{model} {name}", (frames, latents.height, latents.width), patch, context, size["dim"], dtype)
        for model, size in models(tiny).items()
        for name, (frames, patch, context) in SHAPES.items()
    ]


if __name__ == "__main__":
    run("patch_embed", __doc__, cases)
