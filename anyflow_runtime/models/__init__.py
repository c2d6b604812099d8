"""The AnyFlow transformers, and the cache of a causal rollout."""

from __future__ import annotations

from .base import AnyFlowModel
from .bidirectional import AnyFlowTransformer3DModel
from .cache import FarCache
from .far import AnyFlowFARTransformer3DModel
from .outputs import AnyFlowFARTransformerOutput, TransformerOutput

MODELS: dict[str, type[AnyFlowModel]] = {
    model.__name__: model for model in (AnyFlowTransformer3DModel, AnyFlowFARTransformer3DModel)
}

__all__ = [
    "MODELS", "AnyFlowFARTransformer3DModel", "AnyFlowFARTransformerOutput", "AnyFlowModel",
    "AnyFlowTransformer3DModel", "FarCache", "TransformerOutput",
]  # fmt: skip
