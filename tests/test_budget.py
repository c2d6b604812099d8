"""The error law itself: what it lets pass, and what it must not."""

from __future__ import annotations

import pytest
import torch

from anyflow_kernels import load_ops
from anyflow_kernels.testing.budget import check, errors, judge, leaves, map_tensors, widened


def test_one_wrong_row_of_56160_fails_though_the_whole_passes():
    """A chunk of three frames at 480p, 4,680 tokens x 12 heads, bf16: one head of one token gets its neighbour's q."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, 4680, 3 * 1536, generator=generator).bfloat16()
    weights = [torch.randn(1536, generator=generator).bfloat16() for _ in range(2)]
    angle = torch.randn(4680, 64, generator=generator)
    args = (qkv, *weights, (angle.cos(), angle.sin()), 12, 1e-6)
    q = load_ops("torch").qk_norm_rope_append(*args)[0]
    low, exact = (load_ops("reference").qk_norm_rope_append(*a)[0] for a in (args, widened(args)))
    right = check("q", q, low, exact)
    assert right.row < 0.01

    q[0, 2345, 7] = q[0, 2346, 7]
    fault = judge("q", q, low, exact)
    assert q.shape[1] * q.shape[2] == 56160
    assert fault.errors.whole <= fault.budget.whole  # all that a mean-only law sees
    assert fault.errors.row > 10 * fault.budget.row and not fault.ok
    with pytest.raises(AssertionError, match=r"q: got error .*, worst row 1\..*, expected within the budget"):
        check("q", q, low, exact)


def test_a_tiny_row_is_judged_by_the_median_row():
    """Its own norm would make rounding of a cancelled sum look like a fault."""
    exact = torch.ones(5, 4)
    exact[2] = 1e-9
    out = exact.clone()
    out[2] += 1e-7
    assert errors(out, exact).row == pytest.approx(1e-7, rel=1e-3)
    out[2] += 1.0
    assert errors(out, exact).row == pytest.approx(1.0)


def test_zeros_scalars_and_nothing_have_errors():
    assert errors(torch.zeros(2, 3), torch.zeros(2, 3)) == errors(torch.ones(2, 0), torch.ones(2, 0)) == (0.0, 0.0)
    assert errors(torch.tensor(3.0), torch.tensor(2.0)) == (0.5, 0.5)
    assert errors(torch.ones(2), torch.zeros(2)).row > 1e300


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_never_passes(value):
    out = torch.ones(3, 4)
    out[1, 2] = value
    assert not judge("out", out, torch.ones(3, 4), torch.ones(3, 4).double(), steps=1e9).ok


def test_unwritten_slots_must_stay_unwritten():
    exact = torch.ones(3, 4).double()
    exact[1] = torch.nan
    low = exact.float()
    assert check("slab", low.clone(), low, exact) == (0.0, 0.0)
    with pytest.raises(AssertionError, match="slab: got NaN in other places than float64"):
        check("slab", low.nan_to_num(), low, exact)


def test_shape_and_dtype_are_named():
    low = torch.ones(3, 4).bfloat16()
    with pytest.raises(AssertionError, match=r"out: got \(3, 4\) torch.float32, expected \(3, 4\) torch.bfloat16"):
        check("out", low.float(), low, low.double())
    with pytest.raises(AssertionError, match=r"out: got \(4,\) torch.bfloat16, expected \(3, 4\)"):
        check("out", low[0], low, low.double())


def test_steps_are_of_the_narrower_dtype():
    low, exact = torch.ones(1), torch.ones(1).double()
    assert not judge("lse", low + 1e-3, low, exact).ok
    assert judge("lse", low + 1e-3, low, exact, dtype=torch.bfloat16).ok


def test_tensors_are_found_within_nested_structures():
    x = torch.ones(2, requires_grad=True)
    nested = {"a": (x, [torch.ones(1), None]), "b": 3}
    assert leaves(nested) == [x]
    wide = widened(nested)
    assert wide["a"][0].dtype == torch.float64 and wide["a"][0].is_leaf and wide["a"][0].requires_grad
    assert not wide["a"][1][0].requires_grad and wide["b"] == 3
    assert map_tensors(lambda t: t.numel(), nested)["a"] == (2, (1, None))
