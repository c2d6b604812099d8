"""`far_attention` on the triton backend: kernels against float64 (reference backend), tables against dense masks."""

from __future__ import annotations

import importlib
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from anyflow_kernels import AttentionPlan, FarLayout, launch_configs
from anyflow_kernels.reference import far_mask, plan_mask
from anyflow_kernels.testing.budget import check, relative_error, widened
from anyflow_kernels.triton_ops.attention_tiles import describable
from anyflow_kernels.triton_ops.tile_schedule import (
    Schedule,
    decode,
    encode,
    key_schedule,
    query_schedule,
    transpose,
)

from .triton_checks import DEVICE, OPCHECKS, REFERENCE, TRITON, compare, count_compilations, poisoned_memory

forward = importlib.import_module("anyflow_kernels.triton_ops.far_attention")
backward = importlib.import_module("anyflow_kernels.triton_ops.far_attention_backward")

PARTITION = (1, 2, 2, 1)
LAYOUTS = {
    "train": FarLayout(PARTITION, 8, 12, full_chunk_limit=2),
    "clean": FarLayout(PARTITION, 8, 12, full_chunk_limit=2, clean=True),
    "prefill": FarLayout(PARTITION, 8, 12, mode="prefill"),
    "prefill, cached": FarLayout(PARTITION, 8, 12, mode="prefill", cached=1),
    "inference": FarLayout(PARTITION, 8, 12, mode="inference"),
}
PLANS = {name: AttentionPlan.from_layout(layout) for name, layout in LAYOUTS.items()}
GAPS = AttentionPlan(41, 90, ((0, 7, ((3, 9), (20, 21), (40, 73))), (7, 41, ((5, 38),))))  # keys that nobody sees


def inputs(plan: AttentionPlan, batch=1, heads=1, head_dim=16, dtype=torch.float32, grad=False) -> tuple:
    """q, k, v as strided slices: of one fused row where lengths agree, q alone of a wider row where not."""
    generator = torch.Generator().manual_seed(plan.num_queries + head_dim)

    def rows(length: int, parts: int) -> list[Tensor]:
        x = torch.randn(batch, length, parts, heads, head_dim, generator=generator).to(DEVICE, dtype)
        return [x.select(2, i).requires_grad_(grad) for i in range(parts)]

    if plan.num_queries == plan.num_keys:
        return *rows(plan.num_queries, 3), plan
    return rows(plan.num_queries, 2)[0], *rows(plan.num_keys, 2), plan


def configs(**changes: object) -> tuple[launch_configs.AttentionConfig, ...]:
    """The fp32 rows of this device for forward, dq, dkdv, with changes."""
    arch = launch_configs.architecture(DEVICE)
    tables = (launch_configs.ATTENTION_FORWARD, launch_configs.ATTENTION_DQ, launch_configs.ATTENTION_DKDV)
    rows = (launch_configs.attention_row(table, arch, 128, 4, descriptors=False) for table in tables)
    return tuple(replace(row, **changes) for row in rows)  # type: ignore[arg-type]


def oracle(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, seed: Tensor | None = None) -> list[Tensor]:
    """Output and lse in float64 and, with a seed, the gradients."""
    q, k, v = widened((q, k, v))
    out, lse = REFERENCE.far_attention(q, k, v, plan, return_lse=True)
    return [out, lse, *(torch.autograd.grad(out, (q, k, v), seed.double()) if seed is not None else ())]


@pytest.mark.parametrize("plan", [*PLANS.values(), GAPS], ids=[*PLANS, "gaps"])
def test_output_and_lse_within_budget(plan):
    with poisoned_memory():
        compare("far_attention", inputs(plan), {"return_lse": True})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["prefill, cached", "inference"])
def test_output_in_half_precision(name, dtype):
    compare("far_attention", inputs(PLANS[name], dtype=dtype), {"return_lse": True})


