"""The AnyFlow transformers."""

from .base import TransformerOutput
from .bidirectional import AnyFlowTransformer3DModel
from .far import AnyFlowFARTransformer3DModel, AnyFlowFARTransformerOutput

__all__ = [
    "AnyFlowFARTransformer3DModel",
    "AnyFlowFARTransformerOutput",
    "AnyFlowTransformer3DModel",
    "TransformerOutput",
]
