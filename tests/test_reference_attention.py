"""Which way attention of the `reference` backend goes: on a GPU flex_attention has no float64, and oracles need it."""

from __future__ import annotations

import pytest
import torch

from anyflow_kernels import AttentionPlan, FarLayout, load_ops, reference
from anyflow_kernels.testing.budget import widened
from anyflow_kernels.testing.cases import SIZES, Random, operation_cases
from anyflow_runtime.verification.model_cases import model_cases
from bench import far_attention as bench

from . import operation_checks

PLAN = AttentionPlan.from_layout(FarLayout((1, 1, 2), 8, 12, mode="inference"))


@pytest.fixture
def no_float64_in_flex(monkeypatch):
    """flex_attention as a GPU has it: its template keeps sums in fp32 and fails to compile for float64."""
    plain = reference.flex_attention

    def flex(q, *args, **kwargs):
        assert q.dtype != torch.float64, "flex_attention has no float64 on a GPU"
        return plain(q, *args, **kwargs)

    monkeypatch.setattr(reference, "flex_attention", flex)


def inputs(grad: bool) -> list[torch.Tensor]:
    lengths = (PLAN.num_queries, PLAN.num_keys, PLAN.num_keys)
    return [torch.randn(1, n, 2, 16).requires_grad_(grad) for n in lengths]


@pytest.mark.parametrize("grad", [False, True], ids=["forward", "backward"])
def test_no_oracle_takes_flex_attention(grad, no_float64_in_flex):
    """The checks of operations, of whole models (`anyflow verify`) and of the bench, each in its own way to float64."""
    q, k, v = inputs(grad)
    operation_checks.compare(load_ops("torch"), "far_attention", {"q": q, "k": k, "v": v, "plan": PLAN}, gradients=grad)
    attend = load_ops("torch").far_attention
    if grad:
        bench.gradient_parity(lambda q, k, v: attend(q, k, v, PLAN), q, k, v, PLAN)
    else:
        bench.parity(lambda q, k, v: attend(q, k, v, PLAN), q, k, v, PLAN)
        for case in model_cases(SIZES["tiny"]):
            assert case.velocity(None, torch.float32, torch.device("cpu")).dtype == torch.float64


def test_float32_without_gradients_is_flex_attention(no_float64_in_flex, monkeypatch):
    """At the released sizes a GPU has no room for all scores."""
    monkeypatch.setattr(reference, "dense_attention", None)
    q, k, v = inputs(False)
    assert load_ops("reference").far_attention(q, k, v, PLAN).isfinite().all()


def test_written_out_attention_is_flex_attention():
    """In float64 on a CPU, phantom keys and ranges with gaps included: two witnesses that share no formula."""
    cases = [case for case in operation_cases(SIZES["tiny"]) if case.operation == "far_attention"]
    assert cases
    for case in cases:
        args = case.make(Random(0, torch.float64, torch.device("cpu")))
        q, k, v, plan = (args[name] for name in ("q", "k", "v", "plan"))
        scale = q.shape[3] ** -0.5
        got = reference.blockwise_attention(q, k, v, plan, scale)
        wanted = reference.masked_flex_attention(q, *reference.with_phantom_keys(k, v, plan), scale)
        for a, b in zip(got, wanted, strict=True):
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", [1, 7, PLAN.num_queries - 1])
def test_blocks_of_queries_change_nothing(rows, monkeypatch):
    q, k, v = widened(inputs(True))
    whole = reference.blockwise_attention(q, k, v, PLAN, 0.25)
    monkeypatch.setattr(reference, "SCORES", rows * 2 * PLAN.num_keys)
    parts = reference.blockwise_attention(q, k, v, PLAN, 0.25)
    grads = [torch.autograd.grad(out.square().sum() + lse.sum(), (q, k, v)) for out, lse in (whole, parts)]
    for a, b in zip((*whole, *grads[0]), (*parts, *grads[1]), strict=True):
        torch.testing.assert_close(a, b)
