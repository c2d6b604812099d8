"""`flow_map_step` on the triton backend against float64 (reference backend)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_kernels import triton_ops

from .triton_checks import DEVICE, OPCHECKS, TRITON, compare, count_compilations, poisoned_memory

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Noise levels: floats, and device tensors of every shape of the contract, fp32 and fp64, also as an expanded view.
SIGMAS = {
    "floats": (0.9, 0.35),
    "scalars": (torch.tensor(0.9), torch.tensor(0.35, dtype=torch.float64)),
    "tensor and float": (torch.tensor(0.9), 0.35),
    "per sample": (torch.tensor([0.9, 0.8]), torch.tensor([0.1, 0.2])),
    "per frame": (torch.linspace(1, 0.5, 6).reshape(2, 3), torch.linspace(0.4, 0, 6).reshape(2, 3)),
    "expanded": (torch.tensor([[0.9], [0.8]]).expand(2, 3), torch.tensor(0.1)),
}


def inputs(
    shape: tuple[int, ...] = (2, 3, 4, 5, 7), dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x permuted in memory, so that it is no dense tensor; u and u_uncond dense."""
    generator = torch.Generator().manual_seed(0)
    x, u, u_uncond = (torch.randn(*shape, generator=generator).to(DEVICE, dtype) for _ in range(3))
    return x.transpose(1, 2).contiguous().transpose(1, 2), u, u_uncond


def on_device(sigma: Tensor | float) -> Tensor | float:
    return sigma.to(DEVICE) if isinstance(sigma, Tensor) else sigma


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sigmas", SIGMAS)
def test_step_within_budget(sigmas, dtype):
    x, u, _ = inputs(dtype=dtype)
    sigma_t, sigma_r = map(on_device, SIGMAS[sigmas])
    with poisoned_memory():
        compare("flow_map_step", (x, u, sigma_t, sigma_r))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("guidance", [0.0, 1.0, 5.0])
def test_guidance_within_budget(guidance, dtype):
    x, u, u_uncond = inputs(dtype=dtype)
    with poisoned_memory():
        compare("flow_map_step", (x, u, 0.9, 0.35, u_uncond, guidance))


def test_latents_longer_than_a_block():
    """1,300 elements a frame: three blocks in the interpreter's row, the last one partial."""
    x, u, _ = inputs((1, 2, 4, 13, 25))
    levels = torch.tensor([[0.9, 0.7]], device=DEVICE)
    with poisoned_memory():
        compare("flow_map_step", (x, u, levels, levels / 2))


def test_mixed_dtypes_round_once():
    """fp32 latents with a bf16 velocity, as a model in bf16 gives them."""
    x, u, _ = inputs()
    compare("flow_map_step", (x, u.bfloat16(), 0.9, 0.35))


def test_equal_levels_leave_x_unchanged():
    x, u, _ = inputs(dtype=torch.bfloat16)
    assert torch.equal(TRITON.flow_map_step(x, u, 0.5, 0.5), x)


@pytest.mark.parametrize("sigmas", ["floats", "per frame"])
def test_gradients_within_budget(sigmas):
    x, u, u_uncond = (t.requires_grad_() for t in inputs())
    sigma_t, sigma_r = map(on_device, SIGMAS[sigmas])
    compare("flow_map_step", (x, u, sigma_t, sigma_r, u_uncond, 3.0), gradients=True)


def test_rejects_levels_with_gradients():
    x, u, _ = inputs()
    with pytest.raises(ValueError, match="sigma_t"):
        TRITON.flow_map_step(x, u, torch.tensor(0.9, requires_grad=True), 0.1)


def test_rejects_float64():
    x, u, _ = inputs()
    with pytest.raises(TypeError, match=r"u\.dtype"):
        TRITON.flow_map_step(x, u.double(), 0.9, 0.1)


def test_opcheck():
    x, u, u_uncond = (t.contiguous().requires_grad_() for t in inputs((1, 2, 3, 2, 2)))
    op = torch.ops.anyflow.flow_map_step
    levels = torch.tensor([[0.9, 0.7]], device=DEVICE)
    torch.library.opcheck(op, (x, u, u_uncond, levels, levels / 2, 0.0, 3.0), test_utils=OPCHECKS)
    torch.library.opcheck(op, (x, u, None, None, None, 0.5, 1.0), test_utils=OPCHECKS)


def test_compiles_once_for_changing_levels_and_chunks():
    calls = []
    for frames in (2, 3, 5, 4):
        x, u, _ = inputs((1, frames, 2, 3, 4))
        calls.append((x, u, torch.rand((), device=DEVICE), torch.rand((), device=DEVICE), None, 1.0))
    assert count_compilations(triton_ops.flow_map_step, calls) <= 2
