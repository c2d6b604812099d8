"""A FAR training step, forward and backward, on our backend against the reference's way of computing it.

python -m bench.training_step [--repeats 5] [--config small "1.3B attention"] [--dtype float32 bfloat16] [--json FILE]

The causal training layout: compressed context, three noisy chunks, and their clean copy. On CUDA the reference is the
`reference` backend with its flex attention compiled, ours is `triton`; on a CPU, where flex attention has no backward,
the `reference` backend computes the masked attention densely, ours is `torch`. The two take turns in one process on the
same weights; first the loss and every gradient must agree. Peak memory is what a step adds to the process.

On CUDA also the attention alone, forward and backward, of the released models at 480p: 81 frames with their clean copy,
`triton` against compiled flex_attention, whose BlockMask is built beforehand.
"""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import AttentionPlan, FarLayout, load_ops
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.triton_ops.far_attention import flops
from anyflow_runtime import AnyFlowFARTransformer3DModel
from anyflow_runtime.training import FarClip, FarVelocity

from .common import add_json_argument, check_close, interleaved_medians, keep_row, machine_line, print_rows
from .costs import forward_flops
from .far_attention import Attend, flex_contestant
from .memory import with_peak_bytes

PARTITION, TEXT_TOKENS = (1, 3, 3, 3, 3), 512
RELEASED = FarLayout((1, 3, 3, 3, 3, 3, 3, 2), 60, 104, clean=True)
CONFIGS: dict[str, dict[str, Any]] = {
    "small": {"heads": 4, "head_dim": 64, "layers": 4, "ffn_dim": 1024, "size": (16, 24)},  # 96 tokens a frame
    "wide": {"heads": 12, "head_dim": 128, "layers": 2, "ffn_dim": 8960, "size": (16, 24)},
}
ATTENTION = {f"{model} attention": model for model in MODELS}  # on CUDA
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 5e-2}  # bf16: two orders of rounding through the whole backward


def make_model(config: dict[str, Any], dtype: torch.dtype, device: str) -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(0)
    model = AnyFlowFARTransformer3DModel(
        num_attention_heads=config["heads"],
        attention_head_dim=config["head_dim"],
        num_layers=config["layers"],
        ffn_dim=config["ffn_dim"],
        text_dim=64,
    )
    for name, parameter in model.named_parameters():
        kept = not set(name.split(".")).isdisjoint(model.keep_in_fp32)
        parameter.data = parameter.data.to(device, torch.float32 if kept else dtype)
    model.fuse_projections()
    return model


