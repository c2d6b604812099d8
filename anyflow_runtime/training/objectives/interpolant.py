"""The straight path between data and noise: x_t = (1 - t) x0 + t eps, v = eps - x0."""

from __future__ import annotations

import torch

from .timesteps import NUM_TRAIN_TIMESTEPS, require_precise_time


def expand_time(t: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Fractions in the dtype of `t`, (B,) or (B, F) -> broadcastable to `x` (B, F, C, H, W)."""
    require_precise_time("t", t)
    if t.dim() not in (1, 2) or t.shape[0] != x.shape[0] or (t.dim() == 2 and t.shape[1] not in (1, x.shape[1])):
        raise ValueError(f"t: got shape {tuple(t.shape)} for x {tuple(x.shape)}, expected (B,) or (B, F)")
    return t.view(*t.shape, *(1,) * (x.dim() - t.dim())) / NUM_TRAIN_TIMESTEPS


def add_noise(x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """x_t in at least float32; `t` (B,) or (B, F) in 0..1000."""
    if x0.shape != noise.shape:
        raise ValueError(f"noise: got shape {tuple(noise.shape)}, expected that of x0, {tuple(x0.shape)}")
    fraction = expand_time(t, x0)
    return (1 - fraction) * x0 + fraction * noise


def clean_estimate(x_t: torch.Tensor, t: torch.Tensor, velocity: torch.Tensor) -> torch.Tensor:
    """x0 = x_t - t v."""
    return x_t - expand_time(t, x_t) * velocity


def standard_noise(like: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
    """N(0, 1) of the shape, device and (at least float32) dtype of `like`, drawn on the generator's device."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    device = generator.device if generator is not None else like.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=dtype).to(like.device)
