"""Every operation of the `torch` backend, forward and backward.

Witness: the `reference` backend in float64. Budget: error <= 2 x the error of `reference` in the same dtype + one
rounding step. Inputs are strided where the contract allows it; slabs start as NaN.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import anyflow_kernels
from anyflow_kernels import AttentionPlan, FarLayout, TimestepMLP, available_backends, load_ops
from anyflow_kernels.operations import OPERATIONS

from .parity import relative_error

TORCH: Any = load_ops("torch")
REFERENCE: Any = load_ops("reference")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
Args = dict[str, Any]

every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


def randn(*shape: int, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_(grad)


def strided(*shape: int, dtype: torch.dtype) -> Tensor:
    """A leaf whose batches and tokens are not contiguous: every second token of a longer, wider tensor."""
    wide = torch.randn(shape[0], 2 * shape[1] + 1, *shape[2:-1], shape[-1] + 3).to(dtype)
    return wide[:, 1::2, ..., 2 : 2 + shape[-1]].detach().requires_grad_(True)


def widen(value: Any) -> Any:
    """The same numbers in float64, as fresh leaves."""
    if isinstance(value, Tensor):
        return value.detach().double().requires_grad_(value.requires_grad)
    if isinstance(value, TimestepMLP):
        return TimestepMLP(*(widen(v) for v in value))
    if isinstance(value, tuple) and any(isinstance(v, Tensor) for v in value):
        return tuple(widen(v) for v in value)
    return value


def leaves(args: Args) -> dict[str, Tensor]:
    """Inputs that want a gradient, by name."""
    named: dict[str, Tensor] = {}
    for name, value in args.items():
        parts = value if isinstance(value, tuple) else (value,)
        named |= {f"{name}[{i}]": v for i, v in enumerate(parts) if isinstance(v, Tensor) and v.requires_grad}
    return named


def run(ops: Any, operation: str, args: Args) -> dict[str, Tensor]:
    """Outputs, and the gradients of all leaves for the same random cotangents."""
    out = getattr(ops, operation)(**args)
    outputs = out if isinstance(out, tuple) else (out,)
    results = {f"output {i}": o for i, o in enumerate(outputs)}
    differentiable = [o for o in outputs if o.requires_grad]
    if differentiable:
        generator = torch.Generator().manual_seed(5)
        seeds = [torch.randn(o.shape, generator=generator).bfloat16().to(o.dtype) for o in differentiable]
        wanted = leaves(args)
        grads = torch.autograd.grad(differentiable, list(wanted.values()), seeds, allow_unused=True)
        unused = [name for name, grad in zip(wanted, grads, strict=True) if grad is None]
        assert not unused, f"no gradient for {unused}"
        results |= {f"gradient of {name}": grad for name, grad in zip(wanted, grads, strict=True)}
    return results


def assert_within_budget(operation: str, args: Args, steps: float = 1.0) -> None:
    """`steps`: rounding steps of the gradients that the reference does not take."""
    high = run(REFERENCE, operation, {name: widen(value) for name, value in args.items()})
    low, got = run(REFERENCE, operation, args), run(TORCH, operation, args)
    assert got.keys() == low.keys() == high.keys()

    def check(name: str, out: Tensor, rounding_steps: float) -> None:
        assert out.shape == high[name].shape, name
        assert out.dtype == low[name].dtype, name
        budget = 2 * relative_error(low[name], high[name]) + rounding_steps * torch.finfo(out.dtype).eps
        error = relative_error(out, high[name])
        assert error <= budget, f"{name}: error {error:.2e} against float64, budget {budget:.2e}"

    for name, out in got.items():
        check(name, out, steps if name.startswith("gradient") else 1.0)
    with torch.no_grad():  # a path of its own: in place, or through another library
        again = run(TORCH, operation, {k: v.detach() if isinstance(v, Tensor) else v for k, v in args.items()})
    for name, out in again.items():
        check(name, out, 1.0)


# far_attention

PLANS = {
    "dense": AttentionPlan.dense(7, 19),
    "one query": AttentionPlan.dense(1, 5),
    "phantom": AttentionPlan.dense(7, 19, phantom_keys=11),
    "train": AttentionPlan.from_layout(FarLayout((1, 2, 1), 4, 6, full_chunk_limit=2)),
    "clean": AttentionPlan.from_layout(FarLayout((2, 1, 2, 1), 5, 7, full_chunk_limit=3, clean=True)),
    "prefill": AttentionPlan.from_layout(FarLayout((1, 2, 1, 1), 4, 6, mode="prefill", cached=1)),
    "inference": AttentionPlan.from_layout(FarLayout((1, 2, 1, 2), 4, 6, mode="inference"), phantom_keys=3),
}


def assert_attention_within_budget(args: Args) -> None:
    """A flash backward recomputes exp(score - LSE): rounding the LSE costs every probability |LSE| steps."""
    lse = REFERENCE.far_attention(**{**args, "return_lse": True})[1]
    assert_within_budget("far_attention", args, steps=1 + float(lse.abs().max()))


def attention_args(plan: AttentionPlan, heads: int, head_dim: int, dtype: torch.dtype, **extra: Any) -> Args:
    q = strided(2, plan.num_queries, heads, head_dim, dtype=dtype)
    k, v = (strided(2, plan.num_keys, heads, head_dim, dtype=dtype) for _ in range(2))
    return {"q": q, "k": k, "v": v, "plan": plan, **extra}


@every_dtype
@pytest.mark.parametrize("name", PLANS)
def test_far_attention(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert_attention_within_budget(attention_args(PLANS[name], 3, 24, dtype))


@pytest.mark.parametrize("head_dim", [12, 16, 40, 44, 64, 80, 96, 128])
def test_far_attention_head_dims(head_dim: int) -> None:
    torch.manual_seed(0)
    assert_attention_within_budget(attention_args(PLANS["clean"], 2, head_dim, torch.float32))


@every_dtype
@pytest.mark.parametrize("name", ["phantom", "clean"])
def test_far_attention_log_sum_exp(name: str, dtype: torch.dtype) -> None:
    """Phantom keys included; fp32, without a gradient, beside the same output."""
    torch.manual_seed(0)
    args = attention_args(PLANS[name], 3, 24, dtype, return_lse=True, scale=0.3)
    assert_attention_within_budget(args)
    out, lse = TORCH.far_attention(**args)
    assert lse.dtype == torch.float32 and lse.shape == (2, 3, PLANS[name].num_queries)
    assert out.requires_grad and not lse.requires_grad


def test_far_attention_phantom_keys_are_zero_logits() -> None:
    """Not through the backends' own zero rows: the denominator grows by phantom_keys * exp(0)."""
    torch.manual_seed(0)
    args = attention_args(AttentionPlan.dense(7, 19), 2, 16, torch.float64)
    out, lse = TORCH.far_attention(**args, return_lse=True)
    padded = TORCH.far_attention(**{**args, "plan": AttentionPlan.dense(7, 19, phantom_keys=11)})
    share = lse.double().exp() / (lse.double().exp() + 11)
    assert relative_error(padded, out * share.transpose(1, 2).unsqueeze(-1)) < 1e-6  # the LSE is fp32


