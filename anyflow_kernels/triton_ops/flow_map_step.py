"""One flow-map step with classifier-free guidance, one pass over the latents.

    x_r = x - (sigma_t - sigma_r) * (u_uncond + guidance * (u - u_uncond))

float64 inside, so that one rounding is left, as in diffusers; noise levels that are tensors stay on the device: nothing
waits. Without fused multiply-adds the result is diffusers' to the bit.

Bytes:  (x, u, [u_uncond], x_r) = 3 or 4 * numel * itemsize. FLOPs: 2 or 5 * numel. Roof: HBM; for a chunk, the launch.
Source: diffusers' FlowMapEulerDiscreteScheduler.step and the guidance of AnyFlowPipeline.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import AotCase, argument_types
from ..launch_configs import architecture, element_tile, pdl
from .dependent_launch import dependent_launch, wait_for_predecessor
from .frame_tiles import check_dtype


@triton.jit(do_not_specialize=["rows_per_batch"])
def _flow_map_step_kernel(
    x_ptr,
    u_ptr,
    u_uncond_ptr,
    sigma_t_ptr,
    sigma_r_ptr,
    out_ptr,
    sigma_t_stride_b,
    sigma_t_stride_f,
    sigma_r_stride_b,
    sigma_r_stride_f,
    rows_per_batch,
    row_size,
    step: tl.float64,  # a Python float would be fp32
    guidance: tl.float64,
    BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_predecessor(PDL)
    i_n = tl.program_id(1).to(tl.int64)  # a frame of a sample, or all of it if no noise level is per frame
    i_b, i_f = i_n // rows_per_batch, i_n % rows_per_batch
    if sigma_t_ptr is not None:
        sigma_t = tl.load(sigma_t_ptr + i_b * sigma_t_stride_b + i_f * sigma_t_stride_f).to(tl.float64)
        sigma_r = tl.load(sigma_r_ptr + i_b * sigma_r_stride_b + i_f * sigma_r_stride_f).to(tl.float64)
        step = sigma_t - sigma_r
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = i < row_size
    offset = i_n * row_size + i
    x = tl.load(x_ptr + offset, mask=mask).to(tl.float64)  # [BLOCK]
    velocity = tl.load(u_ptr + offset, mask=mask).to(tl.float64)
    if u_uncond_ptr is not None:
        base = tl.load(u_uncond_ptr + offset, mask=mask).to(tl.float64)
        velocity = base + guidance * (velocity - base)
    # By way of fp32, as torch casts from float64.
    tl.store(out_ptr + offset, (x - step * velocity).to(tl.float32).to(out_ptr.dtype.element_ty), mask=mask)


def _launch(
    x: Tensor,
    u: Tensor,
    u_uncond: Tensor | None,
    sigma_t: Tensor | None,
    sigma_r: Tensor | None,
    step: float,
    guidance: float,
) -> Tensor:
    x, u = x.contiguous(), u.contiguous()
    u_uncond = None if u_uncond is None else u_uncond.contiguous()
    out = torch.empty_like(x)
    # Rows: what shares one noise level.
    dims = 0 if sigma_t is None or sigma_r is None else max(sigma_t.ndim, sigma_r.ndim)
    lead = x.shape[:dims]
    num_rows, rows_per_batch = math.prod(lead), lead[1] if dims == 2 else 1
    row_size = math.prod(x.shape[dims:])
    arch = architecture(x.device)
    tile = element_tile("flow_map_step", arch, x.dtype)
    if out.numel():
        with torch.cuda.device_of(x):
            _flow_map_step_kernel[(triton.cdiv(row_size, tile.columns), num_rows)](
                x,
                u,
                u_uncond,
                sigma_t,
                sigma_r,
                out,
                *_sigma_strides(sigma_t),
                *_sigma_strides(sigma_r),
                rows_per_batch,
                row_size,
                step,
                guidance,
                BLOCK=tile.columns,
                num_warps=tile.num_warps,
                enable_fp_fusion=False,
                **dependent_launch(arch),
            )
    return out


def _sigma_strides(sigma: Tensor | None) -> tuple[int, int]:
    strides = [] if sigma is None else list(sigma.stride())
    batch, frame, *_ = [*strides, 0, 0]
    return batch, frame


torch.library.define(
    "anyflow::flow_map_step",
    "(Tensor x, Tensor u, Tensor? u_uncond, Tensor? sigma_t, Tensor? sigma_r, float step, float guidance) -> Tensor",
)
torch.library.impl("anyflow::flow_map_step", ("cpu", "cuda"), _launch)
torch.library.register_fake("anyflow::flow_map_step", lambda x, *_: x.new_empty(x.shape))


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    x, u, u_uncond, sigma_t, sigma_r, ctx.step, ctx.guidance = inputs
    ctx.dtypes = (x.dtype, u.dtype, None if u_uncond is None else u_uncond.dtype)
    ctx.save_for_backward(sigma_t, sigma_r)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    sigma_t, sigma_r = ctx.saved_tensors
    x_dtype, u_dtype, uncond_dtype = ctx.dtypes
    step = ctx.step if sigma_t is None else (_widen(sigma_t, grad) - _widen(sigma_r, grad)).float()
    velocity = -step * grad.float()
    du = (velocity if uncond_dtype is None else ctx.guidance * velocity).to(u_dtype)
    duncond = None if uncond_dtype is None else ((1.0 - ctx.guidance) * velocity).to(uncond_dtype)
    return grad.to(x_dtype), du, duncond, None, None, None, None


torch.library.register_autograd("anyflow::flow_map_step", _backward, setup_context=_setup_context)


def _widen(sigma: Tensor, x: Tensor) -> Tensor:
    return sigma.double().reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))


def bytes_moved(x: Tensor, guided: bool) -> int:
    return (4 if guided else 3) * x.numel() * x.element_size()


def flops(x: Tensor, guided: bool) -> int:
    return (5 if guided else 2) * x.numel()


def flow_map_step(
    x: Tensor,
    u: Tensor,
    sigma_t: Tensor | float,
    sigma_r: Tensor | float,
    u_uncond: Tensor | None,
    guidance: float,
) -> Tensor:
    """See `Ops.flow_map_step`. Noise levels carry no gradient.

    Raises:
        TypeError: unless x, u and u_uncond are fp32, bf16 or fp16.
        ValueError: if a noise level requires a gradient.
    """
    for name, latents in (("x", x), ("u", u), ("u_uncond", u_uncond)):
        if latents is not None:
            check_dtype(name, latents)
    for name, sigma in (("sigma_t", sigma_t), ("sigma_r", sigma_r)):
        if isinstance(sigma, Tensor) and sigma.requires_grad:
            raise ValueError(f"{name}: got a tensor that requires a gradient, expected one that does not")
    if not isinstance(sigma_t, Tensor) and not isinstance(sigma_r, Tensor):
        return torch.ops.anyflow.flow_map_step(x, u, u_uncond, None, None, sigma_t - sigma_r, guidance)
    levels = [
        s.to(x.device) if isinstance(s, Tensor) else torch.full((), s, dtype=torch.float64, device=x.device)
        for s in (sigma_t, sigma_r)
    ]
    return torch.ops.anyflow.flow_map_step(x, u, u_uncond, *levels, 0.0, guidance)


def aot_cases(arch: int) -> list[AotCase]:
    """A chunk of latents, guided, one noise level per frame."""
    tile = element_tile("flow_map_step", arch)
    types = argument_types(
        _flow_map_step_kernel,
        "bf16",
        fp64=("sigma_t_ptr", "sigma_r_ptr", "step", "guidance"),
        absent=("sigma_t_stride_f", "sigma_r_stride_f"),
    )
    constexprs = {"BLOCK": tile.columns, "PDL": pdl(arch), "sigma_t_stride_f": 1, "sigma_r_stride_f": 1}
    divisible = ("row_size",)  # 16 * 60 * 104 latents of a frame
    options = {"enable_fp_fusion": False}
    case = AotCase(_flow_map_step_kernel, "chunk", types, constexprs, divisible=divisible, options=options)
    return [replace(case, num_warps=tile.num_warps)]