@pytest.mark.parametrize("plan", [PLANS["clean"], PLANS["prefill, cached"], GAPS], ids=["clean", "prefill", "gaps"])
def test_gradients_within_budget(plan):
    """Keys that no query sees get zero gradients, not whatever memory held."""
    with poisoned_memory():
        compare("far_attention", inputs(plan, grad=True), gradients=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_in_half_precision(dtype):
    compare("far_attention", inputs(GAPS, dtype=dtype, grad=True), gradients=True)


@pytest.mark.parametrize("head_dim", [12, 24, 44, 64, 128])
def test_head_dims(head_dim):
    """Channels beyond a head_dim that is no power of two belong to the next head."""
    plan = AttentionPlan.dense(33, 37)
    with poisoned_memory():
        compare("far_attention", inputs(plan, 2, 2, head_dim, grad=True), gradients=True)


def test_batch_and_heads():
    compare("far_attention", inputs(GAPS, batch=2, heads=3), {"return_lse": True, "scale": 0.4})


@pytest.mark.parametrize("queries, keys", [(1, 1), (1, 33), (33, 1), (32, 64)])
def test_smallest_and_exact_tiles(queries, keys):
    compare("far_attention", inputs(AttentionPlan.dense(queries, keys)), {"return_lse": True})


@pytest.mark.parametrize("plan", [AttentionPlan.dense(9, 200, 9), replace(GAPS, phantom_keys=3)], ids=["split", "gaps"])
def test_phantom_keys(plan):
    """As many zero keys and values in the reference; split keys must count them once."""
    with poisoned_memory():
        compare("far_attention", inputs(plan), {"return_lse": True})
    compare("far_attention", inputs(plan, grad=True), gradients=True)


@pytest.mark.parametrize("phantom_keys", [0, 5])
def test_split_keys_merge_to_the_same_result(phantom_keys):
    """Few queries and many keys: without the split one program would do all the work."""
    plan = AttentionPlan(20, 300, ((0, 9, ((0, 130), (140, 141), (150, 300))), (9, 20, ((30, 233),))), phantom_keys)
    q, k, v, _ = inputs(plan, batch=2)
    config = configs(split_cost=0)[0]
    flat = tuple(encode(plan.ranges))
    schedule = query_schedule(flat, 2, config.block_m, config.block_n, 3, 0, phantom_keys, torch.device(DEVICE))
    assert schedule.slots > schedule.merges.shape[0] > 0
    with poisoned_memory():
        got = forward.launch_forward(q, k, v, flat, phantom_keys, 0.25, config)
    for name, out, high in zip(("out", "lse"), got, oracle(q, k, v, plan), strict=True):
        low = REFERENCE.far_attention(q, k, v, plan, return_lse=True)[name == "lse"]
        check(name, out, low, high)


@pytest.mark.parametrize("descriptors", [False, True], ids=["pointers", "descriptors"])
def test_slab_values_outside_the_ranges_are_never_used(descriptors):
    """k and v are views of NaN slabs; what the plan hides is NaN as well. One 0 * NaN would spoil a row."""
    plan = GAPS
    q, k, v, _ = inputs(plan, batch=2, heads=2)
    seen = plan_mask(plan).any(dim=0).to(DEVICE)
    slabs = [torch.full((2, 128, 2, 16), torch.nan, device=DEVICE) for _ in range(2)]
    for slab, x in zip(slabs, (k, v), strict=True):
        slab[:, 10 : 10 + plan.num_keys][:, seen] = x[:, seen]
    k_view, v_view = (slab[:, 10 : 10 + plan.num_keys] for slab in slabs)
    seed = torch.randn(q.shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    rows, flat = configs(descriptors=descriptors), tuple(encode(plan.ranges))
    with poisoned_memory():
        out, lse = forward.launch_forward(q, k_view, v_view, flat, 0, 0.25, rows[0])
        grads = backward.launch_backward(seed, q, k_view, v_view, out, lse, flat, 0.25, *rows[1:])
    high = oracle(*(x.requires_grad_() for x in (q, k, v)), plan, seed)
    for name, got, expected in zip(("out", "lse", "dq", "dk", "dv"), (out, lse, *grads), high, strict=True):
        assert relative_error(got, expected) < 2e-6, name


def test_descriptors_only_where_tma_can_address():
    """TMA wants 16-byte aligned bases and strides; anything else must take the pointer kernel."""
    x = torch.zeros(1, 8, 2, 24, dtype=torch.bfloat16)
    assert describable(x)
    assert not describable(torch.zeros(1, 8, 2, 12, dtype=torch.bfloat16))  # 24 bytes from head to head
    assert not describable(x[..., 1:9])  # base off by 2 bytes
    assert not describable(x[:1].expand(2, 8, 2, 24))  # the same batch twice


def test_gradient_of_a_sum():
    """Its output gradient is one element with strides of zero."""
    q, k, v, plan = inputs(GAPS, grad=True)
    got = torch.autograd.grad(TRITON.far_attention(q, k, v, plan).sum(), (q, k, v))
    expected = torch.autograd.grad(REFERENCE.far_attention(q, k, v, plan).sum(), (q, k, v))
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 2e-6


def test_lse_has_no_gradient():
    q, k, v, plan = inputs(GAPS, grad=True)
    out, lse = TRITON.far_attention(q, k, v, plan, return_lse=True)
    assert out.requires_grad and not lse.requires_grad


def test_no_queries():
    q, k, v, plan = inputs(AttentionPlan(0, 5, ()), grad=True)
    out = TRITON.far_attention(q, k, v, plan)
    assert out.shape == (1, 0, 1, 16)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_rejects_what_the_kernel_cannot_do():
    q, k, v, plan = inputs(GAPS)
    with pytest.raises(ValueError, match="k: got strides"):
        TRITON.far_attention(q, torch.zeros(1, 90, 1, 32)[..., ::2], v, plan)
    with pytest.raises(ValueError, match="head_dim 144"):
        TRITON.far_attention(*(torch.zeros(1, n, 1, 144) for n in (41, 90, 90)), plan)
    with pytest.raises(ValueError, match="scale: got -1"):
        TRITON.far_attention(q, k, v, plan, scale=-1.0)


def test_opcheck():
    q, k, v, plan = inputs(PLANS["inference"], grad=True)
    flat = encode(plan.ranges)
    ops = torch.ops.anyflow
    torch.library.opcheck(ops.far_attention, (q, k, v, flat, 2, 0.25), test_utils=OPCHECKS)
    q, k, v = (x.detach() for x in (q, k, v))
    out, lse = ops.far_attention(q, k, v, flat, 2, 0.25)
    torch.library.opcheck(
        ops.far_attention_backward, (torch.randn_like(out), q, k, v, out, lse, flat, 0.25), test_utils=OPCHECKS
    )


def rollout(mode: str) -> list[tuple]:
    """The calls of a rollout of eight chunks, one per chunk; prefill encodes again what was full and newest before."""
    calls = []
    for n in range(1, 8):
        cached = max(0, n - 3) if mode == "prefill" else 0
        layout = FarLayout((1, 2, 2, 2, 2, 2, 2, 1)[:n], 4, 8, mode=mode, cached=cached)
        calls.append((*inputs(AttentionPlan.from_layout(layout)), 0.25, False))
    return calls


@pytest.mark.parametrize("mode, graphs", [("inference", 2), ("prefill", 4)])
def test_compiled_rollout_does_not_recompile_per_chunk(mode, graphs):
    """Seven chunks, seven lengths of queries, keys and ranges. A graph is made for the first, one when lengths turn
    out to change, and one per number of runs (1, 2 and 3 in an incremental prefill)."""
    assert count_compilations(forward.far_attention, rollout(mode)) <= graphs


def test_compiled_backward_matches_eager():
    def loss_gradients(q, k, v):
        return forward.far_attention(q, k, v, GAPS, 0.25, False).square().sum()

    q, k, v, _ = inputs(GAPS, grad=True)
    compiled = torch.compile(loss_gradients, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, v), (q, k, v))
    for a, b in zip(got, torch.autograd.grad(loss_gradients(q, k, v), (q, k, v)), strict=True):
        torch.testing.assert_close(a, b)


# Tables: integers only, so real sizes cost nothing.


def covered(schedule: Schedule, rows: int, columns: int, heads: int) -> Tensor:
    """How often each (head, row, column) is computed."""
    count = torch.zeros(heads, rows, columns, dtype=torch.int32)
    for head, start, end, _, _, first, n in schedule.items.tolist():
        for a, b in schedule.ranges[first : first + n].tolist():
            count[head, start:end, a:b] += 1
    return count


def random_plan(seed: int) -> AttentionPlan:
    generator = random.Random(seed)
    num_keys, runs, start = generator.randint(6, 300), [], 0
    for _ in range(generator.randint(1, 5)):
        end = start + generator.randint(1, 90)
        bounds = sorted(generator.sample(range(num_keys + 1), 2 * generator.randint(1, 3)))
        runs.append((start, end, tuple(zip(bounds[::2], bounds[1::2], strict=True))))
        start = end
    return AttentionPlan(start, num_keys, tuple(runs))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_masks_agree(layout):
    """The plan that the kernels loop over, and the mask built from every token's kind and chunk."""
    assert torch.equal(plan_mask(AttentionPlan.from_layout(layout)), far_mask(layout))


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("split_cost", [None, 0], ids=["whole", "split"])
def test_tables_compute_every_visible_pair_once(seed, split_cost):
    plan = random_plan(seed)
    flat, cpu = tuple(encode(plan.ranges)), torch.device("cpu")
    assert decode(flat) == plan.ranges
    mask = plan_mask(plan).int().expand(2, -1, -1)
    queries = query_schedule(flat, 2, 32, 16, 7, split_cost, 0, cpu)
    assert torch.equal(covered(queries, plan.num_queries, plan.num_keys, 2), mask)
    assert int(queries.merges[:, 4].sum()) == queries.slots == int((queries.items[:, 3] >= 0).sum())
    keys = key_schedule(flat, plan.num_keys, 2, 32, 16, cpu)
    assert torch.equal(covered(keys, plan.num_keys, plan.num_queries, 2), mask.transpose(1, 2))
    written = torch.zeros(2, plan.num_keys, dtype=torch.int32)
    for head, start, end, *_ in keys.items.tolist():
        written[head, start:end] += 1
    assert (written == 1).all(), "every key's gradient is written once, seen or not"


@pytest.mark.parametrize("seed", range(4))
def test_tiles_never_straddle_runs(seed):
    plan = random_plan(seed)
    schedule = query_schedule(tuple(encode(plan.ranges)), 1, 32, 16, 5, 0, 0, torch.device("cpu"))
    for _, start, end, *_ in schedule.items.tolist():
        assert any(a <= start < end <= b and end - start <= 32 for a, b, _ in plan.ranges)


def test_transposed_plan_is_the_transposed_mask():
    plan = PLANS["clean"]
    mask = torch.zeros(plan.num_keys, plan.num_queries, dtype=torch.bool)
    for start, end, ranges in transpose(plan.ranges, plan.num_keys):
        for a, b in ranges:
            mask[start:end, a:b] = True
    assert torch.equal(mask, plan_mask(plan).T)


@pytest.mark.parametrize("chunks, slack", [(1, 1.15), (2, 1.05), (7, 1.05)])
def test_a_chunk_fills_the_gpu(chunks, slack):
    """1.3B at 480p on 132 multiprocessors: whole tiles of a one-frame chunk (156) would keep half of it idle."""
    layout = FarLayout((1, 3, 3, 3, 3, 3, 3, 2)[:chunks], 60, 104, mode="inference")
    plan = AttentionPlan.from_layout(layout)
    schedule = query_schedule(tuple(encode(plan.ranges)), 12, 128, 128, 132, 4, 0, torch.device("cpu"))
    starts, items, ranges = (t.tolist() for t in (schedule.starts, schedule.items, schedule.ranges))
    work = [
        sum(-(-(b - a) // 128) for item in items[i:j] for a, b in ranges[item[5] : item[5] + item[6]])
        for i, j in pairwise(starts)
    ]
    assert len(work) == 132
    assert max(work) <= slack * sum(work) / 132


def test_longest_tiles_first():
    plan = PLANS["prefill"]
    schedule = key_schedule(tuple(encode(plan.ranges)), plan.num_keys, 2, 16, 16, torch.device("cpu"))
    ranges = schedule.ranges.tolist()
    work = [sum(-(-(b - a) // 16) for a, b in ranges[i[5] : i[5] + i[6]]) for i in schedule.items.tolist()]
    assert work == sorted(work, reverse=True) and len(set(work)) > 1


def test_the_table_decides_what_serves(monkeypatch):
    """A library where the table says so and it can: half precision, every key, no phantom ones. Else the kernel."""
    row = launch_configs.ForwardKernel(arch=launch_configs.architecture(DEVICE), dense="flash", reason="a test")
    monkeypatch.setattr(launch_configs, "FORWARD_KERNELS", (row,))
    monkeypatch.setattr(forward, "library_forward", lambda library, *call: library)
    monkeypatch.setattr(forward, "launch_forward", lambda *call, config: "triton")
    monkeypatch.setattr(forward, "refused", lambda q, k, v: None if q.itemsize == 2 else "wide")

    def served(plan: AttentionPlan, dtype: torch.dtype) -> object:
        q, k, v, _ = inputs(plan, dtype=dtype)
        return forward.choose(q, k, v, tuple(encode(plan.ranges)), plan.phantom_keys)(0.25)

    for unproven, expected in ((None, "flash"), ("wrong here", "triton")):
        monkeypatch.setattr(forward, "unproven", lambda library, q, unproven=unproven: unproven)
        assert served(AttentionPlan.dense(9, 21), torch.bfloat16) == expected
        assert served(AttentionPlan.dense(9, 21), torch.float32) == "triton"
        assert served(AttentionPlan.dense(9, 21, phantom_keys=3), torch.bfloat16) == "triton"
        assert served(GAPS, torch.bfloat16) == "triton"
