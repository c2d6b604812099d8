"""`linear_gelu` on the triton backend against float64 (reference backend)."""

from __future__ import annotations

import sys

import pytest
import torch

from anyflow_kernels import launch_configs, triton_ops

from .triton_checks import DEVICE, OPCHECKS, TRITON, compare, count_compilations, poisoned_memory

SHAPES = [((1,), 1, 1), ((3, 11), 24, 37), ((2, 3, 7), 16, 260)]  # leading sizes, K, N
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    lead: tuple[int, ...],
    depth: int,
    width: int,
    dtype: torch.dtype = torch.float32,
    bias: bool = True,
    grad: bool = False,
) -> tuple:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(*lead, depth, generator=generator)
    weight = torch.randn(width, depth, generator=generator) * depth**-0.5
    tensors = [x, weight, 2 * torch.randn(width, generator=generator)][: 2 + bias]
    tensors = [t.to(DEVICE, dtype).requires_grad_(grad) for t in tensors]
    return (*tensors, None)[:3]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_output_within_budget(shape, dtype, bias):
    with poisoned_memory():
        compare("linear_gelu", inputs(*shape, dtype, bias))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
def test_gradients_within_budget(shape, dtype, bias):
    """33 and 42 rows are more than a group: the bias gradient adds several partial sums."""
    with poisoned_memory():
        compare("linear_gelu", inputs(*shape, dtype, bias, grad=True), gradients=True)


def test_far_tails():
    """exp overflows nowhere: gelu(-100) is zero, gelu(100) is 100, and their slopes are 0 and 1."""
    x = torch.tensor([[-100.0], [100.0]], device=DEVICE, requires_grad=True)
    y = TRITON.linear_gelu(x, torch.ones(1, 1, device=DEVICE), None)
    torch.testing.assert_close(y.detach().flatten().cpu(), torch.tensor([0.0, 100.0]))
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0].flatten().cpu(), torch.tensor([0.0, 1.0]))


def test_every_architecture_has_a_way():
    table = {row.arch: row.way for row in launch_configs.LINEAR_GELU}
    assert table.keys() >= set(launch_configs.ARCHITECTURES)
    assert set(table.values()) <= {"cublaslt", "triton"}


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["cublaslt", "triton"])
def test_both_ways_within_budget(way, monkeypatch):
    """The choice in the launch table is about speed alone."""
    # By sys.modules: the package's attribute of this name is the function.
    module = sys.modules["anyflow_kernels.triton_ops.linear_gelu"]
    monkeypatch.setattr(module, "linear_gelu_way", lambda *launch: way)
    compare("linear_gelu", inputs((3, 40), 64, 256, torch.bfloat16))


def test_opcheck():
    h = torch.randn(3, 20, device=DEVICE, requires_grad=True)
    bias = torch.randn(20, device=DEVICE, requires_grad=True)
    ops = torch.ops.anyflow
    for b in (bias, None):
        torch.library.opcheck(ops.bias_gelu, (h, b), test_utils=OPCHECKS)
        backward = (torch.randn(3, 20, device=DEVICE), h.detach(), None if b is None else b.detach())
        torch.library.opcheck(ops.bias_gelu_backward, backward, test_utils=OPCHECKS)


def test_compiles_once_for_changing_lengths():
    calls = [inputs((2, length), 16, 24) for length in (3, 4, 5, 7)]
    assert count_compilations(triton_ops.linear_gelu, calls) <= 2
