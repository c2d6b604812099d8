"""`far_attention` forward for sm_90 in Gluon: warp-specialised, with wgmma, TMA and mbarriers spelled out.

One warp loads, two warpgroups compute 64 queries each. A compute warpgroup issues the scores of the next block of keys
before the softmax of that block and lets the product with the values run under it, so that tensor cores and
exponentials overlap within a warpgroup and between the two. The schedule, the partial results and their merge are
those of `far_attention`. It does not run in the interpreter, and no GPU has run it yet: it is compiled in every check
and serves only where `launch_configs.FORWARD_KERNELS` says so.

Tried, emulated and dropped: mbarriers that make the two warpgroups take turns (FlashAttention-3's ping-pong) cost a
fourth barrier a block and 8 bytes of spills for nothing that the pipe model sees; keys released together with values
save none, for Triton puts a barrier before each arrival.

Source: FlashAttention-3 (arXiv 2407.08608), sections 3.1 and 3.2.
"""

from __future__ import annotations

from typing import Any

import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import launch_configs
from ..aot_case import MODELS, AotCase
from ..launch_configs import AttentionConfig, rows_for
from .attention_tiles import LN2, describable, row_strides, scheduled
from .tile_schedule import END, FIRST_RANGE, HEAD, ITEM, PHANTOM_KEYS, RANGES, SLOT, START, Runs, decode

# Triton 3.6 and 3.7 have it by its old name alone, later ones by the new alone.
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
ROWS = gl.constexpr(64)  # queries of a warpgroup: one wgmma is 64 rows high


