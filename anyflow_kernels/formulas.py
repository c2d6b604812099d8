"""Formulas that ship and are no operation of their own. `reference` writes them out again: a witness shares no code."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def widen(x: Tensor) -> Tensor:
    """fp32, or float64 if x is."""
    return x if x.dtype == torch.float64 else x.float()


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of x (B, L, H, d) by angle i of each token; rope = (cos, sin), (L, d/2)."""
    cos, sin = (table[None, :, None, :] for table in rope)
    even, odd = widen(x)[..., 0::2], widen(x)[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t (N,) at frequencies 10000^(-2i/width), (N, width); fp32, or float64 if t is.

    Source: diffusers models/embeddings.py, `get_timestep_embedding`; its order of operations, for at t = 1000 one fp32
    ulp of a frequency is 1e-4 radians.
    """
    t = widen(t)
    exponent = -math.log(10000.0) * torch.arange(width // 2, dtype=t.dtype, device=t.device) / (width // 2)
    angles = t[:, None] * exponent.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)
