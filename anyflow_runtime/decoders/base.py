"""Contracts of the decoders, which turn the clean latents of a chunk into frames.

Latents are `(..., T, C, h, w)`, video is `(..., T, C, H, W)` in [-1, 1].
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import nn

from ..causal_time import latent_frames, pixel_frames
from ..config import InstantiateConfig
from ..encoders.base import VideoRatios


@dataclass(frozen=True, kw_only=True)
class DecoderConfig(InstantiateConfig):
    """Base of the decoder configs; it declares no settings of its own."""

    _target: type = field(default_factory=lambda: StreamingDecoder)


@dataclass
class StreamingDecoderCache:
    """What a streaming decoder remembers of one rollout; empty unless a subclass adds fields."""


StreamingDecoderCacheT = TypeVar("StreamingDecoderCacheT", bound=StreamingDecoderCache)


class StreamingDecoder(ABC, nn.Module, Generic[StreamingDecoderCacheT]):
    """Decoder called chunk by chunk: `forward(input, autoregressive_index=0, cache=None)`."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @abstractmethod
    def initialize_autoregressive_cache(self, *args: Any, **context: Any) -> StreamingDecoderCacheT:
        """A fresh cache for a new rollout."""


class StreamingVideoDecoder(VideoRatios, StreamingDecoder[StreamingDecoderCacheT]):
    """Streaming decoder from latent video to pixel video.

    The size maps are those of a causal codec (`causal_time`); override them for another one.
    """

    def get_output_temporal_size(self, autoregressive_index: int, input_temporal_size: int) -> int:
        """Pixel frames made of `input_temporal_size` latent frames.

        Raises:
            TemporalSizeError: (a ValueError and AssertionError) for fewer than one latent frame.
        """
        return pixel_frames(autoregressive_index, input_temporal_size, self.temporal_compression_ratio)

    def get_input_temporal_size(self, autoregressive_index: int, output_temporal_size: int) -> int:
        """Latent frames needed for `output_temporal_size` pixel frames.

        Raises:
            TemporalSizeError: (a ValueError and AssertionError) for a count that is no whole number of latent frames.
        """
        return latent_frames(autoregressive_index, output_temporal_size, self.temporal_compression_ratio)
