"""Flow matching and flow-map pretraining, put together from the pieces of this room.

An objective yields its losses one by one, by name; the caller runs backward on each before asking for the next (each
has a graph of its own), then steps its optimisers. Nothing here owns an optimiser, a scheduler or a data loader.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .. import distributed
from .far_training import FarClip, FarVelocity, draw_num_chunks
from .flow_map_loss import FlowMapConfig, LossResult, flow_map_loss, flow_matching_loss
from .guidance import drop_text
from .rebalance import DiffusionMean
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
    """Flow matching or flow-map training of one network, bidirectional or FAR.

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
            given = starts_video and latents.shape[1] > 1 and coins[1] < config.first_frame_probability
            inputs = velocity, latents, batch.text, times, config.flow_map, batch.negative
            result = flow_map_loss(*inputs, first_frame_given=given, running=running, generator=self.generator)
            yield "flow_map", result
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
