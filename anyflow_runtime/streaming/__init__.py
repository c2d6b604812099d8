"""Streaming inference: configs, pipeline, and the parts it drives."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import FrozenDict as FrozenDict
    from .config import InstantiateConfig as InstantiateConfig
    from .config import PrintableConfig as PrintableConfig
    from .config import derive_config as derive_config

# Loaded on first use: the schedulers import `streaming.config`, and the pipeline imports the schedulers.
_EXPORTS = {
    "FrozenDict": "config",
    "InstantiateConfig": "config",
    "PrintableConfig": "config",
    "derive_config": "config",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
