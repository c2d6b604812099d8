"""RMSNorm over the last dimension, forward and backward.

    y = x * rsqrt(mean(x^2) + eps) * weight          fp32 inside, rounded once

and, with xhat = x * rstd and h = dy * weight:

    dx = rstd * (h - xhat * mean(h * xhat)),   dweight = sum over rows of dy * xhat.

Bytes:  forward 2*N*D*itemsize, backward 3*N*D*itemsize + partial sums, 8*D per GROUP rows.
FLOPs:  forward 4*N*D, backward 9*N*D. Roof: HBM.
Source: the q and k norms of diffusers' AnyFlowCrossAttnProcessor (over all D channels, not per head).

rstd is recomputed in the backward from the row that is read anyway. The weight gradient is summed per GROUP rows,
then over groups in a fixed order: no atomics.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, bf16_case
from ..launch_configs import architecture, pdl, row_tile
from .dependent_launch import dependent_launch, wait_for_predecessor
from .frame_tiles import check_dtype, dense_rows, sum_all


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr, weight_ptr, y_ptr,
    num_rows, x_stride_n, eps,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    i_n = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    c = tl.arange(0, BLOCK_D)[None, :]
    mask_c = c < D
    mask = (i_n < num_rows) & mask_c
    x = tl.load(x_ptr + i_n * x_stride_n + c, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    weight = tl.load(weight_ptr + c, mask=mask_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
    y = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) / D + eps) * weight  # [ROWS, BLOCK_D]
    tl.store(y_ptr + i_n * D + c, y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    dx_ptr,
    dweight_ptr,
    num_rows,
    dy_stride_n,
    x_stride_n,
    eps,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_g = tl.program_id(0)
    c = tl.arange(0, BLOCK_D)
    mask = c < D
    weight = tl.load(weight_ptr + c, mask=mask, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_D], tl.float32)
    i_n = i_g.to(tl.int64) * GROUP
    last = tl.minimum(i_n + GROUP, num_rows)
    while i_n < last:  # not range(): Triton 3.6 cannot interpret a range over a tensor
        x = tl.load(x_ptr + i_n * x_stride_n + c, mask=mask, other=0.0).to(tl.float32)
        grad = tl.load(dy_ptr + i_n * dy_stride_n + c, mask=mask, other=0.0).to(tl.float32)
        rstd = tl.rsqrt(tl.sum(x * x, axis=0) / D + eps)
        x *= rstd
        total += grad * x
        grad *= weight
        dx = rstd * (grad - x * (tl.sum(grad * x, axis=0) / D))
        tl.store(dx_ptr + i_n * D + c, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        i_n += 1
    tl.store(dweight_ptr + i_g.to(tl.int64) * D + c, total, mask=mask)


def _launch(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    width = x.shape[-1]
    rows = dense_rows(x.reshape(-1, width))
    y = x.new_empty(x.shape)
    arch = architecture(x.device)
    tile = row_tile("rms_norm", arch, width, x.dtype)
    if y.numel():
        with torch.cuda.device_of(x):
            _rms_norm_kernel[(triton.cdiv(rows.shape[0], tile.rows),)](
                rows,
                weight.contiguous(),
                y,
                rows.shape[0],
                rows.stride(0),
                eps,
                D=width,
                ROWS=tile.rows,
                BLOCK_D=triton.next_power_of_2(width),
                num_warps=tile.num_warps,
                **dependent_launch(arch),
            )
    return y


def _launch_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    width = x.shape[-1]
    rows, grads = dense_rows(x.reshape(-1, width)), dense_rows(dy.reshape(-1, width))
    tile = row_tile("rms_norm_backward", architecture(x.device), width, x.dtype)
    num_groups = triton.cdiv(rows.shape[0], tile.rows)
    dx = x.new_empty(x.shape)
    partial = x.new_empty(1, num_groups, width, dtype=torch.float32)
    if dx.numel():
        with torch.cuda.device_of(x):
            _rms_norm_backward_kernel[(num_groups,)](
                grads,
                rows,
                weight.contiguous(),
                dx,
                partial,
                rows.shape[0],
                grads.stride(0),
                rows.stride(0),
                eps,
                D=width,
                GROUP=tile.rows,
                BLOCK_D=triton.next_power_of_2(width),
                num_warps=tile.num_warps,
            )
    return dx, sum_all(partial).to(weight.dtype)


torch.library.define("anyflow::rms_norm", "(Tensor x, Tensor weight, float eps) -> Tensor")
torch.library.impl("anyflow::rms_norm", ("cpu", "cuda"), _launch)
torch.library.register_fake("anyflow::rms_norm", lambda x, weight, eps: x.new_empty(x.shape))

torch.library.define(
    "anyflow::rms_norm_backward", "(Tensor dy, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)"
)
torch.library.impl("anyflow::rms_norm_backward", ("cpu", "cuda"), _launch_backward)
torch.library.register_fake(
    "anyflow::rms_norm_backward", lambda dy, x, weight, eps: (x.new_empty(x.shape), weight.new_empty(weight.shape))
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, weight, ctx.eps = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, dy: Tensor) -> tuple:
    return (*torch.ops.anyflow.rms_norm_backward(dy, *ctx.saved_tensors, ctx.eps), None)


torch.library.register_autograd("anyflow::rms_norm", _backward, setup_context=_setup_context)


def bytes_moved(x: Tensor, backward: bool = False) -> int:
    """Of one forward or backward, without weights and partial sums."""
    return (3 if backward else 2) * x.numel() * x.element_size()


def flops(x: Tensor, backward: bool = False) -> int:
    return (9 if backward else 4) * x.numel()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """See `Ops.rms_norm`. Raises TypeError unless x is fp32, bf16 or fp16."""
    check_dtype("x", x)
    return torch.ops.anyflow.rms_norm(x, weight, eps)


def aot_cases(arch: int) -> list[AotCase]:
    """Forward and backward at the width of each released model."""
    cases = []
    for model, size in MODELS.items():
        width = size["dim"]
        block = {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
        forward, backward = row_tile("rms_norm", arch, width), row_tile("rms_norm_backward", arch, width)
        name, sums = f"{model} cross-attention", ("eps", "dweight_ptr")
        rows = block | {"ROWS": forward.rows, "PDL": pdl(arch)}
        cases += [
            bf16_case(_rms_norm_kernel, name, rows, forward.num_warps, ("eps",)),
            bf16_case(_rms_norm_backward_kernel, name, block | {"GROUP": backward.rows}, backward.num_warps, sums),
        ]
    return cases
