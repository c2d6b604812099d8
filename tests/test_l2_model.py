"""The L2 model against traces that a hand can follow."""

import pytest
import torch

from anyflow_kernels import AttentionPlan
from anyflow_kernels.triton_ops.tile_schedule import encode, query_schedule
from emulator.l2_model import dram_bytes, lru_traffic, one_per_program, persistent


def trace(lines: str) -> list[str]:
    """One line a step."""
    return list(lines)


@pytest.mark.parametrize(
    "lines, capacity, missed",
    [
        ("ABAB", 2, 2),
        ("ABAB", 1, 4),
        ("ABACAB", 2, 4),  # B leaves for C, C for B: A was used in between
        ("ABCABC", 2, 6),  # a cycle longer than the cache never hits
        ("AAAA", 1, 1),
    ],
)
def test_one_program_by_hand(lines, capacity, missed):
    assert lru_traffic([trace(lines)], capacity, jitter=0) == (missed, len(lines), len(lines))


def test_programs_in_lockstep_share_what_one_reads():
    cycle = "ABCDEFGH"
    assert lru_traffic([trace(cycle)] * 5, 1, jitter=0) == (8, 40, 8)
    # Half a cycle apart each finds what the other read four steps, eight lines, ago only if those fit.
    apart = [trace(cycle * 2), trace((cycle[4:] + cycle[:4]) * 2)]
    assert lru_traffic(apart, 8, jitter=0).missed == 8
    assert lru_traffic(apart, 6, jitter=0).missed == 32


def test_steps_may_read_several_lines_or_none():
    assert lru_traffic([["AB", "", "BC"], ["", "D"]], 4, jitter=0) == (4, 5, 3)


def test_jitter_costs_time_and_reads_the_same():
    programs = [trace("ABCDEFGH" * 4)] * 6
    still, drifting = (lru_traffic(programs, 2, jitter, seed=3) for jitter in (0, 0.3))
    assert drifting.read == still.read
    assert drifting.steps > still.steps and drifting.missed > still.missed
    assert drifting == lru_traffic(programs, 2, 0.3, seed=3)


@pytest.mark.parametrize("options, name", [({"capacity": 0}, "capacity"), ({"capacity": 1, "jitter": 1.0}, "jitter")])
def test_refuses_what_has_no_meaning(options, name):
    with pytest.raises(ValueError, match=name):
        lru_traffic([trace("A")], **options)


def two_runs():
    """One head, tiles of 4 queries, blocks of 8 keys: a tile on keys 0-20, two on keys 6-14."""
    runs = ((0, 4, ((0, 20),)), (4, 12, ((6, 14),)))
    return query_schedule(tuple(encode(runs)), 1, 4, 8, 2, None, 0, torch.device("cpu"))


def test_steps_of_a_schedule():
    """Lines of 4 keys. A step reads all lines its block touches; a tile ends in a step without reads."""

    def lines(*numbers):
        return [(0, n) for n in numbers]

    long = [lines(0, 1), lines(2, 3), lines(4), ()]
    short = [lines(1, 2, 3), ()]
    assert [list(p) for p in persistent(two_runs(), 8, 4)] == [long, short * 2]
    first, second = one_per_program(two_runs(), 2, 8, 4)
    assert [next(first) for _ in long] == long
    assert list(second) == short * 2, "the first is done, the second takes what is left"
    assert next(first, None) is None


def test_a_large_cache_reads_every_key_once():
    plan = AttentionPlan.dense(500, 300)
    schedule = query_schedule(tuple(encode(plan.ranges)), 3, 16, 32, 7, 0, 0, torch.device("cpu"))
    assert dram_bytes(schedule, 32, 64, 1e9, line=4) == 3 * 300 * 64
    assert dram_bytes(schedule, 32, 64, 64 * 64, line=4) > 20 * 3 * 300 * 64, "two blocks of keys: all read again"