def test_far_attention_never_reads_beyond_its_ranges() -> None:
    """Keys no query sees, and the rest of a slab, may hold anything."""
    torch.manual_seed(0)
    slab = torch.randn(2, 2, 12, 3, 16)
    want = TORCH.far_attention(torch.ones(2, 4, 3, 16), *slab[:, :, [0, 1, 5, 6]], AttentionPlan.dense(4, 4))
    slab[:, :, 2:5] = slab[:, :, 7:] = math.nan
    plan = AttentionPlan(4, 7, ((0, 4, ((0, 2), (5, 7))),))
    got = TORCH.far_attention(torch.ones(2, 4, 3, 16), slab[0][:, :7], slab[1][:, :7], plan)
    assert relative_error(got, want) < 1e-6


@pytest.mark.parametrize("ops", [TORCH, REFERENCE], ids=repr)
def test_far_attention_of_parameters_without_gradients(ops: Any) -> None:
    """Under no_grad a leaf still says requires_grad, which CPU flex_attention alone refuses."""
    torch.manual_seed(0)
    args = attention_args(PLANS["dense"], 2, 16, torch.float32)
    with torch.no_grad():
        got = ops.far_attention(**args)
    assert relative_error(got, ops.far_attention(**args)) < 1e-6


def test_far_attention_without_queries() -> None:
    out, lse = TORCH.far_attention(
        torch.ones(2, 0, 3, 16),
        torch.ones(2, 5, 3, 16),
        torch.ones(2, 5, 3, 16),
        AttentionPlan(0, 5, ()),
        return_lse=True,
    )
    assert out.shape == (2, 0, 3, 16) and lse.shape == (2, 3, 0)


