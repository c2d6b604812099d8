"""What the attention kernels share: loading rows, products, a softmax step, merging partial results, descriptors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch_configs import AttentionConfig, attention_programs
from .dependent_launch import dependent_launch, wait_for_predecessor
from .tile_schedule import END, HEAD, MERGE, SLOT, SLOTS, START, Schedule, query_schedule

LN2 = tl.constexpr(math.log(2.0))
LOG2E = tl.constexpr(1.0 / math.log(2.0))


@triton.jit
def load_rows(
    x,
    i_b, i_h, first, end, strides,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows first to first + ROWS of one head; zero beyond column HEAD_DIM and, if EDGE, from row `end` on. `strides`
    are those of batch, token and head.
    """
    if DESCRIPTORS:
        tile = x.load([i_b, i_h, first, 0]).reshape(ROWS, BLOCK_D)
        if EDGE:
            tile = tl.where((first + tl.arange(0, ROWS) < end)[:, None], tile, 0.0)
    else:
        stride_b, stride_l, stride_h = strides
        rows = tl.arange(0, ROWS)
        columns = tl.arange(0, BLOCK_D)
        first_wide = tl.full([], 0, tl.int64) + first  # the interpreter's loop variables are Python integers
        base = x + i_b.to(tl.int64) * stride_b + i_h.to(tl.int64) * stride_h + first_wide * stride_l
        pointers = base + (rows.to(tl.int64)[:, None] * stride_l + columns[None, :])
        inside = (columns < HEAD_DIM)[None, :]
        if EDGE:
            tile = tl.load(pointers, mask=(first + rows < end)[:, None] & inside, other=0.0)
        elif HEAD_DIM < BLOCK_D:
            tile = tl.load(pointers, mask=inside, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile  # [ROWS, BLOCK_D]


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in fp32; acc may be None."""
    if PRECISION == "ieee":
        # Only the interpreter's rows say so: it would multiply the bits of bf16 operands. Widening them is exact.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def softmax_step(acc, denominator, maximum, q, k, v, scale_log2, valid, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """One block of keys: the running maximum is of the scaled logits in base 2."""
    scores = dot(q, k.T, None, PRECISION)  # [BLOCK_M, BLOCK_N]
    if EDGE:
        scores = tl.where(valid[None, :], scores, -float("inf"))
    new_maximum = tl.maximum(maximum, tl.max(scores, 1) * scale_log2)
    p = tl.exp2(scores * scale_log2 - new_maximum[:, None])
    correction = tl.exp2(maximum - new_maximum)
    denominator = denominator * correction + tl.sum(p, 1)
    acc = dot(p.to(v.dtype), v, acc * correction[:, None], PRECISION)
    return acc, denominator, new_maximum


@triton.jit(do_not_specialize=["num_queries"])
def _far_attention_merge_kernel(
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, merges_ptr,
    heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Partial results of one tile, weighted by exp(lse_part - lse)."""
    wait_for_predecessor(PDL)
    merge = merges_ptr + tl.program_id(0) * MERGE
    i_bh = tl.load(merge + HEAD)
    q_start = tl.load(merge + START)
    q_end = tl.load(merge + END)
    slot = tl.load(merge + SLOT).to(tl.int64)
    slots = tl.load(merge + SLOTS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (columns < HEAD_DIM)[None, :]

    lse_pointers = partial_lse_ptr + slot * BLOCK_M + rows
    pointers = partial_ptr + slot * (BLOCK_M * HEAD_DIM) + (rows[:, None] * HEAD_DIM + columns[None, :])
    maximum = tl.load(lse_pointers)
    acc = tl.load(pointers, mask=inside, other=0.0)
    denominator = tl.full([ROWS], 1.0, tl.float32)
    for part in range(1, slots):
        lse = tl.load(lse_pointers + part * BLOCK_M)
        new_maximum = tl.maximum(maximum, lse)
        correction = tl.exp(maximum - new_maximum)
        weight = tl.exp(lse - new_maximum)
        denominator = denominator * correction + weight
        partial = tl.load(pointers + part * (BLOCK_M * HEAD_DIM), mask=inside, other=0.0)
        acc = acc * correction[:, None] + partial * weight[:, None]
        maximum = new_maximum

    written = q_start + rows < q_end
    base = out_ptr + (((i_bh // heads).to(tl.int64) * num_queries + q_start) * heads + i_bh % heads) * HEAD_DIM
    out_pointers = base + (rows[:, None] * (heads * HEAD_DIM) + columns[None, :])
    tl.store(out_pointers, (acc / denominator[:, None]).to(out_ptr.dtype.element_ty), mask=written[:, None] & inside)
    tl.store(lse_ptr + i_bh.to(tl.int64) * num_queries + q_start + rows, maximum + tl.log(denominator), mask=written)


MERGE_ROWS = 16  # a warp per few rows: short programs that fill the GPU


def constants(config: AttentionConfig, head_dim: int) -> dict[str, Any]:
    """What the forward and the backward kernels are compiled for."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": triton.next_power_of_2(max(head_dim, 16)),
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "DESCRIPTORS": config.descriptors,
        "PRECISION": config.precision,
    }


def scheduled(
    q: Tensor, flat: tuple[int, ...], phantom_keys: int, config: AttentionConfig, launch: Callable[..., None]
) -> tuple[Tensor, Tensor]:
    """(out, lse) of a forward; `launch(programs, *memory)` runs its kernel, unless there are no queries.

    The memory is out, lse, the partial results and their lse, and the schedule's starts, items and ranges.
    """
    batch, num_queries, heads, head_dim = q.shape
    out = q.new_empty(q.shape)
    lse = q.new_empty(batch, heads, num_queries, dtype=torch.float32)
    if out.numel() == 0:
        return out, lse
    programs = attention_programs(q.device, config)
    sizes = (batch * heads, config.block_m, config.block_n, programs, config.split_cost)
    schedule = query_schedule(flat, *sizes, phantom_keys, q.device)
    partial = q.new_empty(schedule.slots, config.block_m, head_dim, dtype=torch.float32)
    partial_lse = q.new_empty(schedule.slots, config.block_m, dtype=torch.float32)
    tables = (schedule.starts, schedule.items, schedule.ranges)
    launch(schedule.programs, out, lse, partial, partial_lse, *tables)
    merge(out, lse, partial, partial_lse, schedule, config)
    return out, lse


def merge(
    out: Tensor, lse: Tensor, partial: Tensor, partial_lse: Tensor, schedule: Schedule, config: AttentionConfig
) -> None:
    """Write the tiles whose keys were split, from their partial results."""
    if schedule.slots == 0:
        return
    _far_attention_merge_kernel[(schedule.merges.shape[0], config.block_m // MERGE_ROWS)](
        out,
        lse,
        partial,
        partial_lse,
        schedule.merges,
        out.shape[2],
        out.shape[1],
        HEAD_DIM=out.shape[3],
        BLOCK_D=triton.next_power_of_2(max(out.shape[3], 16)),
        BLOCK_M=config.block_m,
        ROWS=MERGE_ROWS,
        num_warps=4,
        **dependent_launch(config.arch),
    )


def row_strides(x: Tensor) -> tuple[int, int, int]:
    """Those of batch, token and head of (B, L, H, d)."""
    return x.stride(0), x.stride(1), x.stride(2)


def describable(x: Tensor) -> bool:
    """True if a TMA descriptor can address x: 16-byte aligned base, strides that are positive multiples of 16 bytes."""
    return x.data_ptr() % 16 == 0 and all(stride > 0 and stride * x.itemsize % 16 == 0 for stride in row_strides(x))


def describe(x: Tensor, rows: int, block_d: int) -> Any:
    """Descriptor of (B, L, H, d), axes (B, H, L, d): a block is `rows` tokens of one head. Past the end it reads 0."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    batch, length, heads, head_dim = x.shape
    stride_b, stride_l, stride_h = row_strides(x)
    shape, steps = [batch, heads, length, head_dim], [stride_b, stride_h, stride_l, 1]
    return TensorDescriptor(x, shape, steps, [1, 1, rows, block_d])
