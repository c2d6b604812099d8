"""Encoders: text, video and pixels to what the transformer is conditioned on."""

from __future__ import annotations

import importlib
from typing import Any

# Loaded on first use, so that the contracts cost no import of the models.
_EXPORTS = {
    "Encoder": "base",
    "EncoderConfig": "base",
    "NullEncoder": "base",
    "NullEncoderConfig": "base",
    "PixelEncoder": "pixels",
    "PixelEncoderConfig": "pixels",
    "StreamOrderError": "..causal_time",
    "StreamingEncoder": "base",
    "StreamingEncoderCache": "base",
    "StreamingVideoEncoder": "base",
    "TemporalSizeError": "..causal_time",
    "UMT5TextEncoder": "text",
    "UMT5TextEncoderConfig": "text",
    "WordEncoder": "words",
    "WordEncoderConfig": "words",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _EXPORTS[name]
    return getattr(importlib.import_module(module if module.startswith(".") else f".{module}", __name__), name)


def __dir__() -> list[str]:
    return __all__
