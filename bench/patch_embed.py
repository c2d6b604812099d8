"""Patch embedding into a token slab, and unpatchify: the C++ extension against PyTorch's operations.

    python -m bench.patch_embed [--dtype float32|bfloat16] [--repeats N] [--json FILE]

Shapes: chunks of AnyFlow-FAR 1.3B at 480p (D = 1536, 16 latent channels of 60 x 104) and a small model. Every
contestant is checked against a float64 convolution before it is timed; the last line is JSON.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow_kernels.patch_embed import patch_embed, unpatchify

from .common import check_close, interleaved_medians, machine_line, write_rows

# name: (frames, channels, height, width), patch, D
SHAPES = {
    "full, 1 frame": ((1, 16, 60, 104), (1, 2, 2), 1536),
    "full, 3 frames": ((3, 16, 60, 104), (1, 2, 2), 1536),
    "compressed, 1 frame": ((1, 16, 60, 104), (1, 4, 4), 1536),
    "compressed, 3 frames": ((3, 16, 60, 104), (1, 4, 4), 1536),
    "small, 3 frames": ((3, 16, 32, 48), (1, 2, 2), 256),
}
# A rounding step of the tokens, and of the inputs where they are rounded to the weight's dtype: budgets, not guesses.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def conv_flatten_cat(latents: Tensor, weight: Tensor, bias: Tensor, context: Tensor) -> Tensor:
    """What the reference does: permute, Conv3d, flatten, transpose, and a concatenation with the tokens before it."""
    video = latents.permute(0, 2, 1, 3, 4).to(weight.dtype)
    tokens = F.conv3d(video, weight, bias, stride=weight.shape[2:]).flatten(2).transpose(1, 2)
    return torch.cat([context, tokens], dim=1)


def view_permute(tokens: Tensor, grid: tuple[int, ...], patch: tuple[int, int, int], channels: int) -> Tensor:
    """The reference's unpatchify: one large permuted copy."""
    frames, rows, columns = grid
    x = tokens.reshape(1, frames, rows, columns, *patch, channels).permute(0, 1, 4, 7, 2, 5, 3, 6)
    return x.reshape(1, frames * patch[0], channels, rows * patch[1], columns * patch[2])


def row(shape: str, operation: str, dtype: torch.dtype, error: float, fns: dict[str, Callable], repeats: int) -> dict:
    seconds = interleaved_medians(fns, repeats)
    base, ours = seconds.values()
    names = list(fns)
    print(
        f"{shape:<22}{operation:<12}{names[0]} {base * 1e3:8.3f} ms   extension {ours * 1e3:8.3f} ms   "
        f"{base / ours:5.2f}x   error {error:.1e}"
    )
    return {
        "shape": shape,
        "operation": operation,
        "dtype": str(dtype).removeprefix("torch."),
        "baseline_ms": round(base * 1e3, 4),
        "extension_ms": round(ours * 1e3, 4),
        "ratio": round(base / ours, 3),
        "relative_error": error,
    }


def bench_shape(name: str, dtype: torch.dtype, repeats: int, device: str) -> list[dict]:
    (frames, channels, height, width), patch, dim = SHAPES[name]
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, frames, channels, height, width, generator=generator)  # fp32, as a sampler keeps them
    weight = (torch.randn(dim, channels, *patch, generator=generator) / 8).to(dtype)
    bias = torch.randn(dim, generator=generator).to(dtype)
    exact = conv_flatten_cat(latents.double(), weight.double(), bias.double(), torch.empty(1, 0, dim).double())

    latents, weight, bias = latents.to(device), weight.to(device), bias.to(device)
    grid = (frames // patch[0], height // patch[1], width // patch[2])
    count = grid[0] * grid[1] * grid[2]
    context = torch.randn(1, count // 2, dim, device=device).to(dtype)  # what stands before the tokens in the sequence
    slab = torch.full((1, context.shape[1] + count, dim), float("nan"), device=device, dtype=dtype)
    slab[:, : context.shape[1]] = context  # ours already stands there: its producer wrote it into the slab

    def extension() -> Tensor:
        return patch_embed(latents, weight, bias, patch, slab, context.shape[1])

    embed = {"conv3d": lambda: conv_flatten_cat(latents, weight, bias, context), "extension": extension}
    check_close(f"conv3d, {name}", embed["conv3d"]()[:, context.shape[1] :].cpu(), exact, TOLERANCE[dtype])
    error = check_close(f"patch_embed, {name}", extension().cpu(), exact, TOLERANCE[dtype])
    rows = [row(name, "patch_embed", dtype, error, embed, repeats)]

    head = torch.randn(1, count, channels * patch[1] * patch[2], generator=generator).to(dtype).to(device)
    unpack = {
        "permute": lambda: view_permute(head, grid, patch, channels),
        "extension": lambda: unpatchify(head, grid, patch, channels),
    }
    error = check_close(f"unpatchify, {name}", unpack["extension"](), unpack["permute"](), 0.0)
    return [*rows, row(name, "unpatchify", dtype, error, unpack, repeats)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], nargs="+", default=["float32", "bfloat16"]
    )
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--json", help="also write the rows to this file")
    arguments = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(machine_line("anyflow-kernels"))
    print("latents fp32 in memory; weight, GEMM and tokens in the dtype named; medians, contestants taking turns")
    rows = []
    with torch.inference_mode():
        for dtype in arguments.dtype:
            print(f"\n{dtype}")
            for name in SHAPES:
                rows += bench_shape(name, getattr(torch, dtype), arguments.repeats, device)
    write_rows(rows, arguments.json)


if __name__ == "__main__":
    main()
