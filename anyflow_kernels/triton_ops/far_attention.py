"""Softmax attention over key ranges, forward: out = softmax(scale * q k^T) v, with the log-sum-exp.

Flash attention in which the mask is a loop bound: a tile of queries loops over the at most three contiguous key ranges
that its segment sees, unmasked but for the last partial block of a range. Phantom keys start the softmax denominator.
When the tiles do not fill the GPU evenly, keys are split and a second kernel merges partial results by log-sum-exp.

FLOPs and bytes: `flops`, `bytes_moved`. Roof: tensor cores.
Source: FlashAttention-2 (arXiv 2307.08691); stream-K (arXiv 2301.03598) for the split; masks of FAR (arXiv 2503.19325).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_configs
from ..far_layout import AttentionPlan
from ..launch_configs import AttentionConfig, attention_row
from ..launch_configs.tuned import Key, choice_for, declined, tuned_row
from .attention_tiles import LN2, constants, describable, describe, load_rows, row_strides, scheduled, softmax_step
from .dependent_launch import dependent_launch, wait_for_predecessor
from .far_attention_library import LIBRARIES, library_forward, refused, unproven
from .tile_schedule import END, FIRST_RANGE, HEAD, ITEM, PHANTOM_KEYS, RANGES, SLOT, START, decode, encode


# Lengths are not specialised: one that happens to be a multiple of 16 would compile the kernel again mid-rollout.
@triton.jit(do_not_specialize=["num_queries"])
def _far_attention_forward_kernel(
    q, k, v, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, starts_ptr, items_ptr, ranges_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh,
    heads, num_queries, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, WARP_SPECIALIZE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    wait_for_predecessor(PDL)
    q_strides = (stride_qb, stride_ql, stride_qh)
    k_strides = (stride_kb, stride_kl, stride_kh)
    v_strides = (stride_vb, stride_vl, stride_vh)
    program = tl.program_id(0)
    # Hoisting what the epilogue needs out of this loop would hold 30 to 60 registers through the inner one.
    for i in tl.range(tl.load(starts_ptr + program), tl.load(starts_ptr + program + 1), disable_licm=True):
        item = items_ptr + i * ITEM
        i_bh = tl.load(item + HEAD)
        q_start = tl.load(item + START)
        q_end = tl.load(item + END)
        slot = tl.load(item + SLOT)
        phantom_keys = tl.load(item + PHANTOM_KEYS)
        first_range = tl.load(item + FIRST_RANGE)
        last_range = first_range + tl.load(item + RANGES)
        i_b = i_bh // heads
        i_h = i_bh % heads

        q_tile = load_rows(
            q, i_b, i_h, q_start, q_end, q_strides, BLOCK_M, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS
        )
        denominator = tl.zeros([BLOCK_M], tl.float32) + phantom_keys
        maximum = tl.where(denominator > 0, 0.0, -float("inf"))  # a phantom key's logit is 0
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for r in range(first_range, last_range):
            k_start = tl.load(ranges_ptr + 2 * r)
            k_end = tl.load(ranges_ptr + 2 * r + 1)
            k_full = k_start + (k_end - k_start) // BLOCK_N * BLOCK_N
            for n in tl.range(k_start, k_full, BLOCK_N, warp_specialize=WARP_SPECIALIZE):
                k_tile = load_rows(k, i_b, i_h, n, k_end, k_strides, BLOCK_N, HEAD_DIM, BLOCK_D, False, DESCRIPTORS)
                v_tile = load_rows(v, i_b, i_h, n, k_end, v_strides, BLOCK_N, HEAD_DIM, BLOCK_D, False, DESCRIPTORS)
                acc, denominator, maximum = softmax_step(
                    acc, denominator, maximum, q_tile, k_tile, v_tile, scale_log2, None, False, PRECISION
                )
            if k_full < k_end:
                k_tile = load_rows(
                    k, i_b, i_h, k_full, k_end, k_strides, BLOCK_N, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS
                )
                # What lies beyond the range may be NaN, and 0 * NaN is NaN: values are zeroed, scores masked.
                v_tile = load_rows(v, i_b, i_h, k_full, k_end, v_strides, BLOCK_N, HEAD_DIM, BLOCK_D, True, DESCRIPTORS)
                valid = k_full + tl.arange(0, BLOCK_N) < k_end
                acc, denominator, maximum = softmax_step(
                    acc, denominator, maximum, q_tile, k_tile, v_tile, scale_log2, valid, True, PRECISION
                )

        acc = acc / denominator[:, None]
        lse = maximum * LN2 + tl.log(denominator)
        rows = tl.arange(0, BLOCK_M)
        columns = tl.arange(0, BLOCK_D)
        if slot < 0:
            written = q_start + rows < q_end
            out_tile = out_ptr + ((i_b.to(tl.int64) * num_queries + q_start) * heads + i_h) * HEAD_DIM
            out_pointers = out_tile + (rows[:, None] * (heads * HEAD_DIM) + columns[None, :])
            mask = written[:, None] & (columns < HEAD_DIM)[None, :]
            tl.store(out_pointers, acc.to(out_ptr.dtype.element_ty), mask=mask)
            tl.store(lse_ptr + i_bh.to(tl.int64) * num_queries + q_start + rows, lse, mask=written)
        else:
            partial_tile = partial_ptr + slot.to(tl.int64) * (BLOCK_M * HEAD_DIM)
            partial_pointers = partial_tile + (rows[:, None] * HEAD_DIM + columns[None, :])
            tl.store(partial_pointers, acc, mask=(columns < HEAD_DIM)[None, :])
            tl.store(partial_lse_ptr + slot.to(tl.int64) * BLOCK_M + rows, lse)


FORWARD = "anyflow::far_attention"
torch.library.define(
    FORWARD,
    "(Tensor q, Tensor k, Tensor v, SymInt[] ranges, SymInt phantom_keys, float scale) -> (Tensor out, Tensor lse)",
)


@torch.library.register_fake(FORWARD)
def _fake(
    q: Tensor, k: Tensor, v: Tensor, ranges: Sequence[int], phantom_keys: int, scale: float
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.impl(FORWARD, ("cpu", "cuda"))
def _forward(
    q: Tensor, k: Tensor, v: Tensor, ranges: Sequence[int], phantom_keys: int, scale: float
) -> tuple[Tensor, Tensor]:
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return choose(q, k, v, tuple(ranges), phantom_keys)(scale)


Served = Callable[[float], tuple[Tensor, Tensor]]


def choose(q: Tensor, k: Tensor, v: Tensor, flat: tuple[int, ...], phantom_keys: int) -> Served:
    """What serves a forward, given the scale. Decided here alone, the first that can take these arguments: what
    `anyflow tune` found fastest on this machine; what `launch_configs.FORWARD_KERNELS` prefers on this chip (a library
    only once it was right here); the Triton kernel, which takes all.
    """
    arch, runs = launch_configs.architecture(q.device), decode(flat)
    shape = launch_configs.attention_shape(runs, k.shape[1], phantom_keys)
    dense, key = shape != "ranges", Key("far_attention", q.dtype, q.shape[3], shape)
    won = choice_for(arch, key)
    preferred = launch_configs.rows_for(launch_configs.FORWARD_KERNELS, arch)[0]
    default = preferred.dense if dense else preferred.ranges
    # Each way with the key of the parameters that won with it.
    for way, won_key in (*([] if won is None else [(won.way, key)]), (default, None), ("triton", None)):
        if way == "triton":
            break
        if way in LIBRARIES and dense and refused(q, k, v) is None:
            if won_key is not None or unproven(way, q) is None:
                return partial(library_forward, way, q, k, v)
        if way == "gluon":
            from .far_attention_gluon import launch_gluon, suits  # only where Gluon can run

            for row in launch_configs.ATTENTION_GLUON:
                if row.arch == arch and row.head_dim == q.shape[3]:
                    config = row if won_key is None else tuned_row(row, arch, won_key)
                    if suits(q, k, v, runs, config):
                        return partial(launch_gluon, q, k, v, flat, phantom_keys, config=config)
        if won_key is not None:
            declined(won_key, f"{way} cannot take these arguments")
    descriptors = all(map(describable, (q, k, v)))
    config = attention_row(launch_configs.ATTENTION_FORWARD, arch, q.shape[3], q.itemsize, descriptors, won_key)
    return partial(launch_forward, q, k, v, flat, phantom_keys, config=config)


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flat: tuple[int, ...],
    phantom_keys: int,
    scale: float,
    config: AttentionConfig,
) -> tuple[Tensor, Tensor]:
    """Allocate and launch with the given parameters; (out, lse) as the operator returns them."""
    _, num_queries, heads, head_dim = q.shape

    def launch(programs: int, *memory: Tensor) -> None:
        block_d = triton.next_power_of_2(max(head_dim, 16))
        rows = (config.block_m, config.block_n, config.block_n)
        inputs = [describe(x, n, block_d) if config.descriptors else x for x, n in zip((q, k, v), rows, strict=True)]
        _far_attention_forward_kernel[(programs,)](
            *inputs,
            *memory,
            *row_strides(q),
            *row_strides(k),
            *row_strides(v),
            heads,
            num_queries,
            scale / LN2.value,
            **constants(config, head_dim),
            WARP_SPECIALIZE=config.warp_specialize,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
            **dependent_launch(config.arch),
        )

    return scheduled(q, flat, phantom_keys, config, launch)


def flops(plan: AttentionPlan, batch: int, heads: int, head_dim: int, backward: bool = False) -> int:
    """Two matrix products per visible pair; the backward alone has seven: scores and dp in both of its kernels."""
    return (14 if backward else 4) * plan.num_pairs * head_dim * batch * heads


def bytes_moved(q: Tensor, k: Tensor) -> int:
    """q, k, v read and out written once."""
    return 2 * (q.numel() + k.numel()) * q.itemsize


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ranges, _, scale = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.ranges, ctx.scale = ranges, scale


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, out, lse = ctx.saved_tensors
    grads = torch.ops.anyflow.far_attention_backward(grad_out, q, k, v, out, lse, ctx.ranges, ctx.scale)
    return *grads, None, None, None


torch.library.register_autograd(FORWARD, _backward, setup_context=_setup_context)


def far_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """See `anyflow_kernels.operations.Ops.far_attention`."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.stride(3) != 1:
            raise ValueError(f"{name}: got strides {x.stride()}, expected a dense last dimension")
    if q.shape[3] > 128:
        raise ValueError(f"q: got head_dim {q.shape[3]}, expected at most 128")
    if scale < 0:
        raise ValueError(f"scale: got {scale}, expected >= 0")
    out, lse = torch.ops.anyflow.far_attention(q, k, v, encode(plan.ranges), plan.phantom_keys, scale)
    return (out, lse.detach()) if return_lse else out
