"""The bidirectional AnyFlow model as a streaming transformer: a single chunk that is the whole video.

Source: AnyFlow (arXiv 2605.13724); diffusers' `AnyFlowPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import LifecycleError
from ..models.bidirectional import AnyFlowTransformer3DModel
from ..schedulers.base import GuidedFlow
from .adapter import AnyFlowStream, AnyFlowStreamConfig, Condition, check_partition
from .transformer import TransformerAutoregressiveCache

RELEASED_FRAMES = 21  # latent frames of the 81 the released models are trained on


@dataclass(frozen=True, kw_only=True)
class AnyFlowBidirectionalStreamConfig(AnyFlowStreamConfig):
    """Config of `AnyFlowBidirectionalStream`; see `AnyFlowStreamConfig`. `chunk_partition` is one chunk, (21,) if None.

    Raises:
        ValueError: at construction, for more than one chunk.
    """

    _target: type[AnyFlowBidirectionalStream] = field(default_factory=lambda: AnyFlowBidirectionalStream)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_partition is not None:
            _single_chunk(self.chunk_partition)


@dataclass
class AnyFlowBidirectionalStreamCache(TransformerAutoregressiveCache):
    """State of one rollout.

    Attributes:
        condition: the prompt.
        latent_shape: (B, F, C, H, W) of the video.
        prefix: (B, F', C, H, W) latents of the first frames, which are given, or None.
    """

    condition: Condition
    latent_shape: tuple[int, ...]
    prefix: Tensor | None
    num_chunks: int | None = 1

    def frames_in_chunk(self, autoregressive_index: int) -> int:
        """Latent frames of the only chunk.

        Raises:
            LifecycleError: for an index other than 0.
        """
        if autoregressive_index != 0:
            raise LifecycleError(f"autoregressive_index: got {autoregressive_index}, expected 0: there is one chunk")
        return self.latent_shape[1]

    def start(self, autoregressive_index: int) -> None:
        """Check the index."""
        self.frames_in_chunk(autoregressive_index)


class AnyFlowBidirectionalStream(AnyFlowStream[AnyFlowBidirectionalStreamCache]):
    """Runs an `AnyFlowTransformer3DModel` under the streaming contract; see `AnyFlowStream` for the arguments."""

    model_class = AnyFlowTransformer3DModel

    @property
    def default_partition(self) -> tuple[int, ...]:
        """The config's single chunk, or that of the released models."""
        return tuple(self.config.chunk_partition or (RELEASED_FRAMES,))

    @torch.no_grad()
    def initialize_autoregressive_cache(
        self,
        *,
        chunk_partition: Sequence[int] | None = None,
        height: int | None = None,
        width: int | None = None,
        context_latents: Tensor | None = None,
        **prompts: Any,
    ) -> AnyFlowBidirectionalStreamCache:
        """A fresh cache.

        Args:
            chunk_partition: (frames,); None is the config's.
            context_latents: (B, F', C, H, W) normalised latents of the first frames, fewer than all.
            Others: as `AnyFlowFARStream.initialize_autoregressive_cache`.

        Raises:
            ValueError: on shapes that do not fit.
        """
        condition = self.make_condition(**prompts)
        frames = _single_chunk(chunk_partition or self.default_partition)
        size = self.latent_size(height, width, context_latents)
        prefix = self.given_latents(context_latents, condition, size)
        if prefix is not None and prefix.shape[1] >= frames:
            raise ValueError(f"context_latents: got {prefix.shape[1]} frames, expected fewer than the video's {frames}")
        shape = (condition.batch, frames, self.model.config.in_channels, *size)
        return self.remembered(AnyFlowBidirectionalStreamCache(condition, shape, prefix))

    def chunk_latent_shape(self, autoregressive_index: int, cache: AnyFlowBidirectionalStreamCache) -> tuple[int, ...]:
        """(B, F, C, H, W) of the video."""
        return cache.latent_shape

    def flow_of_frames(self, x: Tensor, t: Tensor, r: Tensor, cache: AnyFlowBidirectionalStreamCache) -> GuidedFlow:
        """The average velocity of all frames; given frames enter clean, at t = 0 with r unchanged."""
        condition = cache.condition
        if cache.prefix is not None:
            frames = cache.prefix.shape[1]
            t = torch.cat([torch.zeros_like(t[:, :frames]), t[:, frames:]], dim=1)
            x = torch.cat([cache.prefix, x[:, frames:]], dim=1)

        def network(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.model(x, t, r, condition.text, condition.image).sample

        return self._on_rows(network, condition, x, t, r)

    def finalize_kv_cache(
        self, noisy_latent: Tensor, timestep: Tensor, cache: AnyFlowBidirectionalStreamCache, input: Any = None
    ) -> None:
        """Nothing: no chunk follows."""

    def postprocess_clean_latent(
        self, clean_latent: Tensor, cache: AnyFlowBidirectionalStreamCache, input: Any = None
    ) -> Tensor:
        """The video with the given frames as they were given."""
        if cache.prefix is None:
            return clean_latent
        return torch.cat([cache.prefix, clean_latent[:, cache.prefix.shape[1] :]], dim=1)


def _single_chunk(partition: Sequence[int]) -> int:
    frames = check_partition(partition)
    if len(frames) != 1:
        raise ValueError(f"chunk_partition: got {list(frames)}, expected a single chunk: the model is bidirectional")
    return frames[0]
