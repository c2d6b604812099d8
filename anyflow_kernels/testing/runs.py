"""Running an `OperationCase` and judging what came, for `anyflow verify` and `anyflow tune` alike."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import Ops
from .budget import Judgement, judge, leaves, map_tensors
from .cases import OperationCase, Random

Results = dict[str, Tensor]


def run_case(
    case: OperationCase, ops: Ops, dtype: torch.dtype, device: torch.device, backward: bool, wide: bool = False
) -> Results:
    """The results, or gradients, by name. The inputs are made anew: an operation may write into them."""
    random = Random(0, dtype, device)
    inputs = case.make(random)
    if wide:
        inputs = map_tensors(Tensor.double, inputs)
    if backward:
        return {f"gradient {i}": t for i, t in enumerate(gradients_of(case, ops, inputs, random)())}
    with torch.no_grad():
        out = getattr(ops, case.operation)(**inputs)
    outs = list(out) if isinstance(out, tuple) else [out]
    return {f"result {i}": t for i, t in enumerate(outs)} | {name: inputs[name] for name in case.written}


def gradients_of(
    case: OperationCase, ops: Ops, inputs: dict[str, Any], random: Random
) -> Callable[[], tuple[Tensor, ...]]:
    """Runs the forward; returns what computes the gradients of the differentiable inputs, as often as wanted."""
    for name in case.differentiable:
        inputs[name] = map_tensors(lambda x: x.detach().requires_grad_(), inputs[name])
    with torch.enable_grad():
        out = getattr(ops, case.operation)(**inputs)
    outs = [t for t in (out if isinstance(out, tuple) else [out]) if t.requires_grad]
    seeds = [random(*t.shape, dtype=torch.bfloat16).to(t.dtype) for t in outs]  # exact in every dtype
    wanted = leaves([inputs[name] for name in case.differentiable])
    return lambda: torch.autograd.grad(outs, wanted, seeds, retain_graph=True)


def judge_results(got: Results, low: Results, exact: Results, dtype: torch.dtype) -> dict[str, Judgement]:
    """The error law for every result; a gradient has two rounding steps, a way there and a way back."""
    return {
        name: judge(name, got[name], low[name], exact[name], 2 if name.startswith("gradient") else 1, dtype)
        for name in exact
    }
