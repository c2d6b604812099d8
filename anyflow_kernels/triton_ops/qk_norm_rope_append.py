"""QK-RMSNorm + RoPE + KV-cache append, one pass from the fused projection to q and the cache.

    q' = rope(q * rsqrt(mean(q^2) + eps) * q_weight),  k' likewise,  v unchanged
    k_cache[:, offset:offset+L] = k',  v_cache[:, offset:offset+L] = v

The mean spans all D = H*d channels of a token; rope turns channels (2i, 2i+1) of every head by angle i of the token.
Everything is fp32 until the one rounding at the store. Keys are cached after RoPE: positions are absolute.

Bytes:  6*B*L*D*itemsize (q, k, v read and written once; 5 where v stays a view) + 4*L*d for cos and sin.
FLOPs:  ~20*B*L*D. Roof: HBM.
Source: diffusers' AnyFlowCausalAttnProcessor, which rotates in complex128 and caches keys unrotated.

One program takes one token as a tile (heads, channels): cos and sin are read once per token, not once per head, and a
pair is split and joined inside a thread, so every access stays 16 bytes wide.
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
from .frame_tiles import check_dtype, dense_rows
from .qk_norm_rope_append_backward import backward


@triton.jit
def _rms_scale(x, weight_ptr, offset, mask, eps, D: tl.constexpr):
    weight = tl.load(weight_ptr + offset, mask=mask, other=0.0, eviction_policy="evict_last").to(tl.float32)
    return x * tl.rsqrt(tl.sum(x * x) / D + eps) * weight


@triton.jit
def _rotate(x, cos, sin, BLOCK_H: tl.constexpr, BLOCK_C: tl.constexpr):
    even, odd = tl.split(tl.reshape(x, [BLOCK_H, BLOCK_C // 2, 2]))
    return tl.reshape(tl.join(even * cos - odd * sin, even * sin + odd * cos), [BLOCK_H, BLOCK_C])


@triton.jit(do_not_specialize=["num_tokens", "offset"])
def _qk_norm_rope_append_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    qkv_stride_b,
    qkv_stride_l,
    cos_stride_l,
    sin_stride_l,
    k_stride_b,
    k_stride_t,
    k_stride_h,
    k_stride_c,
    v_stride_b,
    v_stride_t,
    v_stride_h,
    v_stride_c,
    num_tokens,
    offset,
    eps,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    D: tl.constexpr = HEADS * HEAD_DIM
    i_l, i_b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    mask = (h < HEADS) & (c < HEAD_DIM)
    channel = h * HEAD_DIM + c  # [BLOCK_H, BLOCK_C]
    token_ptr = qkv_ptr + i_b * qkv_stride_b + i_l * qkv_stride_l + channel
    # All three rows are requested before the first is used.
    q = tl.load(token_ptr, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    k = tl.load(token_ptr + D, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
    if v_ptr is not None:
        v = tl.load(token_ptr + 2 * D, mask=mask, other=0.0, eviction_policy="evict_first")
    pair = tl.arange(0, BLOCK_C // 2)[None, :]
    cos = tl.load(cos_ptr + i_l * cos_stride_l + pair, mask=pair < HEAD_DIM // 2, other=1.0)  # [1, BLOCK_C / 2]
    sin = tl.load(sin_ptr + i_l * sin_stride_l + pair, mask=pair < HEAD_DIM // 2, other=0.0)
    q = _rotate(_rms_scale(q, q_weight_ptr, channel, mask, eps, D), cos, sin, BLOCK_H, BLOCK_C)
    q_row = q_ptr + (i_b * num_tokens + i_l) * D
    tl.store(q_row + channel, q.to(q_ptr.dtype.element_ty), mask=mask)
    k = _rotate(_rms_scale(k, k_weight_ptr, channel, mask, eps, D), cos, sin, BLOCK_H, BLOCK_C)
    i_t = i_l + offset
    k_row = k_ptr + i_b * k_stride_b + i_t * k_stride_t
    tl.store(k_row + h * k_stride_h + c * k_stride_c, k.to(k_ptr.dtype.element_ty), mask=mask)
    if v_ptr is not None:
        v_row = v_ptr + i_b * v_stride_b + i_t * v_stride_t
        tl.store(v_row + h * v_stride_h + c * v_stride_c, v, mask=mask)


def _launch(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    eps: float,
    k_cache: Tensor,
    v_cache: Tensor | None,
    offset: int,
) -> Tensor:
    qkv, cos, sin = dense_rows(qkv), dense_rows(cos), dense_rows(sin)
    batch, length, width = qkv.shape
    head_dim = width // 3 // heads
    q = _empty_heads(qkv, heads)
    if q.numel() == 0:
        return q
    arch = architecture(qkv.device)
    tile = row_tile("qk_norm_rope_append", arch, width // 3, qkv.dtype)
    with torch.cuda.device_of(qkv):
        _qk_norm_rope_append_kernel[(length, batch)](
            qkv,
            q_weight.contiguous(),
            k_weight.contiguous(),
            cos,
            sin,
            q,
            k_cache,
            v_cache,
            *qkv.stride()[:2],
            cos.stride(0),
            sin.stride(0),
            *k_cache.stride(),
            *(k_cache if v_cache is None else v_cache).stride(),
            length,
            offset,
            eps,
            HEADS=heads,
            HEAD_DIM=head_dim,
            BLOCK_H=triton.next_power_of_2(heads),
            BLOCK_C=triton.next_power_of_2(head_dim),
            num_warps=tile.num_warps,
            **dependent_launch(arch),
        )
    return q


def _launch_functional(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, heads: int, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    k, v = _empty_heads(qkv, heads), _empty_heads(qkv, heads)
    return _launch(qkv, q_weight, k_weight, cos, sin, heads, eps, k, v, 0), k, v


def _empty_heads(qkv: Tensor, heads: int) -> Tensor:
    return qkv.new_empty(*qkv.shape[:2], heads, qkv.shape[2] // 3 // heads)


torch.library.define(
    "anyflow::qk_norm_rope_append",
    "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps, Tensor(a!) k_cache, "
    "Tensor(b!)? v_cache, SymInt offset) -> Tensor",
)
torch.library.impl("anyflow::qk_norm_rope_append", ("cpu", "cuda"), _launch)
torch.library.register_fake(
    "anyflow::qk_norm_rope_append", lambda qkv, qw, kw, cos, sin, heads, *_: _empty_heads(qkv, heads)
)

torch.library.define(
    "anyflow::qk_norm_rope",
    "(Tensor qkv, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, int heads, float eps) "
    "-> (Tensor, Tensor, Tensor)",
)
torch.library.impl("anyflow::qk_norm_rope", ("cpu", "cuda"), _launch_functional)
torch.library.register_fake(
    "anyflow::qk_norm_rope", lambda qkv, qw, kw, cos, sin, heads, eps: tuple(_empty_heads(qkv, heads) for _ in range(3))
)


def _setup_context(ctx: Any, inputs: tuple, output: tuple) -> None:
    *tensors, ctx.heads, ctx.eps = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dq: Tensor, dk: Tensor, dv: Tensor) -> tuple:
    return (*backward(dq, dk, dv, *ctx.saved_tensors, ctx.heads, ctx.eps), None, None, None, None)


torch.library.register_autograd("anyflow::qk_norm_rope", _backward, setup_context=_setup_context)


def bytes_moved(qkv: Tensor, heads: int, append: bool = True) -> int:
    """Of one forward: q, k (and v, unless it stays a view) read and written once, cos and sin read once."""
    batch, length, width = qkv.shape
    rows = 6 if append else 4
    return rows * batch * length * (width // 3) * qkv.element_size() + 4 * length * (width // 3 // heads)


def flops(qkv: Tensor) -> int:
    """Per channel of q and k: 2 for the mean square, 2 to normalise, 3 to rotate; 3 more for index and scalar work."""
    return 20 * qkv.shape[0] * qkv.shape[1] * (qkv.shape[2] // 3)


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    offset: int,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """See `Ops.qk_norm_rope_append`.

    Without slabs and without gradients v stays a view of qkv: attention reads strided views. With gradients v is
    copied, so that the backward writes one gradient of qkv instead of adding two. With slabs and gradients the slabs
    are written through autograd, as the reference backend does.
    """
    check_dtype("qkv", qkv)
    args = (qkv, q_weight, k_weight, *rope, heads, eps)
    needs_grad = torch.is_grad_enabled() and (qkv.requires_grad or q_weight.requires_grad or k_weight.requires_grad)
    if needs_grad:
        q, k, v = torch.ops.anyflow.qk_norm_rope(*args)
    elif k_cache is None:
        k = _empty_heads(qkv, heads)
        q = torch.ops.anyflow.qk_norm_rope_append(*args, k, None, 0)
        v = qkv[..., 2 * (qkv.shape[2] // 3) :].unflatten(-1, (heads, -1))
    else:
        return torch.ops.anyflow.qk_norm_rope_append(*args, k_cache, v_cache, offset)
    if k_cache is None or v_cache is None:
        return q, k, v
    k_cache[:, offset : offset + k.shape[1]] = k
    v_cache[:, offset : offset + v.shape[1]] = v
    return q


def aot_cases(arch: int) -> list[AotCase]:
    """The append at one chunk of each released model."""
    cases = []
    for model, size in MODELS.items():
        heads, head_dim = size["heads"], size["head_dim"]
        tile = row_tile("qk_norm_rope_append", arch, size["dim"])
        constexprs = {
            "k_stride_c": 1,
            "v_stride_c": 1,
            "HEADS": heads,
            "HEAD_DIM": head_dim,
            "BLOCK_H": triton.next_power_of_2(heads),
            "BLOCK_C": triton.next_power_of_2(head_dim),
            "PDL": pdl(arch),
        }
        kernel, fp32 = _qk_norm_rope_append_kernel, ("cos_ptr", "sin_ptr", "eps")
        cases.append(bf16_case(kernel, f"{model} chunk", constexprs, tile.num_warps, fp32))
    return cases