@gluon.jit
def _load_tiles(
    q, k, v,
    tiles, tables, heads,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The loading warp: q of every item, then its blocks of keys and values, as ring buffers get free."""
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
    starts_ptr, items_ptr, ranges_ptr = tables
    program = gl.program_id(0)
    step = 0  # blocks of keys so far
    count = 0  # items so far
    for i in tl.range(gl.load(starts_ptr + program), gl.load(starts_ptr + program + 1), disable_licm=True):
        item = items_ptr + i * ITEM
        i_bh = gl.load(item + HEAD)
        q_start = gl.load(item + START)
        first_range = gl.load(item + FIRST_RANGE)
        last_range = first_range + gl.load(item + RANGES)
        i_b = i_bh // heads
        i_h = i_bh % heads
        for part in gl.static_range(2):
            # A barrier that never completed counts as completed in phase 1: the first pass does not wait.
            mbarrier.wait(q_empty.index(part), (count & 1) ^ 1)
            mbarrier.expect(q_full.index(part), ROWS * HEAD_DIM * 2)
            row = q_start + part * ROWS
            async_load(q, [i_b, i_h, row, 0], q_full.index(part), q_tiles.index(part))
        for r in range(first_range, last_range):
            k_start = gl.load(ranges_ptr + 2 * r)
            k_end = gl.load(ranges_ptr + 2 * r + 1)
            for n in range(k_start, k_end, BLOCK_N):
                row = gl.minimum(n, k_end - BLOCK_N)
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(k_empty.index(stage), phase ^ 1)
                mbarrier.expect(k_full.index(stage), BLOCK_N * HEAD_DIM * 2)
                async_load(k, [i_b, i_h, row, 0], k_full.index(stage), k_tiles.index(stage))
                mbarrier.wait(v_empty.index(stage), phase ^ 1)
                mbarrier.expect(v_full.index(stage), BLOCK_N * HEAD_DIM * 2)
                async_load(v, [i_b, i_h, row, 0], v_full.index(stage), v_tiles.index(stage))
                step += 1
        count += 1


@gluon.jit
def _attend(
    part: gl.constexpr,
    tiles, results, tables, heads, num_queries, scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """A compute warpgroup: rows 64 * part to 64 * part + 64 of every tile."""
    q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty = tiles
    starts_ptr, items_ptr, ranges_ptr = tables
    out_ptr, lse_ptr, partial_ptr, partial_lse_ptr = results
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    out_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    p_layout: gl.constexpr = gl.DotOperandLayout(operand_index=0, parent=out_layout, k_width=2)
    row_layout: gl.constexpr = gl.SliceLayout(1, out_layout)
    # 16 bytes a thread, the rows of a head whole: the product's own layout would store 4.
    store_layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    keys = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, score_layout))
    no_scores = gl.zeros([ROWS, BLOCK_N], gl.float32, score_layout)

    program = gl.program_id(0)
    step = 0  # the block of keys whose values come next
    count = 0
    for i in tl.range(gl.load(starts_ptr + program), gl.load(starts_ptr + program + 1), disable_licm=True):
        item = items_ptr + i * ITEM
        i_bh = gl.load(item + HEAD)
        q_start = gl.load(item + START) + part * ROWS
        q_end = gl.load(item + END)
        slot = gl.load(item + SLOT)
        phantom_keys = gl.load(item + PHANTOM_KEYS)
        r = gl.load(item + FIRST_RANGE)
        last_range = r + gl.load(item + RANGES)
        blocks = 0
        for other in range(r, last_range):
            blocks += gl.cdiv(gl.load(ranges_ptr + 2 * other + 1) - gl.load(ranges_ptr + 2 * other), BLOCK_N)
        n = gl.load(ranges_ptr + 2 * r)
        k_end = gl.load(ranges_ptr + 2 * r + 1)

        mbarrier.wait(q_full.index(part), count & 1)
        q_tile = q_tiles.index(part).reshape([ROWS, HEAD_DIM])
        mbarrier.wait(k_full.index(step % STAGES), (step // STAGES) & 1)
        k_tile = k_tiles.index(step % STAGES).reshape([BLOCK_N, HEAD_DIM])
        scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True)
        scores = warpgroup_mma_wait(0, deps=[scores])
        mbarrier.arrive(k_empty.index(step % STAGES), count=1)
        scores = _mask_seen(scores, keys, n, k_end, BLOCK_N)
        floor = gl.where(phantom_keys > 0, 0.0, -float("inf"))  # a phantom key's logit is 0
        maximum = gl.maximum(gl.max(scores, 1) * scale_log2, floor)
        p = gl.exp2(scores * scale_log2 - maximum[:, None])
        denominator = gl.sum(p, 1) + phantom_keys * gl.exp2(floor - maximum)
        p_operand = gl.convert_layout(p.to(k_tile.dtype), p_layout)
        acc = gl.zeros([ROWS, HEAD_DIM], gl.float32, out_layout)

        for _ in range(1, blocks):
            n += BLOCK_N
            if n >= k_end:
                r += 1
                n = gl.load(ranges_ptr + 2 * r)
                k_end = gl.load(ranges_ptr + 2 * r + 1)
            following = step + 1
            mbarrier.wait(k_full.index(following % STAGES), (following // STAGES) & 1)
            k_tile = k_tiles.index(following % STAGES).reshape([BLOCK_N, HEAD_DIM])
            scores = warpgroup_mma(q_tile, k_tile.permute((1, 0)), no_scores, use_acc=False, is_async=True)
            mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
            v_tile = v_tiles.index(step % STAGES).reshape([BLOCK_N, HEAD_DIM])
            acc = warpgroup_mma(p_operand, v_tile, acc, is_async=True)
            # The scores are there; the product with the values runs on under the softmax.
            scores = warpgroup_mma_wait(1, deps=[scores])
            mbarrier.arrive(k_empty.index(following % STAGES), count=1)
            scores = _mask_seen(scores, keys, n, k_end, BLOCK_N)
            new_maximum = gl.maximum(maximum, gl.max(scores, 1) * scale_log2)
            p = gl.exp2(scores * scale_log2 - new_maximum[:, None])
            correction = gl.exp2(maximum - new_maximum)
            denominator = denominator * correction + gl.sum(p, 1)
            maximum = new_maximum
            acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
            mbarrier.arrive(v_empty.index(step % STAGES), count=1)
            acc = acc * gl.convert_layout(correction, row_layout)[:, None]
            p_operand = gl.convert_layout(p.to(k_tile.dtype), p_layout)
            step = following

        mbarrier.arrive(q_empty.index(part), count=1)
        mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)
        v_tile = v_tiles.index(step % STAGES).reshape([BLOCK_N, HEAD_DIM])
        acc = warpgroup_mma(p_operand, v_tile, acc, is_async=True)
        acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])
        mbarrier.arrive(v_empty.index(step % STAGES), count=1)
        step += 1
        count += 1

        acc = acc / gl.convert_layout(denominator, row_layout)[:, None]
        lse = gl.convert_layout(maximum * LN2 + gl.log(denominator), row_layout)
        rows = gl.arange(0, ROWS, layout=row_layout)
        columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, out_layout))
        if slot < 0:
            out_rows = gl.arange(0, ROWS, layout=gl.SliceLayout(1, store_layout))
            out_columns = gl.arange(0, HEAD_DIM, layout=gl.SliceLayout(0, store_layout))
            token = (i_bh // heads).to(gl.int64) * num_queries + q_start
            out_tile = out_ptr + (token * heads + i_bh % heads) * HEAD_DIM
            out_pointers = out_tile + (out_rows[:, None] * (heads * HEAD_DIM) + out_columns[None, :])
            out = gl.convert_layout(acc.to(out_ptr.dtype.element_ty), store_layout)
            gl.store(out_pointers, out, mask=(q_start + out_rows < q_end)[:, None])
            written = q_start + rows < q_end
            gl.store(lse_ptr + i_bh.to(gl.int64) * num_queries + q_start + rows, lse, mask=written)
        else:
            row = slot.to(gl.int64) * (2 * ROWS) + part * ROWS
            gl.store(partial_ptr + row * HEAD_DIM + (rows[:, None] * HEAD_DIM + columns[None, :]), acc)
            gl.store(partial_lse_ptr + row + rows, lse)


@gluon.jit
def _mask_seen(scores, keys, n, k_end, BLOCK_N: gl.constexpr):
    """The last block of a range ends with it, so it starts with keys that the block before has seen: mask those.

    No row beyond the range is ever loaded: what a slab holds there could be NaN.
    """
    first = gl.minimum(n, k_end - BLOCK_N)
    if first < n:
        scores = gl.where((first + keys < n)[None, :], -float("inf"), scores)
    return scores


@gluon.jit(do_not_specialize=["num_queries"])
def _far_attention_gluon_kernel(
    q, k, v, out_ptr, lse_ptr, partial_ptr, partial_lse_ptr, starts_ptr, items_ptr, ranges_ptr,
    heads, num_queries, scale_log2,
    HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    q_tiles = gl.allocate_shared_memory(q.dtype, [2, 1, 1, ROWS, HEAD_DIM], q.layout)
    k_tiles = gl.allocate_shared_memory(k.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], k.layout)
    v_tiles = gl.allocate_shared_memory(v.dtype, [STAGES, 1, 1, BLOCK_N, HEAD_DIM], v.layout)
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    q_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for part in gl.static_range(2):
        mbarrier.init(q_full.index(part), count=1)
        mbarrier.init(q_empty.index(part), count=1)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        # Both compute warpgroups release a stage.
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()
    # The other warps start behind this, so they have waited too.
    gdc_launch_dependents()
    gdc_wait()

    tiles = (q_tiles, k_tiles, v_tiles, q_full, q_empty, k_full, k_empty, v_full, v_empty)
    tables = (starts_ptr, items_ptr, ranges_ptr)
    results = (out_ptr, lse_ptr, partial_ptr, partial_lse_ptr)
    gl.warp_specialize(
        [
            (_attend, (0, tiles, results, tables, heads, num_queries, scale_log2, HEAD_DIM, BLOCK_N, STAGES)),
            (_attend, (1, tiles, results, tables, heads, num_queries, scale_log2, HEAD_DIM, BLOCK_N, STAGES)),
            (_load_tiles, (q, k, v, tiles, tables, heads, HEAD_DIM, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )


def suits(q: Tensor, k: Tensor, v: Tensor, runs: Runs, config: AttentionConfig) -> bool:
    """True if the kernel can take these arguments.

    The block that ends a range reaches back into it, so a range must hold a block, or start at key 0: rows before that
    read as zero.
    """
    long_enough = all(b - a >= config.block_n or a == 0 for _, _, ranges in runs for a, b in ranges)
    fits = q.itemsize == config.itemsize and q.shape[3] == config.head_dim
    return long_enough and fits and all(map(describable, (q, k, v)))


def launch_gluon(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    flat: tuple[int, ...],
    phantom_keys: int,
    scale: float,
    config: AttentionConfig,
) -> tuple[Tensor, Tensor]:
    """`far_attention.launch_forward` with this kernel.

    Raises:
        ValueError: if the arguments do not suit it.
    """
    if not suits(q, k, v, decode(flat), config):
        raise ValueError(
            f"q, k, v, plan: expected head_dim {config.head_dim}, TMA strides, ranges >= {config.block_n} keys"
        )
    _, num_queries, heads, head_dim = q.shape

    def launch(programs: int, *memory: Tensor) -> None:
        _far_attention_gluon_kernel[(programs,)](
            _describe(q, ROWS.value),
            _describe(k, config.block_n),
            _describe(v, config.block_n),
            *memory,
            heads,
            num_queries,
            scale / LN2.value,
            HEAD_DIM=head_dim,
            BLOCK_N=config.block_n,
            STAGES=config.num_stages,
            num_warps=config.num_warps,
            launch_pdl=True,
        )

    return scheduled(q, flat, phantom_keys, config, launch)


def _layout() -> Any:
    """Shared memory of a tile (1, 1, rows, channels) of 2-byte elements, as wgmma reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def _describe(x: Tensor, rows: int) -> TensorDescriptor:
    """`attention_tiles.describe` with the layout that Gluon wants said."""
    batch, length, heads, head_dim = x.shape
    stride_b, stride_l, stride_h = row_strides(x)
    shape, steps = [batch, heads, length, head_dim], [stride_b, stride_h, stride_l, 1]
    return TensorDescriptor(x, shape, steps, [1, 1, rows, head_dim], _layout())


def aot_cases(arch: int) -> list[AotCase]:
    if arch != 90:
        return []
    return [
        _case(row, f"{name} bf16 d128" if row.head_dim == 128 else f"bf16 d{row.head_dim}")
        for row in rows_for(launch_configs.ATTENTION_GLUON, arch)
        for name in (MODELS if row.head_dim == 128 else [""])
    ]


def _case(config: AttentionConfig, shape: str) -> AotCase:
    constexprs = {"HEAD_DIM": config.head_dim, "BLOCK_N": config.block_n, "STAGES": config.num_stages}
    rows = {"q": ROWS.value, "k": config.block_n, "v": config.block_n}
    arguments = {name: f"tensordesc<bf16[1,1,{n},{config.head_dim}],{_layout()!r}>" for name, n in rows.items()}
    arguments["out_ptr"] = "*bf16"
    arguments |= dict.fromkeys(("lse_ptr", "partial_ptr", "partial_lse_ptr"), "*fp32")
    arguments |= dict.fromkeys(("starts_ptr", "items_ptr", "ranges_ptr"), "*i32")
    arguments |= {"heads": "i32", "num_queries": "i32", "scale_log2": "fp32"}
    return AotCase(
        _far_attention_gluon_kernel,
        shape,
        arguments,
        constexprs,
        config.num_warps,
        config.num_stages,
        tensor_cores=True,
        requires="HGMMA",
        products=2 * 2 * ROWS.value * config.block_n * config.head_dim,
        loaded=2 * config.block_n * config.head_dim * 2,
        per_multiprocessor=1,
        options={"launch_pdl": True},
    )
