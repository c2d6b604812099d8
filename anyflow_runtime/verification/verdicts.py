"""One operation or model on one backend against float64: errors, budget, verdict.

Budget: the error against float64 may be twice that of the reference backend in the same dtype, plus one rounding step;
two steps for a gradient, which has a way there and a way back.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import Ops, load_ops
from anyflow_kernels.testing.cases import OperationCase, Random
from anyflow_kernels.testing.float64_oracle import oracle_ops

from .model_cases import ModelCase

Results = dict[str, Tensor]


@dataclass(frozen=True)
class Verdict:
    """A line of the table. Errors are relative, in the Frobenius norm, those of the worst result.

    Args:
        subject: operation or model; "backward" after it for its gradients.
        shape, dtype, backend: of the run.
        error: of the backend against float64.
        reference_error: of the reference backend in the same dtype against float64.
        difference: between the two backends.
        budget: what `error` may be.
        problem: why it failed other than by its error, or "".
    """

    subject: str
    shape: str
    dtype: str
    backend: str
    error: float
    reference_error: float
    difference: float
    budget: float
    problem: str = ""

    @property
    def ok(self) -> bool:
        return not self.problem and self.error <= self.budget


def verify_operation(
    case: OperationCase, backends: Mapping[str, Ops], dtype: torch.dtype, device: torch.device
) -> Iterator[Verdict]:
    """Results of a case on each backend, then, if it is differentiable, its gradients."""
    for subject, backward in ((case.operation, False), (f"{case.operation} backward", True)):
        if backward and not case.differentiable:
            continue
        low = _run_operation(case, load_ops("reference"), dtype, device, backward)
        high = _run_operation(case, oracle_ops(), dtype, device, backward, wide=True)
        for name, ops in backends.items():
            run = (subject, case.shape, str(dtype).removeprefix("torch."), name)
            try:
                got = _run_operation(case, ops, dtype, device, backward)
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


def _run_operation(
    case: OperationCase, ops: Ops, dtype: torch.dtype, device: torch.device, backward: bool, wide: bool = False
) -> Results:
    """The results, or gradients, by name. The inputs are made anew: an operation may write into them."""
    random = Random(0, dtype, device)
    inputs = case.make(random)
    if wide:
        inputs = _map_tensors(inputs, lambda tensor: tensor.double())
    leaves: list[Tensor] = []
    if backward:
        for name in case.differentiable:
            inputs[name] = _map_tensors(inputs[name], lambda tensor: _leaf(tensor, leaves))
    with torch.set_grad_enabled(backward):
        out = getattr(ops, case.operation)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    if not backward:
        return {f"result {i}": t for i, t in enumerate(outs)} | {name: inputs[name] for name in case.written}
    outs = [t for t in outs if t.requires_grad]
    seeds = [random(*t.shape, dtype=torch.bfloat16).to(t.dtype) for t in outs]  # exact in every dtype
    gradients = torch.autograd.grad(outs, leaves, seeds)
    return {f"gradient {i}": t for i, t in enumerate(gradients)}


def _leaf(tensor: Tensor, leaves: list[Tensor]) -> Tensor:
    leaves.append(tensor.detach().requires_grad_())
    return leaves[-1]


def _map_tensors(value: Any, function: Any) -> Any:
    """Apply a function to the floating-point tensors of nested tuples and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: _map_tensors(part, function) for name, part in value.items()}
    if isinstance(value, tuple):
        parts = [_map_tensors(part, function) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value


def _judge(run: tuple[str, str, str, str], got: Results, low: Results, high: Results) -> Verdict:
    verdicts = [_judge_one(run, name, got[name], low[name], high[name]) for name in high]
    return max(verdicts, key=lambda v: (not v.ok, v.error / v.budget))


def _judge_one(run: tuple[str, str, str, str], name: str, got: Tensor, low: Tensor, high: Tensor) -> Verdict:
    nan = float("nan")
    if got.shape != high.shape or got.dtype != low.dtype:
        problem = f"{name}: got {tuple(got.shape)} {got.dtype}, expected {tuple(high.shape)} {low.dtype}"
        return Verdict(*run, nan, nan, nan, nan, problem)
    if not torch.equal(got.isnan(), high.isnan()):  # slabs start as NaN: it also shows what was written or left out
        return Verdict(*run, nan, nan, nan, nan, f"{name}: NaN in other places than in float64")
    got, low, high = (tensor.detach().double().nan_to_num(nan=0.0) for tensor in (got, low, high))
    reference_error = _relative(low, high)
    steps = 2 if name.startswith("gradient") else 1
    rounding = steps * torch.finfo(getattr(torch, run[2])).eps
    return Verdict(*run, _relative(got, high), reference_error, _relative(got, low), 2 * reference_error + rounding)


def _relative(out: Tensor, ref: Tensor) -> float:
    return float((out - ref).norm() / ref.norm().clamp_min(torch.finfo(torch.float64).tiny))


def _failed(run: tuple[str, str, str, str], error: Exception) -> Verdict:
    nan = float("nan")
    message = " ".join(str(error).split())[:200]
    return Verdict(*run, nan, nan, nan, nan, f"{type(error).__name__}: {message}")
