"""Small random AnyFlow models in a streaming pipeline, their noise and prompts, and the loop over their chunks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.schedulers import (
    FlowMapEulerSchedulerConfig,
)
from anyflow_runtime.streaming import (
    AnyFlowBidirectionalStreamConfig,
    AnyFlowFARStreamConfig,
    DiffusionModelConfig,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
)

PARTITION = (1, 2, 2, 1, 2)
HEIGHT, WIDTH = 8, 12  # of the latents
TEXT_DIM, STEPS = 24, 2
MODEL: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "ffn_dim": 64,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "in_channels": 16,
    "out_channels": 16,
}


def random_model(causal: bool = True, **config: Any) -> Any:
    """A small model, every weight random."""
    torch.manual_seed(0)
    model_class = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    model = model_class(**(MODEL | config)).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def pipeline_of(
    model: Any,
    steps: int = STEPS,
    context_encoder: Any = None,
    model_config: dict[str, Any] | None = None,
    **stream: Any,
) -> StreamInferencePipeline:
    """A pipeline without a decoder around a model."""
    causal = isinstance(model, AnyFlowFARTransformer3DModel)
    kind = AnyFlowFARStreamConfig if causal else AnyFlowBidirectionalStreamConfig
    sizes = {"height": HEIGHT, "width": WIDTH, "chunk_partition": PARTITION if causal else (sum(PARTITION),)}
    transformer = kind(**(sizes | stream))
    config = StreamInferencePipelineConfig(
        name="far",
        diffusion_model=DiffusionModelConfig(
            transformer=transformer,
            scheduler=FlowMapEulerSchedulerConfig(num_inference_steps=steps),
            **(model_config or {}),
        ),
    )
    return config.setup(transformer=transformer.setup(model=model, context_encoder=context_encoder))


def noise_of(frames: int = sum(PARTITION), batch: int = 1) -> Tensor:
    """(B, C, T, H, W), as diffusers draws it."""
    return torch.randn(batch, 16, frames, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(3))


def text_of(seed: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 5, TEXT_DIM, generator=torch.Generator().manual_seed(seed))


def rollout(pipeline: StreamInferencePipeline, noise: Tensor, stop: int | None = None, **context: Any) -> Tensor:
    """(B, T, C, H, W) latents of all chunks, with this initial noise."""
    cache = pipeline.initialize_cache(context)
    chunks, start = [], 0
    state = cache.transformer_cache
    for i in range(state.num_chunks if stop is None else stop):
        end = start + state.frames_in_chunk(i)
        chunks.append(pipeline.generate(i, cache, noise=noise[:, :, start:end].transpose(1, 2)))
        start = end
        pipeline.finalize(i, cache)
    return torch.cat(chunks, dim=1)


def context_of(frames: int, batch: int = 1) -> Tensor | None:
    shape = (batch, frames, 16, HEIGHT, WIDTH)
    return torch.randn(shape, generator=torch.Generator().manual_seed(4)) if frames else None
