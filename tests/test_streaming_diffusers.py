"""Streamed latents are those of the pipelines of diffusers, causal and bidirectional."""

from __future__ import annotations

from typing import Any

import pytest
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, accelerate
from anyflow_runtime.encoders import UMT5TextEncoderConfig
from anyflow_runtime.streaming import (
    StreamInferencePipeline,
)

from .parity import FP32_TOLERANCE, relative_error
from .streaming_models import HEIGHT, PARTITION, STEPS, TEXT_DIM, WIDTH, context_of, noise_of, pipeline_of, rollout


@pytest.fixture(scope="module")
def diffusers_pipe() -> Any:
    pytest.importorskip("diffusers")
    from bench.tiny_pipeline import tiny_pipeline

    return tiny_pipeline(heads=2, head_dim=24, layers=2, ffn_dim=64, text_dim=TEXT_DIM)


@pytest.fixture(scope="module")
def bidirectional_pipe() -> Any:
    pytest.importorskip("diffusers")
    from bench.tiny_pipeline import tiny_pipeline

    return tiny_pipeline(causal=False, heads=2, head_dim=24, layers=2, ffn_dim=64, text_dim=TEXT_DIM)


def diffusers_latents(pipe: Any, prompt: Any, noise: Tensor, guidance: float, context: Tensor | None = None) -> Tensor:
    """(B, T, C, H, W) of the diffusers pipeline."""
    causal = {"chunk_partition": list(PARTITION)} if "FAR" in type(pipe).__name__ else {}
    frames = pipe(
        prompt=prompt,
        negative_prompt="grey" if guidance > 1 else None,
        guidance_scale=guidance,
        height=8 * HEIGHT,
        width=8 * WIDTH,
        num_frames=4 * (noise.shape[2] - 1) + 1,
        num_inference_steps=STEPS,
        latents=noise.clone(),
        video_latents=context,
        output_type="latent",
        max_sequence_length=16,
        **causal,
    ).frames
    return frames.transpose(1, 2)


def like_diffusers(pipe: Any) -> StreamInferencePipeline:
    """Our pipeline with the weights, text encoder and padding of a diffusers one."""
    causal = "FAR" in type(pipe).__name__
    model_class: Any = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    model = model_class.from_config(pipe.transformer.config).eval()
    model.load_state_dict(pipe.transformer.state_dict())
    parts = {"text_encoder": pipe.text_encoder, "tokenizer": pipe.tokenizer}
    encoder = UMT5TextEncoderConfig(max_length=16).setup(**parts)
    padding = {"phantom_padding": True} if causal else {}
    return pipeline_of(model, context_encoder=encoder, **padding)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("given", [0, 1, 5], ids=["T2V", "I2V", "V2V"])
def test_latents_are_those_of_diffusers(diffusers_pipe, given, guidance):
    prompts = ["a red fox", "rain on a window pane"]
    noise, context = noise_of(batch=2), context_of(given, batch=2)
    expected = diffusers_latents(diffusers_pipe, prompts, noise, guidance, context)
    keywords = {"negative_prompt": "grey", "guidance_scale": guidance, "context_latents": context}
    latents = rollout(like_diffusers(diffusers_pipe), noise, prompt=prompts, **keywords)
    assert relative_error(latents, expected) < FP32_TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("given", [0, 3], ids=["T2V", "V2V"])
def test_bidirectional_latents_are_those_of_diffusers(bidirectional_pipe, given, guidance):
    noise, context = noise_of(), context_of(given)
    expected = diffusers_latents(bidirectional_pipe, "a red fox", noise, guidance, context)
    keywords = {"negative_prompt": "grey", "guidance_scale": guidance, "context_latents": context}
    latents = rollout(like_diffusers(bidirectional_pipe), noise, prompt="a red fox", **keywords)
    assert relative_error(latents, expected) < FP32_TOLERANCE


def test_accelerated_diffusers_transformer_can_be_streamed(diffusers_pipe):
    """The weights are shared with the pipeline that owns them, which goes on working."""
    import copy

    transformer = copy.deepcopy(diffusers_pipe.transformer)
    ours = rollout(like_diffusers(diffusers_pipe), noise_of(), prompt="a red fox")
    pipeline = pipeline_of(accelerate(transformer), phantom_padding=True)
    text = like_diffusers(diffusers_pipe).diffusion_model.transformer.context_encoder("a red fox")
    assert relative_error(rollout(pipeline, noise_of(), text_embeddings=text), ours) < FP32_TOLERANCE
