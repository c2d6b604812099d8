"""What the order of tiles costs: bytes from DRAM by the L2 model, and the longest program, at the released sizes."""

import random
from itertools import pairwise

import pytest
import torch

from anyflow_kernels import AttentionPlan, FarLayout
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.triton_ops.tile_schedule import MIN_PIECE, Schedule, encode, key_schedule, query_schedule
from emulator.l2_model import dram_bytes

PARTITION = (1, 3, 3, 3, 3, 3, 3, 2)
KEY_BYTES = 2 * 128 * 2  # a key and its value: 128 channels in bf16
L2 = 45e6  # of the 50 MB of an H100 (NVIDIA's H100 white paper, "L2 cache"); the rest holds queries and results
CPU = torch.device("cpu")
LAYOUTS = {
    **{f"chunk {i}": FarLayout(PARTITION[: i + 1], 60, 104, mode="inference") for i in range(8)},
    "prefill after chunk 6": FarLayout(PARTITION[:7], 60, 104, mode="prefill", cached=4),
    "bidirectional": FarLayout((21,), 60, 104),
    "training": FarLayout(PARTITION, 60, 104),
    "training, clean copy": FarLayout(PARTITION, 60, 104, clean=True),
}


def flat(layout: FarLayout) -> tuple[int, ...]:
    return tuple(encode(AttentionPlan.from_layout(layout).ranges))


def longest_program(schedule: Schedule, block: int) -> int:
    """In blocks; a tile or piece costs one more for what it does beside its loop."""
    starts, items, ranges = (t.tolist() for t in (schedule.starts, schedule.items, schedule.ranges))
    costs = [1 + sum(-(-(b - a) // block) for a, b in ranges[i[5] : i[5] + i[6]]) for i in items]
    return max(sum(costs[first:last]) for first, last in pairwise(starts))


def longest_share(schedule: Schedule, block: int, programs: int) -> int:
    """The longest program if all blocks of whole tiles lay in a row and were cut into equal shares (stream-K)."""
    ranges, edges = schedule.ranges.tolist(), [0]
    for *_, first, number in schedule.items.tolist():
        edges.append(edges[-1] + sum(-(-(b - a) // block) for a, b in ranges[first : first + number]))
    bounds = [edges[-1] * p // programs for p in range(programs + 1)]
    return max(b - a + 1 + sum(a < edge < b for edge in edges) for a, b in pairwise(bounds))


@pytest.mark.parametrize(
    "model, layout, most",
    [
        ("1.3B", "chunk 6", 0.3e9),
        ("14B", "chunk 6", 0.8e9),
        ("1.3B", "prefill after chunk 6", 0.3e9),
        ("14B", "prefill after chunk 6", 0.8e9),
        ("1.3B", "bidirectional", 0.3e9),
    ],
)
def test_keys_come_from_the_l2(model, layout, most):
    """A layer's forward on an H100. Equal shares of all tiles read 3.7, 13.4, 1.9, 16.7 and 44.8 GB in this model.

    Lines of a whole block, four times coarser than ranges can tell apart, see what exact ones see.
    """
    heads, plan = MODELS[model]["heads"], AttentionPlan.from_layout(LAYOUTS[layout])
    schedule = query_schedule(flat(LAYOUTS[layout]), heads, 128, 128, 132, 4, 0, CPU)
    assert schedule.slots, "the last wave is cut"
    read = dram_bytes(schedule, 128, KEY_BYTES, L2, line=128)
    assert heads * plan.num_keys * KEY_BYTES <= read < most
    if (model, layout) == ("1.3B", "chunk 6"):
        assert dram_bytes(schedule, 128, KEY_BYTES, L2, line=16) == pytest.approx(read, rel=0.02)


def test_the_model_tells_a_bad_order():
    """Every second program walks its tiles backwards: as many heads again in flight."""
    schedule = query_schedule(flat(LAYOUTS["chunk 6"]), 40, 128, 128, 132, 4, 0, CPU)
    items, starts = schedule.items.clone(), schedule.starts.tolist()
    for first, last in list(pairwise(starts))[::2]:
        items[first:last] = items[first:last].flip(0)
    assert dram_bytes(schedule._replace(items=items), 128, KEY_BYTES, L2, line=128) > 0.8e9


def test_the_backward_feeds_the_l2_too():
    """Longest first, nothing cut: more heads in flight, but under a tenth of what the DRAM delivers."""
    plan, runs = AttentionPlan.from_layout(LAYOUTS["training, clean copy"]), flat(LAYOUTS["training, clean copy"])
    by_query = query_schedule(runs, 12, 128, 64, 132, None, 0, CPU)
    assert dram_bytes(by_query, 64, KEY_BYTES, L2, line=64) < 0.6e9
    by_key = key_schedule(runs, plan.num_keys, 12, 128, 64, CPU)
    assert dram_bytes(by_key, 64, KEY_BYTES, L2, resident=132, line=64) < 1.2e9


def random_runs(chance: random.Random):
    runs, start, keys = [], 0, chance.randint(6, 300)
    for _ in range(chance.randint(1, 5)):
        end = start + chance.randint(1, 90)
        bounds = sorted(chance.sample(range(keys + 1), 2 * chance.randint(1, 3)))
        runs.append((start, end, tuple(zip(bounds[::2], bounds[1::2], strict=True))))
        start = end
    return tuple(runs)


def check_longest(runs: tuple[int, ...], heads: int, block: int, programs: int) -> None:
    whole, cut = (query_schedule(runs, heads, max(32, block), block, programs, c, 0, CPU) for c in (None, 0))
    shortest = min(longest_program(whole, block), longest_share(whole, block, programs))
    assert longest_program(cut, block) <= shortest + MIN_PIECE  # which equal shares here do not keep
    assert cut.slots <= 2 * programs + len(cut.merges)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_longer_than_whole_tiles_or_equal_shares(layout):
    inference = LAYOUTS[layout].mode == "inference"
    for programs in (108, 132, 142, 148, 188, 264) if inference else (132, 188):
        for heads in (12, 40) if inference else (12,):
            check_longest(flat(LAYOUTS[layout]), heads, 128, programs)


@pytest.mark.parametrize("programs", [1, 2, 3, 7, 40])
def test_toys_are_no_longer_either(programs):
    for seed in range(60):
        chance = random.Random(seed)
        check_longest(tuple(encode(random_runs(chance))), chance.randint(1, 12), 16, programs)
