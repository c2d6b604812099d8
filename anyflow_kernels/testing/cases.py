"""Inputs of every operation at a few shapes, for `anyflow verify` and for tests.

A case makes its inputs from a seed, in one dtype on one device, and says which of them are written in place and which
have a gradient. Inputs are as strided as in the models; slabs start as NaN.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import AttentionPlan, FarLayout, TimestepMLP

EPS = 1e-6


@dataclass(frozen=True)
class Sizes:
    """A model and a video at one scale; every operation case follows from it.

    Args:
        heads, head_dim, ffn_dim, freq_dim, text_dim: of the model.
        text_tokens: length of the prompt.
        height, width: of the latents.
        chunks: frames per chunk; the last is the newest.
        batch: rows.
    """

    heads: int
    head_dim: int
    ffn_dim: int
    freq_dim: int
    text_dim: int
    text_tokens: int
    height: int
    width: int
    chunks: tuple[int, ...]
    batch: int = 1

    @property
    def dim(self) -> int:
        return self.heads * self.head_dim

    def layout(self, mode: str, **keywords: Any) -> FarLayout:
        """A layout of all chunks."""
        return FarLayout(self.chunks, self.height, self.width, mode=mode, **keywords)


SIZES = {
    # For the Triton interpreter: several tiles of the smallest kind.
    "tiny": Sizes(2, 16, 40, 16, 24, 7, 4, 6, (1, 2, 1, 1), batch=2),
    # For a CPU: ragged, two resolutions, a third of a released model's heads.
    "small": Sizes(4, 64, 384, 64, 48, 37, 12, 18, (1, 3, 3, 2)),
    # For a GPU: AnyFlow-FAR 1.3B at 480p, compressed context and two full chunks in the cache.
    "real": Sizes(12, 128, 8960, 256, 4096, 512, 60, 104, (1, 3, 3, 3)),
}


class Random:
    """Normal tensors from a seed, the same values on every device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self.dtype, self.device = dtype, device

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        """(*shape) in the case's dtype or another."""
        values = torch.randn(*shape, generator=self._generator) * scale
        return values.to(self.device, dtype or self.dtype)

    def fp32(self, *shape: int, scale: float = 1.0) -> Tensor:
        """Modulation, norm weights, times: what a bf16 model keeps in fp32."""
        return self(*shape, dtype=torch.float32, scale=scale)

    def slab(self, *shape: int) -> Tensor:
        """Memory not yet written: NaN."""
        return torch.full(shape, torch.nan, dtype=self.dtype, device=self.device)


@dataclass(frozen=True)
class OperationCase:
    """One operation at one shape.

    Args:
        operation: its name in `anyflow_kernels`.
        shape: for people.
        make: keyword arguments of the operation from a source of random tensors.
        written: arguments that are written in place, compared like results.
        differentiable: arguments whose gradients are compared.
    """

    operation: str
    shape: str
    make: Callable[[Random], dict[str, Any]]
    written: tuple[str, ...] = ()
    differentiable: tuple[str, ...] = ()


def operation_cases(sizes: Sizes) -> Iterator[OperationCase]:
    """The cases of every operation at these sizes."""
    for name, plan in attention_plans(sizes).items():
        yield attention_case(sizes, name, plan)
    yield from _norm_cases(sizes)
    yield from _linear_cases(sizes)
    yield from _patch_cases(sizes)
    yield _step_case(sizes)


def attention_plans(s: Sizes) -> dict[str, AttentionPlan]:
    """Every kind of attention of a model."""
    return {
        "newest chunk": AttentionPlan.from_layout(s.layout("inference")),
        "newest chunk, phantom keys": AttentionPlan.from_layout(s.layout("inference"), phantom_keys=5),
        "prefill": AttentionPlan.from_layout(s.layout("prefill", cached=1)),
        "train, clean copy": AttentionPlan.from_layout(s.layout("train", clean=True)),
        "text": AttentionPlan.dense(s.layout("inference").num_query_tokens, s.text_tokens),
    }


def attention_case(s: Sizes, name: str, plan: AttentionPlan) -> OperationCase:
    """`far_attention` over a plan: q is a slice of the fused projection, k and v are the front of longer slabs."""

    def make(random: Random) -> dict[str, Any]:
        q = random(s.batch, plan.num_queries, 3 * s.dim)[..., : s.dim].unflatten(-1, (s.heads, s.head_dim))
        k, v = (random(s.batch, plan.num_keys + 3, s.heads, s.head_dim)[:, : plan.num_keys] for _ in range(2))
        return {"q": q, "k": k, "v": v, "plan": plan, "return_lse": True}

    shape = f"{name}: {plan.num_queries} x {plan.num_keys}, {s.heads} x {s.head_dim}"
    return OperationCase("far_attention", shape, make, differentiable=("q", "k", "v"))


