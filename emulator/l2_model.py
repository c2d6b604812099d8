"""DRAM traffic of a tile schedule: an LRU model of the L2.

Every program reads one block of its tile's ranges per step. The programs on the chip go in lockstep; with probability
`jitter` one rests for a step, in random order, so that they drift as independent walks. A line that the L2 does not
hold is read from DRAM and takes the place of the line not used for the longest. Not modelled: sets, slices, the two
halves of a data-centre L2, reads that meet a line still in flight, and the rows a tile owns and writes, each of which
passes once under any schedule.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from anyflow_kernels.triton_ops.tile_schedule import FIRST_RANGE, HEAD, RANGES, Schedule

Line = Hashable
Step = Sequence[Line]  # the lines a program reads at a time; none: a step spent elsewhere


class Traffic(NamedTuple):
    """Lines read from DRAM, lines read in all, and steps until the last program ended."""

    missed: int
    read: int
    steps: int


def lru_traffic(programs: Iterable[Iterable[Step]], capacity: int, jitter: float = 0.1, seed: int = 0) -> Traffic:
    """Run programs, all at the same time, over an L2 of `capacity` lines.

    Raises:
        ValueError: if capacity or jitter is out of range.
    """
    if capacity < 1:
        raise ValueError(f"capacity: got {capacity} lines, expected >= 1")
    if not 0 <= jitter < 1:
        raise ValueError(f"jitter: got {jitter}, expected 0 <= jitter < 1")
    chance = random.Random(seed)
    held: OrderedDict[Line, None] = OrderedDict()
    missed = read = steps = 0
    running = [iter(program) for program in programs]
    while running:
        chance.shuffle(running)
        still = []
        for program in running:
            if jitter and chance.random() < jitter:
                still.append(program)
                continue
            step = next(program, None)
            if step is None:
                continue
            still.append(program)
            read += len(step)
            for line in step:
                if line in held:
                    held.move_to_end(line)
                    continue
                missed += 1
                held[line] = None
                if len(held) > capacity:
                    held.popitem(last=False)
        steps += bool(still)
        running = still
    return Traffic(missed, read, steps)


def persistent(schedule: Schedule, block: int, line: int) -> list[Iterator[Step]]:
    """The steps of every program of a schedule: blocks of `block` columns as lines of `line` columns."""
    items, ranges, starts = (table.tolist() for table in (schedule.items, schedule.ranges, schedule.starts))
    return [_steps(iter(items[first:last]), ranges, block, line) for first, last in pairwise(starts)]


def one_per_program(schedule: Schedule, resident: int, block: int, line: int) -> list[Iterator[Step]]:
    """The steps of a grid of one item per program, in order, of which `resident` fit the chip at a time."""
    items, ranges = schedule.items.tolist(), schedule.ranges.tolist()
    queue = iter(items)  # shared: whoever is free takes the next
    return [_steps(queue, ranges, block, line) for _ in range(min(resident, len(items)))]


def _steps(items: Iterator[list[int]], ranges: list[list[int]], block: int, line: int) -> Iterator[Step]:
    for item in items:
        head, first = item[HEAD.value], item[FIRST_RANGE.value]
        for start, end in ranges[first : first + item[RANGES.value]]:
            for column in range(start, end, block):
                yield [(head, i) for i in range(column // line, -(-min(column + block, end) // line))]
        yield ()  # its result


def dram_bytes(
    schedule: Schedule,
    block: int,
    column_bytes: int,
    capacity_bytes: float,
    resident: int | None = None,
    line: int | None = None,
    jitter: float = 0.1,
    seed: int = 0,
) -> int:
    """Bytes of columns (keys and values; in dk dv queries and gradients) that a launch reads from DRAM.

    Args:
        block: columns of a step.
        column_bytes: of one column of one head.
        capacity_bytes: what the L2 keeps for them.
        resident: programs on the chip at a time, if each program is one item in order of the grid; None: the
            schedule's own persistent programs.
        line: columns per line of the model, a quarter of a block by default. Ranges that start off a block share
            lines only if these are finer than blocks.
    """
    line = line or max(1, block // 4)
    capacity = int(capacity_bytes // (line * column_bytes))
    if resident is None:
        programs = persistent(schedule, block, line)
    else:
        programs = one_per_program(schedule, resident, block, line)
    return lru_traffic(programs, capacity, jitter, seed).missed * line * column_bytes
