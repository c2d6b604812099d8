"""What the tests of the Triton kernels share: backends, comparison, poisoned memory, recompilation counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from anyflow_kernels import load_ops
from anyflow_kernels.testing.budget import check, leaves, widened

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON, REFERENCE = load_ops("triton"), load_ops("reference")
OPCHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def compare(operation: str, args: tuple, kwargs: dict[str, Any] | None = None, gradients: bool = False) -> None:
    """Outputs of an operation on `triton` (and gradients of every leaf) within the budget of `reference`."""
    kwargs = kwargs or {}
    results = []
    for ops, (a, k) in (
        (TRITON, (args, kwargs)),
        (REFERENCE, (args, kwargs)),
        (REFERENCE, widened((args, kwargs))),
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
            check(f"{operation} {kind} {i}", got, low, high)


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
