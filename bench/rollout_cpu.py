"""A whole FAR rollout on the CPU: diffusers' own pipeline against the same pipeline through `accelerate`.

    python -m bench.rollout_cpu [--repeats 3] [--config small wide] [--dtype float32 bfloat16] [--json FILE]

The two take turns in one process on the same weights; the ratio is that of their medians. In fp32 the videos must
agree to 2e-5 with diffusers' phantom keys reproduced before anything is timed; the timed run is the default, without
them. Peak memory is what each rollout adds to the process. The ceiling is the fastest GEMM this machine was seen to
do in that dtype.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from anyflow_kernels import load_ops
from anyflow_runtime import accelerate, restore

from .common import add_json_argument, check_close, interleaved_medians, keep_row, machine_line, print_rows
from .costs import rollout_flops
from .memory import with_peak_bytes
from .tiny_pipeline import tiny_pipeline

PARTITION, STEPS, TEXT_TOKENS = [1, 3, 3, 3], 4, 512
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"model": {"heads": 4, "head_dim": 64, "layers": 4}, "size": (240, 416)},  # 390 tokens a frame
    "wide": {"model": {"heads": 12, "head_dim": 128, "layers": 2, "ffn_dim": 8960}, "size": (256, 416)},  # 416
}


def gemm_ceiling(dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large matrix products through this backend."""
    best = 0.0
    linear = load_ops("torch").linear
    for m, k, n in ((1248, 1536, 8960), (2048, 2048, 2048)):
        x, weight = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
        with torch.no_grad():
            median = interleaved_medians({"gemm": partial(linear, x, weight, None)}, repeats=9)["gemm"]
        best = max(best, 2 * m * k * n / median)
    return best


def bench(name: str, dtype: torch.dtype, repeats: int, ceiling: float) -> dict[str, Any]:
    config = CONFIGS[name]
    height, width = config["size"]
    pipe = tiny_pipeline(**config["model"]).to(dtype)
    embeds = torch.randn(1, TEXT_TOKENS, pipe.transformer.config.text_dim, generator=torch.Generator().manual_seed(1))

    def rollout() -> torch.Tensor:
        return pipe(
            prompt_embeds=embeds.to(dtype),
            height=height,
            width=width,
            num_frames=4 * (sum(PARTITION) - 1) + 1,
            num_inference_steps=STEPS,
            chunk_partition=PARTITION,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
        ).frames

    def diffusers_rollout() -> torch.Tensor:
        restore(pipe)
        return rollout()

    def our_rollout() -> torch.Tensor:
        accelerate(pipe, backend="torch")
        return rollout()

    reference, reference_bytes = with_peak_bytes(diffusers_rollout)
    accelerate(pipe, backend="torch", match_diffusers_padding=True)
    # 2e-5 is some 170 epsilons of fp32; two bf16 rollouts are each within a rounding step of the exact one.
    tolerance = 2e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    error = check_close(f"{name} {dtype}", rollout(), reference, tolerance)
    _, our_bytes = with_peak_bytes(our_rollout)
    seconds = interleaved_medians({"diffusers": diffusers_rollout, "ours": our_rollout}, repeats, warmup=0)
    flops = rollout_flops(PARTITION, height // 8, width // 8, pipe.transformer.config, STEPS, 1, TEXT_TOKENS)
    return {
        "config": name,
        "dtype": str(dtype).removeprefix("torch."),
        "diffusers_s": seconds["diffusers"],
        "ours_s": seconds["ours"],
        "speedup": seconds["diffusers"] / seconds["ours"],
        "diffusers_peak_bytes": reference_bytes,
        "ours_peak_bytes": our_bytes,
        "memory_ratio": our_bytes / reference_bytes,
        "error_with_phantom_keys": error,
        "ours_gflops": flops / seconds["ours"] / 1e9,
        "gemm_ceiling_gflops": ceiling / 1e9,
        "fraction_of_ceiling": flops / seconds["ours"] / ceiling,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--config", nargs="+", choices=CONFIGS, default=list(CONFIGS))
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    add_json_argument(parser)
    args = parser.parse_args()
    print(machine_line("diffusers"))
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtype):
        ceiling = gemm_ceiling(dtype)
        print(f"GEMM ceiling, {dtype}: {ceiling / 1e9:.0f} GFLOP/s")
        for name in args.config:
            row = bench(name, dtype, args.repeats, ceiling)
            rows.append(row)
            keep_row(row, args.json)
            print(
                f"{name:<6}{row['dtype']:<9} diffusers {row['diffusers_s']:7.2f} s   ours {row['ours_s']:6.2f} s   "
                f"{row['speedup']:5.1f}x   peak memory {row['memory_ratio']:.2f}x   "
                f"{row['ours_gflops']:.0f} GFLOP/s = {row['fraction_of_ceiling']:.0%} of the ceiling   "
                f"error {row['error_with_phantom_keys']:.1e}",
                flush=True,
            )
    print_rows(rows)


if __name__ == "__main__":
    main()
