"""The flow-map loss and the plain flow-matching loss, for any velocity.

Source: AnyFlow (arXiv 2605.13724), section on flow-map pretraining; order of operations as in NVlabs/AnyFlow, its known
defects left out: times stay in float32, a batch without diffusion samples is not NaN, conditioning frames are masked.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from .flow_map_target import flow_map_target
from .guidance import drop_text, fused_prediction, guidance_strengths
from .interpolant import add_noise, standard_noise
from .loss_weights import LossWeight
from .rebalance import DiffusionMean, rebalance
from .timesteps import TimePairs, require_precise_time
from .velocity import Velocity


@dataclass(frozen=True)
class FlowMapConfig:
    """Settings of `flow_map_loss`; the defaults are those of the released models.

    Attributes:
        epsilon: half distance of the two probes, thousandths.
        guidance: fused guidance strength; None turns it off.
        text_dropout: probability of the negative prompt in place of the caption.
        per_sample_guidance: dropped samples use strength 1 (their u_c equals u_n, so nothing is to be divided); not so
            in NVlabs/AnyFlow.
        weighting, shift: of `LossWeight`, made once, as `loss_weight`.
        rebalanced: scale non-diffusion losses to the mean diffusion loss.
        equal_forwards: never skip a forward that this batch does not need; for ranks that shard one model.
    """

    epsilon: float = 5.0
    guidance: float | None = 3.0
    text_dropout: float = 0.1
    per_sample_guidance: bool = False
    weighting: str = "beta08"
    shift: float = 5.0
    rebalanced: bool = True
    equal_forwards: bool = False
    loss_weight: LossWeight = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "loss_weight", LossWeight(self.weighting, self.shift))


@dataclass(frozen=True)
class LossResult:
    """`loss` (scalar, with gradient), `per_sample` (B,) before reduction, and plain numbers for the log."""

    loss: torch.Tensor
    per_sample: torch.Tensor
    log: dict[str, float] = field(default_factory=dict)
    prediction: torch.Tensor | None = None


def flow_map_loss(
    velocity: Velocity,
    x0: torch.Tensor,
    text: torch.Tensor,
    times: TimePairs,
    config: FlowMapConfig,
    negative: torch.Tensor | None = None,
    noise: torch.Tensor | None = None,
    first_frame_given: bool = False,
    running: DiffusionMean | None = None,
    generator: torch.Generator | None = None,
) -> LossResult:
    """Mean flow-map loss of a batch.

    Args:
        velocity: the student, `(x, t, r, text) -> u`, with gradient.
        x0: (B, F, C, H, W) clean latents.  text: (B, S, D).  times: one (t, r) per sample, shared by its frames.
        negative: embedding of the negative prompt, needed for text dropout and guidance.
        noise: like x0; drawn if None.
        first_frame_given: image to video: frame 0 is clean at t = r = 0 and does not enter the loss.
        running: see `DiffusionMean`.
    """
    _check(x0, text, times)
    if config.text_dropout > 0 and negative is None:
        raise ValueError("negative: got None, expected the embedding of the negative prompt for text_dropout > 0")
    dropped = torch.zeros(x0.shape[0], dtype=torch.bool, device=x0.device)
    if negative is not None and config.text_dropout > 0:
        text, dropped = drop_text(text, negative, config.text_dropout, generator)
    noise = standard_noise(x0, generator) if noise is None else noise
    t, r = times.per_frame(x0.shape[1])
    active = torch.ones_like(t, dtype=torch.bool)
    if first_frame_given:
        t, r, active = give_first_frame(t, r)

    x_t = add_noise(x0, noise, t)
    v = noise - x0
    strengths = guidance_strengths(config.guidance, x_t, dropped if config.per_sample_guidance else None)
    always = config.equal_forwards and config.guidance is not None
    prediction = fused_prediction(velocity, x_t, t, r, text, negative, strengths, always)
    moving = active if first_frame_given else None
    target, correction = flow_map_target(
        velocity, x_t, v, t, r, text, config.epsilon, strengths, moving, config.equal_forwards
    )
    squared = _per_sample_error(prediction, target, active)
    weighted = squared * _mean_over(config.loss_weight(t), active)
    losses = rebalance(weighted, times.is_diffusion, running) if config.rebalanced else weighted
    log = {
        "loss": losses.mean().item(),
        "unweighted": squared.mean().item(),
        "correction_rms": correction.square().mean().sqrt().item(),
        "dropped": dropped.float().mean().item(),
    }
    if times.is_diffusion.any():
        log["diffusion"] = weighted[times.is_diffusion].mean().item()
    if not times.is_diffusion.all():
        log["flow_map"] = weighted[~times.is_diffusion].mean().item()
    return LossResult(losses.mean(), losses, log, prediction)


def flow_matching_loss(
    velocity: Velocity,
    x0: torch.Tensor,
    text: torch.Tensor,
    t: torch.Tensor,
    negative: torch.Tensor | None = None,
    guidance: float | None = None,
    noise: torch.Tensor | None = None,
    dropped: torch.Tensor | None = None,
    equal_forwards: bool = False,
    generator: torch.Generator | None = None,
) -> LossResult:
    """Unweighted flow matching at r = t: the teacher stage, bidirectional co-training and the fake score.

    Args:
        t: (B,) in 0..1000.  guidance: fused as in the flow-map loss; None for plain flow matching.
        dropped: (B,) bool, samples whose text already is the negative prompt: guided with strength 1.
    """
    require_precise_time("t", t)
    noise = standard_noise(x0, generator) if noise is None else noise
    frames = t[:, None].repeat(1, x0.shape[1])
    x_t = add_noise(x0, noise, frames)
    strengths = guidance_strengths(guidance, x_t, dropped)
    prediction = fused_prediction(
        velocity, x_t, frames, frames, text, negative, strengths, equal_forwards and guidance is not None
    )
    losses = _per_sample_error(prediction, noise - x0, torch.ones_like(frames, dtype=torch.bool))
    return LossResult(losses.mean(), losses, {"loss": losses.mean().item()}, prediction)


def give_first_frame(t: torch.Tensor, r: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Times with frame 0 clean (t = r = 0), and the (B, F) mask of frames that are still to be learned."""
    if t.shape[1] < 2:
        raise ValueError(f"t: got {t.shape[1]} frame, expected at least 2 when the first one is given")
    active = torch.ones_like(t, dtype=torch.bool)
    active[:, 0] = False
    return torch.where(active, t, torch.zeros_like(t)), torch.where(active, r, torch.zeros_like(r)), active


def _per_sample_error(prediction: torch.Tensor, target: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    wide = torch.promote_types(prediction.dtype, torch.float32)
    return _mean_over((prediction.to(wide) - target.to(wide)).square().mean(dim=(2, 3, 4)), active)


def _mean_over(values: torch.Tensor, active: torch.Tensor) -> torch.Tensor:
    """Mean over the active frames of (B, F) values."""
    kept = torch.where(active, values, torch.zeros_like(values))
    return kept.sum(1) / active.sum(1)


def _check(x0: torch.Tensor, text: torch.Tensor, times: TimePairs) -> None:
    if x0.dim() != 5:
        raise ValueError(f"x0: got shape {tuple(x0.shape)}, expected (B, F, C, H, W)")
    for name, tensor in (("text", text), ("times.t", times.t)):
        if tensor.shape[0] != x0.shape[0]:
            raise ValueError(f"{name}: got {tensor.shape[0]} samples, expected {x0.shape[0]} as in x0")
