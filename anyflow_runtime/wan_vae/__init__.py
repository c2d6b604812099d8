"""The Wan VAE: its encoder for contexts, its streaming decoder, whole or by tiles, on the weights of diffusers."""

from __future__ import annotations

from .decoder import WanVAEStreamDecoder, WanVAEStreamDecoderCache, WanVAEStreamDecoderConfig
from .encoder import WanVAEEncoder, WanVAEEncoderCache, WanVAEEncoderConfig

__all__ = [
    "WanVAEEncoder", "WanVAEEncoderCache", "WanVAEEncoderConfig", "WanVAEStreamDecoder", "WanVAEStreamDecoderCache",
    "WanVAEStreamDecoderConfig",
]  # fmt: skip
