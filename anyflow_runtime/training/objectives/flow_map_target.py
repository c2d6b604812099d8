"""The flow-map target: v - (t - r) dF/dt, with the total derivative by central differences.

The average velocity u of a flow map obeys u(x_t, t, r) = v - (t - r) d/dt u(x_t, t, r) along the path dx/dt = v. The
derivative is (u(x + v eps/1000, t + eps) - u(x - v eps/1000, t - eps)) / gap: two forwards without gradient. Where a
probe would leave 0..1000 it stays at t and the gap shrinks (one-sided difference).
Source: AnyFlow (arXiv 2605.13724), MeanFlow (arXiv 2505.13447).
"""

from __future__ import annotations

import torch

from .interpolant import expand_time
from .timesteps import NUM_TRAIN_TIMESTEPS, require_precise_time
from .velocity import Velocity, select_rows


def probe_times(t: torch.Tensor, epsilon: float = 5.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Upper and lower probe (B, F): t +- epsilon, or t itself where that would leave 0..1000."""
    require_precise_time("t", t)
    if not 0 < epsilon <= NUM_TRAIN_TIMESTEPS / 2:
        raise ValueError(f"epsilon: got {epsilon}, expected 0 < epsilon <= {NUM_TRAIN_TIMESTEPS / 2}")
    upper, lower = t + epsilon, t - epsilon
    return torch.where(upper > NUM_TRAIN_TIMESTEPS, t, upper), torch.where(lower < 0, t, lower)


@torch.no_grad()
def total_derivative(
    velocity: Velocity,
    x_t: torch.Tensor,
    v: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    text: torch.Tensor,
    epsilon: float = 5.0,
    active: torch.Tensor | None = None,
) -> torch.Tensor:
    """dF/dt per thousandth, (B, F, C, H, W), r held fixed.

    Args:
        active: (B, F) bool, frames that move; the others (conditioning frames at t = 0) are not probed and get 0.
    """
    upper, lower = probe_times(t, epsilon)
    if active is not None:
        upper, lower = torch.where(active, upper, t), torch.where(active, lower, t)
    u_upper = velocity(x_t + v * expand_time(upper - t, x_t), upper, r, text)
    u_lower = velocity(x_t + v * expand_time(lower - t, x_t), lower, r, text)
    gap = (upper - lower).view(*t.shape, *(1,) * (x_t.dim() - 2))
    difference = u_upper.to(_wide(u_upper)) - u_lower
    return torch.where(gap > 0, difference / gap.clamp_min(torch.finfo(gap.dtype).tiny), torch.zeros_like(difference))


@torch.no_grad()
def flow_map_target(
    velocity: Velocity,
    x_t: torch.Tensor,
    v: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    text: torch.Tensor,
    epsilon: float = 5.0,
    guidance: torch.Tensor | float = 1.0,
    active: torch.Tensor | None = None,
    probe_all: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The regression target and its correction (t - r) dF/dt / guidance, both (B, F, C, H, W) without gradient.

    Args:
        v: the velocity of the path at x_t; noise - x0 in training.
        guidance: a number or (B,); divides the derivative, as it does the conditional branch (`guidance`).
        probe_all: also probe samples with r = t, whose correction is 0. Needed where sharded ranks must run the same
            number of forwards; otherwise half of the batch needs no probe.
    """
    require_precise_time("r", r)
    distance = t - r
    correction = torch.zeros_like(v, dtype=_wide(v))
    moving = distance != 0 if active is None else (distance != 0) & active
    rows = moving.any(dim=1).nonzero().flatten() if not probe_all else torch.arange(t.shape[0], device=t.device)
    if rows.numel() > 0:
        whole = rows.numel() == t.shape[0]
        chosen = velocity if whole else select_rows(velocity, rows)
        x_rows, v_rows, t_rows, r_rows, text_rows = (x if whole else x[rows] for x in (x_t, v, t, r, text))
        moved = None if active is None else active[rows]
        derivative = total_derivative(chosen, x_rows, v_rows, t_rows, r_rows, text_rows, epsilon, moved)
        scale = distance[rows].view(-1, t.shape[1], *(1,) * (x_t.dim() - 2))
        gamma = torch.as_tensor(guidance, device=t.device, dtype=t.dtype).expand(t.shape[0])[rows]
        correction[rows] = (scale * derivative / gamma.view(-1, *(1,) * (x_t.dim() - 1))).to(correction.dtype)
    return v - correction, correction


def _wide(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
