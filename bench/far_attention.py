"""Attention of the released models at 480p, against what PyTorch has for the same masks.

python -m bench.far_attention [--dtype float32|bfloat16] [--shape SUBSTRING] [--repeats N] [--json FILE]

On CUDA: `triton` (and, on sm_90, its Gluon forward) against flash and cuDNN SDPA (one call per run of queries, keys
concatenated where a run sees several ranges) and compiled flex_attention with its BlockMask (built beforehand, its
time reported apart); the training layout with its backward. On a CPU: the `torch` backend against the dense formula,
eager and compiled, at a shape it can do.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from anyflow_kernels import AttentionPlan, available_backends, launch_configs, load_ops
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.reference import dense_attention, plan_mask
from anyflow_kernels.triton_ops.far_attention import bytes_moved, flops
from anyflow_kernels.triton_ops.tile_schedule import encode

from .common import interleaved_medians, machine_line, relative_error, write_rows
from .kernel_bench import LAYOUTS, copy_bandwidth, gemm_rate
from .roofline import draw_roofline

CPU_SHAPES = ("1.3B chunk 0",)
CHECKED_ROWS = 16  # queries per run compared with float64: the whole score matrix would not fit
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    default = "bfloat16" if device == "cuda" else "float32"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=default)
    parser.add_argument("--shape", default="", metavar="SUBSTRING", help="only shapes whose name contains it")
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="write a roofline picture to this file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(machine_line("triton", "anyflow-kernels"))
    copy, gemm = copy_bandwidth(device), gemm_rate(device, dtype)
    print(f"ceilings: copy {copy / 1e9:.0f} GB/s, {options.dtype} GEMM {gemm / 1e12:.2f} TFLOP/s")
    rows: list[dict[str, Any]] = []
    for model, size in MODELS.items():
        for shape, layout in LAYOUTS.items():
            name = f"{model} {shape}"
            if options.shape not in name:
                continue
            if device == "cpu" and name not in CPU_SHAPES:
                print(f"skipped: {name} (too slow on a CPU)")
                continue
            rows += bench_shape(
                name, AttentionPlan.from_layout(layout), size, layout.clean, dtype, options.repeats, gemm
            )
    if options.plot:
        draw_roofline(rows, copy, gemm, options.plot)
    write_rows(rows, options.json)


def bench_shape(
    name: str, plan: AttentionPlan, size: dict[str, int], backward: bool, dtype: torch.dtype, repeats: int, gemm: float
) -> list[dict[str, Any]]:
    """The rows of one shape: each contestant is checked, then timed in turns with the others."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensor(length: int) -> Tensor:
        shape = (1, length, size["heads"], size["head_dim"])
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(backward)

    q, k, v = tensor(plan.num_queries), tensor(plan.num_keys), tensor(plan.num_keys)
    contestants, mask_ms, skipped = contestants_for(plan, size["head_dim"] ** -0.5, device)
    functions: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    for label, attend in contestants.items():
        try:
            errors[label] = parity(attend, q, k, v, plan)
            functions[label] = graphed(partial(step, attend, q, k, v, backward), device)
        except (RuntimeError, ValueError, AssertionError) as error:
            # A rival that does not run here, or is wrong, has no speed; ours must run and be right.
            if label in ("triton", "torch"):
                raise
            skipped[label] = str(error).strip().splitlines()[0]
    for label, reason in skipped.items():
        print(f"skipped: {label}, {name} ({reason})")
    seconds = interleaved_medians(functions, repeats)
    shape = (1, size["heads"], size["head_dim"])
    work = flops(plan, *shape) + (flops(plan, *shape, backward=True) if backward else 0)
    rows = []
    for label, s in seconds.items():
        rate, bandwidth = work / s, bytes_moved(q, k) / s
        print(
            f"{name:<30}{'fwd+bwd ' if backward else '':<8}{label:<12}{s * 1e3:10.4f} ms {rate / 1e12:8.2f} TFLOP/s "
            f"{rate / gemm:5.0%} of GEMM {bandwidth / 1e9:8.1f} GB/s   error {errors[label]:.1e}"
            + (f"   mask built in {mask_ms:.0f} ms" if label == "flex" else ""),
            flush=True,
        )
        rows.append(
            {
                "operation": "far_attention",
                "shape": name,
                "backward": backward,
                "contestant": label,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": s * 1e3,
                "flops": work,
                "bytes": bytes_moved(q, k),
                "tflop_per_s": rate / 1e12,
                "of_ceiling": rate / gemm,
                "gb_per_s": bandwidth / 1e9,
                "relative_error": errors[label],
                **({"mask_ms": mask_ms} if label == "flex" else {}),
            }
        )
    return rows


