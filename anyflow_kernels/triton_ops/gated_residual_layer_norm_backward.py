"""Backward of the gated residual + LayerNorm + modulation, one pass over the tokens plus a small sum.

With xhat = (x_new - mean) * rstd, a = xhat * weight + bias and h = dy * (1 + scale[f]) * weight:

    dx      = dx_new + rstd * (h - mean(h) - xhat * mean(h * xhat))
    dbranch = gate[f] * dx        dgate[f]  = sum over the frame of dx * branch
    dshift[f] = sum of dy         dscale[f] = sum of dy * a
    dweight = sum of dy * (1 + scale[f]) * xhat,  dbias = sum of dy * (1 + scale[f])

mean and rstd are recomputed from the row, which is read anyway: nothing but inputs and x_new is saved.

Bytes:  (x_new, dy, dx, [dx_new, branch, dbranch]) = 3 to 6 * B*L*D*itemsize, + partial sums, 8*D per reduced row and
        GROUP tokens. FLOPs: ~30*B*L*D. Roof: HBM.

A program walks GROUP tokens of one frame and keeps the sums in registers; `sum_tiles` then adds the groups of a frame
in order. No atomics: the same bits on every run.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, bf16_case
from ..launch_configs import architecture, row_tile
from .frame_tiles import RUNS, count_tiles, dense_rows, locate_tile, run_groups, strides_2d, sum_all, sum_tiles


@triton.jit(do_not_specialize=RUNS)
def _gated_residual_layer_norm_backward_kernel(
    x_new_ptr,
    branch_ptr,
    gate_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    dx_new_ptr,
    dy_ptr,
    dx_ptr,
    dbranch_ptr,
    dgate_ptr,
    dshift_ptr,
    dscale_ptr,
    dweight_ptr,
    dbias_ptr,
    frames_0,
    tokens_0,
    frames_1,
    tokens_1,
    frames_2,
    tokens_2,
    x_new_stride_b,
    x_new_stride_l,
    branch_stride_b,
    branch_stride_l,
    gate_stride_b,
    gate_stride_f,
    scale_stride_b,
    scale_stride_f,
    dx_new_stride_b,
    dx_new_stride_l,
    dy_stride_b,
    dy_stride_l,
    dx_stride_b,
    partial_stride_b,
    eps,
    D: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i_f, start, end = locate_tile(i_g, frames_0, tokens_0, frames_1, tokens_1, frames_2, tokens_2, GROUP)
    c = tl.arange(0, BLOCK_D)
    mask = c < D
    partial = i_b * partial_stride_b + i_g.to(tl.int64) * D + c

    # Modulation and weight rows are read from L1 for every token: kept in registers they would crowd out the sums.
    if gate_ptr is not None:
        gate_row = gate_ptr + i_b * gate_stride_b + i_f * gate_stride_f + c
        dgate = tl.zeros([BLOCK_D], tl.float32)
    if scale_ptr is not None:
        scale_row = scale_ptr + i_b * scale_stride_b + i_f * scale_stride_f + c
        dshift = tl.zeros([BLOCK_D], tl.float32)
        dscale = tl.zeros([BLOCK_D], tl.float32)
    if weight_ptr is not None:
        dweight = tl.zeros([BLOCK_D], tl.float32)
        dbias = tl.zeros([BLOCK_D], tl.float32)

    i_l = start.to(tl.int64)
    last = tl.minimum(start + GROUP, end)
    while i_l < last:  # not range(): Triton 3.6 cannot interpret a range over a tensor
        x_new = tl.load(x_new_ptr + i_b * x_new_stride_b + i_l * x_new_stride_l + c, mask=mask, other=0.0)
        grad = tl.load(dy_ptr + i_b * dy_stride_b + i_l * dy_stride_l + c, mask=mask, other=0.0).to(tl.float32)
        xhat = x_new.to(tl.float32)
        xhat = tl.where(mask, xhat - tl.sum(xhat, axis=0) / D, 0.0)
        rstd = tl.rsqrt(tl.sum(xhat * xhat, axis=0) / D + eps)
        xhat *= rstd
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + c, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        if scale_ptr is not None:
            scale = tl.load(scale_row, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            dshift += grad
            if weight_ptr is not None:
                bias = tl.load(bias_ptr + c, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
                dscale += grad * (xhat * weight + bias)
            else:
                dscale += grad * xhat
            grad *= 1.0 + scale
        if weight_ptr is not None:
            dweight += grad * xhat
            dbias += grad
            grad *= weight
        along = tl.sum(grad * xhat, axis=0) / D
        dx = rstd * (grad - tl.sum(grad, axis=0) / D - xhat * along)
        if dx_new_ptr is not None:
            dx_new_row = dx_new_ptr + i_b * dx_new_stride_b + i_l * dx_new_stride_l
            dx += tl.load(dx_new_row + c, mask=mask, other=0.0).to(tl.float32)
        out = i_b * dx_stride_b + i_l * D + c
        tl.store(dx_ptr + out, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        if gate_ptr is not None:
            branch = tl.load(branch_ptr + i_b * branch_stride_b + i_l * branch_stride_l + c, mask=mask, other=0.0)
            gate = tl.load(gate_row, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
            dgate += dx * branch.to(tl.float32)
            tl.store(dbranch_ptr + out, (dx * gate).to(dbranch_ptr.dtype.element_ty), mask=mask)
        i_l += 1

    if gate_ptr is not None:
        tl.store(dgate_ptr + partial, dgate, mask=mask)
    if scale_ptr is not None:
        tl.store(dshift_ptr + partial, dshift, mask=mask)
        tl.store(dscale_ptr + partial, dscale, mask=mask)
    if weight_ptr is not None:
        tl.store(dweight_ptr + partial, dweight, mask=mask)
        tl.store(dbias_ptr + partial, dbias, mask=mask)


def _launch(
    x_new: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dx_new: Tensor | None,
    dy: Tensor,
    frame_map: list[int],
    eps: float,
) -> list[Tensor]:
    x_new, dy = dense_rows(x_new), dense_rows(dy)
    branch, gate, scale, dx_new = (None if t is None else dense_rows(t) for t in (branch, gate, scale, dx_new))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    batch, length, width = x_new.shape
    tile = row_tile("gated_residual_layer_norm_backward", architecture(x_new.device), width, x_new.dtype)
    tile_map = [triton.cdiv(n, tile.rows) if i % 2 else n for i, n in enumerate(frame_map)]
    num_tiles = sum(f * t for f, t in zip(tile_map[0::2], tile_map[1::2], strict=True))
    dx = x_new.new_empty(batch, length, width)
    dbranch = None if gate is None else torch.empty_like(dx)
    reduced = (gate, scale, scale, weight, weight)  # whose gradients are sums: gate, shift, scale, weight, bias
    partials = [None if t is None else dx.new_empty(batch, num_tiles, width, dtype=torch.float32) for t in reduced]

    first_tile = 0
    for token, tokens, frame, runs in run_groups(frame_map):
        if batch * tokens == 0:
            continue
        per_token = [None if t is None else t[:, token : token + tokens] for t in (x_new, branch, dx_new, dy)]
        rows = [None if t is None else t[:, frame:] for t in (gate, scale)]
        tiles = count_tiles(runs, tile.rows)
        with torch.cuda.device_of(x_new):
            _gated_residual_layer_norm_backward_kernel[(tiles, batch)](
                *per_token[:2],
                *rows,
                weight,
                bias,
                *per_token[2:],
                dx[:, token:],
                None if dbranch is None else dbranch[:, token:],
                *(None if t is None else t[:, first_tile:] for t in partials),
                *runs,
                *(stride for t in per_token[:2] + rows + per_token[2:] for stride in strides_2d(t)),
                dx.stride(0),
                num_tiles * width,
                eps,
                D=width,
                GROUP=tile.rows,
                BLOCK_D=triton.next_power_of_2(width),
                num_warps=tile.num_warps,
            )
        first_tile += tiles

    sums = [
        (sum_tiles(partial, tile_map) if i < 3 else sum_all(partial)).to(like.dtype)
        for i, (partial, like) in enumerate(zip(partials, reduced, strict=True))
        if partial is not None and like is not None
    ]
    return [dx, *([] if dbranch is None else [dbranch]), *sums]


OP = "anyflow::gated_residual_layer_norm_backward"
torch.library.define(
    OP,
    "(Tensor x_new, Tensor? branch, Tensor? gate, Tensor? scale, Tensor? weight, Tensor? bias, Tensor? dx_new, "
    "Tensor dy, SymInt[] frame_map, float eps) -> Tensor[]",
)
torch.library.impl(OP, ("cpu", "cuda"), _launch)


@torch.library.register_fake(OP)
def _fake(
    x_new: Tensor, branch: Tensor | None, gate: Tensor | None, scale: Tensor | None, weight: Tensor | None, *_: object
) -> list[Tensor]:
    like = [x_new, x_new if gate is not None else None, gate, scale, scale, weight, weight]
    return [t.new_empty(t.shape) for t in like if t is not None]


def backward(
    x_new: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    dx_new: Tensor | None,
    dy: Tensor | None,
    frame_map: list[int],
    eps: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, branch, gate, shift, scale, weight, bias), None for absent ones.

    The gradient of branch is given only with gate: without, it is that of x. A missing `dy` counts as zeros.
    """
    dy = torch.zeros_like(x_new) if dy is None else dy
    grads = iter(
        torch.ops.anyflow.gated_residual_layer_norm_backward(
            x_new, branch, gate, scale, weight, bias, dx_new, dy, frame_map, eps
        )
    )
    present = (True, gate is not None, gate is not None, *[scale is not None] * 2, *[weight is not None] * 2)
    return tuple(next(grads) if there else None for there in present)


