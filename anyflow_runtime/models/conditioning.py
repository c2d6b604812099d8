"""Conditions of the model: source and target time per frame, text and image tokens.

Source: AnyFlow (arXiv 2605.13724), the gated dual-timestep embedding; parameter names of
`AnyFlowDualTimestepTextImageEmbedding` in diffusers' src/diffusers/models/transformers/transformer_anyflow.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow_kernels import Ops, TimestepMLP
from anyflow_kernels.formulas import sinusoid
from anyflow_kernels.launch_tables import to_device

from .layers import ImageEmbedding, TextProjection, TimestepEmbedding
from .parameters import is_plain, parameter_dtype

DELTA_TYPES = ("r", "t-r")
TimeMemo = dict[tuple[float, float], tuple[Tensor, ...]]  # (t, delta) to the rows (D,) and (6D,)


class ConditionEmbedder(nn.Module):
    """Parameters of the time, text and image conditions."""

    def __init__(
        self, dim: int, freq_dim: int, text_dim: int, image_dim: int | None, gate_value: float, deltatime_type: str
    ) -> None:
        super().__init__()
        if deltatime_type not in DELTA_TYPES:
            raise ValueError(f"deltatime_type: got {deltatime_type!r}, expected one of {DELTA_TYPES}")
        if not 0.0 <= gate_value <= 1.0:
            raise ValueError(f"gate_value: got {gate_value}, expected 0 <= gate_value <= 1")
        self.time_embedder = TimestepEmbedding(freq_dim, dim)
        self.delta_embedder = TimestepEmbedding(freq_dim, dim)
        self.time_proj = nn.Linear(dim, 6 * dim)
        self.text_embedder = TextProjection(text_dim, dim)
        self.image_embedder = None if image_dim is None else ImageEmbedding(image_dim, dim)


def embed_times(
    embedder: Any, config: Any, ops: Ops, t: Tensor, r: Tensor, memo: TimeMemo | None = None
) -> tuple[Tensor, Tensor]:
    """The time condition of each frame.

    Times on the CPU are embedded once per distinct pair, and with a memo once per rollout; to find the distinct ones
    among times on a GPU would stall its queue for a few rows of a small GEMM, so those are all embedded.

    Args:
        embedder: a condition embedder, ours or diffusers'.
        t, r: (B, F), source and target time on the 0..1000 scale; never rounded to bf16.
        memo: the pairs embedded so far, extended here; unused where gradients are wanted.

    Returns:
        (B, F, D), the head's condition, and (B, F, 6, D), the blocks' modulation, both fp32.
    """
    dtype = torch.float64 if embedder.time_proj.weight.dtype == torch.float64 else torch.float32
    t, r = t.to(dtype), r.to(dtype)
    delta = r if config.deltatime_type == "r" else t - r
    if t.device.type != "cpu":
        rt, proj = _embed_pairs(embedder, config, ops, t.flatten(), delta.flatten())
    else:
        pairs = list(zip(t.flatten().tolist(), delta.flatten().tolist(), strict=True))
        rows: TimeMemo = {} if memo is None or torch.is_grad_enabled() else memo
        new = [pair for pair in dict.fromkeys(pairs) if pair not in rows]
        if new:
            device = embedder.time_proj.weight.device
            times = torch.tensor(new, dtype=dtype, device="cpu")
            times = times if device.type == "meta" else to_device(times, device)
            embedded = _embed_pairs(embedder, config, ops, *times.unbind(1))
            rows.update(zip(new, zip(*embedded, strict=True), strict=True))
        rt, proj = (torch.stack(column) for column in zip(*(rows[pair] for pair in pairs), strict=True))
    return rt.unflatten(0, t.shape), proj.unflatten(0, t.shape).unflatten(-1, (6, -1))


def _embed_pairs(embedder: Any, config: Any, ops: Ops, t: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(N,) times to (N, D) and (N, 6D)."""
    layers = [embedder.time_embedder.linear_1, embedder.time_embedder.linear_2]
    layers += [embedder.delta_embedder.linear_1, embedder.delta_embedder.linear_2, embedder.time_proj]
    if all(is_plain(layer) for layer in layers):
        time_1, time_2, delta_1, delta_2, last = ((layer.weight, layer.bias) for layer in layers)
        mlps = TimestepMLP(*time_1, *time_2), TimestepMLP(*delta_1, *delta_2)
        return ops.dual_timestep_embedding(t, delta, *mlps, *last, config.gate_value)
    # By calling the layers, for adapters and offload hooks.
    *mlp_layers, last = layers

    def mlp(t: Tensor, first: nn.Module, second: nn.Module) -> Tensor:
        hidden = first(sinusoid(t, config.freq_dim).to(parameter_dtype(first)))
        return second(F.silu(hidden).to(parameter_dtype(second))).to(t.dtype)

    gate = config.gate_value
    rt = (1 - gate) * mlp(t, *mlp_layers[:2]) + gate * mlp(delta, *mlp_layers[2:])
    return rt, last(F.silu(rt).to(parameter_dtype(last))).to(rt.dtype)
