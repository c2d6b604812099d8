"""Attention of the released models at 480p, against what PyTorch has for the same masks.

python -m bench.far_attention [--dtype float32|bfloat16] [--shape PART] [--contestants NAME ...] [--tiny] [--plot FILE]

On CUDA: `triton`, whatever serves there, its own kernel (`portable`) and, on sm_90, its Gluon forward, against flash
and cuDNN SDPA (one call per run of queries, keys concatenated where a run sees several ranges) and compiled
flex_attention with its BlockMask (built beforehand, its time reported apart); the training layout with its backward. On
a CPU: the `torch` backend against the dense formula, eager and compiled, at a shape it can do. Everywhere: as diffusers
does it, which in inference is flex_attention without compilation over padded sequences, and is checked against what
that computes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from anyflow_kernels import AttentionPlan, FarLayout, available_backends, launch_configs, load_ops
from anyflow_kernels.launch_configs import attention_row
from anyflow_kernels.reference import blockwise_attention, dense_attention, plan_mask
from anyflow_kernels.testing.budget import check, widened
from anyflow_kernels.triton_ops.attention_tiles import describable
from anyflow_kernels.triton_ops.far_attention import bytes_moved, flops, launch_forward
from anyflow_kernels.triton_ops.tile_schedule import encode

from . import diffusers_eager
from .common import graphed, interleaved_medians, keep_row, print_rows
from .kernel_bench import MODELS, TINY, ceilings, layouts, parse
from .model_bounds import attention_bound, compiles_here
from .roofline import chip_here, draw_roofline

CPU_SHAPES = ("1.3B chunk 0",)
GRADIENT_ROWS = 1024  # queries of a head at a time in the check of a backward
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def main() -> None:
    options = parse(__doc__, contestants=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    copy, gemm = ceilings(device, options.dtype)
    rows: list[dict[str, Any]] = []
    for model, size in (TINY if options.tiny else MODELS).items():
        for shape, layout in layouts(options.tiny).items():
            name = f"{model} {shape}"
            if options.shape not in name:
                continue
            if device == "cpu" and not options.tiny and name not in CPU_SHAPES:
                print(f"skipped: {name} (too slow on a CPU)")
                continue
            for row in bench_shape(name, layout, size, options.dtype, options.repeats, gemm, options.contestants):
                keep_row(row, options.json)
                rows.append(row)
    if not rows:
        wanted = f"{options.shape!r}, --contestants: got {options.contestants or 'all'}"
        raise SystemExit(f"--shape: got {wanted}, expected part of a shape's name and a contestant that can run here")
    if options.plot:
        draw_roofline(rows, copy, gemm, options.plot)
    print_rows(rows)


def bench_shape(
    name: str,
    layout: FarLayout,
    size: dict[str, int],
    dtype: torch.dtype,
    repeats: int,
    gemm: float,
    only: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """The rows of one shape: each contestant is checked, then timed in turns with the others."""
    plan, backward = AttentionPlan.from_layout(layout), layout.clean
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)

    def tensor(length: int) -> Tensor:
        shape = (1, length, size["heads"], size["head_dim"])
        return torch.randn(shape, generator=generator, device=device, dtype=dtype).requires_grad_(backward)

    q, k, v = tensor(plan.num_queries), tensor(plan.num_keys), tensor(plan.num_keys)
    contestants, mask_ms, skipped = contestants_for(plan, size["head_dim"] ** -0.5, device, only)
    eager_plan = plan
    try:
        if diffusers_eager.NAME in (only or (diffusers_eager.NAME,)):
            contestants[diffusers_eager.NAME], eager_plan = diffusers_eager.far_attention(layout, device)
    except torch.OutOfMemoryError as error:  # its mask is made from all pairs of tokens
        skipped[diffusers_eager.NAME] = str(error).partition("\n")[0]
    functions: dict[str, Callable[[], Any]] = {}
    errors: dict[str, float] = {}
    captured: dict[str, bool] = {}
    for label, attend in contestants.items():
        try:
            errors[label] = parity(attend, q, k, v, eager_plan if label == diffusers_eager.NAME else plan)
            if backward:
                errors[label] = max(errors[label], gradient_parity(attend, q, k, v, plan))
            call = partial(step, attend, q, k, v, backward)
            functions[label], captured[label] = graphed(call, device, f"{label}, {name}")
        except (RuntimeError, ValueError, AssertionError) as error:
            # A rival that does not run here, or is wrong, has no speed; ours must run and be right.
            if label in ("triton", "torch"):
                raise
            skipped[label] = (str(error).strip() or type(error).__name__).splitlines()[0]
    for label, reason in skipped.items():
        print(f"skipped: {label}, {name} ({reason})")
    seconds = interleaved_medians(functions, repeats)
    shape = (1, size["heads"], size["head_dim"])
    # A backward is five matrix products and twice the traffic, whatever a kernel computes or reads again.
    work, moved = flops(plan, *shape), bytes_moved(q, k)
    if backward:
        work, moved = work * 7 // 2, moved * 3
    bounds = model_bounds(name, plan, size, dtype, backward)
    rows = []
    for label, s in seconds.items():
        rate, bandwidth = work / s, moved / s
        print(
            f"{name:<30}{'fwd+bwd ' if backward else '':<8}{label:<16}{s * 1e3:10.4f} ms {rate / 1e12:8.2f} TFLOP/s "
            f"{rate / gemm:5.0%} of GEMM {bandwidth / 1e9:8.1f} GB/s   error {errors[label]:.1e}"
            + (f"   mask built in {mask_ms:.0f} ms" if label == "flex" else "")
            + ("" if captured[label] else "   with its launches")
            + (f"   {bounds[label] / s:4.0%} of the model's bound" if label in bounds else ""),
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
                "bytes": moved,
                "tflop_per_s": rate / 1e12,
                "of_ceiling": rate / gemm,
                "gb_per_s": bandwidth / 1e9,
                "relative_error": errors[label],
                "launches_timed": not captured[label],
                **({"mask_ms": mask_ms} if label == "flex" else {}),
                **({"of_model": bounds[label] / s} if label in bounds else {}),
            }
        )
    return rows


def model_bounds(
    name: str, plan: AttentionPlan, size: dict[str, int], dtype: torch.dtype, backward: bool
) -> dict[str, float]:
    """Seconds by the model of our kernels, printed; without a GPU of bf16 on one that is not here."""
    if not compiles_here():
        return {}
    chip, served = chip_here(), dtype if torch.cuda.is_available() else torch.bfloat16
    kinds = ("triton", "gluon") if chip.arch == 90 and served.itemsize == 2 and not backward else ("triton",)
    shape = (size["heads"], size["head_dim"], served, backward)
    bounds = {kind: attention_bound(kind, chip, plan, *shape) for kind in kinds}
    shown = ", ".join(f"{kind} {s * 1e3:.4f} ms" for kind, s in bounds.items())
    print(f"{name:<30}model of {8 * served.itemsize}-bit kernels on {chip.name}: at least {shown}")
    return bounds


def contestants_for(
    plan: AttentionPlan, scale: float, device: str, only: Sequence[str] = ()
) -> tuple[dict[str, Attend], float, dict[str, str]]:
    """Contestants by name (if given, `only` those), the milliseconds of flex's mask, who cannot run here and why."""

    def ours(backend: str) -> Attend:
        ops = load_ops(backend)
        return lambda q, k, v: ops.far_attention(q, k, v, plan, scale)

    if device == "cpu":
        mask = plan_mask(plan)
        compiled = torch.compile(dense_attention, dynamic=False)
        known = {
            "torch": ours("torch"),
            "eager": lambda q, k, v: dense_attention(q, k, v, mask, scale)[0],
            "compiled": lambda q, k, v: compiled(q, k, v, mask, scale)[0],
        }
        skipped = {
            "triton": available_backends()["triton"] or "TRITON_INTERPRET=1 runs it in Python: no speed",
            "flash, cudnn, flex": "no CUDA device",
        }
    else:
        known, skipped = {"triton": ours("triton"), "portable": portable_contestant(plan, scale)}, {}
        if launch_configs.architecture(device) == 90:
            known["gluon"] = gluon_contestant(plan, scale)
        known["flash"] = sdpa_contestant(plan, scale, SDPBackend.FLASH_ATTENTION)
        known["cudnn"] = sdpa_contestant(plan, scale, SDPBackend.CUDNN_ATTENTION)
    chosen = {name: attend for name, attend in known.items() if not only or name in only}
    mask_ms = 0.0
    if device == "cuda" and (not only or "flex" in only):
        mask_ms, chosen["flex"] = flex_contestant(plan, scale)
    return chosen, mask_ms, skipped


