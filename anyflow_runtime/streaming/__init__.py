"""Streaming inference: from a model's directory to frames, chunk by chunk, and the contracts of the parts."""

from __future__ import annotations

from ..config import FrozenDict, InstantiateConfig, PrintableConfig, derive_config
from ..decoders.base import DecoderConfig, StreamingDecoder, StreamingDecoderCache, StreamingVideoDecoder
from ..encoders.base import (
    Encoder,
    EncoderConfig,
    NullEncoder,
    NullEncoderConfig,
    StreamingEncoder,
    StreamingEncoderCache,
    StreamingVideoEncoder,
)
from ..errors import LifecycleError, NonFiniteError
from .adapter import AnyFlowStream, AnyFlowStreamConfig, Condition
from .async_decoder import AsyncDecoder, PendingFrames, decode_behind
from .bidirectional_stream import (
    AnyFlowBidirectionalStream,
    AnyFlowBidirectionalStreamCache,
    AnyFlowBidirectionalStreamConfig,
)
from .diffusion_model import DiffusionModel, DiffusionModelConfig, FinalState
from .far_stream import AnyFlowFARStream, AnyFlowFARStreamCache, AnyFlowFARStreamConfig
from .kv_cache import RollingKVCache
from .library import stream, video_noise
from .model_directory import ModelDirectory, read_model_directory
from .open_model import open_model
from .pipeline import StreamInferencePipeline, StreamInferencePipelineCache, StreamInferencePipelineConfig
from .presets import PRESETS, preset, released_pipeline
from .profiler import EventProfiler
from .rollout import Change, Decoded, Denoised, Step
from .transformer import Transformer, TransformerAutoregressiveCache, TransformerConfig

__all__ = [
    "PRESETS", "AnyFlowBidirectionalStream", "AnyFlowBidirectionalStreamCache", "AnyFlowBidirectionalStreamConfig",
    "AnyFlowFARStream", "AnyFlowFARStreamCache", "AnyFlowFARStreamConfig", "AnyFlowStream", "AnyFlowStreamConfig",
    "AsyncDecoder", "Change", "Condition", "Decoded", "DecoderConfig", "Denoised", "DiffusionModel",
    "DiffusionModelConfig", "Encoder", "EncoderConfig", "EventProfiler", "FinalState", "FrozenDict",
    "InstantiateConfig", "LifecycleError", "ModelDirectory", "NonFiniteError", "NullEncoder", "NullEncoderConfig",
    "PendingFrames", "PrintableConfig", "RollingKVCache", "Step", "StreamInferencePipeline",
    "StreamInferencePipelineCache", "StreamInferencePipelineConfig", "StreamingDecoder", "StreamingDecoderCache",
    "StreamingEncoder", "StreamingEncoderCache", "StreamingVideoDecoder", "StreamingVideoEncoder", "Transformer",
    "TransformerAutoregressiveCache", "TransformerConfig", "decode_behind", "derive_config", "open_model", "preset",
    "read_model_directory", "released_pipeline", "stream", "video_noise",
]  # fmt: skip
