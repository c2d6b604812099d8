"""The error law, once: how far a result may be from float64, for tests, benches and `anyflow verify`.

A result is judged beside the `reference` backend's in the same dtype: its error against float64 may be twice the
reference's own plus a rounding step. That holds for the whole (relative, Frobenius) and, with two steps, for the worst
row: one wrong row of 56,160 moves the whole by 0.6 %, which a bf16 budget forgives. A row is a vector of the last
dimension, channels of a head or of a token; its error is relative to its norm, or to the median row's if that is
larger. NaN marks what is not written, so it must stand where it stands in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

_TINY = torch.finfo(torch.float64).tiny


class Errors(NamedTuple):
    """Relative errors of a tensor: of the whole, and of its worst row."""

    whole: float
    row: float

    def within(self, budget: Errors) -> bool:
        """False also if anything is NaN."""
        return self.whole <= budget.whole and self.row <= budget.row


class Judgement(NamedTuple):
    """Errors of a result and of the reference against float64, what the former may be, and what else is wrong or ""."""

    errors: Errors
    reference: Errors
    budget: Errors
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.errors.within(self.budget)


def errors(out: Tensor, exact: Tensor) -> Errors:
    """Errors of `out` against `exact`, of one shape; NaN if anything is."""
    if exact.numel() == 0:
        return Errors(0.0, 0.0)
    width = exact.shape[-1] if exact.ndim else 1
    out, exact = (x.detach().double().reshape(-1, width) for x in (out, exact))
    off, norms = (out - exact).norm(dim=1), exact.norm(dim=1)
    typical = norms[norms > 0].median() if norms.any() else norms.new_tensor(_TINY)
    whole = off.norm() / norms.norm().clamp_min(_TINY)
    return Errors(float(whole), float((off / norms.clamp_min(typical)).max()))


def relative_error(out: Tensor, exact: Tensor) -> float:
    """||out - exact|| / ||exact|| in float64; NaN if anything is."""
    return errors(out, exact).whole


def judge(
    name: str, out: Tensor, low: Tensor, exact: Tensor, steps: float = 1.0, dtype: torch.dtype | None = None
) -> Judgement:
    """The law for one tensor.

    Args:
        name: of the tensor, for messages.
        out: to be judged.
        low: the reference's, in the dtype that `out` must have.
        exact: the reference's in float64.
        steps: rounding steps that `out` may take and the reference does not.
        dtype: of those steps, that of the inputs if they are narrower than the result; default: that of `low`.
    """
    unknown = Errors(torch.nan, torch.nan)
    if out.shape != exact.shape or out.dtype != low.dtype:
        kinds = f"got {tuple(out.shape)} {out.dtype}, expected {tuple(exact.shape)} {low.dtype}"
        return Judgement(unknown, unknown, unknown, f"{name}: {kinds}")
    if not torch.equal(out.isnan(), exact.isnan()):
        return Judgement(unknown, unknown, unknown, f"{name}: got NaN in other places than float64, expected the same")
    out, low_wide, exact = (x.detach().double().nan_to_num(nan=0.0) for x in (out, low, exact))
    own, rounding = errors(low_wide, exact), steps * torch.finfo(dtype or low.dtype).eps
    # The worst of many rows is an extreme of rounding: the reference's may be a lucky one, so a row gets two steps.
    budget = Errors(2 * own.whole + rounding, 2 * own.row + 2 * rounding)
    return Judgement(errors(out, exact), own, budget)


def check(name: str, out: Tensor, low: Tensor, exact: Tensor, steps: float = 1.0) -> Errors:
    """The errors of a tensor that keeps the law; arguments as for `judge`.

    Raises:
        AssertionError: naming the tensor, if it does not.
    """
    verdict = judge(name, out, low, exact, steps)
    got, budget = verdict.errors, verdict.budget
    if not verdict.ok:
        raise AssertionError(
            verdict.problem
            or f"{name}: got error {got.whole:.2e}, worst row {got.row:.2e}, against float64, "
            f"expected within the budget of {budget.whole:.2e}, worst row {budget.row:.2e}"
        )
    return got


def map_tensors(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor within tuples, lists and dicts; lists become tuples."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: map_tensors(function, part) for name, part in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [map_tensors(function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def widened(value: Any) -> Any:
    """The same numbers in float64, as fresh leaves that require a gradient where theirs did."""
    return map_tensors(lambda x: x.detach().double().requires_grad_(x.requires_grad), value)


def leaves(value: Any) -> list[Tensor]:
    """The tensors that require a gradient, in order."""
    found: list[Tensor] = []
    map_tensors(lambda x: found.append(x) if x.requires_grad else None, value)
    return found
