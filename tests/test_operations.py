"""The contract of every operation, checked alike for every backend, and how backends are chosen."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import anyflow_kernels
from anyflow_kernels import AttentionPlan, TimestepMLP, available_backends, load_ops
from anyflow_kernels.operations import OPERATIONS
from anyflow_kernels.testing.budget import relative_error

from .operation_checks import FRAME_MAP, REFERENCE, TORCH, Args, time_args

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
    ("patch_embed", "out", {"out": torch.ones(2, 5, 60).transpose(1, 2)}),
    ("patch_embed", "out", {"out": torch.ones(60, 5)}),
    ("patch_embed", "out", {"out": torch._neg_view(torch.ones(2, 60, 5))}),
    ("patch_embed", "bias", {"bias": torch.ones(5).double()}),
    ("patch_embed", "weight", {"weight": torch.ones(5, 4, 1, 2, 2, device="meta")}),
    ("patch_embed", "weight", {"weight": torch.ones(5, 4, 1, 2, 2, dtype=torch.long)}),
    ("patch_embed", "patch_size", {"patch_size": (2, 2)}),
    ("patch_embed", "patch_size", {"patch_size": (1, 0, 2)}),
    ("patch_embed", "offset", {"offset": -1}),
    ("patch_embed", "offset", {"offset": 13}),
    ("patch_embed", "offset", {"out": None}),
    ("unpatchify", "tokens", {"tokens": torch.ones(2, 5, 12)}),
    ("unpatchify", "tokens", {"tokens": torch.ones(2, 6, 12, dtype=torch.int32)}),
    ("unpatchify", "tokens", {"channels": 4}),
    ("unpatchify", "channels", {"channels": 0}),
    ("unpatchify", "grid", {"grid": (6,)}),
    ("unpatchify", "patch_size", {"patch_size": (4, 1)}),
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


@pytest.mark.parametrize("change", [{"offset": 3}, {"offset": -1}, {"bias": torch.ones(4)}], ids=str)
def test_a_refused_patch_embedding_leaves_the_slab_as_it_was(change: Args) -> None:
    arguments = {**ONES["patch_embed"](), **change}
    slab = torch.full((2, 3, 5), torch.nan)
    with pytest.raises(ValueError, match="got"):
        TORCH.patch_embed(**{**arguments, "out": slab})
    assert slab.isnan().all()


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
    """`load_ops` alone imports it, when asked by name."""
    packages = [Path(anyflow_kernels.__file__).parent, Path(anyflow_kernels.__file__).parent.parent / "anyflow_runtime"]
    importing = re.compile(
        r"^\s*(from .*\breference\b import|from .* import .*\breference\b|import .*\breference\b)", re.M
    )
    named = {path for package in packages for path in package.rglob("*.py") if importing.search(path.read_text())}
    assert not named


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_is_a_function_of_the_package(name):
    """Also where a module has its name, before and after it is loaded."""

    load_ops("torch")
    assert callable(getattr(anyflow_kernels, name))
    if name == "patch_embed":
        x, weight = torch.randn(1, 2, 3, 4, 4), torch.randn(5, 3, 1, 2, 2)
        got = anyflow_kernels.patch_embed(x, weight, None, (1, 2, 2))
        assert torch.equal(got, load_ops("auto").patch_embed(x, weight, None, (1, 2, 2)))
