"""Streaming inference: configs, pipeline, and the parts it drives."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config import FrozenDict as FrozenDict
    from ..config import InstantiateConfig as InstantiateConfig
    from ..config import PrintableConfig as PrintableConfig
    from ..config import derive_config as derive_config

# Loaded on first use: the schedulers import `streaming.config`, and the pipeline imports the schedulers.
_NAMES_OF = {
    "async_decoder": ("AsyncDecoder", "PendingFrames", "decode_behind"),
    "adapter": ("AnyFlowStream", "AnyFlowStreamConfig", "Condition"),
    "bidirectional_stream": (
        "AnyFlowBidirectionalStream",
        "AnyFlowBidirectionalStreamCache",
        "AnyFlowBidirectionalStreamConfig",
    ),
    "..config": ("FrozenDict", "InstantiateConfig", "PrintableConfig", "derive_config"),
    "diffusion_model": ("DiffusionModel", "DiffusionModelConfig", "FinalState"),
    "..errors": ("LifecycleError", "NonFiniteError"),
    "far_stream": ("AnyFlowFARStream", "AnyFlowFARStreamCache", "AnyFlowFARStreamConfig"),
    "kv_cache": ("RollingKVCache",),
    "library": ("Change", "stream"),
    "pipeline": ("StreamInferencePipeline", "StreamInferencePipelineCache", "StreamInferencePipelineConfig"),
    "presets": ("PRESETS", "preset", "released_pipeline"),
    "profiler": ("EventProfiler",),
    "transformer": ("Transformer", "TransformerAutoregressiveCache", "TransformerConfig"),
    # Defined with the models they belong to, and part of the streaming documents.
    "..decoders.base": ("DecoderConfig", "StreamingDecoder", "StreamingDecoderCache", "StreamingVideoDecoder"),
    "..encoders.base": (
        "Encoder",
        "EncoderConfig",
        "NullEncoder",
        "NullEncoderConfig",
        "StreamingEncoder",
        "StreamingEncoderCache",
        "StreamingVideoEncoder",
    ),
}
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = _MODULE_OF[name]
    return getattr(importlib.import_module(module if module.startswith(".") else f".{module}", __name__), name)


def __dir__() -> list[str]:
    return __all__