def bench(name: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    config = CONFIGS[name]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = make_model(config, dtype, device)
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(1, sum(PARTITION), 16, *config["size"], generator=generator).to(device)
    text = torch.randn(1, TEXT_TOKENS, 64, generator=generator).to(device)
    clip = FarClip.from_latents(latents, PARTITION, len(PARTITION))
    velocity = FarVelocity(model, clip, dtype)
    noisy = torch.randn(clip.target.shape, generator=generator).to(device)
    target = torch.randn(clip.target.shape, generator=generator).to(device)
    t = torch.full(noisy.shape[:2], 700.0, device=device)
    r = torch.full(noisy.shape[:2], 200.0, device=device)

    def step(backend: str) -> Tensor:
        model.set_backend(backend)
        model.zero_grad(set_to_none=True)
        loss = (velocity(noisy, t, r, text).float() - target).square().mean()
        loss.backward()
        return loss.detach()

    ours = load_ops("auto").backend
    expected = step("reference")
    gradients = {key: p.grad.clone() for key, p in model.named_parameters() if p.grad is not None}
    check_close(f"{name} loss", step(ours), expected, TOLERANCE[dtype])
    present = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    if set(present) != set(gradients):
        raise AssertionError(f"{name}: gradients of {sorted(set(present) ^ set(gradients))[:3]} are on one side only")
    error = check_close(f"{name} gradients", _flat(present), _flat(gradients), TOLERANCE[dtype])
    del gradients, present

    bytes_of = {}
    for backend in ("reference", ours):
        model.zero_grad(set_to_none=True)
        _, bytes_of[backend] = with_peak_bytes(partial(step, backend))
    seconds = interleaved_medians({b: partial(step, b) for b in ("reference", ours)}, repeats, warmup=1)
    height, width = config["size"]
    layout = model.layout("train", PARTITION, height, width, clean=True)
    flops = 3 * forward_flops(layout, model.config, 1, TEXT_TOKENS)
    row = {
        "config": name,
        "dtype": str(dtype).removeprefix("torch."),
        "backend": ours,
        "tokens": layout.num_query_tokens,
        "reference_s": seconds["reference"],
        "ours_s": seconds[ours],
        "speedup": seconds["reference"] / seconds[ours],
        "reference_peak_bytes": bytes_of["reference"],
        "ours_peak_bytes": bytes_of[ours],
        "memory_ratio": bytes_of[ours] / bytes_of["reference"],
        "gradient_error": error,
        "ours_gflops": flops / seconds[ours] / 1e9,
    }
    print(
        f"{name:<6}{row['dtype']:<9}{row['tokens']} tokens   reference {row['reference_s']:6.2f} s   "
        f"{row['backend']} {row['ours_s']:6.2f} s   {row['speedup']:.2f}x   peak memory "
        f"{row['ours_peak_bytes'] / 2**20:.0f} of {row['reference_peak_bytes'] / 2**20:.0f} MiB   "
        f"{row['ours_gflops']:.0f} GFLOP/s   gradient error {row['gradient_error']:.1e}",
        flush=True,
    )
    return row


def bench_attention(model: str, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    """The attention of a released model in training, on CUDA."""
    heads, head_dim = MODELS[model]["heads"], MODELS[model]["head_dim"]
    plan, scale = AttentionPlan.from_layout(RELEASED), head_dim**-0.5
    generator = torch.Generator("cuda").manual_seed(0)
    lengths = (plan.num_queries, plan.num_keys, plan.num_keys, plan.num_queries)
    q, k, v, upstream = (
        torch.randn(1, n, heads, head_dim, generator=generator, device="cuda", dtype=dtype) for n in lengths
    )
    inputs = [tensor.requires_grad_() for tensor in (q, k, v)]
    ops = load_ops("triton")
    mask_ms, flex = flex_contestant(plan, scale)
    contestants: dict[str, Attend] = {
        "triton": lambda q, k, v: ops.far_attention(q, k, v, plan, scale),
        "flex": flex,
    }

    def step(name: str) -> tuple[Tensor, ...]:
        out = contestants[name](*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, upstream)

    errors = {
        part: check_close(f"{model} attention, {part}", own, other, TOLERANCE[dtype])
        for part, own, other in zip(("out", "dq", "dk", "dv"), step("triton"), step("flex"), strict=True)
    }
    seconds = interleaved_medians({name: partial(step, name) for name in contestants}, repeats)
    shape = (1, heads, head_dim)
    work = flops(plan, *shape) + flops(plan, *shape, backward=True)
    row = {
        "config": f"{model} attention",
        "dtype": str(dtype).removeprefix("torch."),
        "backend": "triton",
        "tokens": plan.num_queries,
        "flex_s": seconds["flex"],
        "ours_s": seconds["triton"],
        "speedup": seconds["flex"] / seconds["triton"],
        "flex_mask_ms": mask_ms,
        "errors": errors,
        "ours_tflops": work / seconds["triton"] / 1e12,
    }
    print(
        f"{model} attention {row['dtype']} {row['tokens']} tokens, forward + backward   "
        f"flex {seconds['flex'] * 1e3:.2f} ms (mask {mask_ms:.0f} ms)   triton {seconds['triton'] * 1e3:.2f} ms   "
        f"{row['speedup']:.2f}x   {row['ours_tflops']:.0f} TFLOP/s   error {max(errors.values()):.1e}",
        flush=True,
    )
    return row


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([gradients[key].flatten().float() for key in sorted(gradients)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--config", nargs="+", choices=[*CONFIGS, *ATTENTION], default=[*CONFIGS, *ATTENTION])
    default = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", nargs="+", choices=("float32", "bfloat16"), default=[default])
    add_json_argument(parser)
    args = parser.parse_args()
    print(machine_line("triton", "anyflow-kernels"))
    rows = []
    for dtype in (getattr(torch, name) for name in args.dtype):
        for name in args.config:
            if name in ATTENTION and not torch.cuda.is_available():
                print(f"skipped: {name} against flex_attention, forward + backward (no CUDA device)")
                continue
            make_row = bench_attention if name in ATTENTION else bench
            row = make_row(ATTENTION.get(name, name), dtype, args.repeats)
            rows.append(row)
            keep_row(row, args.json)
    print_rows(rows)


if __name__ == "__main__":
    main()
