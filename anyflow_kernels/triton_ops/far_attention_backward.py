"""Attention over key ranges, backward: dq, dk, dv from the log-sum-exp, without atomics, hence deterministic.

With p = exp(scale * q k^T - lse), dp = dout v^T, delta = rowsum(dout * out) and ds = p * (dp - delta):
dq = scale * ds k, dk = scale * ds^T q, dv = p^T dout. One kernel walks the key ranges of a query tile (dq), another
the query ranges that see a key tile (dk, dv; the transposed plan). Phantom keys, without gradient, act by the lse.

FLOPs: 14 * plan.num_pairs * d * B * H (scores and dp twice, dq, dk, dv). Roof: tensor cores.
Source: FlashAttention-2 (arXiv 2307.08691), section 3.2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import launch_configs
from ..launch_configs import AttentionConfig, attention_row
from ..launch_configs.tuned import Key
from .attention_tiles import LN2, LOG2E, constants, describable, describe, dot, load_rows, row_strides
from .tile_schedule import END, FIRST_RANGE, HEAD, ITEM, RANGES, START, Schedule, key_schedule, query_schedule

# Floats in a query's row of statistics, and where delta stands in it. Of a load with fewer elements than the block has
# threads Triton 3.6 makes copies, sixteen in each thread; four floats a query are staged once. Two of them are unused.
WIDTH, DELTA = tl.constexpr(4), tl.constexpr(2)


@triton.jit(do_not_specialize=["num_queries"])
def _far_attention_delta_kernel(
    out_ptr, grad_ptr, lse_ptr, statistics_ptr,
    stride_gb, stride_gl, stride_gh,
    heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """lse in base 2 and delta = rowsum(dout * out) of ROWS queries of a head; behind the last (infinity, 0)."""
    i_b = tl.program_id(1) // heads
    i_h = tl.program_id(1) % heads
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    mask = (rows < num_queries)[:, None] & (columns < HEAD_DIM)[None, :]
    wide_rows = rows.to(tl.int64)[:, None]
    out_offsets = ((i_b.to(tl.int64) * num_queries + wide_rows) * heads + i_h) * HEAD_DIM + columns[None, :]
    grad_offsets = (
        i_b.to(tl.int64) * stride_gb + wide_rows * stride_gl + i_h.to(tl.int64) * stride_gh + columns[None, :]
    )
    out = tl.load(out_ptr + out_offsets, mask=mask, other=0.0).to(tl.float32)  # [ROWS, BLOCK_D]
    grad = tl.load(grad_ptr + grad_offsets, mask=mask, other=0.0).to(tl.float32)
    lse_row = lse_ptr + tl.program_id(1).to(tl.int64) * num_queries
    lse = tl.load(lse_row + rows, mask=rows < num_queries, other=float("inf"))
    target = statistics_ptr + tl.program_id(1).to(tl.int64) * (WIDTH * (num_queries + 1)) + WIDTH * rows
    tl.store(target, lse * LOG2E, mask=rows <= num_queries)
    tl.store(target + DELTA, tl.sum(out * grad, 1), mask=rows <= num_queries)


@triton.jit
def _statistics(statistics_ptr, i_bh, first, end, num_queries, ROWS: tl.constexpr):
    """Rows of WIDTH floats of ROWS queries: the first is lse in base 2, that at DELTA is delta.

    From row `end` on it is the row behind the last one, of infinite lse, so that p is 0: masks instead would be a
    comparison and a selection for each column of scores that a thread holds.
    """
    rows = first + tl.arange(0, ROWS)
    head = statistics_ptr + i_bh.to(tl.int64) * (WIDTH * (num_queries + 1))
    return head + WIDTH * tl.where(rows < end, rows, num_queries)


@triton.jit
def _dq_step(dq, q, grad, k, v, lse, delta, scale_log2, valid, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    scores = dot(q, k.T, None, PRECISION)  # [BLOCK_M, BLOCK_N]
    p = tl.exp2(scores * scale_log2 - lse[:, None])
    if EDGE:
        p = tl.where(valid[None, :], p, 0.0)
    dp = dot(grad, v.T, None, PRECISION)
    ds = p * (dp - delta[:, None])
    return dot(ds.to(k.dtype), k, dq, PRECISION)


@triton.jit(do_not_specialize=["num_queries"])
def _far_attention_dq_kernel(
    q, k, v, grad, statistics_ptr, dq_ptr, starts_ptr, items_ptr, ranges_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_gb,
    stride_gl, stride_gh,
    heads, num_queries, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_strides = (stride_qb, stride_ql, stride_qh)
    k_strides = (stride_kb, stride_kl, stride_kh)
    v_strides = (stride_vb, stride_vl, stride_vh)
    g_strides = (stride_gb, stride_gl, stride_gh)
    program = tl.program_id(0)
    for i in tl.range(tl.load(starts_ptr + program), tl.load(starts_ptr + program + 1), disable_licm=True):
        item = items_ptr + i * ITEM
        i_bh = tl.load(item + HEAD)
        q_start = tl.load(item + START)
        q_end = tl.load(item + END)
        first_range = tl.load(item + FIRST_RANGE)
        last_range = first_range + tl.load(item + RANGES)
        i_b = i_bh // heads
        i_h = i_bh % heads

        q_tile = load_rows(
            q, i_b, i_h, q_start, q_end, q_strides, BLOCK_M, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS
        )
        grad_tile = load_rows(
            grad, i_b, i_h, q_start, q_end, g_strides, BLOCK_M, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS
        )
        row = _statistics(statistics_ptr, i_bh, q_start, q_end, num_queries, BLOCK_M)
        lse, delta = tl.load(row), tl.load(row + DELTA)
        dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        for r in range(first_range, last_range):
            k_start = tl.load(ranges_ptr + 2 * r)
            k_end = tl.load(ranges_ptr + 2 * r + 1)
            k_full = k_start + (k_end - k_start) // BLOCK_N * BLOCK_N
            for n in range(k_start, k_full, BLOCK_N):
                k_tile = load_rows(k, i_b, i_h, n, k_end, k_strides, BLOCK_N, HEAD_DIM, BLOCK_D, False, DESCRIPTORS)
                v_tile = load_rows(v, i_b, i_h, n, k_end, v_strides, BLOCK_N, HEAD_DIM, BLOCK_D, False, DESCRIPTORS)
                dq = _dq_step(dq, q_tile, grad_tile, k_tile, v_tile, lse, delta, scale_log2, None, False, PRECISION)
            if k_full < k_end:
                # What lies beyond the range may be NaN: keys and values are zeroed, and p for exp2(-lse) of those
                # zeros.
                k_tile = load_rows(k, i_b, i_h, k_full, k_end, k_strides, BLOCK_N, HEAD_DIM, BLOCK_D, True, DESCRIPTORS)
                v_tile = load_rows(v, i_b, i_h, k_full, k_end, v_strides, BLOCK_N, HEAD_DIM, BLOCK_D, True, DESCRIPTORS)
                valid = k_full + tl.arange(0, BLOCK_N) < k_end
                dq = _dq_step(dq, q_tile, grad_tile, k_tile, v_tile, lse, delta, scale_log2, valid, True, PRECISION)
        store_rows(dq_ptr, dq * scale, i_b, i_h, q_start, q_end, num_queries, heads, BLOCK_M, HEAD_DIM, BLOCK_D)


@triton.jit
def store_rows(
    out_ptr,
    tile, i_b, i_h, first, end, length, heads,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Rows first to end of one head of a contiguous (B, length, H, HEAD_DIM) tensor."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    base = out_ptr + ((i_b.to(tl.int64) * length + first) * heads + i_h) * HEAD_DIM
    mask = (first + rows < end)[:, None] & (columns < HEAD_DIM)[None, :]
    pointers = base + (rows[:, None] * (heads * HEAD_DIM) + columns[None, :])
    tl.store(pointers, tile.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _dkdv_step(dk, dv, k, v, q, grad, lse, delta, scale_log2, PRECISION: tl.constexpr):
    """One block of queries."""
    scores = dot(k, q.T, None, PRECISION)  # [BLOCK_N, BLOCK_M]
    p = tl.exp2(scores * scale_log2 - lse[None, :])
    dv = dot(p.to(grad.dtype), grad, dv, PRECISION)
    dp = dot(v, grad.T, None, PRECISION)
    ds = p * (dp - delta[None, :])
    dk = dot(ds.to(q.dtype), q, dk, PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def _far_attention_dkdv_kernel(
    q, k, v, grad, statistics_ptr, dk_ptr, dv_ptr, items_ptr, ranges_ptr,
    stride_qb, stride_ql, stride_qh, stride_kb, stride_kl, stride_kh, stride_vb, stride_vl, stride_vh, stride_gb,
    stride_gl, stride_gh,
    heads, num_queries, num_keys, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    q_strides = (stride_qb, stride_ql, stride_qh)
    k_strides = (stride_kb, stride_kl, stride_kh)
    v_strides = (stride_vb, stride_vl, stride_vh)
    g_strides = (stride_gb, stride_gl, stride_gh)
    # One key tile per program: the state of a loop over tiles would spill. The grid is ordered longest first.
    item = items_ptr + tl.program_id(0) * ITEM
    i_bh = tl.load(item + HEAD)
    k_start = tl.load(item + START)
    k_end = tl.load(item + END)
    first_range = tl.load(item + FIRST_RANGE)
    last_range = first_range + tl.load(item + RANGES)
    i_b = i_bh // heads
    i_h = i_bh % heads

    k_tile = load_rows(k, i_b, i_h, k_start, k_end, k_strides, BLOCK_N, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS)
    v_tile = load_rows(v, i_b, i_h, k_start, k_end, v_strides, BLOCK_N, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for r in range(first_range, last_range):
        q_start = tl.load(ranges_ptr + 2 * r)
        q_end = tl.load(ranges_ptr + 2 * r + 1)
        # No separate edge: beyond the range p is 0 by its infinite lse, and rows there are other queries, not garbage.
        for m in range(q_start, q_end, BLOCK_M):
            q_tile = load_rows(
                q, i_b, i_h, m, q_end, q_strides, BLOCK_M, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS
            )
            grad_tile = load_rows(
                grad, i_b, i_h, m, q_end, g_strides, BLOCK_M, HEAD_DIM, BLOCK_D, not DESCRIPTORS, DESCRIPTORS
            )
            row = _statistics(statistics_ptr, i_bh, m, q_end, num_queries, BLOCK_M)
            if DESCRIPTORS:
                used, _ = tl.split(tl.load(row[:, None] + tl.arange(0, WIDTH)[None, :]).reshape(BLOCK_M, 2, 2))
                lse, delta = tl.split(used)
            else:  # both at once would spill
                lse, delta = tl.load(row), tl.load(row + DELTA)
            dk, dv = _dkdv_step(dk, dv, k_tile, v_tile, q_tile, grad_tile, lse, delta, scale_log2, PRECISION)
    store_rows(dk_ptr, dk * scale, i_b, i_h, k_start, k_end, num_keys, heads, BLOCK_N, HEAD_DIM, BLOCK_D)
    store_rows(dv_ptr, dv, i_b, i_h, k_start, k_end, num_keys, heads, BLOCK_N, HEAD_DIM, BLOCK_D)


BACKWARD = "anyflow::far_attention_backward"
torch.library.define(
    BACKWARD,
    "(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, SymInt[] ranges, float scale)"
    " -> (Tensor dq, Tensor dk, Tensor dv)",
)


@torch.library.register_fake(BACKWARD)
def _fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ranges: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


@torch.library.impl(BACKWARD, ("cpu", "cuda"))
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, ranges: Sequence[int], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    if grad.stride(3) != 1 or 0 in row_strides(grad):  # an expanded gradient, such as that of a sum
        grad = grad.contiguous()
    arch = launch_configs.architecture(q.device)
    descriptors = all(map(describable, (q, k, v, grad)))
    tables = {"far_attention_dq": launch_configs.ATTENTION_DQ, "far_attention_dkdv": launch_configs.ATTENTION_DKDV}
    dq_config, dkdv_config = (
        attention_row(table, arch, q.shape[3], q.itemsize, descriptors, Key(operation, q.dtype, q.shape[3]))
        for operation, table in tables.items()
    )
    with torch.cuda.device_of(q):  # Triton launches on the current device
        return launch_backward(grad, q, k, v, out, lse, tuple(ranges), scale, dq_config, dkdv_config)


DELTA_ROWS = 32


def launch_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    flat: tuple[int, ...],
    scale: float,
    dq_config: AttentionConfig,
    dkdv_config: AttentionConfig,
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate and launch with the given parameters; (dq, dk, dv), contiguous."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if q.numel() == 0:
        return dq, dk.zero_(), dv.zero_()
    batch, num_queries, heads, head_dim = q.shape
    block_d = triton.next_power_of_2(max(head_dim, 16))
    statistics = lse.new_empty(batch, heads, num_queries + 1, WIDTH.value)
    _far_attention_delta_kernel[(triton.cdiv(num_queries + 1, DELTA_ROWS), batch * heads)](
        out,
        grad,
        lse,
        statistics,
        *row_strides(grad),
        heads,
        num_queries,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        ROWS=DELTA_ROWS,
        num_warps=4,
    )
    sizes = [n for x in (q, k, v, grad) for n in row_strides(x)]

    def launch(
        kernel: triton.JITFunction,
        config: AttentionConfig,
        schedule: Schedule,
        targets: tuple[Tensor, ...],
        tables: tuple[Tensor, ...],
        lengths: tuple[int, ...],
    ) -> None:
        rows = (config.block_m, config.block_n, config.block_n, config.block_m)
        tensors = zip((q, k, v, grad), rows, strict=True)
        kernel[(schedule.programs,)](
            *(describe(x, n, block_d) if config.descriptors else x for x, n in tensors),
            statistics,
            *targets,
            *tables,
            *sizes,
            heads,
            *lengths,
            scale,
            scale / LN2.value,
            **constants(config, head_dim),
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )

    rows, columns = dq_config.block_m, dq_config.block_n
    programs = launch_configs.attention_programs(q.device, dq_config)
    by_query = query_schedule(flat, batch * heads, rows, columns, programs, None, 0, q.device)
    dq_tables = (by_query.starts, by_query.items, by_query.ranges)
    launch(_far_attention_dq_kernel, dq_config, by_query, (dq,), dq_tables, (num_queries,))

    num_keys = k.shape[1]
    by_key = key_schedule(flat, num_keys, batch * heads, dkdv_config.block_n, dkdv_config.block_m, q.device)
    dkdv_tables = (by_key.items, by_key.ranges)
    launch(_far_attention_dkdv_kernel, dkdv_config, by_key, (dk, dv), dkdv_tables, (num_queries, num_keys))
    return dq, dk, dv
