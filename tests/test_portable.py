"""Every operation of the `torch` backend but attention, forward and backward.

Witness: the `reference` backend in float64; budget: `anyflow_kernels.testing.budget`. Inputs are strided where the
contract allows it; slabs start as NaN.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_kernels import TimestepMLP
from anyflow_kernels.testing.budget import relative_error, widened

from .operation_checks import (
    FRAME_MAP,
    REFERENCE,
    TORCH,
    Args,
    assert_within_budget,
    detached,
    every_dtype,
    randn,
    results,
    strided,
    time_args,
)

# gated_residual_layer_norm

TERMS: dict[str, tuple[str, ...]] = {
    "norm alone": (),
    "modulation": ("shift", "scale"),
    "branch": ("branch",),
    "branch, affine": ("branch", "weight", "bias"),
    "gate": ("branch", "gate"),
    "gate, modulation": ("branch", "gate", "shift", "scale"),
    "gate, affine": ("branch", "gate", "weight", "bias"),
    "all": ("branch", "gate", "weight", "bias", "shift", "scale"),
}


def norm_args(terms: tuple[str, ...], dtype: torch.dtype, width: int = 37, affine: torch.dtype = torch.float32) -> Args:
    shapes = {
        "gate": (2, 3, width),
        "shift": (2, 3, width),
        "scale": (2, 3, width),
        "weight": (width,),
        "bias": (width,),
    }
    args: Args = {"x": strided(2, 13, width, dtype=dtype), "frame_map": FRAME_MAP}
    for name in terms:
        if name == "branch":
            args[name] = strided(2, 13, width, dtype=dtype)
        else:
            args[name] = randn(*shapes[name], dtype=affine if name in ("weight", "bias") else torch.float32)
    return args


@every_dtype
@pytest.mark.parametrize("terms", TERMS)
def test_gated_residual_layer_norm(terms: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_within_budget("gated_residual_layer_norm", norm_args(TERMS[terms], dtype))


def test_gated_residual_layer_norm_takes_affine_weights_in_the_dtype_of_x() -> None:
    """A model cast as a whole (`model.to(bf16)`) has bf16 norms; the arithmetic stays fp32."""
    torch.manual_seed(0)
    assert_within_budget("gated_residual_layer_norm", norm_args(TERMS["all"], torch.bfloat16, affine=torch.bfloat16))


def test_gated_residual_layer_norm_of_a_large_mean() -> None:
    """One-pass variances lose everything here."""
    torch.manual_seed(0)
    args = norm_args(TERMS["all"], torch.float32)
    args = detached(args)
    args["x"] += 1000
    assert_within_budget("gated_residual_layer_norm", args)


def test_gated_residual_layer_norm_with_an_empty_run() -> None:
    """Compressed frames smaller than a patch have modulation rows and no tokens."""
    torch.manual_seed(0)
    args = norm_args(TERMS["gate, modulation"], torch.float32) | {"frame_map": ((2, 0), (1, 13))}
    assert_within_budget("gated_residual_layer_norm", args)


def test_gated_residual_layer_norm_leaves_its_inputs_alone() -> None:
    args: Args = detached(norm_args(TERMS["all"], torch.float32))
    before = {k: v.clone() for k, v in args.items() if isinstance(v, Tensor)}
    TORCH.gated_residual_layer_norm(**args)
    assert all(torch.equal(args[name], value) for name, value in before.items())


# qk_norm_rope_append


def rope_args(
    heads: int, head_dim: int, dtype: torch.dtype, length: int = 9, weights: torch.dtype | None = None
) -> Args:
    width = heads * head_dim
    angles = torch.rand(length, head_dim // 2, dtype=torch.float64) * 6
    return {
        "qkv": strided(2, length, 3 * width, dtype=dtype),
        "q_weight": randn(width, dtype=weights or dtype),
        "k_weight": randn(width, dtype=weights or dtype),
        "rope": (angles.cos().float(), angles.sin().float()),
        "heads": heads,
        "eps": 1e-6,
    }


@every_dtype
@pytest.mark.parametrize(("heads", "head_dim"), [(3, 12), (1, 16), (2, 44), (2, 128)])
def test_qk_norm_rope(heads: int, head_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_within_budget("qk_norm_rope_append", rope_args(heads, head_dim, dtype))


def test_qk_norm_rope_takes_fp32_norm_weights() -> None:
    torch.manual_seed(0)
    assert_within_budget("qk_norm_rope_append", rope_args(2, 24, torch.bfloat16, weights=torch.float32))


@every_dtype
@pytest.mark.parametrize("ops", [TORCH, REFERENCE], ids=repr)
def test_append_writes_its_slots_and_no_other(ops: Any, dtype: torch.dtype) -> None:
    """Slabs start as NaN; slots 4 to 13 of 20 get what the call without slabs returns, all others stay NaN."""
    torch.manual_seed(0)
    args = rope_args(3, 12, dtype)
    args = detached(args)
    k_slab, v_slab = torch.full((2, 2, 20, 3, 12), math.nan, dtype=dtype).unbind(0)
    q, k, v = ops.qk_norm_rope_append(**args)
    got = ops.qk_norm_rope_append(**args, k_cache=k_slab, v_cache=v_slab, offset=4)
    assert torch.equal(got, q)
    for slab, want in ((k_slab, k), (v_slab, v)):
        assert torch.equal(slab[:, 4:13], want)
        assert slab[:, :4].isnan().all() and slab[:, 13:].isnan().all()


# rms_norm, linear, linear_gelu


@every_dtype
@pytest.mark.parametrize("width", [1, 37, 256])
def test_rms_norm(width: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = {"x": strided(2, 5, width, dtype=dtype), "weight": randn(width, dtype=dtype), "eps": 1e-6}
    assert_within_budget("rms_norm", args)


@every_dtype
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("operation", ["linear", "linear_gelu"])
def test_linear(operation: str, bias: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = strided(2, 5, 37, dtype=dtype), randn(19, 37, dtype=dtype)
    assert_within_budget(operation, {"x": x, "weight": weight, "bias": randn(19, dtype=dtype) if bias else None})


@every_dtype
@pytest.mark.parametrize("view", ["every second", "expanded", "column"])
@pytest.mark.parametrize("operation", ["linear", "linear_gelu", "patch_embed"])
def test_a_bias_of_any_stride(operation: str, view: str, dtype: torch.dtype) -> None:
    """oneDNN reads a bias as dense: an expanded one was read out of bounds."""
    torch.manual_seed(0)
    bias = {
        "every second": randn(38, dtype=dtype)[::2],
        "expanded": randn(1, dtype=dtype).expand(19),
        "column": randn(19, 3, dtype=dtype)[:, 1],
    }[view]
    if operation == "patch_embed":
        patch = (1, 2, 2)
        args = {"latents": randn(2, 3, 4, 6, 8, dtype=dtype), "weight": randn(19, 4, *patch, dtype=dtype)}
        assert_within_budget(operation, {**args, "bias": bias, "patch_size": patch})
    else:
        x, weight = strided(2, 5, 37, dtype=dtype), randn(19, 37, dtype=dtype)
        assert_within_budget(operation, {"x": x, "weight": weight, "bias": bias})


@pytest.mark.parametrize("operation", ["linear", "linear_gelu"])
def test_linear_of_no_tokens(operation: str) -> None:
    out = getattr(TORCH, operation)(torch.ones(2, 0, 8), torch.ones(3, 8), torch.ones(3))
    assert out.shape == (2, 0, 3)


# dual_timestep_embedding


@every_dtype
def test_dual_timestep_embedding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = time_args(dtype)
    assert_within_budget("dual_timestep_embedding", args)
    assert [x.dtype for x in TORCH.dual_timestep_embedding(**args)] == [torch.float32] * 2


def test_dual_timestep_embedding_follows_its_formula() -> None:
    """A third witness: float64 from the text."""
    torch.manual_seed(0)
    args = {name: widened(value) for name, value in time_args(torch.float32).items()}

    def embed(t: Tensor, mlp: TimestepMLP) -> Tensor:
        angles = t[:, None] / 10000 ** (torch.arange(16, dtype=torch.float64) / 16)
        x = torch.cat([angles.cos(), angles.sin()], 1) @ mlp.weight_1.T + mlp.bias_1
        return x * x.sigmoid() @ mlp.weight_2.T + mlp.bias_2

    want = 0.75 * embed(args["t"], args["time_mlp"]) + 0.25 * embed(args["delta"], args["delta_mlp"])
    rt, proj = TORCH.dual_timestep_embedding(**args)
    assert relative_error(rt, want) < 1e-12
    assert relative_error(proj, want * want.sigmoid() @ args["proj_weight"].T + args["proj_bias"]) < 1e-12


# patch_embed, unpatchify


def patch_args(dtype: torch.dtype, patch: tuple[int, int, int], size: tuple[int, int]) -> Args:
    latents = torch.randn(2, 5, 3, *size).to(dtype).transpose(1, 2)[:, :, 1:4].detach().requires_grad_(True)
    return {
        "latents": latents,  # (2, 3, 3, H, W), strides of another layout
        "weight": randn(11, 3, *patch, dtype=dtype),
        "bias": randn(11, dtype=dtype),
        "patch_size": patch,
    }


@every_dtype
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), (1, 3, 2), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("size", [(8, 12), (9, 7)], ids=str)
def test_patch_embed(size: tuple[int, int], patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_within_budget("patch_embed", patch_args(dtype, patch, size))


@every_dtype
def test_patch_embed_writes_its_slots_and_no_other(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args: Args = detached(patch_args(dtype, (1, 2, 2), (9, 7)))
    want = TORCH.patch_embed(**args)
    slab = torch.full((2, 50, 11), math.nan, dtype=dtype)
    got = TORCH.patch_embed(**args, out=slab, offset=6)
    assert torch.equal(got, want) and got.data_ptr() == slab[:, 6:].data_ptr()
    assert slab[:, :6].isnan().all() and slab[:, 6 + want.shape[1] :].isnan().all()


@every_dtype
@pytest.mark.parametrize("patch", [(1, 2, 2), (1, 4, 4), (2, 1, 3)], ids=str)
def test_unpatchify(patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    grid, channels = (2, 3, 5), 7
    tokens = strided(2, math.prod(grid), math.prod(patch) * channels, dtype=dtype)
    args = {"tokens": tokens, "grid": grid, "patch_size": patch, "channels": channels}
    got, want = results(TORCH, "unpatchify", args), results(REFERENCE, "unpatchify", args)
    assert all(torch.equal(got[name], want[name]) for name in want)


# flow_map_step


@every_dtype
@pytest.mark.parametrize("guidance", [None, 1.0, 4.5], ids=str)
@pytest.mark.parametrize("shape", [None, (), (2,), (2, 3)], ids=["float", "0-d", "B", "BF"])
def test_flow_map_step(shape: tuple[int, ...] | None, guidance: float | None, dtype: torch.dtype) -> None:
    """A third witness: float64 from the text."""
    torch.manual_seed(0)
    x, u, u_uncond = (strided(2, 3, 4, 5, 6, dtype=dtype) for _ in range(3))
    sigma_t, sigma_r = (0.9, 0.35) if shape is None else torch.rand(2, *shape).unbind(0)
    extra: Args = {} if guidance is None else {"u_uncond": u_uncond, "guidance": guidance}
    got = TORCH.flow_map_step(x, u, sigma_t, sigma_r, **extra)
    a, b = (
        torch.as_tensor(s, dtype=torch.float64).reshape(*(shape or ()), *[1] * (5 - len(shape or ())))
        for s in (sigma_t, sigma_r)
    )
    velocity = u.double() if guidance is None else u_uncond.double() + guidance * (u.double() - u_uncond.double())
    want = x.double() - (a - b) * velocity
    assert got.dtype == dtype
    assert relative_error(got, want) <= torch.finfo(dtype).eps
    inputs = [x, u] + ([u_uncond] if guidance not in (None, 1.0) else [])
    grads, wanted = (torch.autograd.grad(out.double().square().sum(), inputs) for out in (got, want))
    for grad, expected in zip(grads, wanted, strict=True):
        assert relative_error(grad, expected) <= 4 * torch.finfo(dtype).eps


def test_flow_map_step_rounds_the_difference_of_the_sigmas_once() -> None:
    """Neighbouring sigmas in float64, as a schedule has them: an fp32 difference would keep three digits."""
    x, u = torch.zeros(1, 1, 1, 1, 1), torch.ones(1, 1, 1, 1, 1)
    step = TORCH.flow_map_step(x, u, 0.9, 0.9 - 1e-5)
    assert abs(-float(step) / 1e-5 - 1) < 1e-6
