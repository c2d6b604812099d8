"""Dual timestep embedding: two sinusoids, two MLPs, gate mix, SiLU and the modulation projection, in three launches.

    h_t  = silu(W1_t @ [cos, sin](t) + b1_t),    h_d = silu(W1_d @ [cos, sin](delta) + b1_d)       launch 1
    rt   = (1 - gate) * (W2_t @ h_t + b2_t) + gate * (W2_d @ h_d + b2_d)                            launch 2
    proj = Wp @ silu(rt) + bp                                                                       launch 3

fp32 throughout (angles fp64), except silu(rt), which is rounded to the dtype of Wp as the reference rounds it. There
is one row per distinct (t, r), usually one in all, so each layer is a matrix times very few vectors: the weights are
streamed once and the arithmetic hides under them. Programs take a few output channels; blocks of rows share a weight
tile through the L2.

Bytes:  weights once: 4*(2*D*freq + 2*D*D) + 6*D*D*itemsize. FLOPs: 2*N*(2*D*freq + 2*D*D + 6*D*D). Roof: HBM.
Source: diffusers' AnyFlowDualTimestepTextImageEmbedding, evaluated there per frame and repeated to every token.

The backward runs once a training step on a handful of rows; it is GEMMs of torch, recomputing h from t.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, argument_types
from ..launch_configs import GemvTile, architecture, gemv_tile
from ..operations import TimestepMLP

FREQ_DIM = 256  # of the released models


@triton.jit
def _silu(x):
    return x / (1.0 + tl.exp(-x))


@triton.jit
def _product(
    x_ptr, weight_ptr, i_n, i_o, num_rows, OUT: tl.constexpr, IN: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_O: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """weight @ x for rows i_n of x (num_rows, IN) and channels i_o of weight (OUT, IN): [BLOCK_N, BLOCK_O] fp32."""
    total = tl.zeros([BLOCK_N, BLOCK_O, BLOCK_K], tl.float32)
    for start in range(0, IN, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        mask_w = (i_o < OUT)[:, None] & (k < IN)[None, :]
        weight = tl.load(weight_ptr + i_o.to(tl.int64)[:, None] * IN + k[None, :], mask=mask_w, other=0.0)
        x = tl.load(
            x_ptr + i_n[:, None] * IN + k[None, :], mask=(i_n < num_rows)[:, None] & (k < IN)[None, :], other=0.0
        )
        total += weight.to(tl.float32)[None, :, :] * x.to(tl.float32)[:, None, :]
    return tl.sum(total, axis=2)


@triton.jit
def _cos_sin(angle):
    """cos and sin of fp64 angles, to fp32 rounding.

    In fp32 an angle of 1000 rad has already lost its fourth decimal; libdevice's functions keep an array in local
    memory for huge angles and the hardware's approximations lose three digits. So: reduce in fp64 by multiples of
    pi/2, then Taylor in fp32 on [-pi/4, pi/4].
    """
    n = tl.floor(angle * 0.6366197723675814 + 0.5)
    r = (angle - n * tl.full([], 1.5707963267948966, tl.float64)).to(tl.float32)
    z = r * r
    cos = 1.0 + z * (-1 / 2 + z * (1 / 24 + z * (-1 / 720 + z * (1 / 40320 + z * (-1 / 3628800)))))
    sin = r + r * z * (-1 / 6 + z * (1 / 120 + z * (-1 / 5040 + z * (1 / 362880))))
    quarter = n.to(tl.int32) & 3
    swap = (quarter & 1) == 1
    c = tl.where(swap, sin, cos)
    s = tl.where(swap, cos, sin)
    return tl.where((quarter == 1) | (quarter == 2), -c, c), tl.where(quarter >= 2, -s, s)


@triton.jit
def _sinusoid_product(
    t_ptr, weight_ptr, i_n, i_o, num_rows, OUT: tl.constexpr, HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    """weight (OUT, 2*HALF) @ [cos, sin](t * 10000^(-i / HALF)): [BLOCK_N, BLOCK_O] fp32."""
    i = tl.arange(0, BLOCK_HALF)
    t = tl.load(t_ptr + i_n, mask=i_n < num_rows, other=0.0).to(tl.float64)
    frequency = tl.exp2(i.to(tl.float64) * tl.full([], -13.287712379549449 / HALF, tl.float64))  # log2(10000)
    angle = t[:, None] * frequency[None, :]
    mask = (i_o < OUT)[:, None] & (i < HALF)[None, :]
    row = weight_ptr + i_o.to(tl.int64)[:, None] * (2 * HALF) + i[None, :]
    for_cos = tl.load(row, mask=mask, other=0.0).to(tl.float32)[None, :, :]
    for_sin = tl.load(row + HALF, mask=mask, other=0.0).to(tl.float32)[None, :, :]
    cos, sin = _cos_sin(angle)  # [BLOCK_N, BLOCK_HALF]
    return tl.sum(for_cos * cos[:, None, :] + for_sin * sin[:, None, :], axis=2)


@triton.jit
def _bias(bias_ptr, i_o, OUT: tl.constexpr):
    return tl.load(bias_ptr + i_o, mask=i_o < OUT, other=0.0).to(tl.float32)[None, :]


@triton.jit(do_not_specialize=["num_rows"])
def _timestep_hidden_kernel(
    t_ptr,
    delta_ptr,
    time_weight_ptr,
    time_bias_ptr,
    delta_weight_ptr,
    delta_bias_ptr,
    hidden_ptr,
    num_rows,
    OUT: tl.constexpr,
    TIME_HALF: tl.constexpr,
    DELTA_HALF: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_TIME: tl.constexpr,
    BLOCK_DELTA: tl.constexpr,
):
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    # hidden: (2, num_rows, OUT), time then delta
    if tl.program_id(2) == 0:
        h = _sinusoid_product(t_ptr, time_weight_ptr, i_n, i_o, num_rows, OUT, TIME_HALF, BLOCK_TIME)
        h += _bias(time_bias_ptr, i_o, OUT)
    else:
        h = _sinusoid_product(delta_ptr, delta_weight_ptr, i_n, i_o, num_rows, OUT, DELTA_HALF, BLOCK_DELTA)
        h += _bias(delta_bias_ptr, i_o, OUT)
    out = hidden_ptr + (tl.program_id(2) * num_rows + i_n[:, None]) * OUT + i_o[None, :]
    tl.store(out, _silu(h), mask=(i_n < num_rows)[:, None] & (i_o < OUT)[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def _timestep_mix_kernel(
    time_hidden_ptr,
    delta_hidden_ptr,
    time_weight_ptr,
    time_bias_ptr,
    delta_weight_ptr,
    delta_bias_ptr,
    rt_ptr,
    activated_ptr,
    num_rows,
    gate,
    OUT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    time = _product(time_hidden_ptr, time_weight_ptr, i_n, i_o, num_rows, OUT, OUT, BLOCK_N, BLOCK_O, BLOCK_K)
    delta = _product(delta_hidden_ptr, delta_weight_ptr, i_n, i_o, num_rows, OUT, OUT, BLOCK_N, BLOCK_O, BLOCK_K)
    time += _bias(time_bias_ptr, i_o, OUT)
    delta += _bias(delta_bias_ptr, i_o, OUT)
    rt = (1.0 - gate) * time + gate * delta  # [BLOCK_N, BLOCK_O]
    offset = i_n[:, None] * OUT + i_o[None, :]
    mask = (i_n < num_rows)[:, None] & (i_o < OUT)[None, :]
    tl.store(rt_ptr + offset, rt, mask=mask)
    tl.store(activated_ptr + offset, _silu(rt).to(activated_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _timestep_projection_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    num_rows,
    OUT: tl.constexpr,
    IN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    i_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    i_o = tl.program_id(1) * BLOCK_O + tl.arange(0, BLOCK_O)
    y = _product(x_ptr, weight_ptr, i_n, i_o, num_rows, OUT, IN, BLOCK_N, BLOCK_O, BLOCK_K)
    y += _bias(bias_ptr, i_o, OUT)
    tl.store(y_ptr + i_n[:, None] * OUT + i_o[None, :], y, mask=(i_n < num_rows)[:, None] & (i_o < OUT)[None, :])


def _blocks(tile: GemvTile, num_rows: int, width: int) -> dict[str, int]:
    """Tile sizes of `_product`: one row needs no block of four, a narrow model no long one."""
    return {
        "BLOCK_N": min(triton.next_power_of_2(num_rows), tile.rows),
        "BLOCK_O": tile.outputs,
        "BLOCK_K": min(triton.next_power_of_2(width), tile.depth),
    }


def _launch(
    t: Tensor,
    delta: Tensor,
    time_weight_1: Tensor,
    time_bias_1: Tensor,
    time_weight_2: Tensor,
    time_bias_2: Tensor,
    delta_weight_1: Tensor,
    delta_bias_1: Tensor,
    delta_weight_2: Tensor,
    delta_bias_2: Tensor,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gate: float,
) -> tuple[Tensor, Tensor]:
    num_rows, width, out_width = t.shape[0], proj_weight.shape[1], proj_weight.shape[0]
    time_mlp = [w.contiguous() for w in (time_weight_1, time_bias_1, time_weight_2, time_bias_2)]
    delta_mlp = [w.contiguous() for w in (delta_weight_1, delta_bias_1, delta_weight_2, delta_bias_2)]
    hidden = t.new_empty(2, num_rows, width, dtype=torch.float32)
    rt = t.new_empty(num_rows, width, dtype=torch.float32)
    activated = t.new_empty(num_rows, width, dtype=proj_weight.dtype)
    proj = t.new_empty(num_rows, out_width, dtype=torch.float32)
    if num_rows == 0:
        return rt, proj
    tile = gemv_tile(architecture(t.device), proj_weight.dtype, width)
    blocks = _blocks(tile, num_rows, width)
    time_half, delta_half = time_weight_1.shape[1] // 2, delta_weight_1.shape[1] // 2
    # Row blocks vary fastest, so that programs which share a weight tile run together.
    row_blocks, channel_blocks = triton.cdiv(num_rows, blocks["BLOCK_N"]), triton.cdiv(width, tile.outputs)
    with torch.cuda.device_of(t):
        _timestep_hidden_kernel[(row_blocks, channel_blocks, 2)](
            t.contiguous(),
            delta.contiguous(),
            *time_mlp[:2],
            *delta_mlp[:2],
            hidden,
            num_rows,
            OUT=width,
            TIME_HALF=time_half,
            DELTA_HALF=delta_half,
            BLOCK_N=blocks["BLOCK_N"],
            BLOCK_O=tile.outputs,
            BLOCK_TIME=triton.next_power_of_2(time_half),
            BLOCK_DELTA=triton.next_power_of_2(delta_half),
            num_warps=tile.num_warps,
        )
        _timestep_mix_kernel[(row_blocks, channel_blocks)](
            hidden[0],
            hidden[1],
            *time_mlp[2:],
            *delta_mlp[2:],
            rt,
            activated,
            num_rows,
            gate,
            OUT=width,
            **blocks,
            num_warps=tile.num_warps,
        )
        _timestep_projection_kernel[(row_blocks, triton.cdiv(out_width, tile.outputs))](
            activated,
            proj_weight.contiguous(),
            proj_bias.contiguous(),
            proj,
            num_rows,
            OUT=out_width,
            IN=width,
            **blocks,
            num_warps=tile.num_warps,
        )
    return rt, proj


_MLPS = ", ".join(
    f"Tensor {mlp}_{part}_{i}" for mlp in ("time", "delta") for i in (1, 2) for part in ("weight", "bias")
)
torch.library.define(
    "anyflow::dual_timestep_embedding",
    f"(Tensor t, Tensor delta, {_MLPS}, Tensor proj_weight, Tensor proj_bias, float gate) -> (Tensor rt, Tensor proj)",
)
torch.library.impl("anyflow::dual_timestep_embedding", ("cpu", "cuda"), _launch)


@torch.library.register_fake("anyflow::dual_timestep_embedding")
def _fake(t: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out_width, width = rest[-3].shape
    return (
        t.new_empty(t.shape[0], width, dtype=torch.float32),
        t.new_empty(t.shape[0], out_width, dtype=torch.float32),
    )


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.gate = inputs
    ctx.save_for_backward(*tensors[:-1], output[0])  # all but proj_bias
    ctx.proj_bias_dtype = tensors[-1].dtype


def _backward(ctx: Any, drt: Tensor, dproj: Tensor) -> tuple:
    t, delta, *mlps, proj_weight, rt = ctx.saved_tensors
    time_mlp, delta_mlp = TimestepMLP(*mlps[:4]), TimestepMLP(*mlps[4:])
    activated = F.silu(rt).to(proj_weight.dtype)
    dproj_weight = dproj.t() @ activated.float()
    sigmoid = torch.sigmoid(rt)
    drt = drt + (dproj @ proj_weight.float()) * sigmoid * (1.0 + rt * (1.0 - sigmoid))
    grads_t = _mlp_backward(t, time_mlp, drt * (1.0 - ctx.gate))
    grads_delta = _mlp_backward(delta, delta_mlp, drt * ctx.gate)
    return (
        grads_t[0],
        grads_delta[0],
        *grads_t[1:],
        *grads_delta[1:],
        dproj_weight.to(proj_weight.dtype),
        dproj.sum(0).to(ctx.proj_bias_dtype),
        None,
    )


def _mlp_backward(t: Tensor, mlp: TimestepMLP, grad: Tensor) -> tuple[Tensor, ...]:
    """Gradients of (t, weight_1, bias_1, weight_2, bias_2) from that of the MLP's output, (N, D) fp32."""
    weight_1, bias_1, weight_2, bias_2 = mlp
    half = weight_1.shape[1] // 2
    frequency = torch.exp2(torch.arange(half, device=t.device, dtype=torch.float64) * (-math.log2(10000.0) / half))
    angle = t.double()[:, None] * frequency
    cos, sin = angle.cos().float(), angle.sin().float()
    sinusoid = torch.cat([cos, sin], dim=-1)
    pre = torch.addmm(bias_1.float(), sinusoid, weight_1.float().t())
    sigmoid = torch.sigmoid(pre)
    dpre = (grad @ weight_2.float()) * sigmoid * (1.0 + pre * (1.0 - sigmoid))
    dcos, dsin = (dpre @ weight_1.float()).chunk(2, dim=-1)
    dt = ((dsin * cos - dcos * sin) * frequency).sum(-1)
    return (
        dt.to(t.dtype),
        (dpre.t() @ sinusoid).to(weight_1.dtype),
        dpre.sum(0).to(bias_1.dtype),
        (grad.t() @ (pre * sigmoid)).to(weight_2.dtype),
        grad.sum(0).to(bias_2.dtype),
    )


