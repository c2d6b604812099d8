"""What the tests of the Triton kernels share: backends, error budgets, poisoned memory, recompilation counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from anyflow_kernels import load_ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON, REFERENCE = load_ops("triton"), load_ops("reference")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def relative_error(out: Tensor, high: Tensor) -> float:
    """||out - high|| / ||high|| in float64; NaN if anything is."""
    return float(
        (out.detach().double() - high.detach().double()).norm() / high.detach().double().norm().clamp_min(1e-300)
    )


def assert_within_budget(name: str, out: Tensor, low: Tensor, high: Tensor) -> None:
    """Error against float64 (`high`) <= 2 x that of the same-dtype reference (`low`) + one rounding step of the dtype.

    The interpreter's cast to bf16 truncates, so the step is a full one, `finfo.eps`.
    """
    assert out.shape == high.shape, f"{name}: got {tuple(out.shape)}, expected {tuple(high.shape)}"
    assert out.dtype == low.dtype, f"{name}: got {out.dtype}, expected {low.dtype}"
    error, budget = relative_error(out, high), 2 * relative_error(low, high) + torch.finfo(out.dtype).eps
    assert error <= budget, f"{name}: error {error:.3e} against float64, budget {budget:.3e}"


def widen(value: Any) -> Any:
    """Floating-point tensors to float64 (fresh leaves, same requires_grad), also within tuples and dicts."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, tuple):
        parts = [widen(v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {k: widen(v) for k, v in value.items()}
    return value


def leaves(value: Any) -> list[Tensor]:
    """The tensors that require a gradient, in order."""
    if isinstance(value, Tensor):
        return [value] if value.requires_grad else []
    if isinstance(value, (tuple, list)):
        return [leaf for v in value for leaf in leaves(v)]
    return leaves(tuple(value.values())) if isinstance(value, dict) else []


def compare(operation: str, args: tuple, kwargs: dict[str, Any] | None = None, gradients: bool = False) -> None:
    """Outputs of an operation on `triton` (and gradients of every leaf) within the budget of `reference`."""
    kwargs = kwargs or {}
    results = []
    for ops, (a, k) in (
        (TRITON, (args, kwargs)),
        (REFERENCE, (args, kwargs)),
        (REFERENCE, (widen(args), widen(kwargs))),
    ):
        out = getattr(ops, operation)(*a, **k)
        out = out if isinstance(out, tuple) else (out,)
        grads: Sequence[Tensor] = ()
        if gradients:
            generator = torch.Generator().manual_seed(7)
            seeds = [torch.randn(o.shape, generator=generator).to(o.device, torch.bfloat16).to(o.dtype) for o in out]
            # A seed per output, exact in bf16; strided, as a slice of a wider gradient would be.
            seeds = [torch.stack([s, s], dim=1).select(1, 0) for s in seeds]
            grads = torch.autograd.grad(out, leaves((a, k)), seeds)
        results.append((out, grads))
    for kind, index in (("output", 0), ("gradient", 1)):
        for i, (got, low, high) in enumerate(zip(*(r[index] for r in results), strict=True)):
            assert_within_budget(f"{operation} {kind} {i}", got, low, high)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor from `empty` starts as NaN: an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def count_compilations(function: Callable, calls: Sequence[tuple]) -> int:
    """Graphs that `torch.compile(fullgraph=True)` makes for these calls; each result must equal the eager one."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for args in calls:
        torch.testing.assert_close(compiled(*args), function(*args))
    return counter.frame_count
