"""AnyFlow video models assembled from `anyflow_kernels`: models, caches, schedulers, pipelines, training.

Names are imported at first use, so that nothing heavy (diffusers, transformers) is loaded before it is needed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .acceleration import accelerate as accelerate
    from .acceleration import restore as restore
    from .models import AnyFlowFARTransformer3DModel as AnyFlowFARTransformer3DModel
    from .models import AnyFlowFARTransformerOutput as AnyFlowFARTransformerOutput
    from .models import AnyFlowTransformer3DModel as AnyFlowTransformer3DModel
    from .models import FarCache as FarCache
    from .schedulers import FlowMapEulerDiscreteScheduler as FlowMapEulerDiscreteScheduler

_NAMES_OF = {
    "acceleration": ("accelerate", "restore"),
    "models": ("AnyFlowFARTransformer3DModel", "AnyFlowFARTransformerOutput", "AnyFlowTransformer3DModel", "FarCache"),
    "schedulers": (
        "FlowMapEulerDiscreteScheduler", "FlowMapEulerScheduler", "FlowMapEulerSchedulerConfig", "FlowMatchScheduler",
        "FlowMatchSchedulerConfig", "FlowMatchUniPCScheduler", "FlowMatchUniPCSchedulerConfig",
    ),
    "encoders": ("Encoder", "NullEncoder", "NullEncoderConfig", "StreamingEncoder", "StreamingVideoEncoder"),
    "decoders": ("StreamingDecoder", "StreamingVideoDecoder"),
    "streaming": (
        "AnyFlowBidirectionalStream", "AnyFlowBidirectionalStreamConfig", "AnyFlowFARStream",
        "AnyFlowFARStreamConfig", "DiffusionModel", "DiffusionModelConfig", "FinalState", "InstantiateConfig",
        "PrintableConfig", "StreamInferencePipeline", "StreamInferencePipelineCache", "StreamInferencePipelineConfig",
        "Transformer", "TransformerAutoregressiveCache", "TransformerConfig", "derive_config", "open_model", "stream",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _NAMES_OF.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import version

        return version("anyflow-kernels")
    if name in _MODULE_OF:
        return getattr(importlib.import_module(f".{_MODULE_OF[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
