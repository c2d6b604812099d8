"""Pixels as latents: the decoder of models that work on pixels, such as the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoders.base import check_frames
from ..encoders.pixels import check_range
from .base import DecoderConfig, StreamingDecoderCache, StreamingVideoDecoder


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig(DecoderConfig):
    """Config of `PixelDecoder`.

    Args:
        channels: of the video.
        block: side of the square of pixels that one latent's `channels * block**2` channels hold.
        latent_range: values of latents that are black and white.
    Raises:
        ValueError: at construction, for counts below one or an empty range.
    """

    _target: type[PixelDecoder] = field(default_factory=lambda: PixelDecoder)
    channels: int = 3
    block: int = 1
    latent_range: Sequence[float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.block < 1:
            raise ValueError(f"channels, block: got {self.channels}, {self.block}, expected at least 1")
        check_range("latent_range", self.latent_range)


class PixelDecoder(StreamingVideoDecoder[StreamingDecoderCache]):
    """Latents to video without loss, the inverse of `PixelEncoder`, clamped to [-1, 1]."""

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.block

    @property
    def temporal_compression_ratio(self) -> int:
        return 1

    def initialize_autoregressive_cache(self) -> StreamingDecoderCache:
        """An empty cache: the frames do not depend on each other."""
        return StreamingDecoderCache()

    @torch.no_grad()
    def forward(
        self, input: Tensor, autoregressive_index: int = 0, cache: StreamingDecoderCache | None = None
    ) -> Tensor:
        """(..., T, C * block**2, h, w) latents -> (..., T, C, h * block, w * block) video in [-1, 1].

        Raises:
            ValueError: for a shape that is no such latents.
        """
        check_frames("input", input, self.config.channels * self.config.block**2)
        self.get_output_temporal_size(autoregressive_index, input.shape[-4])
        black, white = self.config.latent_range
        centre, half = (white + black) / 2, (white - black) / 2
        return F.pixel_shuffle((input - centre) / half, self.config.block).clamp(-1.0, 1.0)
