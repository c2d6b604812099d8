"""The training stages, put together from the pieces of this package.

A stage yields its losses one by one, by name; the caller runs backward on each before asking for the next (each has a
graph of its own), then steps its optimisers. Nothing here owns an optimiser, a scheduler or a data loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn
from torch.func import functional_call

from . import distributed
from .dmd import ScoreConfig, fake_score_loss, generator_score_loss
from .far_training import FarClip, FarVelocity, draw_num_chunks
from .flow_map_loss import FlowMapConfig, LossResult, flow_map_loss, flow_matching_loss
from .gan import BlockFeatures, approximate_r1, discriminator_gan_loss, generator_gan_loss
from .guidance import drop_text
from .interpolant import add_noise, standard_noise
from .loss_weights import LossWeight
from .rebalance import DiffusionMean
from .rollout import STEP_CHOICES, RolloutDraw, draw_rollout, far_rollout, rollout
from .timesteps import GlobalBatch, assign_buckets, sample_logit_normal, sample_time_pairs
from .velocity import BidirectionalVelocity, Velocity, is_far

Terms = Iterator[tuple[str, LossResult]]


@dataclass(frozen=True)
class TrainingBatch:
    """`latents` (B, F, C, H, W), `text` (B, S, D), and the negative prompt's `negative` (S, D) or (1, S, D)."""

    latents: torch.Tensor
    text: torch.Tensor
    negative: torch.Tensor | None = None

    def __post_init__(self) -> None:
        if self.latents.dim() != 5:
            raise ValueError(f"latents: got shape {tuple(self.latents.shape)}, expected (B, F, C, H, W)")
        if self.text.dim() != 3 or self.text.shape[0] != self.latents.shape[0]:
            raise ValueError(f"text: got shape {tuple(self.text.shape)}, expected (B={self.latents.shape[0]}, S, D)")

    def first(self, count: int | None) -> TrainingBatch:
        """The first `count` samples; all for None."""
        return self if count is None else replace(self, latents=self.latents[:count], text=self.text[:count])


@dataclass(frozen=True)
class FarConfig:
    """The causal variant: `chunk_partition` of the whole clip, probability of long context, and of a second,
    bidirectional flow-matching term (0.1 in pretraining, 0 on-policy)."""

    chunk_partition: tuple[int, ...] = (1, 3, 3, 3, 3, 3, 3, 2)
    full_chunk_limit: int = 3
    long_context_ratio: float = 0.5
    bidirectional_probability: float = 0.1


@dataclass(frozen=True)
class PretrainConfig:
    """Flow-map pretraining, and plain flow matching under the same data and layout.

    Attributes:
        objective: "flow_map", or "flow_matching": the teacher stage, unweighted, logit-normal times, r = t.
        flow_map: settings of the loss; `shift` and `text_dropout` also serve flow matching, which has no guidance.
        diffusion_ratio, consistency_ratio: shares of r = t and r = 0.
        stochastic_buckets: round the bucket sizes at random, for tiny global batches.
        first_frame_probability: chance that a step is given its first frame (one coin for all ranks).
        far: None for the bidirectional model.
        input_dtype: of latents and text as they enter the network; None leaves them.
    """

    objective: str = "flow_map"
    flow_map: FlowMapConfig = field(default_factory=FlowMapConfig)
    diffusion_ratio: float = 0.5
    consistency_ratio: float = 0.25
    stochastic_buckets: bool = False
    first_frame_probability: float = 0.0
    far: FarConfig | None = None
    input_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        if self.objective not in ("flow_map", "flow_matching"):
            raise ValueError(f"objective: got {self.objective!r}, expected 'flow_map' or 'flow_matching'")


