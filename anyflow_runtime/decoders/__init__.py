"""Decoders: the clean latents of a chunk to frames."""

from __future__ import annotations

import importlib
from typing import Any

# Loaded on first use, so that the contracts cost no import of the models.
_EXPORTS = {
    "DecoderConfig": "base",
    "PixelDecoder": "pixels",
    "PixelDecoderConfig": "pixels",
    "StreamOrderError": "..causal_time",
    "StreamingDecoder": "base",
    "StreamingDecoderCache": "base",
    "StreamingVideoDecoder": "base",
    "TemporalSizeError": "..causal_time",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _EXPORTS[name]
    return getattr(importlib.import_module(module if module.startswith(".") else f".{module}", __name__), name)


def __dir__() -> list[str]:
    return __all__