torch.library.register_autograd("anyflow::dual_timestep_embedding", _backward, setup_context=_setup_context)


def bytes_moved(dim: int, freq_dim: int, mlp_itemsize: int, proj_itemsize: int) -> int:
    """The weights, once; rows of activations are a few kilobytes."""
    return mlp_itemsize * 2 * (dim * freq_dim + dim * dim) + proj_itemsize * 6 * dim * dim


def flops(num_rows: int, dim: int, freq_dim: int) -> int:
    return 2 * num_rows * (2 * dim * freq_dim + 2 * dim * dim + 6 * dim * dim)


def dual_timestep_embedding(
    t: Tensor,
    delta: Tensor,
    time_mlp: TimestepMLP,
    delta_mlp: TimestepMLP,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gate: float,
) -> tuple[Tensor, Tensor]:
    """See `Ops.dual_timestep_embedding`."""
    return torch.ops.anyflow.dual_timestep_embedding(t, delta, *time_mlp, *delta_mlp, proj_weight, proj_bias, gate)


def aot_cases(arch: int) -> list[AotCase]:
    """The three launches at each released model, for one distinct (t, r) and for blocks of four."""
    tile = gemv_tile(arch)
    cases = []
    for model, size in MODELS.items():
        width = size["dim"]
        for num_rows in (1, 21):
            blocks = _blocks(tile, num_rows, width)
            hidden_constexprs = {
                "OUT": width,
                "TIME_HALF": FREQ_DIM // 2,
                "DELTA_HALF": FREQ_DIM // 2,
                "BLOCK_N": blocks["BLOCK_N"],
                "BLOCK_O": tile.outputs,
                "BLOCK_TIME": FREQ_DIM // 2,
                "BLOCK_DELTA": FREQ_DIM // 2,
            }
            kernels = (
                (_timestep_hidden_kernel, argument_types(_timestep_hidden_kernel, "fp32"), hidden_constexprs),
                (
                    _timestep_mix_kernel,
                    argument_types(_timestep_mix_kernel, "fp32", fp32=("gate",)) | {"activated_ptr": "*bf16"},
                    {"OUT": width, **blocks},
                ),
                (
                    _timestep_projection_kernel,
                    argument_types(_timestep_projection_kernel, "bf16", fp32=("y_ptr",)),
                    {"OUT": 6 * width, "IN": width, **blocks},
                ),
            )
            for kernel, types, constexprs in kernels:
                cases.append(AotCase(kernel, f"{model} N={num_rows}", types, constexprs, num_warps=tile.num_warps))
    return cases
