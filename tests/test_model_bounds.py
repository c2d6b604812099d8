"""Bounds beside the benches' measurements: roofs of data sheets, and the model of an attention kernel, by hand."""

import pytest
import torch

from anyflow_kernels import AttentionPlan, launch_configs
from anyflow_kernels.pipe_model import CHIPS, Chip
from anyflow_kernels.triton_ops.tile_schedule import encode, query_schedule
from bench import model_bounds, roofline

ROUND = Chip(name="round", arch=80, multiprocessors=10, clock_ghz=1.0, dram_gb_s=1000, products=1000)


def test_roofs_by_hand():
    assert roofline.roof_seconds(ROUND, 1e9) == pytest.approx(1e-3)
    assert roofline.roof_seconds(ROUND, 1e9, 40e9) == pytest.approx(2e-3)
    assert roofline.roof_seconds(ROUND, 1e9, 40e9, itemsize=4) == pytest.approx(4e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the card of this machine is meant")
def test_the_card_elsewhere_is_named():
    assert roofline.chip_here().name == roofline.ELSEWHERE


def test_the_longest_program_by_hand():
    runs = ((0, 4, ((0, 20),)), (4, 12, ((6, 14),)))  # a tile of 3 blocks, two of 1
    schedule = query_schedule(tuple(encode(runs)), 1, 4, 8, 2, None, 0, torch.device("cpu"))
    assert model_bounds.costs(schedule, 8) == [4, 2, 2]
    assert model_bounds.longest_program(schedule, 8) == 4
    assert model_bounds.listed([4, 2, 2, 3], 2) == 7


def test_the_bound_of_attention_by_hand(monkeypatch):
    """An inner loop of 2,000 cycles of products, and a tenth of redundant ones, at half of the peak at best. Two heads
    of one tile on 132 multiprocessors: the bound is that of one of them, a block more than its loop has."""
    model = {"cycles": {"tensor": 2200}, "redundancy": 1.1, "bound": 0.5, "expected": 0.25}
    monkeypatch.setattr(model_bounds, "pipe_row", lambda kind, fields, chip, head_dim: (model, 1))
    tables = (launch_configs.ATTENTION_FORWARD, launch_configs.ATTENTION_DQ, launch_configs.ATTENTION_DKDV)
    row, dq, dkdv = (launch_configs.attention_row(table, 90, 128, 2) for table in tables)
    plan = AttentionPlan.dense(row.block_m, dkdv.block_n)
    step = 2000 / 0.5 / 1.83e9
    forward = model_bounds.attention_bound("triton", CHIPS["H100"], plan, 2, 128, torch.bfloat16)
    assert forward == pytest.approx((1 + plan.num_keys / row.block_n) * step)
    both = model_bounds.attention_bound("triton", CHIPS["H100"], plan, 2, 128, torch.bfloat16, backward=True)
    steps = (1 + plan.num_keys / dq.block_n) + (1 + plan.num_queries / dkdv.block_m)
    assert both == pytest.approx(forward + steps * step)
