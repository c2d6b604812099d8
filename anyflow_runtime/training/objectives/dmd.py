"""Distribution matching: the generator's gradient from two scores, and the update of the fake one.

The generated clip is noised, both scores estimate the clean clip, and the student is pushed along real - fake,
normalised per sample. Scores are plain networks of one time (`BidirectionalVelocity(single_time=True)`),
bidirectional also for FAR.
Source: DMD2 (arXiv 2405.14867) as in NVlabs/AnyFlow, which may divide by zero: the normaliser has a floor here.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .flow_map_loss import LossResult, flow_matching_loss
from .guidance import expand_negative
from .interpolant import add_noise, clean_estimate, standard_noise
from .timesteps import NUM_TRAIN_TIMESTEPS, sample_logit_normal, sample_uniform
from .velocity import Velocity


@dataclass(frozen=True)
class ScoreConfig:
    """Settings of distribution matching; the defaults are those of the released models.

    Attributes:
        real_guidance: s in real = cond + s (cond - uncond): guidance of strength s + 1. 0 or None: no guidance.
        shift: of the noising times, for both updates.
        min_timestep, max_timestep: clamp of the noising times, 0..1000.
        weight: factor of the generator loss.
        floor: lower bound of the normaliser mean |x - real|.
    """

    real_guidance: float | None = 3.0
    shift: float = 5.0
    min_timestep: float = 0.0
    max_timestep: float = float(NUM_TRAIN_TIMESTEPS)
    weight: float = 1.0
    floor: float = 1e-6

    def __post_init__(self) -> None:
        if not 0 <= self.min_timestep <= self.max_timestep <= NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"min_timestep: got {self.min_timestep} with max_timestep={self.max_timestep}, "
                "expected 0 <= min <= max <= 1000"
            )


def guided_estimate(cond: torch.Tensor, uncond: torch.Tensor | None, scale: float | None) -> torch.Tensor:
    """cond + scale (cond - uncond), or cond where the scale is 0 or None."""
    if not scale:
        return cond
    if uncond is None:
        raise ValueError(f"uncond: got None, expected the unconditional estimate for scale={scale}")
    return cond + scale * (cond - uncond)


@torch.no_grad()
def dmd_gradient(x: torch.Tensor, fake: torch.Tensor, real: torch.Tensor, floor: float = 1e-6) -> torch.Tensor:
    """(fake - real) / max(mean |x - real|, floor) per sample; NaN and infinity become finite. All (B, F, C, H, W)."""
    scale = (x - real).abs().mean(dim=tuple(range(1, x.dim())), keepdim=True).clamp_min(floor)
    return torch.nan_to_num((fake - real) / scale)


def dmd_loss(x: torch.Tensor, gradient: torch.Tensor, weight: float = 1.0) -> torch.Tensor:
    """A float64 scalar whose gradient with respect to x is 2 weight gradient / x.numel()."""
    target = (x.double() - gradient.double()).detach()
    return weight * (x.double() - target).square().mean()


def generator_score_loss(
    x: torch.Tensor,
    text: torch.Tensor,
    real: Velocity,
    fake: Velocity,
    config: ScoreConfig,
    negative: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> LossResult:
    """The distribution-matching loss of generated latents x (B, F, C, H, W), with gradient into x.

    Args:
        real, fake: `(x, t, r, text) -> v`; called with r = t, without gradient.
        negative: embedding of the negative prompt; needed for real_guidance.
    """
    if config.real_guidance and negative is None:
        raise ValueError("negative: got None, expected the embedding of the negative prompt for real_guidance")
    with torch.no_grad():
        clean = x.detach()
        t = sample_uniform(x.shape[0], config.shift, generator, x.device)
        t = t.clamp(config.min_timestep, config.max_timestep)[:, None].repeat(1, x.shape[1])
        x_t = add_noise(clean, standard_noise(clean, generator), t)
        x0_fake = clean_estimate(x_t, t, fake(x_t, t, t, text))
        x0_cond = clean_estimate(x_t, t, real(x_t, t, t, text))
        x0_uncond = None
        if config.real_guidance and negative is not None:
            x0_uncond = clean_estimate(x_t, t, real(x_t, t, t, expand_negative(negative, text)))
        gradient = dmd_gradient(clean, x0_fake, guided_estimate(x0_cond, x0_uncond, config.real_guidance), config.floor)
    loss = dmd_loss(x, gradient, config.weight)
    per_sample = gradient.square().mean(dim=tuple(range(1, x.dim())))
    log = {"vsd": loss.item(), "vsd_gradient_rms": gradient.square().mean().sqrt().item()}
    return LossResult(loss, per_sample, log)


def fake_score_loss(
    fake: Velocity, x: torch.Tensor, text: torch.Tensor, config: ScoreConfig, generator: torch.Generator | None = None
) -> LossResult:
    """Flow matching of the fake score on generated latents x, which are detached; conditional prompt only."""
    t = sample_logit_normal(x.shape[0], config.shift, generator, x.device)
    t = t.clamp(config.min_timestep, config.max_timestep)
    result = flow_matching_loss(fake, x.detach(), text, t, generator=generator)
    return LossResult(result.loss, result.per_sample, {"fake_score": result.loss.item()}, result.prediction)


@dataclass(frozen=True)
class UpdateCadence:
    """Which network trains when: the fake score always, the student before it when iteration % ratio == 0."""

    ratio: int = 1

    def __post_init__(self) -> None:
        if self.ratio < 1:
            raise ValueError(f"ratio: got {self.ratio}, expected >= 1")

    def updates_student(self, iteration: int) -> bool:
        """True if the student takes a step before the fake score at this 0-based iteration."""
        return iteration % self.ratio == 0
