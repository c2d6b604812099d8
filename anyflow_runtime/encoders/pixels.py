"""Pixels as latents: the codec of models that work on pixels, such as the demo model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import InstantiateConfig
from .base import EncoderConfig, StreamingEncoderCache, StreamingVideoEncoder, VideoRatios, check_frames


@dataclass(frozen=True, kw_only=True)
class PixelCodecConfig(InstantiateConfig):
    """What the configs of `PixelEncoder` and `PixelDecoder` share.

    Args:
        channels: of the video.
        block: pixels of a block x block square become the channels of one latent, `channels * block**2` of them.
        latent_range: values of latents that are black and white.
    Raises:
        ValueError: at construction, for counts below one or an empty range.
    """

    channels: int = 3
    block: int = 1
    latent_range: Sequence[float] = (-1.0, 1.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.channels < 1 or self.block < 1:
            raise ValueError(f"channels, block: got {self.channels}, {self.block}, expected at least 1")
        if len(self.latent_range) != 2 or not self.latent_range[0] < self.latent_range[1]:
            raise ValueError(f"latent_range: got {self.latent_range}, expected two rising numbers")


class PixelRatios(VideoRatios):
    """Squares of pixels as one latent, frame by frame."""

    config: Any

    @property
    def spatial_compression_ratio(self) -> int:
        return self.config.block

    @property
    def temporal_compression_ratio(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class PixelEncoderConfig(PixelCodecConfig, EncoderConfig):
    """Config of `PixelEncoder`; see also `PixelCodecConfig`.

    Args:
        pixel_range: "signed" for video in [-1, 1], "unit" for video in [0, 1].
    Raises:
        ValueError: at construction, for another range.
    """

    _target: type[PixelEncoder] = field(default_factory=lambda: PixelEncoder)
    pixel_range: str = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_range not in ("signed", "unit"):
            raise ValueError(f"pixel_range: got {self.pixel_range!r}, expected 'signed' or 'unit'")


class PixelEncoder(PixelRatios, StreamingVideoEncoder[StreamingEncoderCache]):
    """Video to latents without loss: a space-to-depth rearrangement, one latent frame for each pixel frame."""

    def initialize_autoregressive_cache(self) -> StreamingEncoderCache:
        """An empty cache: the frames do not depend on each other."""
        return StreamingEncoderCache()

    @torch.no_grad()
    def forward(
        self, input: Tensor, autoregressive_index: int = 0, cache: StreamingEncoderCache | None = None
    ) -> Tensor:
        """(..., T, C, H, W) video -> (..., T, C * block**2, H / block, W / block) latents in `latent_range`.

        Raises:
            ValueError: for a shape that is no such video.
        """
        check_frames("input", input, self.config.channels)
        if input.shape[-2] % self.config.block or input.shape[-1] % self.config.block:
            raise ValueError(
                f"input: got height and width {tuple(input.shape[-2:])}, expected multiples of {self.config.block}"
            )
        self.get_output_temporal_size(autoregressive_index, input.shape[-4])
        latents = F.pixel_unshuffle(input, self.config.block)
        if self.config.pixel_range == "unit":
            latents = latents * 2 - 1
        black, white = self.config.latent_range
        return latents * ((white - black) / 2) + (white + black) / 2
