"""`rms_norm` on the triton backend against float64 (reference backend)."""

from __future__ import annotations

import pytest
import torch

from anyflow_kernels import triton_ops

from .triton_checks import DEVICE, OPCHECKS, TRITON, compare, count_compilations, poisoned_memory

SHAPES = [(1, 1), (3, 37), (2, 9, 48), (2, 3, 2, 130), (2, 1536), (1, 5120)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple:
    """x is a slice of wider rows, as q is of a fused projection."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(*shape[:-1], 3 * shape[-1], generator=generator).to(DEVICE, dtype)[..., : shape[-1]]
    weight = torch.randn(shape[-1], generator=generator).to(DEVICE)
    return x.requires_grad_(grad), weight.requires_grad_(grad), 1e-6


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_within_budget(shape, dtype):
    with poisoned_memory():
        compare("rms_norm", inputs(shape, dtype))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:4], ids=str)
def test_gradients_within_budget(shape, dtype):
    """18 rows are more than a group: the weight gradient adds several partial sums."""
    with poisoned_memory():
        compare("rms_norm", inputs(shape, dtype, grad=True), gradients=True)


def test_epsilon_keeps_zero_rows_finite():
    x, weight, _ = inputs((2, 16))
    assert torch.equal(TRITON.rms_norm(torch.zeros_like(x), weight, 1e-6), torch.zeros_like(x))


def test_empty():
    x, weight, eps = inputs((2, 16))
    assert TRITON.rms_norm(x[:0], weight, eps).shape == (0, 16)


def test_opcheck():
    x, weight, eps = inputs((2, 3, 16), grad=True)
    ops = torch.ops.anyflow
    torch.library.opcheck(ops.rms_norm, (x, weight, eps), test_utils=OPCHECKS)
    backward = (torch.randn_like(x), x.detach(), weight.detach(), eps)
    torch.library.opcheck(ops.rms_norm_backward, backward, test_utils=OPCHECKS)


def test_compiles_once_for_changing_lengths():
    calls = [inputs((2, length, 16)) for length in (3, 4, 5, 7)]
    assert count_compilations(triton_ops.rms_norm, calls) <= 2
