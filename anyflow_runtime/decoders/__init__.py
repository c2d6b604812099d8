"""Decoders: the clean latents of a chunk to frames."""

from __future__ import annotations

from ..causal_time import StreamOrderError, TemporalSizeError
from .base import DecoderConfig, StreamingDecoder, StreamingDecoderCache, StreamingVideoDecoder
from .pixels import PixelDecoder, PixelDecoderConfig

__all__ = [
    "DecoderConfig", "PixelDecoder", "PixelDecoderConfig", "StreamOrderError", "StreamingDecoder",
    "StreamingDecoderCache", "StreamingVideoDecoder", "TemporalSizeError",
]  # fmt: skip
