"""Backward of QK-RMSNorm + RoPE, from (dq', dk', dv) to one gradient of the fused projection.

With g = rope^-1(dq') (the rotation by -angle), xhat = q * rstd and h = g * q_weight:

    dq = rstd * (h - xhat * mean(h * xhat)),   dq_weight = sum over tokens of g * xhat,   likewise k;   dv is copied.

rstd is recomputed from the row, which is read anyway.

Bytes:  8*B*L*D*itemsize (q, k, dq', dk', dv read; dq, dk, dv written) + partial sums, 16*D per GROUP tokens.
FLOPs:  ~30*B*L*D. Roof: HBM.

A program walks GROUP tokens of q, of k or of v and keeps the weight gradient in registers; `sum_all` adds the groups
in order: no atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, bf16_case
from ..launch_configs import architecture, row_tile
from .frame_tiles import dense_rows, sum_all


@triton.jit
def _rows_backward(
    grad_ptr,
    x_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    dx_ptr,
    dweight_ptr,
    grad_stride_l,
    grad_stride_h,
    x_stride_l,
    cos_stride_l,
    sin_stride_l,
    start,
    end,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """q or k of tokens start to end: writes dx, rows of 3*D, and the sum of dweight over these tokens."""
    D: tl.constexpr = HEADS * HEAD_DIM
    h = tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (h < HEADS) & (c < HEAD_DIM)
    channel = h * HEAD_DIM + c  # [BLOCK_H, BLOCK_C]
    pair = tl.arange(0, BLOCK_C // 2)[None, :]
    mask_pair = pair < HEAD_DIM // 2
    total = tl.zeros([BLOCK_H, BLOCK_C], tl.float32)
    i_l = start.to(tl.int64)
    while i_l < end:
        grad = tl.load(grad_ptr + i_l * grad_stride_l + h * grad_stride_h + c, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + i_l * x_stride_l + channel, mask=mask, other=0.0).to(tl.float32)
        cos = tl.load(cos_ptr + i_l * cos_stride_l + pair, mask=mask_pair, other=1.0)  # [1, BLOCK_C / 2]
        sin = tl.load(sin_ptr + i_l * sin_stride_l + pair, mask=mask_pair, other=0.0)
        weight = tl.load(weight_ptr + channel, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
        even, odd = tl.split(tl.reshape(grad, [BLOCK_H, BLOCK_C // 2, 2]))
        grad = tl.reshape(tl.join(even * cos + odd * sin, odd * cos - even * sin), [BLOCK_H, BLOCK_C])
        rstd = tl.rsqrt(tl.sum(x * x) / D + eps)
        x *= rstd
        total += grad * x
        along = tl.sum(grad * x * weight) / D
        dx = rstd * (grad * weight - x * along)
        tl.store(dx_ptr + i_l * 3 * D + channel, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        i_l += 1
    tl.store(dweight_ptr + channel, total, mask=mask)


@triton.jit
def _qk_norm_rope_backward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    dq_ptr,
    dk_ptr,
    dv_ptr,
    dqkv_ptr,
    dq_weight_ptr,
    dk_weight_ptr,
    qkv_stride_b,
    qkv_stride_l,
    cos_stride_l,
    sin_stride_l,
    dq_stride_b,
    dq_stride_l,
    dq_stride_h,
    dk_stride_b,
    dk_stride_l,
    dk_stride_h,
    dv_stride_b,
    dv_stride_l,
    dv_stride_h,
    num_tokens,
    num_groups,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    D: tl.constexpr = HEADS * HEAD_DIM
    i_g, i_b, role = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2)
    start, end = i_g * GROUP, tl.minimum(i_g * GROUP + GROUP, num_tokens)
    qkv_row = qkv_ptr + i_b * qkv_stride_b
    dqkv_row = dqkv_ptr + i_b * num_tokens * 3 * D
    partial = (i_b * num_groups + i_g) * D
    if role == 0:
        _rows_backward(
            dq_ptr + i_b * dq_stride_b, qkv_row, q_weight_ptr, cos_ptr, sin_ptr, dqkv_row, dq_weight_ptr + partial,
            dq_stride_l, dq_stride_h, qkv_stride_l, cos_stride_l, sin_stride_l, start, end, eps,
            HEADS, HEAD_DIM, BLOCK_H, BLOCK_C,
        )  # fmt: skip
    elif role == 1:
        _rows_backward(
            dk_ptr + i_b * dk_stride_b, qkv_row + D, k_weight_ptr, cos_ptr, sin_ptr, dqkv_row + D,
            dk_weight_ptr + partial,
            dk_stride_l, dk_stride_h, qkv_stride_l, cos_stride_l, sin_stride_l, start, end, eps,
            HEADS, HEAD_DIM, BLOCK_H, BLOCK_C,
        )  # fmt: skip
    else:
        h = tl.arange(0, BLOCK_H)[:, None]
        c = tl.arange(0, BLOCK_C)[None, :]
        mask = (h < HEADS) & (c < HEAD_DIM)
        dv_row = dv_ptr + i_b * dv_stride_b + h * dv_stride_h + c
        i_l = start.to(tl.int64)
        while i_l < end:
            dv = tl.load(dv_row + i_l * dv_stride_l, mask=mask, other=0.0)
            tl.store(dqkv_row + i_l * 3 * D + 2 * D + h * HEAD_DIM + c, dv, mask=mask)
            i_l += 1


def _launch(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv, qkv, cos, sin = (dense_rows(x) for x in (dq, dk, dv, qkv, cos, sin))
    batch, length, width = qkv.shape
    tile = row_tile("qk_norm_rope_append_backward", architecture(qkv.device), width // 3, qkv.dtype)
    num_groups = triton.cdiv(length, tile.rows)
    dqkv = qkv.new_empty(batch, length, width)
    partial_q, partial_k = (qkv.new_empty(batch, num_groups, width // 3, dtype=torch.float32) for _ in range(2))
    if qkv.numel():
        with torch.cuda.device_of(qkv):
            _qk_norm_rope_backward_kernel[(num_groups, batch, 3)](
                qkv,
                q_weight.contiguous(),
                k_weight.contiguous(),
                cos,
                sin,
                dq,
                dk,
                dv,
                dqkv,
                partial_q,
                partial_k,
                *qkv.stride()[:2],
                cos.stride(0),
                sin.stride(0),
                *dq.stride()[:3],
                *dk.stride()[:3],
                *dv.stride()[:3],
                length,
                num_groups,
                eps,
                HEADS=heads,
                HEAD_DIM=width // 3 // heads,
                GROUP=tile.rows,
                BLOCK_H=triton.next_power_of_2(heads),
                BLOCK_C=triton.next_power_of_2(width // 3 // heads),
                num_warps=tile.num_warps,
            )
    return dqkv, sum_all(partial_q).to(q_weight.dtype), sum_all(partial_k).to(k_weight.dtype)


torch.library.define(
    "anyflow::qk_norm_rope_backward",
    "(Tensor dq, Tensor dk, Tensor dv, Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, "
    "int heads, float eps) -> (Tensor, Tensor, Tensor)",
)
torch.library.impl("anyflow::qk_norm_rope_backward", ("cpu", "cuda"), _launch)


@torch.library.register_fake("anyflow::qk_norm_rope_backward")
def _fake(
    dq: Tensor, dk: Tensor, dv: Tensor, qkv: Tensor, q_weight: Tensor, k_weight: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor]:
    return qkv.new_empty(qkv.shape), q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


backward = torch.ops.anyflow.qk_norm_rope_backward


def bytes_moved(qkv: Tensor) -> int:
    """Of one backward, without the partial sums."""
    return 8 * qkv.shape[0] * qkv.shape[1] * (qkv.shape[2] // 3) * qkv.element_size()


def aot_cases(arch: int) -> list[AotCase]:
    """The backward at the width of each released model."""
    cases = []
    for model, size in MODELS.items():
        tile = row_tile("qk_norm_rope_append_backward", arch, size["dim"])
        constexprs = {
            "HEADS": size["heads"],
            "HEAD_DIM": size["head_dim"],
            "GROUP": tile.rows,
            "BLOCK_H": triton.next_power_of_2(size["heads"]),
            "BLOCK_C": triton.next_power_of_2(size["head_dim"]),
        }
        kernel, fp32 = _qk_norm_rope_backward_kernel, ("cos_ptr", "sin_ptr", "eps", "dq_weight_ptr", "dk_weight_ptr")
        cases.append(bf16_case(kernel, f"{model} training", constexprs, tile.num_warps, fp32))
    return cases
