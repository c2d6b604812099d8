"""The first half of the FFN: GEMM, then bias and tanh-GELU fused.

    y = gelu(x @ weight.T + bias),   gelu(h) = h * sigmoid(2u),   u = sqrt(2/pi) * (h + 0.044715 * h^3)

(the same function as 0.5 * h * (1 + tanh(u)), without the cancellation at large negative h).

Two ways, chosen by `launch_configs.linear_gelu_way` where no gradient is needed:
    "cublaslt"  bias and GELU in the epilogue of the GEMM (aten::_addmm_activation, tanh-GELU on CUDA): no pass
    "triton"    torch.mm, then one pass that adds the bias in fp32
Training always takes the second, which keeps the GEMM's output for the backward.

Bytes:  of the pass, 2*M*N*itemsize forward (read, write), 3*M*N*itemsize backward (dy, h, dh). FLOPs: GEMM 2*M*N*K;
        pass ~12*M*N and ~25*M*N. Roof: tensor cores for the GEMM, HBM for the pass.
Source: the FeedForward of diffusers' AnyFlowTransformerBlock ("gelu-approximate").
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, bf16_case
from ..launch_configs import architecture, element_tile, linear_gelu_way, pdl
from .dependent_launch import dependent_launch, wait_for_predecessor
from .frame_tiles import check_dtype, sum_all


@triton.jit
def _gate(h):
    """sigmoid(2u), 1 - sigmoid(2u) without cancellation, and du/dh of tanh-GELU."""
    u = 0.7978845608028654 * (h + 0.044715 * h * h * h)
    small = tl.exp(tl.minimum(-2.0 * u, 80.0))
    gate = 1.0 / (1.0 + small)
    return gate, small * gate, 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * h * h)


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_kernel(
    h_ptr, bias_ptr, y_ptr,
    num_rows,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    i_m = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    mask = (i_m < num_rows) & (c < N)  # [ROWS, BLOCK_N]
    h = tl.load(h_ptr + i_m * N + c, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        h += tl.load(bias_ptr + c, mask=c < N, other=0.0).to(tl.float32)
    gate, _, _ = _gate(h)
    tl.store(y_ptr + i_m * N + c, (h * gate).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _bias_gelu_backward_kernel(
    dy_ptr,
    h_ptr,
    bias_ptr,
    dh_ptr,
    dbias_ptr,
    num_rows,
    N: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    i_g = tl.program_id(0)
    c = (tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    total = tl.zeros([ROWS, BLOCK_N], tl.float32)
    for start in range(0, GROUP, ROWS):
        i_m = (i_g * GROUP + start + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        mask = (i_m < num_rows) & (c < N)  # [ROWS, BLOCK_N]
        h = tl.load(h_ptr + i_m * N + c, mask=mask, other=0.0).to(tl.float32)
        dh = tl.load(dy_ptr + i_m * N + c, mask=mask, other=0.0).to(tl.float32)
        if bias_ptr is not None:
            h += tl.load(bias_ptr + c, mask=c < N, other=0.0).to(tl.float32)
        gate, complement, slope = _gate(h)
        dh *= gate + 2.0 * h * gate * complement * slope
        total += dh
        tl.store(dh_ptr + i_m * N + c, dh.to(dh_ptr.dtype.element_ty), mask=mask)
    if dbias_ptr is not None:
        tl.store(dbias_ptr + i_g * N + c, tl.sum(total, axis=0, keep_dims=True), mask=c < N)


def _launch(h: Tensor, bias: Tensor | None) -> Tensor:
    h = h.contiguous()
    y = torch.empty_like(h)
    num_rows, width = h.shape
    arch = architecture(h.device)
    tile = element_tile("bias_gelu", arch, h.dtype)
    if y.numel():
        grid = (triton.cdiv(num_rows, tile.rows), triton.cdiv(width, tile.columns))
        with torch.cuda.device_of(h):
            _bias_gelu_kernel[grid](
                h,
                None if bias is None else bias.contiguous(),
                y,
                num_rows,
                N=width,
                ROWS=tile.rows,
                BLOCK_N=tile.columns,
                num_warps=tile.num_warps,
                **dependent_launch(arch),
            )
    return y


def _launch_backward(dy: Tensor, h: Tensor, bias: Tensor | None) -> list[Tensor]:
    dy, h = dy.contiguous(), h.contiguous()
    dh = torch.empty_like(h)
    num_rows, width = h.shape
    tile = element_tile("bias_gelu_backward", architecture(h.device), h.dtype)
    num_groups = triton.cdiv(num_rows, tile.group)
    partial = None if bias is None else h.new_empty(1, num_groups, width, dtype=torch.float32)
    if dh.numel():
        with torch.cuda.device_of(h):
            _bias_gelu_backward_kernel[(num_groups, triton.cdiv(width, tile.columns))](
                dy,
                h,
                None if bias is None else bias.contiguous(),
                dh,
                partial,
                num_rows,
                N=width,
                GROUP=tile.group,
                ROWS=tile.rows,
                BLOCK_N=tile.columns,
                num_warps=tile.num_warps,
            )
    return [dh] if bias is None or partial is None else [dh, sum_all(partial).to(bias.dtype)]


torch.library.define("anyflow::bias_gelu", "(Tensor h, Tensor? bias) -> Tensor")
torch.library.impl("anyflow::bias_gelu", ("cpu", "cuda"), _launch)
torch.library.register_fake("anyflow::bias_gelu", lambda h, bias: h.new_empty(h.shape))

torch.library.define("anyflow::bias_gelu_backward", "(Tensor dy, Tensor h, Tensor? bias) -> Tensor[]")
torch.library.impl("anyflow::bias_gelu_backward", ("cpu", "cuda"), _launch_backward)
torch.library.register_fake(
    "anyflow::bias_gelu_backward",
    lambda dy, h, bias: [h.new_empty(h.shape)] + ([] if bias is None else [bias.new_empty(bias.shape)]),
)


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor | None]:
    grads = torch.ops.anyflow.bias_gelu_backward(dy, *ctx.saved_tensors)
    return grads[0], grads[1] if len(grads) > 1 else None


torch.library.register_autograd("anyflow::bias_gelu", _backward, setup_context=_setup_context)


def bytes_moved(rows: int, ffn: int, itemsize: int, backward: bool = False) -> int:
    """Of the bias + GELU pass alone."""
    return (3 if backward else 2) * rows * ffn * itemsize


def flops(rows: int, dim: int, ffn: int) -> int:
    """Of the forward GEMM."""
    return 2 * rows * dim * ffn


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """See `Ops.linear_gelu`. Raises TypeError unless x is fp32, bf16 or fp16."""
    check_dtype("x", x)
    rows = x.reshape(-1, x.shape[-1])
    needs_grad = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias))
    if bias is not None and not needs_grad and linear_gelu_way(x.device, x.dtype) == "cublaslt":
        y = torch.ops.aten._addmm_activation(bias, rows, weight.t(), use_gelu=True)
    else:
        y = torch.ops.anyflow.bias_gelu(torch.mm(rows, weight.t()), bias)
    return y.unflatten(0, x.shape[:-1])


def aot_cases(arch: int) -> list[AotCase]:
    """The pass, forward and backward, at the FFN width of each released model."""
    cases = []
    for model, size in MODELS.items():
        forward, backward = element_tile("bias_gelu", arch), element_tile("bias_gelu_backward", arch)
        name = f"{model} FFN"
        constexprs = {"N": size["ffn"], "ROWS": forward.rows, "BLOCK_N": forward.columns, "PDL": pdl(arch)}
        cases.append(bf16_case(_bias_gelu_kernel, name, constexprs, forward.num_warps))
        constexprs = {"N": size["ffn"], "GROUP": backward.group, "ROWS": backward.rows, "BLOCK_N": backward.columns}
        cases.append(bf16_case(_bias_gelu_backward_kernel, name, constexprs, backward.num_warps, ("dbias_ptr",)))
    return cases
