"""Contracts of the encoders: one-shot ones for contexts, streaming ones for the input of every chunk.

Video tensors are `(..., T, C, H, W)`; so are latents, `(..., T, C, h, w)`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from torch import Tensor, nn

from ..causal_time import latent_frames, pixel_frames
from ..config import InstantiateConfig


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(InstantiateConfig):
    """Base of the encoder configs; it declares no settings of its own."""

    _target: type = field(default_factory=lambda: Encoder)


@dataclass
class StreamingEncoderCache:
    """What a streaming encoder remembers of one rollout; empty unless a subclass adds fields."""


StreamingEncoderCacheT = TypeVar("StreamingEncoderCacheT", bound=StreamingEncoderCache)


class _ConfiguredModule(ABC, nn.Module):
    """A module that keeps the config it was built from."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config


class Encoder(_ConfiguredModule):
    """One-shot encoder without state, the `context_encoder` of a transformer: `forward(input)`."""


class StreamingEncoder(_ConfiguredModule, Generic[StreamingEncoderCacheT]):
    """Encoder of the input of every chunk: `forward(input, autoregressive_index=0, cache=None)`."""

    @abstractmethod
    def initialize_autoregressive_cache(self, *args: Any, **context: Any) -> StreamingEncoderCacheT:
        """A fresh cache for a new rollout."""


class VideoRatios(ABC):
    """Sizes of video against latents, of either half of a codec."""

    @property
    @abstractmethod
    def spatial_compression_ratio(self) -> int:
        """Pixel side / latent side."""

    @property
    @abstractmethod
    def temporal_compression_ratio(self) -> int:
        """Pixel frames / latent frames from the second chunk on."""


class StreamingVideoEncoder(VideoRatios, StreamingEncoder[StreamingEncoderCacheT]):
    """Streaming encoder from pixel video to latent video.

    The size maps are those of a causal codec (`causal_time`); override them for another one.
    """

    def get_output_temporal_size(self, autoregressive_index: int, input_temporal_size: int) -> int:
        """Latent frames made of `input_temporal_size` pixel frames.

        Raises:
            TemporalSizeError: (a ValueError and AssertionError) for a count that is no whole number of latent frames.
        """
        return latent_frames(autoregressive_index, input_temporal_size, self.temporal_compression_ratio)

    def get_input_temporal_size(self, autoregressive_index: int, output_temporal_size: int) -> int:
        """Pixel frames needed for `output_temporal_size` latent frames.

        Raises:
            TemporalSizeError: (a ValueError and AssertionError) for fewer than one latent frame.
        """
        return pixel_frames(autoregressive_index, output_temporal_size, self.temporal_compression_ratio)


@dataclass(frozen=True, kw_only=True)
class NullEncoderConfig(EncoderConfig):
    """Config of `NullEncoder`."""

    _target: type[NullEncoder] = field(default_factory=lambda: NullEncoder)


class NullEncoder(Encoder, StreamingEncoder[StreamingEncoderCache]):
    """Identity: passes what is already encoded straight on, as a context encoder and in the pipeline's slot."""

    def initialize_autoregressive_cache(self, **context: Any) -> StreamingEncoderCache:
        """An empty cache.

        Raises:
            TypeError: if a context is given; there is nothing it could set.
        """
        if context:
            raise TypeError(f"context: got {', '.join(sorted(context))}, expected none for a NullEncoder")
        return StreamingEncoderCache()

    def forward(self, input: Any, autoregressive_index: int = 0, cache: StreamingEncoderCache | None = None) -> Any:
        """`input`, unchanged."""
        return input


def check_frames(name: str, x: Any, channels: int) -> None:
    """Raise unless `x` is a floating-point tensor (..., T, channels, height, width) with something in it."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: got {type(x).__name__}, expected a tensor (..., T, {channels}, H, W)")
    if x.ndim < 4 or x.shape[-3] != channels or 0 in x.shape:
        raise ValueError(f"{name}: got {tuple(x.shape)}, expected shape (..., T, {channels}, H, W)")
    if not x.is_floating_point():
        raise TypeError(f"{name}: got {x.dtype}, expected a floating-point dtype")
