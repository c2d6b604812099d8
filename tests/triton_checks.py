"""What the tests of the Triton kernels share: backends, comparison, poisoned memory, recompilation counts."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from anyflow_kernels import load_ops

from . import operation_checks

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON, REFERENCE = load_ops("triton"), load_ops("reference")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def compare(operation: str, args: tuple, kwargs: dict[str, Any] | None = None, gradients: bool = False) -> None:
    """Outputs of an operation on `triton` (and gradients of every leaf) within the budget of `reference`."""
    names = inspect.signature(getattr(TRITON, operation)).parameters
    operation_checks.compare(TRITON, operation, {**dict(zip(names, args, strict=False)), **(kwargs or {})}, gradients)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Every tensor from `empty` starts as NaN: an element that is not written shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)  # on a GPU the witness takes products of cuBLAS
    assert torch.empty(3, device=DEVICE).isnan().all()
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
