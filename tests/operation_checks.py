"""What the tests of operations share: inputs, results with gradients, and their comparison with `reference`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_kernels import TimestepMLP, load_ops
from anyflow_kernels.testing.budget import check, leaves, map_tensors, widened

TORCH: Any = load_ops("torch")
REFERENCE: Any = load_ops("reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FRAME_MAP = ((2, 3), (1, 7))
Args = dict[str, Any]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    """A leaf whose batches and tokens are not contiguous: every second token of a longer, wider tensor."""
    wide = torch.randn(shape[0], 2 * shape[1] + 1, *shape[2:-1], shape[-1] + 3).to(dtype)
    return wide[:, 1::2, ..., 2 : 2 + shape[-1]].detach().requires_grad_(True)


def time_args(dtype: torch.dtype, freq_dim: int = 32, width: int = 20) -> Args:
    """As a checkpoint in `dtype` has it: the time MLP is kept in fp32."""

    def mlp(kind: torch.dtype) -> TimestepMLP:
        shapes = ((width, freq_dim), (width,), (width, width), (width,))
        return TimestepMLP(*(randn(*shape, dtype=kind) for shape in shapes))

    return {
        "t": torch.tensor([0.0, 1.0, 333.3, 999.9, 1000.0]),
        "delta": torch.tensor([0.0, 0.0, 200.0, 1000.0, 0.1]),
        "time_mlp": mlp(torch.float32),
        "delta_mlp": mlp(dtype),
        "proj_weight": randn(6 * width, width, dtype=dtype),
        "proj_bias": randn(6 * width, dtype=dtype),
        "gate": 0.25,
    }


def detached(args: Args) -> Args:
    return map_tensors(Tensor.detach, args)


def results(ops: Any, operation: str, args: Args, gradients: bool = True) -> dict[str, Tensor]:
    """Outputs of an operation and, where they have any, the gradients of all leaves for the same cotangents."""
    out = getattr(ops, operation)(**args)
    outputs = out if isinstance(out, tuple) else (out,)
    found = {f"output {i}": o for i, o in enumerate(outputs)}
    differentiable = [o for o in outputs if o.requires_grad] if gradients else []
    if differentiable:
        generator = torch.Generator().manual_seed(7)
        seeds = [torch.randn(o.shape, generator=generator).to(o.device, torch.bfloat16).to(o.dtype) for o in outputs]
        # A seed per output, exact in bf16; strided, as a slice of a wider gradient would be.
        seeds = [
            torch.stack([s, s], dim=1).select(1, 0) for s, o in zip(seeds, outputs, strict=True) if o.requires_grad
        ]
        wanted = torch.autograd.grad(differentiable, leaves(args), seeds)
        found |= {f"gradient {i}": gradient for i, gradient in enumerate(wanted)}
    return found


def compare(ops: Any, operation: str, args: Args, gradients: bool = False) -> None:
    """Outputs of an operation (and gradients of every leaf) within the budget of `reference`."""
    got, low, high = (
        results(backend, operation, own, gradients)
        for backend, own in ((ops, args), (REFERENCE, args), (REFERENCE, widened(args)))
    )
    assert got.keys() == low.keys() == high.keys()
    for name, out in got.items():
        check(f"{operation} {name}", out, low[name], high[name])


def assert_within_budget(operation: str, args: Args, steps: float = 1.0) -> None:
    """As `compare`, for the `torch` backend, with and without gradients.

    `steps`: rounding steps of the gradients that the reference does not take.
    """
    low, high = results(REFERENCE, operation, args), results(REFERENCE, operation, widened(args))
    with torch.no_grad():  # a path of its own: in place, or through another library
        again = results(TORCH, operation, detached(args))
    got = results(TORCH, operation, args)
    assert got.keys() == low.keys() == high.keys()
    for name, out in [*got.items(), *again.items()]:
        check(f"{operation} {name}", out, low[name], high[name], steps if name.startswith("gradient") else 1.0)