class Pretraining:
    """Stages A and B: flow matching or flow-map training of one network, bidirectional or FAR.

    Args:
        model: the student.
        shared: CPU generator of the decisions all ranks share (seeded alike everywhere).
        generator: of noise, times and text dropout (seeded per rank).
    """

    def __init__(
        self,
        model: nn.Module,
        config: PretrainConfig,
        shared: torch.Generator | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        if config.far is None and is_far(model):
            raise ValueError("config.far: got None, expected a FarConfig for a FAR model")
        self.model, self.config, self.shared, self.generator = model, config, shared, generator
        self.weight = LossWeight(config.flow_map.weighting, config.flow_map.shift)

    def terms(
        self, batch: TrainingBatch, position: GlobalBatch | None = None, running: DiffusionMean | None = None
    ) -> Terms:
        """Losses of one micro-batch.

        Args:
            position: where the batch stands in the global one; None: this process's only micro-step.
            running: shared by the micro-steps of one optimiser step.
        """
        config, far = self.config, self.config.far
        if position is None:
            position = GlobalBatch(batch.latents.shape[0], distributed.rank(), distributed.world_size())
        coins = distributed.draw_uniform(3, self.shared)
        velocity: Velocity
        if far is None:
            latents, starts_video = batch.latents, True
            velocity = BidirectionalVelocity(self.model, input_dtype=config.input_dtype)
        else:
            num_chunks = draw_num_chunks(
                len(far.chunk_partition), far.full_chunk_limit, far.long_context_ratio, self.shared
            )
            clip = FarClip.from_latents(batch.latents, far.chunk_partition, num_chunks, far.full_chunk_limit)
            latents, starts_video = clip.target, clip.starts_video
            velocity = FarVelocity(self.model, clip, config.input_dtype)

        if config.objective == "flow_matching":
            yield "flow_matching", self._flow_matching(velocity, latents, batch, guidance=None)
        else:
            draw = coins[0] if config.stochastic_buckets else None
            labels = assign_buckets(position, config.diffusion_ratio, config.consistency_ratio, draw)
            times = sample_time_pairs(labels, config.flow_map.shift, self.generator, latents.device)
            yield (
                "flow_map",
                flow_map_loss(
                    velocity,
                    latents,
                    batch.text,
                    times,
                    config.flow_map,
                    batch.negative,
                    first_frame_given=starts_video
                    and latents.shape[1] > 1
                    and coins[1] < config.first_frame_probability,
                    running=running,
                    weight=self.weight,
                    generator=self.generator,
                ),
            )
        if far is not None and coins[2] < far.bidirectional_probability:
            whole = BidirectionalVelocity(self.model, far=True, input_dtype=config.input_dtype)
            guidance = config.flow_map.guidance if config.objective == "flow_map" else None
            yield "bidirectional", self._flow_matching(whole, batch.latents, batch, guidance)

    def _flow_matching(
        self, velocity: Velocity, latents: torch.Tensor, batch: TrainingBatch, guidance: float | None
    ) -> LossResult:
        settings = self.config.flow_map
        text, dropped = batch.text, None
        if batch.negative is not None and settings.text_dropout > 0:
            text, dropped = drop_text(text, batch.negative, settings.text_dropout, self.generator)
        t = sample_logit_normal(latents.shape[0], settings.shift, self.generator, latents.device)
        return flow_matching_loss(
            velocity,
            latents,
            text,
            t,
            batch.negative,
            guidance,
            dropped=dropped if settings.per_sample_guidance else None,
            equal_forwards=settings.equal_forwards,
            generator=self.generator,
        )


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
        gan: None: no adversarial term.
        input_dtype: as in `PretrainConfig`.
    """

    score: ScoreConfig = field(default_factory=ScoreConfig)
    step_choices: tuple[int, ...] = STEP_CHOICES
    shift: float = 5.0
    batch_size: int | None = None
    cotrain: bool = True
    chunk_partition: tuple[int, ...] | None = None
    gan: GanConfig | None = None
    input_dtype: torch.dtype | None = None


class OnPolicy:
    """Stage C: the student's step by distribution matching, the fake score's (and discriminator's) step on its
    rollouts.

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
            raise ValueError("discriminator: expected heads exactly where config.gan is set")
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
