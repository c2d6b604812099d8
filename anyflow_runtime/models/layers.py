"""Modules that hold parameters under the reference's names; the blocks and their kernels do the rest."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """The learned weight (D,) of a norm over all heads' channels; `ops.rms_norm` applies it."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))


class Attention(nn.Module):
    """Projections and norms of one attention; the block and its kernels do the rest."""

    def __init__(self, dim: int, heads: int, eps: float) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(dim, dim) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(dim, dim), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = RMSNorm(dim, eps), RMSNorm(dim, eps)


class GELU(nn.Module):
    """The first half of a feed-forward: `proj`, then GELU (tanh by default)."""

    def __init__(self, dim: int, inner_dim: int, approximate: str = "tanh") -> None:
        super().__init__()
        self.proj = nn.Linear(dim, inner_dim)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.proj(x), approximate=self.approximate)


class FeedForward(nn.Module):
    """Linear, GELU, linear, under the reference's parameter names."""

    def __init__(self, dim: int, inner_dim: int, out_dim: int | None = None, approximate: str = "tanh") -> None:
        super().__init__()
        self.net = nn.ModuleList(
            [GELU(dim, inner_dim, approximate), nn.Dropout(0.0), nn.Linear(inner_dim, out_dim or dim)]
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.net:
            x = layer(x)
        return x


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

        self.norm1 = FP32LayerNorm(image_dim)
        self.ff = FeedForward(image_dim, image_dim, dim, approximate="none")
        self.norm2 = FP32LayerNorm(dim)

    def forward(self, image: Tensor) -> Tensor:
        return self.norm2(self.ff(self.norm1(image)))
