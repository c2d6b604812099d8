"""Encoders: text, video and pixels to what the transformer is conditioned on."""

from __future__ import annotations

from ..causal_time import StreamOrderError, TemporalSizeError
from .base import (
    Encoder,
    EncoderConfig,
    NullEncoder,
    NullEncoderConfig,
    StreamingEncoder,
    StreamingEncoderCache,
    StreamingVideoEncoder,
)
from .pixels import PixelEncoder, PixelEncoderConfig
from .text import UMT5TextEncoder, UMT5TextEncoderConfig
from .words import WordEncoder, WordEncoderConfig

__all__ = [
    "Encoder", "EncoderConfig", "NullEncoder", "NullEncoderConfig", "PixelEncoder", "PixelEncoderConfig",
    "StreamOrderError", "StreamingEncoder", "StreamingEncoderCache", "StreamingVideoEncoder", "TemporalSizeError",
    "UMT5TextEncoder", "UMT5TextEncoderConfig", "WordEncoder", "WordEncoderConfig",
]  # fmt: skip