def portable_contestant(plan: AttentionPlan, scale: float) -> Attend:
    """The Triton forward, whether or not another serves in its place."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        arch, descriptors = launch_configs.architecture(q.device), all(map(describable, (q, k, v)))
        config = attention_row(launch_configs.ATTENTION_FORWARD, arch, q.shape[3], q.itemsize, descriptors)
        return launch_forward(q, k, v, tuple(encode(plan.ranges)), plan.phantom_keys, scale, config)[0]

    return attend


def gluon_contestant(plan: AttentionPlan, scale: float) -> Attend:
    """The warp-specialised forward, whether or not the launch table chooses it."""
    from anyflow_kernels.triton_ops.far_attention_gluon import launch_gluon

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        config = attention_row(launch_configs.ATTENTION_GLUON, 90, q.shape[3], q.itemsize)
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
    mask_mod = diffusers_eager.range_mask(plan, plan.num_queries, "cuda")

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
    """Relative error of the whole output against float64.

    Raises:
        AssertionError: if the output breaks the error law beside the dense formula in this dtype.
    """
    with torch.no_grad():
        return check("out", attend(q, k, v), *witness_outputs(q, k, v, plan)).whole


def gradient_parity(attend: Attend, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> float:
    """The largest relative error of dq, dk and dv against float64, for an output gradient equal to the output.

    Raises:
        AssertionError: if one breaks the error law beside the dense formula in this dtype.
    """
    out_grad, low, exact = witness_gradients(q, k, v, plan)
    grads = torch.autograd.grad(attend(q, k, v), (q, k, v), out_grad)
    return max(check(*tensors).whole for tensors in zip(("dq", "dk", "dv"), grads, low, exact, strict=True))


@lru_cache(maxsize=2)  # all contestants of a shape are judged by the same: minutes of float64 at the largest
def witness_outputs(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor]:
    """The dense formula in the dtype of q, and in float64."""
    with torch.no_grad():
        low, exact = (
            blockwise_attention(*tensors, plan, q.shape[3] ** -0.5)[0] for tensors in ((q, k, v), widened((q, k, v)))
        )
    return low, exact


@lru_cache(maxsize=1)
def witness_gradients(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """An output gradient, and dq, dk and dv for it by the dense formula in the dtype of q, and in float64."""
    out_grad = witness_outputs(q, k, v, plan)[0]
    heads = list(zip(*(x.detach().split(1, dim=2) for x in (q, k, v, out_grad)), strict=True))
    low = [
        torch.cat(parts, dim=2).to(q.dtype) for parts in zip(*(dense_gradients(plan, *h) for h in heads), strict=True)
    ]
    wide = (dense_gradients(plan, *(x.double() for x in head)) for head in heads)
    return out_grad, low, [torch.cat(parts, dim=2) for parts in zip(*wide, strict=True)]


def dense_gradients(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, out_grad: Tensor) -> list[Tensor]:
    """float64 sums of dq, dk and dv, each computed in the dtype of q, some queries at a time."""
    scale, sums = q.shape[3] ** -0.5, [torch.zeros_like(x, dtype=torch.float64) for x in (q, k, v)]
    mask = torch.ones(1, 1, dtype=torch.bool, device=q.device)
    for q_start, q_end, ranges in plan.ranges:
        keys = torch.cat([torch.arange(a, b, device=q.device) for a, b in ranges])
        for start in range(q_start, q_end, GRADIENT_ROWS):
            rows = slice(start, min(start + GRADIENT_ROWS, q_end))
            own = [x.clone().requires_grad_() for x in (q[:, rows], k[:, keys], v[:, keys])]
            grads = torch.autograd.grad(dense_attention(own[0], own[1], own[2], mask, scale)[0], own, out_grad[:, rows])
            indices: tuple[Any, ...] = (rows, keys, keys)
            for total, index, grad in zip(sums, indices, grads, strict=True):
                total[:, index] += grad
    return sums


def step(attend: Attend, q: Tensor, k: Tensor, v: Tensor, backward: bool) -> None:
    """What is timed: a forward and, in training, the gradients for an output gradient equal to the output."""
    if not backward:
        with torch.no_grad():
            attend(q, k, v)
        return
    out = attend(q, k, v)
    torch.autograd.grad(out, (q, k, v), out.detach())


if __name__ == "__main__":
    main()
