"""`dual_timestep_embedding` on the triton backend against float64 (reference backend)."""

from __future__ import annotations

import math

import pytest
import torch

from anyflow_kernels import TimestepMLP, triton_ops

from .triton_checks import DEVICE, OPCHECKS, TRITON, compare, count_compilations, poisoned_memory

SHAPES = [(1, 8, 2), (3, 24, 16), (6, 130, 64), (2, 48, 256)]  # N, D, freq_dim


def inputs(
    rows: int, width: int, freq_dim: int, mlp_dtype: torch.dtype = torch.float32, dtype: torch.dtype = torch.float32,
    grad: bool = False, top: float = 1000.0,
) -> tuple:  # fmt: skip
    generator = torch.Generator().manual_seed(rows * width)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)

    def mlp() -> TimestepMLP:
        shapes = ((width, freq_dim), (width,), (width, width), (width,))
        return TimestepMLP(*(random(*s).to(DEVICE, mlp_dtype).requires_grad_(grad) for s in shapes))

    times = [(torch.rand(rows, generator=generator) * top).to(DEVICE).requires_grad_(grad) for _ in range(2)]
    times[0].detach()[:1] = top  # the first step of every rollout
    projection = [random(6 * width, width), random(6 * width)]
    projection = [p.to(DEVICE, dtype).requires_grad_(grad) for p in projection]
    return *times, mlp(), mlp(), *projection, 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mlp_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_within_budget(shape, mlp_dtype, dtype):
    with poisoned_memory():
        compare("dual_timestep_embedding", inputs(*shape, mlp_dtype, dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_gradients_within_budget(shape, dtype):
    """Of every weight, and of t and delta."""
    compare("dual_timestep_embedding", inputs(*shape, dtype, dtype, grad=True), gradients=True)


@pytest.mark.parametrize("top", [0.0, 1.0, -1000.0])
def test_small_and_negative_times(top):
    """t = 0 is the cache step; delta = t - r may have either sign."""
    compare("dual_timestep_embedding", inputs(3, 24, 64, top=top))


def test_phase_is_exact_to_fp32():
    """cos and sin of angles up to 1000 rad, read back through identity weights: no digit lost to range reduction."""
    rows, freq_dim = 5, 8
    t = torch.tensor([0.0, 0.5, 31.4159, 777.7, 1000.0], device=DEVICE)
    zeros = torch.zeros(freq_dim, device=DEVICE)
    eye = torch.eye(freq_dim, device=DEVICE)
    # silu(x + 40) = x + 40 to fp32 rounding of 40; the second layer subtracts it again.
    mlp = TimestepMLP(eye, zeros + 40.0, eye, zeros - 40.0)
    rt, _ = TRITON.dual_timestep_embedding(t, t, mlp, mlp, eye, zeros, 0.25)
    frequency = 10000.0 ** (-torch.arange(freq_dim // 2, dtype=torch.float64) / (freq_dim // 2))
    angle = t.double().cpu()[:, None] * frequency
    expected = torch.cat([angle.cos(), angle.sin()], dim=-1)
    # A frequency and a phase are each rounded to fp32: 2 * 1000 * 2^-24; 40 + x costs 2 * 40 * 2^-24 more.
    assert rt.shape == (rows, freq_dim)
    assert float((rt.double().cpu() - expected).abs().max()) < 3 * (1000 + 40) * 2**-24


def test_empty():
    t, delta, *rest = inputs(2, 8, 4)
    rt, proj = TRITON.dual_timestep_embedding(t[:0], delta[:0], *rest)
    assert rt.shape == (0, 8) and proj.shape == (0, 48)


def test_outputs_are_fp32_whatever_the_weights():
    rt, proj = TRITON.dual_timestep_embedding(*inputs(2, 8, 4, torch.bfloat16, torch.bfloat16))
    assert rt.dtype == proj.dtype == torch.float32


def test_opcheck():
    t, delta, time_mlp, delta_mlp, weight, bias, gate = inputs(2, 8, 4, grad=True)
    args = (t, delta, *time_mlp, *delta_mlp, weight, bias, gate)
    torch.library.opcheck(torch.ops.anyflow.dual_timestep_embedding, args, test_utils=OPCHECKS)


def test_compiles_once_for_changing_row_counts():
    calls = [inputs(rows, 8, 4) for rows in (2, 3, 5, 4)]
    assert count_compilations(triton_ops.dual_timestep_embedding, calls) <= 2


def test_silu_of_large_negative_is_zero():
    """exp(-x) overflows to infinity and the quotient to zero: no NaN."""
    t, delta, time_mlp, _, weight, bias, gate = inputs(1, 8, 4)
    frozen = TimestepMLP(time_mlp.weight_1 * 0, time_mlp.bias_1 * 0 - 80.0, time_mlp.weight_2, time_mlp.bias_2)
    rt, _ = TRITON.dual_timestep_embedding(t, delta, frozen, frozen, weight, bias, gate)
    torch.testing.assert_close(rt[0], frozen.bias_2)
    assert math.isfinite(float(rt.sum()))
