"""Who computes which tile: an `AttentionPlan` turned into tables of int32 for a persistent grid.

Forward and dq loop over the keys of a query tile, dk and dv over the queries of a key tile; both are a *tile* (rows of
one head) with at most a few *ranges* (columns to loop over). Tiles never straddle a segment, so a range is visible to
all of a tile or to none and needs no mask but at its ragged end. Built once per plan, shape and device, on the CPU,
and cached.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ..launch_tables import read_by_launches, to_device

Ranges = tuple[tuple[int, int], ...]
Runs = tuple[tuple[int, int, Ranges], ...]

# Columns of Schedule.items, and how many there are; Schedule.merges has the first four and SLOTS.
HEAD, START, END, SLOT, PHANTOM_KEYS, FIRST_RANGE, RANGES, ITEM = map(tl.constexpr, range(8))
SLOTS, MERGE = tl.constexpr(4), tl.constexpr(5)
RUN = 7  # integers of a run in `encode`: its end and three ranges
MIN_PIECE = 2  # key blocks: a shorter piece costs more in its prologue and its partial result than it evens out


class Schedule(NamedTuple):
    """Tables of one launch, int32 on its device.

    starts: (programs + 1,); program p computes items starts[p] to starts[p + 1].
    items: (n, ITEM): batch * heads + head, first row, end row, slot of the partial result or -1, phantom keys, first
        range and number of ranges.
    ranges: (n, 2): first column, end column.
    merges: (n, MERGE): batch * heads + head, first row, end row, first slot, slots.
    slots: partial results in all, 0 if no tile is split.
    """

    starts: Tensor
    items: Tensor
    ranges: Tensor
    merges: Tensor
    slots: int

    @property
    def programs(self) -> int:
        return self.starts.numel() - 1


class _Tile(NamedTuple):
    start: int
    end: int
    ranges: Ranges
    blocks: int


class _Piece(NamedTuple):
    """Blocks `first` to `last` of a tile's ranges, for one head."""

    head: int
    tile: _Tile
    first: int
    last: int


def encode(runs: Runs) -> list[int]:
    """Runs as a flat list of RUN ints each, as they pass through a torch operator; unused ranges are (0, 0)."""
    flat = []
    for _, end, ranges in runs:
        flat.append(end)
        for a, b in ranges:
            flat += (a, b)
        flat += (0, 0) * (3 - len(ranges))
    return flat


def decode(flat: Sequence[int]) -> Runs:
    """The inverse of `encode`."""
    runs, start = [], 0
    for i in range(0, len(flat), RUN):
        end, *bounds = flat[i : i + RUN]
        ranges = tuple((bounds[j], bounds[j + 1]) for j in (0, 2, 4) if bounds[j + 1] > bounds[j])
        runs.append((start, end, ranges))
        start = end
    return tuple(runs)


def transpose(runs: Runs, num_keys: int) -> Runs:
    """Per run of keys the ranges of queries that see it. Keys that no query sees form runs without ranges."""
    cuts = sorted({0, num_keys, *(bound for _, _, ranges in runs for key_range in ranges for bound in key_range)})
    result: list[tuple[int, int, Ranges]] = []
    for k_start, k_end in pairwise(cuts):
        seen_by: list[tuple[int, int]] = []
        for q_start, q_end, ranges in runs:
            if any(a <= k_start and k_end <= b for a, b in ranges):
                if seen_by and seen_by[-1][1] == q_start:
                    seen_by[-1] = (seen_by[-1][0], q_end)
                else:
                    seen_by.append((q_start, q_end))
        if result and result[-1][2] == tuple(seen_by):
            result[-1] = (result[-1][0], k_end, result[-1][2])
        else:
            result.append((k_start, k_end, tuple(seen_by)))
    return tuple(result)


@read_by_launches
@lru_cache(maxsize=512)
def query_schedule(
    flat: tuple[int, ...],
    heads: int,
    block_rows: int,
    block_columns: int,
    programs: int,
    split_cost: int | None,
    phantom_keys: int,
    device: torch.device,
) -> Schedule:
    """Tiles of queries with their key ranges.

    Args:
        flat: `encode(plan.ranges)`.
        heads: batch * heads.
        programs: size of the grid: the blocks the GPU holds at once.
        split_cost: blocks of the longest program that splitting keys must save to pay for the merge; None: no splits.
    """
    return _build(decode(flat), heads, block_rows, block_columns, programs, split_cost, phantom_keys, device)


@read_by_launches
@lru_cache(maxsize=512)
def key_schedule(
    flat: tuple[int, ...],
    num_keys: int,
    heads: int,
    block_rows: int,
    block_columns: int,
    device: torch.device,
) -> Schedule:
    """Tiles of keys with the query ranges that see them, one per program, longest first; see `query_schedule`."""
    runs = transpose(decode(flat), num_keys)
    return _build(runs, heads, block_rows, block_columns, heads * (num_keys + len(runs)), None, 0, device)


