"""Gated residual + LayerNorm + modulation, one pass over the tokens.

    x_new = x + gate[f] * branch                              rounded to the dtype of x
    y = LN(x_new) [* weight + bias] * (1 + scale[f]) + shift[f]

f is the frame of the token; statistics and arithmetic are fp32, the variance is centred on the mean (two passes over
registers). y is the norm of the rounded x_new that is returned, so the next block sees the same residual stream.

Bytes:  (x, branch, x_new, y) = 4*B*L*D*itemsize, or 2*B*L*D*itemsize without branch, + 4*B*F*D per modulation tensor.
FLOPs:  ~13*B*L*D. Roof: HBM.
Source: norm, gate and modulation of diffusers' AnyFlowTransformerBlock, which widens modulation to every token.

A program takes a tile of tokens of one frame and reads the frame's modulation once (from L1 where the tile is one
row). The frame comes from the frame map by arithmetic: there is no index tensor. Without branch the op writes y alone
and x is its own x_new.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, bf16_case
from ..launch_configs import architecture, pdl, row_tile
from ..operations import FrameMap
from .dependent_launch import dependent_launch, wait_for_predecessor
from .frame_tiles import RUNS, check_dtype, count_tiles, dense_rows, locate_tile, run_groups, strides_2d
from .gated_residual_layer_norm_backward import backward


@triton.jit(do_not_specialize=RUNS)
def _gated_residual_layer_norm_kernel(
    x_ptr,
    branch_ptr,
    gate_ptr,
    shift_ptr,
    scale_ptr,
    weight_ptr,
    bias_ptr,
    x_new_ptr,
    y_ptr,
    frames_0,
    tokens_0,
    frames_1,
    tokens_1,
    frames_2,
    tokens_2,
    x_stride_b,
    x_stride_l,
    branch_stride_b,
    branch_stride_l,
    gate_stride_b,
    gate_stride_f,
    shift_stride_b,
    shift_stride_f,
    scale_stride_b,
    scale_stride_f,
    y_stride_b,
    eps,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    i_b = tl.program_id(1).to(tl.int64)
    i_f, start, end = locate_tile(tl.program_id(0), frames_0, tokens_0, frames_1, tokens_1, frames_2, tokens_2, ROWS)
    i_l = (start + tl.arange(0, ROWS)).to(tl.int64)[:, None]  # [ROWS, 1]
    c = tl.arange(0, BLOCK_D)[None, :]  # [1, BLOCK_D]
    mask_c = c < D
    mask = (i_l < end) & mask_c
    out = i_b * y_stride_b + i_l * D + c

    x = tl.load(x_ptr + i_b * x_stride_b + i_l * x_stride_l + c, mask=mask, other=0.0, eviction_policy="evict_first")
    wide = x.to(tl.float32)  # [ROWS, BLOCK_D]
    if branch_ptr is not None:
        branch_row = branch_ptr + i_b * branch_stride_b + i_l * branch_stride_l
        update = tl.load(branch_row + c, mask=mask, other=0.0, eviction_policy="evict_first").to(tl.float32)
        if gate_ptr is not None:
            gate_row = gate_ptr + i_b * gate_stride_b + i_f * gate_stride_f
            update *= tl.load(gate_row + c, mask=mask_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
        x = (wide + update).to(x.dtype)
        tl.store(x_new_ptr + out, x, mask=mask)
        wide = x.to(tl.float32)

    mean = tl.sum(wide, axis=1, keep_dims=True) / D  # [ROWS, 1]
    y = tl.where(mask_c, wide - mean, 0.0)
    y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) / D + eps)
    if weight_ptr is not None:
        weight = tl.load(weight_ptr + c, mask=mask_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y = y * weight + tl.load(bias_ptr + c, mask=mask_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
    if scale_ptr is not None:
        scale_row = scale_ptr + i_b * scale_stride_b + i_f * scale_stride_f
        shift_row = shift_ptr + i_b * shift_stride_b + i_f * shift_stride_f
        scale = tl.load(scale_row + c, mask=mask_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
        y = y * (1.0 + scale)
        y += tl.load(shift_row + c, mask=mask_c, other=0.0, eviction_policy="evict_last").to(tl.float32)
    tl.store(y_ptr + out, y.to(y_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    frame_map: list[int],
    eps: float,
) -> tuple[Tensor | None, Tensor]:
    x = dense_rows(x)
    branch, gate, shift, scale = (None if t is None else dense_rows(t) for t in (branch, gate, shift, scale))
    weight, bias = (None if t is None else t.contiguous() for t in (weight, bias))
    batch, length, width = x.shape
    y = x.new_empty(batch, length, width)
    x_new = None if branch is None else torch.empty_like(y)
    arch = architecture(x.device)
    tile = row_tile("gated_residual_layer_norm", arch, width, x.dtype)
    for token, tokens, frame, runs in run_groups(frame_map):
        if batch * tokens == 0:
            continue
        tokens_of = slice(token, token + tokens)
        rows = [None if t is None else t[:, frame:] for t in (gate, shift, scale)]
        with torch.cuda.device_of(x):
            _gated_residual_layer_norm_kernel[(count_tiles(runs, tile.rows), batch)](
                x[:, tokens_of],
                None if branch is None else branch[:, tokens_of],
                *rows,
                weight,
                bias,
                None if x_new is None else x_new[:, tokens_of],
                y[:, tokens_of],
                *runs,
                *strides_2d(x),
                *strides_2d(branch),
                *(stride for row in rows for stride in strides_2d(row)),
                y.stride(0),
                eps,
                D=width,
                ROWS=tile.rows,
                BLOCK_D=triton.next_power_of_2(width),
                num_warps=tile.num_warps,
                **dependent_launch(arch),
            )
    return x_new, y


def _launch_without_branch(
    x: Tensor,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    frame_map: list[int],
    eps: float,
) -> Tensor:
    return _launch(x, None, None, shift, scale, weight, bias, frame_map, eps)[1]


torch.library.define(
    "anyflow::gated_residual_layer_norm",
    "(Tensor x, Tensor branch, Tensor? gate, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, "
    "SymInt[] frame_map, float eps) -> (Tensor x_new, Tensor y)",
)
torch.library.impl("anyflow::gated_residual_layer_norm", ("cpu", "cuda"), _launch)
torch.library.register_fake(
    "anyflow::gated_residual_layer_norm", lambda x, *_: (x.new_empty(x.shape), x.new_empty(x.shape))
)

torch.library.define(
    "anyflow::modulated_layer_norm",
    "(Tensor x, Tensor? shift, Tensor? scale, Tensor? weight, Tensor? bias, SymInt[] frame_map, float eps) -> Tensor",
)
torch.library.impl("anyflow::modulated_layer_norm", ("cpu", "cuda"), _launch_without_branch)
torch.library.register_fake("anyflow::modulated_layer_norm", lambda x, *_: x.new_empty(x.shape))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, branch, gate, _, scale, weight, bias, ctx.frame_map, ctx.eps = inputs
    ctx.has_gate = gate is not None
    ctx.save_for_backward(output[0], branch if ctx.has_gate else None, gate, scale, weight, bias)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, dx_new: Tensor | None, dy: Tensor | None) -> tuple:
    x_new, branch, gate, scale, weight, bias = ctx.saved_tensors
    dx, dbranch, dgate, dshift, dscale, dweight, dbias = backward(
        x_new, branch, gate, scale, weight, bias, dx_new, dy, ctx.frame_map, ctx.eps
    )
    return dx, dbranch if ctx.has_gate else dx, dgate, dshift, dscale, dweight, dbias, None, None


def _setup_context_without_branch(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, _, scale, weight, bias, ctx.frame_map, ctx.eps = inputs
    ctx.save_for_backward(x, scale, weight, bias)


def _backward_without_branch(ctx: Any, dy: Tensor) -> tuple:
    x, scale, weight, bias = ctx.saved_tensors
    grads = backward(x, None, None, scale, weight, bias, None, dy, ctx.frame_map, ctx.eps)
    dx, _, _, dshift, dscale, dweight, dbias = grads
    return dx, dshift, dscale, dweight, dbias, None, None


torch.library.register_autograd("anyflow::gated_residual_layer_norm", _backward, setup_context=_setup_context)
torch.library.register_autograd(
    "anyflow::modulated_layer_norm", _backward_without_branch, setup_context=_setup_context_without_branch
)


def bytes_moved(x: Tensor, num_frames: int, branch: bool, modulation_rows: int) -> int:
    """Of one forward. `modulation_rows`: how many of gate, shift and scale are present, fp32, read once per frame."""
    return (4 if branch else 2) * x.numel() * x.element_size() + 4 * modulation_rows * x.shape[
        0
    ] * num_frames * x.shape[2]


def flops(x: Tensor) -> int:
    """Of one forward with all terms: 2 gate, 1 mean, 3 variance, 1 normalise, 2 affine, 4 modulation."""
    return 13 * x.numel()


def gated_residual_layer_norm(
    x: Tensor,
    frame_map: FrameMap,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """See `Ops.gated_residual_layer_norm`. Raises TypeError unless x is fp32, bf16 or fp16."""
    check_dtype("x", x)
    flat = [n for run in frame_map for n in run]
    if branch is None:
        return x, torch.ops.anyflow.modulated_layer_norm(x, shift, scale, weight, bias, flat, eps)
    return torch.ops.anyflow.gated_residual_layer_norm(x, branch, gate, shift, scale, weight, bias, flat, eps)


# Which terms are present at the uses in a block: first norm; norm2; the others.
_USES = {
    "modulated": ("branch_ptr", "gate_ptr", "weight_ptr", "bias_ptr", "x_new_ptr"),
    "gated + affine": ("shift_ptr", "scale_ptr"),
    "residual + modulated": ("gate_ptr", "weight_ptr", "bias_ptr"),
    "gated + modulated": ("weight_ptr", "bias_ptr"),
}


def aot_cases(arch: int) -> list[AotCase]:
    """The four uses in a block of each released model."""
    fp32, cases = ("gate_ptr", "shift_ptr", "scale_ptr", "weight_ptr", "bias_ptr", "eps"), []
    for model, size in MODELS.items():
        width = size["dim"]
        tile = row_tile("gated_residual_layer_norm", arch, width)
        constexprs = {"D": width, "ROWS": tile.rows, "BLOCK_D": triton.next_power_of_2(width), "PDL": pdl(arch)}
        cases += [
            bf16_case(_gated_residual_layer_norm_kernel, f"{model} {use}", constexprs, tile.num_warps, fp32, absent)
            for use, absent in _USES.items()
        ]
    return cases
