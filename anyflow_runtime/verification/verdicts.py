"""One operation or model on one backend against float64: errors, budgets, verdict.

The law is that of `anyflow_kernels.testing`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from anyflow_kernels import Ops, load_ops
from anyflow_kernels.testing.budget import Judgement, relative_error
from anyflow_kernels.testing.cases import OperationCase
from anyflow_kernels.testing.runs import Results, judge_results, run_case

from .model_cases import ModelCase


@dataclass(frozen=True)
class Verdict:
    """A line of the table: the errors of the worst result, relative, whole and of its worst row.

    Args:
        subject: operation or model; "backward" after it for its gradients.
        shape, dtype, backend: of the run.
        error, row_error: of the backend against float64.
        reference_error: of the reference backend in the same dtype against float64.
        difference: between the two backends.
        budget, row_budget: what `error` and `row_error` may be.
        problem: why it failed other than by its errors, or "".
    """

    subject: str
    shape: str
    dtype: str
    backend: str
    error: float = float("nan")
    row_error: float = float("nan")
    reference_error: float = float("nan")
    difference: float = float("nan")
    budget: float = float("nan")
    row_budget: float = float("nan")
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.budget and self.row_error <= self.row_budget


def verify_operation(
    case: OperationCase, backends: Mapping[str, Ops], dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    """Results of a case on each backend, then, if it is differentiable, its gradients."""
    for subject, backward in ((case.operation, False), (f"{case.operation} backward", True)):
        if backward and not case.differentiable:
            continue
        low = run_case(case, load_ops("reference"), dtype, device, backward)
        high = run_case(case, load_ops("reference"), dtype, device, backward, wide=True)
        for name, ops in backends.items():
            run = (subject, case.shape, str(dtype).removeprefix("torch."), name)
            try:
                got = run_case(case, ops, dtype, device, backward)
            except Exception as error:  # any failure of a kernel is a finding; the other rows are still wanted
                yield _failed(run, error)
            else:
                yield _judge(run, got, low, high)


def verify_model(
    case: ModelCase, backends: Mapping[str, Ops], dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    """The velocity of a case on each backend."""
    low = {"velocity": case.velocity(load_ops("reference"), dtype, device)}
    high = {"velocity": case.velocity(None, dtype, device)}
    for name, ops in backends.items():
        run = (case.model.__name__, case.path, str(dtype).removeprefix("torch."), name)
        try:
            got = {"velocity": case.velocity(ops, dtype, device)}
        except Exception as error:
            yield _failed(run, error)
        else:
            yield _judge(run, got, low, high)


def _judge(run: tuple[str, str, str, str], got: Results, low: Results, high: Results) -> Verdict:
    found = judge_results(got, low, high, getattr(torch, run[2]))
    verdicts = [_verdict(run, found[name], got[name], low[name]) for name in high]
    return max(verdicts, key=lambda v: (not v.ok, max(v.error / v.budget, v.row_error / v.row_budget)))


def _verdict(run: tuple[str, str, str, str], found: Judgement, got: Tensor, low: Tensor) -> Verdict:
    if found.problem:
        return Verdict(*run, problem=found.problem)
    difference = relative_error(got.nan_to_num(nan=0.0), low.nan_to_num(nan=0.0))
    return Verdict(*run, *found.errors, found.reference.whole, difference, *found.budget)


def _failed(run: tuple[str, str, str, str], error: Exception) -> Verdict:
    message = " ".join(str(error).split())[:200]
    return Verdict(*run, problem=f"{type(error).__name__}: {message}")
