"""`far_attention` of the `torch` backend, forward and backward. Witness: the `reference` backend in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from anyflow_kernels import AttentionPlan, FarLayout
from anyflow_kernels.testing.budget import relative_error

from .operation_checks import REFERENCE, TORCH, Args, assert_within_budget, every_dtype, strided

PLANS = {
    "dense": AttentionPlan.dense(7, 19),
    "one query": AttentionPlan.dense(1, 5),
    "phantom": AttentionPlan.dense(7, 19, phantom_keys=11),
    "train": AttentionPlan.from_layout(FarLayout((1, 2, 1), 4, 6, full_chunk_limit=2)),
    "clean": AttentionPlan.from_layout(FarLayout((2, 1, 2, 1), 5, 7, full_chunk_limit=3, clean=True)),
    "prefill": AttentionPlan.from_layout(FarLayout((1, 2, 1, 1), 4, 6, mode="prefill", cached=1)),
    "inference": AttentionPlan.from_layout(FarLayout((1, 2, 1, 2), 4, 6, mode="inference"), phantom_keys=3),
}


def assert_attention_within_budget(args: Args) -> None:
    """A flash backward recomputes exp(score - LSE): rounding the LSE costs every probability |LSE| steps."""
    lse = REFERENCE.far_attention(**{**args, "return_lse": True})[1]
    assert_within_budget("far_attention", args, steps=1 + float(lse.abs().max()))


def attention_args(plan: AttentionPlan, heads: int, head_dim: int, dtype: torch.dtype, **extra: Any) -> Args:
    q = strided(2, plan.num_queries, heads, head_dim, dtype=dtype)
    k, v = (strided(2, plan.num_keys, heads, head_dim, dtype=dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v, "plan": plan, **extra}


@every_dtype
@pytest.mark.parametrize("name", PLANS)
def test_far_attention(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_attention_within_budget(attention_args(PLANS[name], 3, 24, dtype))


@pytest.mark.parametrize("head_dim", [12, 16, 40, 44, 64, 80, 96, 128])
def test_far_attention_head_dims(head_dim: int) -> None:
    torch.manual_seed(0)
    assert_attention_within_budget(attention_args(PLANS["clean"], 2, head_dim, torch.float32))


@every_dtype
@pytest.mark.parametrize("name", ["phantom", "clean"])
def test_far_attention_log_sum_exp(name: str, dtype: torch.dtype) -> None:
    """Phantom keys included; fp32, without a gradient, beside the same output."""
    torch.manual_seed(0)
    args = attention_args(PLANS[name], 3, 24, dtype, return_lse=True, scale=0.3)
    assert_attention_within_budget(args)
    out, lse = TORCH.far_attention(**args)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, PLANS[name].num_queries)
    assert out.requires_grad and not lse.requires_grad


def test_far_attention_phantom_keys_are_zero_logits() -> None:
    """Not through the backends' own zero rows: the denominator grows by phantom_keys * exp(0)."""
    torch.manual_seed(0)
    args = attention_args(AttentionPlan.dense(7, 19), 2, 16, torch.float64)
    out, lse = TORCH.far_attention(**args, return_lse=True)
    padded = TORCH.far_attention(**{**args, "plan": AttentionPlan.dense(7, 19, phantom_keys=11)})
    share = lse.double().exp() / (lse.double().exp() + 11)
    assert relative_error(padded, out * share.transpose(1, 2).unsqueeze(-1)) < 1e-6  # the LSE is fp32


def test_far_attention_never_reads_beyond_its_ranges() -> None:
    """Keys no query sees, and the rest of a slab, may hold anything."""
    torch.manual_seed(0)
    slab = torch.randn(2, 2, 12, 3, 16)
    want = TORCH.far_attention(torch.ones(2, 4, 3, 16), *slab[:, :, [0, 1, 5, 6]], AttentionPlan.dense(4, 4))
    slab[:, :, 2:5] = slab[:, :, 7:] = math.nan
    plan = AttentionPlan(4, 7, ((0, 4, ((0, 2), (5, 7))),))
    got = TORCH.far_attention(torch.ones(2, 4, 3, 16), slab[0][:, :7], slab[1][:, :7], plan)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("ops", [TORCH, REFERENCE], ids=repr)
def test_far_attention_of_parameters_without_gradients(ops: Any) -> None:
    """Under no_grad a leaf still says requires_grad, which CPU flex_attention alone refuses."""
    torch.manual_seed(0)
    args = attention_args(PLANS["dense"], 2, 16, torch.float32)
    with torch.no_grad():
        got = ops.far_attention(**args)
    assert relative_error(got, ops.far_attention(**args)) < 1e-6


def test_far_attention_without_queries() -> None:
    out, lse = TORCH.far_attention(
        torch.ones(2, 0, 3, 16),
        torch.ones(2, 5, 3, 16),
        torch.ones(2, 5, 3, 16),
        AttentionPlan(0, 5, ()),
        return_lse=True,
    )
    assert out.shape == (2, 0, 3, 16) and lse.shape == (2, 3, 0)