def contestants_for(plan: AttentionPlan, scale: float, device: str) -> tuple[dict[str, Attend], float, dict[str, str]]:
    """Contestants by name, the milliseconds that flex's mask took, and who cannot run here and why."""

    def ours(backend: str) -> Attend:
        ops = load_ops(backend)
        return lambda q, k, v: ops.far_attention(q, k, v, plan, scale)

    if device == "cpu":
        mask = plan_mask(plan)
        compiled = torch.compile(dense_attention, dynamic=False)
        return (
            {
                "torch": ours("torch"),
                "eager": lambda q, k, v: dense_attention(q, k, v, mask, scale)[0],
                "compiled": lambda q, k, v: compiled(q, k, v, mask, scale)[0],
            },
            0.0,
            {
                "triton": available_backends()["triton"] or "TRITON_INTERPRET=1 runs it in Python: no speed",
                "flash, cudnn, flex": "no CUDA device",
            },
        )
    mask_ms, flex = flex_contestant(plan, scale)
    hopper = {"gluon": gluon_contestant(plan, scale)} if launch_configs.architecture(device) == 90 else {}
    return (
        {
            "triton": ours("triton"),
            **hopper,
            "flash": sdpa_contestant(plan, scale, SDPBackend.FLASH_ATTENTION),
            "cudnn": sdpa_contestant(plan, scale, SDPBackend.CUDNN_ATTENTION),
            "flex": flex,
        },
        mask_ms,
        {},
    )


def gluon_contestant(plan: AttentionPlan, scale: float) -> Attend:
    """The warp-specialised forward, whether or not the launch table chooses it."""
    from anyflow_kernels.triton_ops.far_attention_gluon import launch_gluon

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = launch_configs.attention_row(launch_configs.ATTENTION_GLUON, 90, q.shape[3], q.itemsize)
        return launch_gluon(q, k, v, tuple(encode(plan.ranges)), plan.phantom_keys, scale, config)[0]

    return attend


def sdpa_contestant(plan: AttentionPlan, scale: float, backend: SDPBackend) -> Attend:
    """One library call per run of queries."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = []
        for q_start, q_end, ranges in plan.ranges:
            keys, values = ([x[:, a:b] for a, b in ranges] for x in (k, v))
            own_k, own_v = (x[0] if len(x) == 1 else torch.cat(x, dim=1) for x in (keys, values))
            own_q, own_k, own_v = (x.transpose(1, 2) for x in (q[:, q_start:q_end], own_k, own_v))
            with sdpa_kernel(backend):
                outs.append(F.scaled_dot_product_attention(own_q, own_k, own_v, scale=scale).transpose(1, 2))
        return outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)

    return attend


def flex_contestant(plan: AttentionPlan, scale: float) -> tuple[float, Attend]:
    """Compiled flex_attention, and the milliseconds its BlockMask took. Its mask_mod reads each query's ranges."""
    bounds = torch.zeros(plan.num_queries, 3, 2, dtype=torch.int32, device="cuda")
    for q_start, q_end, ranges in plan.ranges:
        bounds[q_start:q_end, : len(ranges)] = torch.tensor(ranges, dtype=torch.int32, device="cuda")

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = [(key >= bounds[query, i, 0]) & (key < bounds[query, i, 1]) for i in range(3)]
        return own[0] | own[1] | own[2]

    def build() -> BlockMask:
        return create_block_mask(mask_mod, None, None, plan.num_queries, plan.num_keys, device="cuda", _compile=True)

    build()  # compiles
    torch.cuda.synchronize()
    start = time.perf_counter()
    mask = build()
    torch.cuda.synchronize()
    mask_ms = (time.perf_counter() - start) * 1e3
    compiled = torch.compile(flex_attention, dynamic=False)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask, scale=scale).transpose(1, 2)

    return mask_ms, attend


def parity(attend: Attend, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> float:
    """Relative error against float64 on some queries of every run, the last one included.

    Raises:
        AssertionError: if it exceeds twice the dense formula's own error in this dtype and a rounding step.
    """
    scale = q.shape[3] ** -0.5
    with torch.no_grad():
        out = attend(q, k, v)
        error = budget = 0.0
        for q_start, q_end, ranges in plan.ranges:
            rows = torch.linspace(q_start, q_end - 1, min(CHECKED_ROWS, q_end - q_start)).round().long().unique()
            keys = torch.cat([torch.arange(a, b) for a, b in ranges])
            mask = torch.ones(1, 1, dtype=torch.bool, device=q.device)
            own = (q[:, rows], k[:, keys], v[:, keys])
            low = dense_attention(*own, mask, scale)[0]
            exact = dense_attention(own[0].double(), own[1].double(), own[2].double(), mask, scale)[0]
            error = max(error, relative_error(out[:, rows], exact))
            budget = max(budget, 2 * relative_error(low, exact) + torch.finfo(q.dtype).eps)
    assert error <= budget, f"error {error:.2e} against float64, budget {budget:.2e}"
    return error


def step(attend: Attend, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
    """What is timed: a forward and, in training, the gradients for an output gradient equal to the output."""
    if not backward:
        with torch.no_grad():
            attend(q, k, v)
        return
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), out.detach())


def graphed(call: Callable[[], None], device: str) -> Callable[[], Any]:
    """On CUDA a graph of the call, so that what is timed is the GPU and not Python."""
    if device == "cpu":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


if __name__ == "__main__":
    main()