def _norm_cases(s: Sizes) -> Iterator[OperationCase]:
    layout = s.layout("prefill")
    frames, tokens, dim = sum(f for f, _ in layout.frame_map), layout.num_query_tokens, s.dim
    uses = {
        "modulated": ("shift", "scale"),
        "gated, affine": ("branch", "gate", "weight", "bias"),
        "gated, modulated": ("branch", "gate", "shift", "scale"),
    }
    for name, terms in uses.items():

        def make_norm(random: Random, terms: tuple[str, ...] = terms) -> dict[str, Any]:
            modulation = random.fp32(s.batch, frames, 6, dim)
            tensors = {
                "branch": random(s.batch, tokens, dim),
                "gate": modulation[:, :, 2],
                "shift": modulation[:, :, 0],
                "scale": modulation[:, :, 1],
                "weight": random.fp32(dim),
                "bias": random.fp32(dim),
            }
            chosen = {term: tensors[term] for term in terms}
            return {"x": random(s.batch, tokens, dim), "frame_map": layout.frame_map, "eps": EPS, **chosen}

        yield OperationCase("gated_residual_layer_norm", f"{name}: {tokens} x {dim}", make_norm, (), ("x", *terms))

    queries = s.layout("inference")
    length, offset = queries.num_query_tokens, queries.cache_offset

    def make_qkv(random: Random) -> dict[str, Any]:
        angle = random.fp32(length, s.head_dim // 2, scale=3.0)
        weights = {"q_weight": random(dim), "k_weight": random(dim)}
        rope = (angle.cos(), angle.sin())
        return {"qkv": random(s.batch, length, 3 * dim), **weights, "rope": rope, "heads": s.heads, "eps": EPS}

    def make_append(random: Random) -> dict[str, Any]:
        k, v = (random.slab(s.batch, offset + length + 2, s.heads, s.head_dim) for _ in range(2))
        return {**make_qkv(random), "k_cache": k, "v_cache": v, "offset": offset}

    shape, name = f"{length} x 3 x {s.heads} x {s.head_dim}", "qk_norm_rope_append"
    yield OperationCase(name, shape, make_qkv, differentiable=("qkv", "q_weight", "k_weight"))
    yield OperationCase(name, f"{shape} into a slab at {offset}", make_append, written=("k_cache", "v_cache"))

    def make_text_keys(random: Random) -> dict[str, Any]:
        return {"x": random(s.batch, s.text_tokens, dim), "weight": random(dim), "eps": EPS}

    yield OperationCase("rms_norm", f"{s.text_tokens} x {dim}", make_text_keys, differentiable=("x", "weight"))


def _linear_cases(s: Sizes) -> Iterator[OperationCase]:
    tokens, dim = s.layout("inference").num_query_tokens, s.dim
    for operation, width in (("linear", 3 * dim), ("linear_gelu", s.ffn_dim)):

        def make(random: Random, width: int = width) -> dict[str, Any]:
            weight = random(width, dim, scale=dim**-0.5)
            return {"x": random(s.batch, tokens, dim), "weight": weight, "bias": random(width)}

        yield OperationCase(operation, f"{tokens} x {dim} -> {width}", make, differentiable=("x", "weight", "bias"))

    def make_times(random: Random) -> dict[str, Any]:
        def mlp() -> TimestepMLP:
            first, second = random.fp32(dim, s.freq_dim, scale=s.freq_dim**-0.5), random.fp32(dim, dim, scale=dim**-0.5)
            return TimestepMLP(first, random.fp32(dim), second, random.fp32(dim))

        t = torch.tensor([1000.0, 937.5, 0.0], device=random.device)
        delta = torch.tensor([937.5, 0.0, 0.0], device=random.device)
        projection = {"proj_weight": random(6 * dim, dim, scale=dim**-0.5), "proj_bias": random(6 * dim)}
        return {"t": t, "delta": delta, "time_mlp": mlp(), "delta_mlp": mlp(), **projection, "gate": 0.25}

    trained = ("time_mlp", "delta_mlp", "proj_weight", "proj_bias")
    yield OperationCase("dual_timestep_embedding", f"3 pairs -> 6 x {dim}", make_times, differentiable=trained)


def _patch_cases(s: Sizes) -> Iterator[OperationCase]:
    frames, channels = s.chunks[-1], 16
    grids = {patch: (s.height // patch[1], s.width // patch[2]) for patch in ((1, 2, 2), (1, 4, 4))}
    for patch, (rows, columns) in grids.items():

        def make(random: Random, patch: tuple[int, int, int] = patch) -> dict[str, Any]:
            # As a diffusers pipeline has them: (B, C, F, H, W) in memory.
            latents = random(s.batch, channels, frames, s.height, s.width).transpose(1, 2)
            weight = random(s.dim, channels, *patch, scale=0.1)
            return {"latents": latents, "weight": weight, "bias": random(s.dim), "patch_size": patch}

        def make_slab(
            random: Random, tokens: int = frames * rows * columns, make: Callable[..., dict[str, Any]] = make
        ) -> dict[str, Any]:
            return {**make(random), "out": random.slab(s.batch, tokens + 4, s.dim), "offset": 3}

        shape, trained = f"{frames} x {s.height} x {s.width}, patch {patch}", ("latents", "weight", "bias")
        yield OperationCase("patch_embed", shape, make, differentiable=trained)
        yield OperationCase("patch_embed", f"{shape} into a slab", make_slab, written=("out",))

    rows, columns = grids[1, 2, 2]

    def make_tokens(random: Random) -> dict[str, Any]:
        tokens = random(s.batch, frames * rows * columns, 4 * channels)
        return {"tokens": tokens, "grid": (frames, rows, columns), "patch_size": (1, 2, 2), "channels": channels}

    shape = f"{frames} x {rows} x {columns} tokens"
    yield OperationCase("unpatchify", shape, make_tokens, differentiable=("tokens",))


def _step_case(s: Sizes) -> OperationCase:
    shape = (s.batch, s.chunks[-1], 16, s.height, s.width)

    def make(random: Random) -> dict[str, Any]:
        x, u, u_uncond = (random(*shape) for _ in range(3))
        return {"x": x, "u": u, "u_uncond": u_uncond, "sigma_t": 0.9375, "sigma_r": 0.5, "guidance": 3.5}

    name = "guidance: " + " x ".join(map(str, shape))
    return OperationCase("flow_map_step", name, make, differentiable=("x", "u", "u_uncond"))