def bytes_moved(x: Tensor, gate: bool, dx_new: bool) -> int:
    """Of one backward, without the partial sums: x_new, dy, dx; branch and dbranch with a gate; dx_new if it came."""
    return (3 + 2 * gate + dx_new) * x.numel() * x.element_size()


_USES = {
    "modulated": ("branch_ptr", "gate_ptr", "dx_new_ptr", "dbranch_ptr", "dgate_ptr"),
    "gated + affine": ("scale_ptr", "dshift_ptr", "dscale_ptr"),
    "gated + modulated": (),
}
_AFFINE = ("weight_ptr", "bias_ptr", "dweight_ptr", "dbias_ptr")


def aot_cases(arch: int) -> list[AotCase]:
    """The backwards of a block of each released model."""
    fp32 = [f"{name}_ptr" for name in ("gate", "scale", "weight", "bias")]
    fp32 += [f"d{name}_ptr" for name in ("gate", "shift", "scale", "weight", "bias")]
    cases = []
    for model, size in MODELS.items():
        width = size["dim"]
        tile = row_tile("gated_residual_layer_norm_backward", arch, width)
        for use, missing in _USES.items():
            absent = missing if use == "gated + affine" else missing + _AFFINE
            kernel, name = _gated_residual_layer_norm_backward_kernel, f"{model} {use}"
            constexprs = {"D": width, "GROUP": tile.rows, "BLOCK_D": triton.next_power_of_2(width)}
            cases.append(bf16_case(kernel, name, constexprs, tile.num_warps, (*fp32, "eps"), absent))
    return cases
