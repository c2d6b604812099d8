"""Seconds of the attention kernels on a GPU by the models of this project: a model's bound, not a measurement.

The longest program of the tile schedule, its blocks at the share of the tensor cores' peak of the pipe model for
the inner loop as compiled for the row that a launch would take. Clocks are the data sheet's boost clocks.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
import triton

from anyflow_kernels import AttentionPlan, launch_configs
from anyflow_kernels.aot import compile_case
from anyflow_kernels.launch_configs import AttentionConfig, attention_row
from anyflow_kernels.launch_configs.tuned import Key
from anyflow_kernels.pipe_model import Chip
from anyflow_kernels.triton_ops import far_attention_backward, tile_schedule
from anyflow_kernels.triton_ops import far_attention_gluon as gluon
from anyflow_kernels.triton_ops.far_attention import _far_attention_forward_kernel
from anyflow_kernels.triton_ops.far_attention_cases import attention_case

KERNELS = {
    "forward": _far_attention_forward_kernel,
    "dq": far_attention_backward._far_attention_dq_kernel,
    "dkdv": far_attention_backward._far_attention_dkdv_kernel,
}
CPU = torch.device("cpu")


def compiles_here() -> bool:
    """Whether kernels can be compiled in this process: not if they were imported for the interpreter."""
    return isinstance(_far_attention_forward_kernel, triton.JITFunction)


@cache
def pipe_row(kind: str, fields: tuple[tuple[str, Any], ...], chip: Chip, head_dim: int) -> tuple[dict[str, Any], int]:
    """The pipe model of a compiled attention kernel, and how many of its blocks share a multiprocessor. `fields` are
    those of its row, by name."""
    config = AttentionConfig(**dict(fields))  # the row of an older commit is another class
    if kind == "gluon":
        case = next(c for c in gluon.aot_cases(chip.arch) if c.constexprs["HEAD_DIM"] == config.head_dim)
    else:
        case = attention_case(KERNELS[kind], config, "", head_dim)
    row = compile_case(case, chip.arch, chip)
    if "model" not in row:
        raise RuntimeError(f"{case.name} on {chip.name}: {'; '.join(row['problems'])}")
    blocks = row["blocks_per_multiprocessor"]
    return row["model"], min(blocks, case.per_multiprocessor or blocks)


def block_seconds(kind: str, row: Any, chip: Chip, head_dim: int, share: str) -> tuple[float, int]:
    """Seconds of one iteration of a program beside as many others as fit, and how many programs fit the card.

    `share` of the tensor cores' peak: the model's "bound", all pipes overlapped, or what is "expected".
    """
    model, blocks = pipe_row(kind, tuple(vars(row).items()), chip, head_dim)
    cycles = model["cycles"]["tensor"] / model["redundancy"] / model[share]
    return blocks * cycles / (chip.clock_ghz * 1e9), blocks * chip.multiprocessors


def costs(schedule: Any, block: int) -> list[int]:
    """Of each item, in blocks of `block` columns; what it does beside its loop counts as one."""
    ranges = schedule.ranges.tolist()
    return [
        1 + sum(-(-(b - a) // block) for a, b in ranges[first : first + number])
        for *_, first, number in schedule.items.tolist()
    ]


def longest_program(schedule: Any, block: int) -> int:
    """Of a persistent grid, in blocks."""
    items = costs(schedule, block)
    return max(sum(items[first:last]) for first, last in pairwise(schedule.starts.tolist()))


def listed(items: Sequence[int], resident: int) -> int:
    """The end of the last of these items if whichever of `resident` programs is free takes the next."""
    loads = [0] * resident
    for cost in items:
        heapq.heapreplace(loads, loads[0] + cost)
    return max(loads)


def forward_seconds(
    kind: str,
    row: Any,
    schedule_of: Any,
    chip: Chip,
    plan: AttentionPlan,
    heads: int,
    head_dim: int,
    share: str = "expected",
) -> tuple[float, Any]:
    """The longest program of a forward, and the schedule; `schedule_of` is `tile_schedule` or an older commit's."""
    seconds, _ = block_seconds(kind, row, chip, head_dim, share)
    sizes = (heads, row.block_m, row.block_n, chip.multiprocessors * row.per_multiprocessor, row.split_cost)
    schedule = schedule_of.query_schedule(tuple(schedule_of.encode(plan.ranges)), *sizes, 0, CPU)
    return seconds * longest_program(schedule, row.block_n), schedule


def attention_bound(
    kind: str, chip: Chip, plan: AttentionPlan, heads: int, head_dim: int, dtype: torch.dtype, backward: bool = False
) -> float:
    """No less by the model: a forward by a kernel of ours, "triton" or "gluon"; with `backward` also dq, dk and dv."""

    def row(table: tuple[AttentionConfig, ...], operation: str, shape: str = "") -> AttentionConfig:
        """As a launch chooses it: what won on this machine, if there is a GPU and `anyflow tune` was run."""
        key = Key(operation, dtype, head_dim, shape) if torch.cuda.is_available() else None
        return attention_row(table, chip.arch, head_dim, dtype.itemsize, key=key)

    flat = tuple(tile_schedule.encode(plan.ranges))
    if kind == "gluon":
        forward = next(r for r in launch_configs.ATTENTION_GLUON if r.arch == chip.arch and head_dim <= r.head_dim)
    else:
        shape = launch_configs.attention_shape(plan.ranges, plan.num_keys, plan.phantom_keys)
        kind, forward = "forward", row(launch_configs.ATTENTION_FORWARD, "far_attention", shape)
    total, _ = forward_seconds(kind, forward, tile_schedule, chip, plan, heads, head_dim, "bound")
    if not backward:
        return total
    dq = row(launch_configs.ATTENTION_DQ, "far_attention_dq")
    seconds, _ = block_seconds("dq", dq, chip, head_dim, "bound")
    sizes = (heads, dq.block_m, dq.block_n, chip.multiprocessors * dq.per_multiprocessor)
    total += seconds * longest_program(tile_schedule.query_schedule(flat, *sizes, None, 0, CPU), dq.block_n)
    dkdv = row(launch_configs.ATTENTION_DKDV, "far_attention_dkdv")
    seconds, resident = block_seconds("dkdv", dkdv, chip, head_dim, "bound")
    schedule = tile_schedule.key_schedule(flat, plan.num_keys, heads, dkdv.block_n, dkdv.block_m, CPU)
    return total + seconds * listed(costs(schedule, dkdv.block_m), resident)
