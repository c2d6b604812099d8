"""The AnyFlow transformers, imported at first use: the cache needs parts of this package, the FAR model the cache."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import AnyFlowModel as AnyFlowModel
    from .base import TransformerOutput as TransformerOutput
    from .bidirectional import AnyFlowTransformer3DModel as AnyFlowTransformer3DModel
    from .far import AnyFlowFARTransformer3DModel as AnyFlowFARTransformer3DModel
    from .far import AnyFlowFARTransformerOutput as AnyFlowFARTransformerOutput

_MODULE_OF = {
    "AnyFlowFARTransformer3DModel": "far",
    "AnyFlowFARTransformerOutput": "far",
    "AnyFlowModel": "base",
    "AnyFlowTransformer3DModel": "bidirectional",
    "TransformerOutput": "base",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
