"""A causal (FAR) video chunk by chunk: denoised and decoded while the rest is still to be made.

The models are those of a loaded diffusers pipeline, whose weights are shared. The latents are those that the pipeline
makes with the same seed, and the frames those of decoding them all at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..decoders.wan_vae import WanVAEStreamDecoder, WanVAEStreamDecoderConfig
from ..encoders.text import UMT5TextEncoder, UMT5TextEncoderConfig
from ..schedulers.flow_map_stream import FlowMapEulerSchedulerConfig
from ..streaming import (
    AnyFlowFARStream,
    AnyFlowFARStreamConfig,
    DiffusionModelConfig,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    stream,
)
from ..streaming.errors import check_finite, check_finite_weights
from .generate_request import GenerateRequest


def streaming_pipeline(
    pipe: Any, steps: int, *, prompts: bool = False, decode: bool = False, finite: bool = False
) -> StreamInferencePipeline:
    """The streaming pipeline on the models of a diffusers `AnyFlowFARPipeline` with our transformer.

    Args:
        pipe: as `generate_stages.load_pipeline` returns it.
        steps: denoising steps per chunk.
        prompts: take texts, with the text encoder of `pipe`; else embeddings.
        decode: give frames, with the VAE of `pipe`; else latents.
        finite: check weights and latents for NaN and infinities.
    """
    config = AnyFlowFARStreamConfig()
    text = UMT5TextEncoder(UMT5TextEncoderConfig(), pipe.text_encoder, pipe.tokenizer) if prompts else None
    scheduler = FlowMapEulerSchedulerConfig(
        num_inference_steps=steps,
        shift=pipe.scheduler.config.shift,
        num_train_timesteps=pipe.scheduler.config.num_train_timesteps,
    )
    return StreamInferencePipeline(
        StreamInferencePipelineConfig(
            name="generate",
            diffusion_model=DiffusionModelConfig(transformer=config, scheduler=scheduler, check_finite=finite),
        ),
        transformer=AnyFlowFARStream(config, pipe.transformer, text),
        decoder=WanVAEStreamDecoder(WanVAEStreamDecoderConfig(), pipe.vae) if decode else None,
    )


class ChunkedVideo:
    """The video of a request, in two steps per chunk so that each can be timed.

    With offloading the transformer and the VAE's decoder share the GPU while chunks are made: the decoder is small, and
    fetching the transformer once per chunk would take longer than denoising.

    Args:
        pipe: the loaded diffusers pipeline.
        request: with a causal model.
    """

    def __init__(self, pipe: Any, request: GenerateRequest) -> None:
        self._request = request
        if request.offload:
            pipe.transformer._hf_hook.pre_forward(pipe.transformer)
        self._pipeline = streaming_pipeline(pipe, request.steps, finite=request.check_finite)
        self._decoder = WanVAEStreamDecoder(WanVAEStreamDecoderConfig(), pipe.vae).to(request.device)
        self._decoder_cache = self._decoder.initialize_autoregressive_cache()
        if request.check_finite:
            check_finite_weights("decoder", self._decoder)

    def latents(
        self, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None, context_latents: Tensor | None
    ) -> Iterator[Tensor]:
        """Clean normalised latents (1, F, C, H/8, W/8) of every chunk, those that are given included.

        The noise is drawn for the whole video at once on the CPU, in fp32, as diffusers does: the same video on every
        device.

        Raises:
            NonFiniteError: with `--check-finite`, naming the first weight or latent that is not finite.
        """
        request = self._request
        ratio = self._decoder.spatial_compression_ratio
        height, width = (side // ratio for side in request.size)
        channels = self._pipeline.diffusion_model.transformer.model.config.in_channels
        noise = torch.randn(
            (1, channels, request.latent_frames, height, width), generator=torch.Generator().manual_seed(request.seed)
        )
        return stream(
            self._pipeline,
            prompt_embeds,
            negative_prompt=negative_prompt_embeds,
            guidance_scale=request.guidance,
            chunk_partition=request.chunks,
            noise=noise,
            height=height,
            width=width,
            context_latents=context_latents,
        )

    def decode(self, latents: Tensor, index: int) -> Tensor:
        """Frames (T, 3, H, W) in [-1, 1] of the next chunk."""
        frames = self._decoder(latents, index, self._decoder_cache)[0]
        if self._request.check_finite:
            check_finite(f"frames of chunk {index}", frames)
        return frames
