"""Conditions of the model: source and target time per frame, text and image tokens.

Source: AnyFlow (arXiv 2605.13724), the gated dual-timestep embedding; parameter names of diffusers'
`AnyFlowDualTimestepTextImageEmbedding`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow_kernels import Ops, TimestepMLP
from anyflow_kernels.reference import sinusoid

from .parameters import apply_linear, is_plain, onloaded, parameter_dtype

DELTA_TYPES = ("r", "t-r")
TimeMemo = dict[tuple[float, float], tuple[Tensor, ...]]  # (t, delta) to the rows (D,) and (6D,)


class TimestepEmbedding(nn.Module):
    """Parameters of a timestep MLP: linear, SiLU, linear."""

    def __init__(self, freq_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(freq_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)


class TextProjection(nn.Module):
    """Linear, tanh-GELU, linear: text embeddings to the model's width."""

    def __init__(self, text_dim: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(text_dim, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, text: Tensor) -> Tensor:
        return self.linear_2(F.gelu(self.linear_1(text), approximate="tanh"))


class FP32LayerNorm(nn.LayerNorm):
    """LayerNorm computed in fp32, result in the dtype of the input."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float64:
            return super().forward(x)
        weight, bias = (None if p is None else p.float() for p in (self.weight, self.bias))
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class ImageEmbedding(nn.Module):
    """LayerNorm, linear-GELU-linear, LayerNorm: image embeddings to the model's width."""

    def __init__(self, image_dim: int, dim: int) -> None:
        super().__init__()
        from .blocks import FeedForward

        self.norm1 = FP32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, dim, approximate="none")
        self.norm2 = FP32LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm2(self.ff(self.norm1(image)))


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
            columns = torch.tensor(new, dtype=dtype, device="cpu" if device.type == "meta" else device).unbind(1)
            rows.update(zip(new, zip(*_embed_pairs(embedder, config, ops, *columns), strict=True), strict=True))
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


class PromptKeys:
    """A prompt's tokens, and per block their keys and values: computed at first use, kept while no gradient is wanted.

    Args:
        embedder: a condition embedder, ours or diffusers'.
        text: (B, S, text_dim) text embeddings.
        image: (B, S_image, image_dim) image embeddings or None; they stand before the text.
    """

    def __init__(self, embedder: Any, text: Tensor, image: Tensor | None = None) -> None:
        if image is not None and embedder.image_embedder is None:
            raise ValueError("encoder_hidden_states_image: got a tensor, expected None for a model without image_dim")
        # A tensor made in inference mode does not count its changes: compare with a copy.
        self.text, self.image = (x.clone() if x is not None and x.is_inference() else x for x in (text, image))
        self._versions = (_version(text), _version(image))
        self._embedder = embedder
        self._tokens: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def matches(self, text: Tensor, image: Tensor | None) -> bool:
        """True if these are the embeddings this object was made from."""
        unchanged = self._versions == (_version(self.text), _version(self.image))
        return unchanged and _same(self.text, text) and _same(self.image, image)

    def tokens(self) -> Tensor:
        """(B, S_image + S, D)."""
        if self._tokens is None:
            tokens = self._embedder.text_embedder(self.text)
            if self.image is not None:
                tokens = torch.cat([self._embedder.image_embedder(self.image), tokens], dim=1)
            self._tokens = tokens
        return self._tokens

    def keys_values(self, layer: int, attn: Any, ops: Ops) -> tuple[Tensor, Tensor]:
        """Normed keys and values, each (B, S, H, d), for the cross-attention of a block."""
        if layer in self._kept and not torch.is_grad_enabled():
            return self._kept[layer]
        tokens = self.tokens()
        with onloaded(attn.norm_k):
            k = ops.rms_norm(apply_linear(ops, attn.to_k, tokens), attn.norm_k.weight, attn.norm_k.eps).unflatten(
                -1, (attn.heads, -1)
            )
        v = apply_linear(ops, attn.to_v, tokens).unflatten(-1, (attn.heads, -1))
        if not torch.is_grad_enabled():
            self._kept[layer] = (k, v)
        return k, v


def _version(x: Tensor | None) -> int | None:
    """Counts in-place changes; tensors made in inference mode do not."""
    return None if x is None or x.is_inference() else x._version


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None or a is b:
        return a is b
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
