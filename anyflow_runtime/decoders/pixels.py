"""Pixels as latents: the decoder of models that work on pixels, such as the demo model."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from ..encoders.base import check_frames
from ..encoders.pixels import PixelCodecConfig, PixelRatios
from .base import DecoderConfig, StreamingDecoderCache, StreamingVideoDecoder


@dataclass(frozen=True, kw_only=True)
class PixelDecoderConfig(PixelCodecConfig, DecoderConfig):
    """Config of `PixelDecoder`; see `PixelCodecConfig`."""

    _target: type[PixelDecoder] = field(default_factory=lambda: PixelDecoder)


class PixelDecoder(PixelRatios, StreamingVideoDecoder[StreamingDecoderCache]):
    """Latents to video without loss, the inverse of `PixelEncoder`, clamped to [-1, 1]."""

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