# gated_residual_layer_norm

FRAME_MAP = ((2, 3), (1, 7))
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
    args = {name: value.detach() if isinstance(value, Tensor) else value for name, value in args.items()}
    args["x"] += 1000
    assert_within_budget("gated_residual_layer_norm", args)


def test_gated_residual_layer_norm_with_an_empty_run() -> None:
    """Compressed frames smaller than a patch have modulation rows and no tokens."""
    torch.manual_seed(0)
    args = norm_args(TERMS["gate, modulation"], torch.float32) | {"frame_map": ((2, 0), (1, 13))}
    assert_within_budget("gated_residual_layer_norm", args)


def test_gated_residual_layer_norm_leaves_its_inputs_alone() -> None:
    args: Args = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in norm_args(TERMS["all"], torch.float32).items()
    }
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
    args = {k: v.detach() if isinstance(v, Tensor) else v for k, v in args.items()}
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


@pytest.mark.parametrize("operation", ["linear", "linear_gelu"])
def test_linear_of_no_tokens(operation: str) -> None:
    out = getattr(TORCH, operation)(torch.ones(2, 0, 8), torch.ones(3, 8), torch.ones(3))
    assert out.shape == (2, 0, 3)


# dual_timestep_embedding


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


@every_dtype
def test_dual_timestep_embedding(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    args = time_args(dtype)
    assert_within_budget("dual_timestep_embedding", args)
    assert [x.dtype for x in TORCH.dual_timestep_embedding(**args)] == [torch.float32] * 2


def test_dual_timestep_embedding_follows_its_formula() -> None:
    """A third witness: float64 from the text."""
    torch.manual_seed(0)
    args = {name: widen(value) for name, value in time_args(torch.float32).items()}

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
    args: Args = {
        k: v.detach() if isinstance(v, Tensor) else v for k, v in patch_args(dtype, (1, 2, 2), (9, 7)).items()
    }
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
    got, want = run(TORCH, "unpatchify", args), run(REFERENCE, "unpatchify", args)
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


# bad input, for every operation

ONES: dict[str, Callable[[], Args]] = {
    "far_attention": lambda: {
        "q": torch.ones(2, 3, 2, 8), "k": torch.ones(2, 5, 2, 8), "v": torch.ones(2, 5, 2, 8),
        "plan": AttentionPlan.dense(3, 5),
    },
    "gated_residual_layer_norm": lambda: {
        "x": torch.ones(2, 13, 8), "frame_map": FRAME_MAP, "branch": torch.ones(2, 13, 8), "gate": torch.ones(2, 3, 8),
        "shift": torch.ones(2, 3, 8), "scale": torch.ones(2, 3, 8), "weight": torch.ones(8), "bias": torch.ones(8),
    },
    "qk_norm_rope_append": lambda: {
        "qkv": torch.ones(2, 3, 48), "q_weight": torch.ones(16), "k_weight": torch.ones(16),
        "rope": (torch.ones(3, 4), torch.ones(3, 4)), "heads": 2, "eps": 1e-6,
        "k_cache": torch.ones(2, 6, 2, 8), "v_cache": torch.ones(2, 6, 2, 8), "offset": 3,
    },
    "rms_norm": lambda: {"x": torch.ones(2, 8), "weight": torch.ones(8), "eps": 1e-6},
    "linear": lambda: {"x": torch.ones(2, 8), "weight": torch.ones(3, 8), "bias": torch.ones(3)},
    "linear_gelu": lambda: {"x": torch.ones(2, 8), "weight": torch.ones(3, 8), "bias": torch.ones(3)},
    "dual_timestep_embedding": lambda: time_args(torch.float32),
    "patch_embed": lambda: {
        "latents": torch.ones(2, 3, 4, 8, 8), "weight": torch.ones(5, 4, 1, 2, 2), "bias": torch.ones(5),
        "patch_size": (1, 2, 2), "out": torch.ones(2, 60, 5), "offset": 12,
    },
    "unpatchify": lambda: {"tokens": torch.ones(2, 6, 12), "grid": (1, 2, 3), "patch_size": (1, 2, 2), "channels": 3},
    "flow_map_step": lambda: {
        "x": torch.ones(2, 3, 4, 5, 6), "u": torch.ones(2, 3, 4, 5, 6), "sigma_t": torch.ones(2, 3), "sigma_r": 0.5,
        "u_uncond": torch.ones(2, 3, 4, 5, 6), "guidance": 2.0,
    },
}  # fmt: skip


def mlp_of_ones(hidden: int, freq_dim: int, width: int) -> TimestepMLP:
    shapes = ((hidden, freq_dim), (hidden,), (width, hidden), (width,))
    return TimestepMLP(*(torch.ones(*shape) for shape in shapes))


BAD: list[tuple[str, str, Args]] = [
    ("far_attention", "q", {"q": torch.ones(2, 3, 16)}),
    ("far_attention", "q", {"q": torch.ones(2, 3, 2, 8, dtype=torch.long)}),
    ("far_attention", "q", {"q": torch.ones(2, 4, 2, 8)}),
    ("far_attention", "k", {"k": torch.ones(2, 6, 2, 8)}),
    ("far_attention", "k", {"k": torch.ones(1, 5, 2, 8)}),
    ("far_attention", "v", {"v": torch.ones(2, 5, 2, 4)}),
    ("far_attention", "k", {"k": torch.ones(2, 5, 2, 8, dtype=torch.double)}),
    ("far_attention", "v", {"v": torch.ones(2, 5, 2, 8, dtype=torch.bfloat16)}),
    ("gated_residual_layer_norm", "x", {"x": torch.ones(13, 8)}),
    ("gated_residual_layer_norm", "frame_map", {"frame_map": ((2, 3),)}),
    ("gated_residual_layer_norm", "branch", {"branch": torch.ones(2, 12, 8)}),
    ("gated_residual_layer_norm", "branch", {"branch": torch.ones(2, 13, 8).bfloat16()}),
    ("gated_residual_layer_norm", "gate", {"branch": None}),
    ("gated_residual_layer_norm", "gate", {"gate": torch.ones(2, 13, 8)}),
    ("gated_residual_layer_norm", "shift", {"shift": None}),
    ("gated_residual_layer_norm", "scale", {"scale": torch.ones(2, 3, 1)}),
    ("gated_residual_layer_norm", "weight", {"bias": None}),
    ("gated_residual_layer_norm", "bias", {"bias": torch.ones(7)}),
    ("qk_norm_rope_append", "qkv", {"qkv": torch.ones(3, 48)}),
    ("qk_norm_rope_append", "qkv", {"qkv": torch.ones(2, 3, 47)}),
    ("qk_norm_rope_append", "qkv", {"heads": 3}),
    ("qk_norm_rope_append", "heads", {"heads": 0}),
    ("qk_norm_rope_append", "q_weight", {"q_weight": torch.ones(8)}),
    ("qk_norm_rope_append", "k_weight", {"k_weight": torch.ones(2, 8)}),
    ("qk_norm_rope_append", "rope", {"rope": (torch.ones(3, 8), torch.ones(3, 4))}),
    ("qk_norm_rope_append", "rope", {"rope": (torch.ones(3, 4), torch.ones(2, 4))}),
    ("qk_norm_rope_append", "k_cache", {"v_cache": None}),
    ("qk_norm_rope_append", "k_cache", {"k_cache": torch.ones(1, 6, 2, 8)}),
    ("qk_norm_rope_append", "v_cache", {"v_cache": torch.ones(2, 6, 1, 16)}),
    ("qk_norm_rope_append", "v_cache", {"v_cache": torch.ones(2, 6, 2, 8).half()}),
    ("qk_norm_rope_append", "offset", {"offset": 4}),
    ("qk_norm_rope_append", "offset", {"offset": -1}),
    ("rms_norm", "weight", {"weight": torch.ones(7)}),
    ("linear", "weight", {"weight": torch.ones(3, 7)}),
    ("linear", "weight", {"weight": torch.ones(3, 8).bfloat16(), "bias": torch.ones(3).bfloat16()}),
    ("linear", "bias", {"bias": torch.ones(4)}),
    ("linear", "bias", {"bias": torch.ones(3).bfloat16()}),
    ("linear_gelu", "weight", {"weight": torch.ones(8)}),
    ("linear_gelu", "bias", {"bias": torch.ones(2)}),
    ("dual_timestep_embedding", "t", {"t": torch.ones(5, 1)}),
    ("dual_timestep_embedding", "delta", {"delta": torch.ones(4)}),
    ("dual_timestep_embedding", "time_mlp", {"time_mlp": mlp_of_ones(20, 4, 9)}),
    ("dual_timestep_embedding", "delta_mlp", {"delta_mlp": mlp_of_ones(20, 3, 20)}),
    ("dual_timestep_embedding", "proj_bias", {"proj_bias": torch.ones(20)}),
    ("patch_embed", "latents", {"latents": torch.ones(2, 3, 4, 8)}),
    ("patch_embed", "latents", {"latents": torch.ones(2, 3, 4, 8, 8, dtype=torch.int32)}),
    ("patch_embed", "weight", {"weight": torch.ones(5, 3, 1, 2, 2)}),
    ("patch_embed", "bias", {"bias": torch.ones(4)}),
    ("patch_embed", "weight", {"patch_size": (1, 4, 4)}),
    ("patch_embed", "out", {"out": torch.ones(2, 60, 6)}),
    ("patch_embed", "out", {"out": torch.ones(2, 60, 5).half()}),
    ("patch_embed", "offset", {"offset": 13}),
    ("patch_embed", "offset", {"out": None}),
    ("unpatchify", "tokens", {"tokens": torch.ones(2, 5, 12)}),
    ("unpatchify", "tokens", {"channels": 4}),
    ("flow_map_step", "u", {"u": torch.ones(2, 3, 4, 5, 1)}),
    ("flow_map_step", "u_uncond", {"u_uncond": torch.ones(1, 3, 4, 5, 6)}),
    ("flow_map_step", "guidance", {"u_uncond": None}),
    ("flow_map_step", "sigma_t", {"sigma_t": torch.ones(3)}),
    ("flow_map_step", "sigma_r", {"sigma_r": torch.ones(2, 3, 4)}),
]  # fmt: skip


@pytest.mark.parametrize("ops", [TORCH, REFERENCE], ids=repr)
@pytest.mark.parametrize(("operation", "name", "change"), BAD, ids=[f"{o}-{n}-{i}" for i, (o, n, _) in enumerate(BAD)])
def test_bad_argument_is_named(operation: str, name: str, change: Args, ops: Any) -> None:
    """Both backends refuse the same calls before any work; the message says what came and what was expected."""
    with pytest.raises((ValueError, TypeError), match=rf"^{name}\b.*: got .*expected"):
        getattr(ops, operation)(**{**ONES[operation](), **change})


def test_every_operation_has_bad_and_good_input_here() -> None:
    assert set(ONES) == {operation for operation, _, _ in BAD} == set(OPERATIONS)
    for operation, arguments in ONES.items():
        getattr(TORCH, operation)(**arguments())


# backends


def test_module_functions_are_those_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANYFLOW_BACKEND", "reference")
    assert load_ops().backend == "reference" and load_ops("torch").backend == "torch"
    x = torch.randn(3, 8)
    assert torch.equal(anyflow_kernels.rms_norm(x, torch.ones(8), 0.0), REFERENCE.rms_norm(x, torch.ones(8), 0.0))


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backend: got 'cuda', expected 'auto' or one of"):
        load_ops("cuda")


def test_a_backend_that_cannot_run_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """And does not fall back."""
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    anyflow_kernels._load.cache_clear()
    missing = available_backends()["triton"]
    assert missing is not None
    with pytest.raises(RuntimeError, match="backend 'triton' cannot run here: "):
        load_ops("triton")
    assert available_backends()["torch"] is None


def test_reference_layer_norm_is_torchs() -> None:
    """The witness itself, once, against PyTorch."""
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 13, 37).double(), torch.randn(37).double(), torch.randn(37).double()
    y = REFERENCE.gated_residual_layer_norm(x, FRAME_MAP, weight=weight, bias=bias)[1]
    assert relative_error(y, F.layer_norm(x, (37,), weight, bias, 1e-6)) < 1e-14


def test_nothing_that_ships_imports_the_reference() -> None:
    """It is named by `load_ops`, which imports it when asked, and by `testing`."""
    packages = [Path(anyflow_kernels.__file__).parent, Path(anyflow_kernels.__file__).parent.parent / "anyflow_runtime"]
    importing = re.compile(
        r"^\s*(from .*\breference\b import|from .* import .*\breference\b|import .*\breference\b)", re.M
    )
    named = {path for package in packages for path in package.rglob("*.py") if importing.search(path.read_text())}
    assert {path.parent.name for path in named} == {"testing"}