def _build(
    runs: Runs,
    heads: int,
    block_rows: int,
    block_columns: int,
    programs: int,
    split_cost: int | None,
    phantom_keys: int,
    device: torch.device,
) -> Schedule:
    tiles = [
        _Tile(row, min(row + block_rows, end), ranges, sum(-(-(b - a) // block_columns) for a, b in ranges))
        for start, end, ranges in runs
        for row in range(start, end, block_rows)
    ]
    whole = [_Piece(head, tile, 0, tile.blocks) for head in range(heads) for tile in tiles]
    # The sort is stable: equal tiles of a head stay together.
    bins, _ = _listed(sorted(whole, key=_cost, reverse=True), min(programs, len(whole)))
    if split_cost is not None:
        waves = _waves(whole, programs)
        if _makespan(bins) - _makespan(waves) >= max(split_cost, 1):
            bins = waves
    return _tabulate(bins, block_columns, phantom_keys, device)


def _cost(piece: _Piece) -> int:
    """In blocks: a tile, or a piece of one, costs about one beside its loop."""
    return piece.last - piece.first + 1


def _makespan(bins: list[list[_Piece]]) -> int:
    return max(sum(map(_cost, pieces)) for pieces in bins)


def _listed(pieces: list[_Piece], programs: int, bound: float = math.inf) -> tuple[list[list[_Piece]], list[_Piece]]:
    """Each piece in turn to the program with the least work; what would exceed `bound` there is left over. Programs
    running at the same time take neighbours of the list: tiles of one head, whose keys all read from L2."""
    bins: list[list[_Piece]] = [[] for _ in range(programs)]
    heap = [(0, program) for program in range(programs)]
    left = []
    for piece in pieces:
        load, program = heap[0]
        if load + _cost(piece) > bound:
            left.append(piece)
        else:
            bins[program].append(piece)
            heapq.heapreplace(heap, (load + _cost(piece), program))
    return bins, left


def _waves(whole: list[_Piece], programs: int) -> list[list[_Piece]]:
    """Whole tiles head by head; those of the last, incomplete wave are cut along their keys to fill what the programs
    have left. Cutting all tiles into equal shares (stream-K) takes as long, but has all heads in flight, each program
    at its own place in the keys: far more than the L2 holds."""
    bound = max(MIN_PIECE + 1, -(-sum(map(_cost, whole)) // programs))
    while (bins := _within(whole, programs, bound)) is None:
        bound += 1
    return [pieces for pieces in bins if pieces]


def _within(whole: list[_Piece], programs: int, bound: int) -> list[list[_Piece]] | None:
    """Bins that cost at most `bound` each, or None if this fails. Successive programs take the pieces of a tile."""
    bins, left = _listed(whole, programs, bound)
    room = [bound - sum(map(_cost, pieces)) - 1 for pieces in bins]  # blocks of the next piece
    program = 0
    for head, tile, first, last in left:
        while first < last:
            if program == programs:
                return None
            blocks = min(last - first, room[program])
            if blocks < last - first:  # a cut: no side under MIN_PIECE
                blocks = min(blocks, last - first - MIN_PIECE)
                if blocks < MIN_PIECE:
                    program += 1
                    continue
            bins[program].append(_Piece(head, tile, first, first + blocks))
            room[program] -= blocks + 1
            first += blocks
    return bins


def _tabulate(bins: list[list[_Piece]], block_columns: int, phantom_keys: int, device: torch.device) -> Schedule:
    starts, items, merges = [0], [], []
    ranges: dict[Ranges, int] = {}
    range_rows: list[tuple[int, int]] = []
    slots = 0
    for pieces in bins:
        for head, tile, first, last in pieces:
            visible = _clip(tile.ranges, first, last, block_columns)
            if visible not in ranges:
                ranges[visible] = len(range_rows)
                range_rows += visible
            slot = -1
            if (first, last) != (0, tile.blocks):
                slot = slots
                slots += 1
                if first == 0:
                    merges.append([head, tile.start, tile.end, slot, 0])
                merges[-1][SLOTS.value] += 1
            phantom = phantom_keys if first == 0 else 0
            items.append((head, tile.start, tile.end, slot, phantom, ranges[visible], len(visible)))
        starts.append(len(items))

    def table(rows: Sequence[Sequence[int]], columns: int) -> Tensor:
        return to_device(torch.tensor(rows, dtype=torch.int32).reshape(-1, columns), device)

    return Schedule(
        to_device(torch.tensor(starts, dtype=torch.int32), device),
        table(items, ITEM.value),
        table(range_rows, 2),
        table(merges, MERGE.value),
        slots,
    )


def _clip(ranges: Ranges, first: int, last: int, block: int) -> Ranges:
    """The part of the ranges that blocks `first` to `last` cover, blocks counted through all ranges."""
    result, offset = [], 0
    for start, end in ranges:
        blocks = -(-(end - start) // block)
        low, high = max(first - offset, 0), min(last - offset, blocks)
        if low < high:
            result.append((start + low * block, min(end, start + high * block)))
        offset += blocks
    return tuple(result)
