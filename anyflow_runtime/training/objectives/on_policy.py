"""On-policy distillation, put together from the pieces of this room; see `pretraining` for how its losses come."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import nn
from torch.func import functional_call

from .dmd import ScoreConfig, fake_score_loss, generator_score_loss
from .flow_map_loss import LossResult
from .gan import BlockFeatures, approximate_r1, discriminator_gan_loss, generator_gan_loss
from .interpolant import add_noise, standard_noise
from .pretraining import Pretraining, Terms, TrainingBatch
from .rebalance import DiffusionMean
from .rollout import STEP_CHOICES, RolloutDraw, draw_rollout, far_rollout, rollout
from .timesteps import GlobalBatch, sample_logit_normal
from .velocity import BidirectionalVelocity, is_far


@dataclass(frozen=True)
class GanConfig:
    """The optional adversarial term: blocks of the real score network whose tokens the heads read, and weights."""

    blocks: tuple[int, ...]
    weight: float = 0.03
    r1_weight: float = 0.0
    r1_noise: float = 0.1


@dataclass(frozen=True)
class OnPolicyConfig:
    """On-policy distillation.

    Attributes:
        score: distribution matching.
        step_choices, shift: of the rollouts.
        batch_size: samples of a batch used for generation; None: all.
        cotrain: also yield the pretraining losses on real data in the student's step.
        chunk_partition: for a FAR student.
        gan: heads that learn in the fake score's step; None: no adversarial term.
        input_dtype: as in `PretrainConfig`.
        student_every: the ratio of the caller's `UpdateCadence`.
    """

    score: ScoreConfig = field(default_factory=ScoreConfig)
    step_choices: tuple[int, ...] = STEP_CHOICES
    shift: float = 5.0
    batch_size: int | None = None
    cotrain: bool = True
    chunk_partition: tuple[int, ...] | None = None
    gan: GanConfig | None = None
    input_dtype: torch.dtype | None = None
    student_every: int = 1


class OnPolicy:
    """The student's step by distribution matching, and the fake score's (and discriminator's) step on its rollouts.

    Args:
        student: bidirectional or FAR.
        real, fake: bidirectional plain networks of one time; `real` is frozen by the caller.
        pretraining: of the same student, for co-training; needed if `config.cotrain`.
        discriminator: `DiscriminatorHeads`; needed if `config.gan`.
        shared, generator: as in `Pretraining`.
    """

    def __init__(
        self,
        student: nn.Module,
        real: nn.Module,
        fake: nn.Module,
        config: OnPolicyConfig,
        pretraining: Pretraining | None = None,
        discriminator: nn.Module | None = None,
        shared: torch.Generator | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if config.cotrain and pretraining is None:
            raise ValueError("pretraining: got None, expected the student's Pretraining for config.cotrain=True")
        if (config.gan is None) != (discriminator is None):
            raise ValueError(
                f"discriminator: got {type(discriminator).__name__}, expected heads exactly where config.gan is set"
            )
        if is_far(student) != (config.chunk_partition is not None):
            raise ValueError(
                f"config.chunk_partition: got {config.chunk_partition}, expected one exactly for a FAR student"
            )
        self.student, self.config = student, config
        self.pretraining, self.discriminator = pretraining, discriminator
        self.shared, self.generator = shared, generator
        self.real = BidirectionalVelocity(real, input_dtype=config.input_dtype, single_time=True)
        self.fake = BidirectionalVelocity(fake, input_dtype=config.input_dtype, single_time=True)
        self.features = None if config.gan is None else BlockFeatures(real, config.gan.blocks)

    def generate(self, like: torch.Tensor, text: torch.Tensor, draw: RolloutDraw) -> torch.Tensor:
        """A rollout from pure noise of the shape of `like`; gradient as the caller has set it."""
        noise, segments = standard_noise(like, self.generator), draw.segments(self.config.shift)
        dtype = self.config.input_dtype
        if self.config.chunk_partition is not None:
            return far_rollout(self.student, noise, text, self.config.chunk_partition, segments, dtype)
        return rollout(BidirectionalVelocity(self.student, input_dtype=dtype), noise, text, segments)

    def student_terms(
        self, batch: TrainingBatch, position: GlobalBatch | None = None, running: DiffusionMean | None = None
    ) -> Terms:
        """Distribution matching on a fresh rollout (with the adversarial term, if any), then the co-trained losses."""
        config, used = self.config, batch.first(self.config.batch_size)
        draw = draw_rollout(config.step_choices, self.shared)
        x = self.generate(used.latents, used.text, draw)
        result = generator_score_loss(x, used.text, self.real, self.fake, config.score, used.negative, self.generator)
        log = {**result.log, "rollout_steps": float(draw.num_steps), "rollout_index": float(draw.index)}
        loss = result.loss
        if config.gan is not None:
            adversarial = generator_gan_loss(self._logits(x, used.text, train_heads=False))
            loss = loss + config.gan.weight * adversarial
            log["gan_generator"] = adversarial.item()
        log["total"] = loss.item()
        yield "distribution_matching", LossResult(loss, result.per_sample, log, x.detach())
        if config.cotrain and self.pretraining is not None:
            yield from self.pretraining.terms(batch, position, running)

    def fake_terms(self, batch: TrainingBatch) -> Terms:
        """The fake score's flow matching on a fresh rollout without gradient, then the discriminator's loss, if any."""
        config, used = self.config, batch.first(self.config.batch_size)
        with torch.no_grad():
            x = self.generate(used.latents, used.text, draw_rollout(config.step_choices, self.shared))
        yield "fake_score", fake_score_loss(self.fake, x, used.text, config.score, self.generator)
        gan = config.gan
        if gan is None:
            return
        fake_logits = self._logits(x, used.text, train_heads=True)
        real_logits = self._logits(used.latents, used.text, train_heads=True)
        loss = discriminator_gan_loss(real_logits, fake_logits)
        log = {"gan_discriminator": loss.item()}
        if gan.r1_weight > 0:
            nearby = used.latents + gan.r1_noise * standard_noise(used.latents, self.generator)
            penalty = approximate_r1(real_logits, self._logits(nearby, used.text, train_heads=True))
            loss, log["r1"] = loss + gan.r1_weight * penalty, penalty.item()
        yield "discriminator", LossResult(loss, fake_logits.detach().mean(1), log)

    def _logits(self, x: torch.Tensor, text: torch.Tensor, train_heads: bool) -> torch.Tensor:
        """Head logits (B, K) of noised x. Training the heads leaves x alone, and the other way round."""
        assert self.discriminator is not None and self.features is not None
        t = sample_logit_normal(x.shape[0], self.config.score.shift, self.generator, x.device)
        t = t[:, None].repeat(1, x.shape[1])
        x_t = add_noise(x, standard_noise(x, self.generator), t)
        if train_heads:
            with torch.no_grad():
                features = self.features(self.real, x_t, t, text)
            return self.discriminator(features)
        frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        return functional_call(self.discriminator, frozen, (self.features(self.real, x_t, t, text),))
