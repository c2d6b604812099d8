"""Classifier-free guidance fused into the conditional branch, and text dropout.

With strength g the network's conditional output learns g * cond - (g - 1) * uncond and is sampled without guidance:
the regressed prediction is (u_c - (1 - g) u_n) / g, with the unconditional u_n held constant.
"""

from __future__ import annotations

import torch

from .timesteps import require_precise_time
from .velocity import Velocity


def drop_text(
    text: torch.Tensor, negative: torch.Tensor, probability: float = 0.1, generator: torch.Generator | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replace each sample's embedding by the negative prompt's with the given probability.

    Args:
        text: (B, S, D).  negative: (S, D), (1, S, D) or (B, S, D), the embedding of the negative prompt, not zeros.

    Returns: a new (B, S, D), the input untouched, and (B,) bool of the dropped samples.
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability: got {probability}, expected 0 <= probability <= 1")
    negative = expand_negative(negative, text)
    device = generator.device if generator is not None else text.device
    dropped = (torch.rand(text.shape[0], generator=generator, device=device) < probability).to(text.device)
    return torch.where(dropped.view(-1, 1, 1), negative, text), dropped


def expand_negative(negative: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """The negative embedding as (B, S, D) like `text`, without copying."""
    if negative.dim() == 2:
        negative = negative.unsqueeze(0)
    if negative.shape[1:] != text.shape[1:] or negative.shape[0] not in (1, text.shape[0]):
        raise ValueError(
            f"negative: got shape {tuple(negative.shape)}, expected (S, D) or (B, S, D) of {tuple(text.shape)}"
        )
    return negative.to(text.dtype).expand_as(text)


def guidance_strengths(guidance: float | None, like: torch.Tensor, dropped: torch.Tensor | None = None) -> torch.Tensor:
    """(B,) strengths in the dtype of `like` (B, ...): `guidance`, and 1 for samples whose prompt was dropped.

    With `dropped=None`, as in NVlabs/AnyFlow, dropped samples, for which u_c = u_n, still have gradient and derivative
    divided by g.
    """
    value = 1.0 if guidance is None else float(guidance)
    if value <= 0:
        raise ValueError(f"guidance: got {guidance}, expected > 0, or None for none")
    strengths = torch.full(
        like.shape[:1], value, device=like.device, dtype=torch.promote_types(like.dtype, torch.float32)
    )
    return strengths if dropped is None else torch.where(dropped, torch.ones_like(strengths), strengths)


def fused_prediction(
    velocity: Velocity,
    x_t: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor,
    text: torch.Tensor,
    negative: torch.Tensor | None,
    strengths: torch.Tensor,
    always_forward: bool = False,
) -> torch.Tensor:
    """(u_c - (1 - g) u_n) / g with gradient through u_c alone.

    Args:
        strengths: (B,) of `guidance_strengths`; where all are 1 the unconditional forward is skipped unless
            `always_forward` (sharded ranks must run equal forwards).
    """
    require_precise_time("t", t)
    u_c = velocity(x_t, t, r, text)
    if not always_forward and bool((strengths == 1).all()):
        return u_c
    if negative is None:
        raise ValueError("negative: got None, expected the embedding of the negative prompt where guidance is not 1")
    with torch.no_grad():
        u_n = velocity(x_t, t, r, expand_negative(negative, text))
    g = strengths.view(-1, *(1,) * (u_c.dim() - 1))
    return (u_c - (1 - g) * u_n) / g
