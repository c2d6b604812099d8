"""A causal (FAR) video chunk by chunk: denoised and decoded while the rest is still to be made.

The models are those of a loaded diffusers pipeline, whose weights are shared. The latents are those that the pipeline
makes with the same seed, and the frames those of decoding them all at once.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from ..decoders.base import StreamingVideoDecoder
from ..encoders.base import Encoder
from ..encoders.text import UMT5TextEncoder, UMT5TextEncoderConfig
from ..errors import check_finite, check_finite_weights
from ..models import AnyFlowFARTransformer3DModel
from ..schedulers.flow_map_stream import FlowMapEulerSchedulerConfig
from ..streaming import (
    AnyFlowBidirectionalStreamConfig,
    AnyFlowFARStreamConfig,
    DiffusionModelConfig,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    stream,
)
from ..streaming.async_decoder import AsyncDecoder, decode_behind
from ..wan_vae.decoder import WanVAEStreamDecoder, WanVAEStreamDecoderConfig
from ..wan_vae.encoder import WanVAEEncoder, WanVAEEncoderConfig
from .generate_request import GenerateRequest
from .pixel_pipe import PixelPipe
from .stages import StageClock


def streaming_pipeline(
    pipe: Any, steps: int, *, prompts: bool = False, decode: bool = False, finite: bool = False
) -> StreamInferencePipeline:
    """The streaming pipeline on the models of a diffusers AnyFlow pipeline with our transformer, causal or not.

    Args:
        pipe: as `generate_stages.load_pipeline` returns it.
        steps: denoising steps per chunk.
        prompts: take texts, with the text encoder of `pipe`; else embeddings.
        decode: give frames, with the VAE of `pipe`; else latents.
        finite: check weights and latents for NaN and infinities.
    """
    causal = isinstance(pipe.transformer, AnyFlowFARTransformer3DModel)
    config = AnyFlowFARStreamConfig() if causal else AnyFlowBidirectionalStreamConfig()
    text = text_encoder_of(pipe) if prompts else None
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
        transformer=config.setup(model=pipe.transformer, context_encoder=text),
        decoder=decoder_of(pipe) if decode else None,
    )


def text_encoder_of(pipe: Any) -> Encoder:
    """The text encoder of a loaded pipeline as a streaming transformer takes it."""
    if isinstance(pipe, PixelPipe):
        return pipe.text_encoder
    return UMT5TextEncoder(UMT5TextEncoderConfig(), pipe.text_encoder, pipe.tokenizer)


def decoder_of(pipe: Any) -> StreamingVideoDecoder:
    """A streaming decoder on the weights of a loaded pipeline."""
    return pipe.decoder() if isinstance(pipe, PixelPipe) else WanVAEStreamDecoder(WanVAEStreamDecoderConfig(), pipe.vae)


def encoder_of(pipe: Any) -> torch.nn.Module:
    """An encoder of video in [0, 1] on the weights of a loaded pipeline."""
    if isinstance(pipe, PixelPipe):
        return pipe.encoder
    return WanVAEEncoder(WanVAEEncoderConfig(pixel_range="unit"), pipe.vae)


class ChunkedVideo:
    """The video of a request, in two steps per chunk so that each can be timed, and one may run beside the other.

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
        self._decoder = decoder_of(pipe).to(request.device)
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

    def frames(
        self, parts: Iterator[Tensor], clock: StageClock, finished: list[Tensor]
    ) -> Generator[tuple[Tensor, dict[str, float]], None, None]:
        """Decode chunks of latents, with `--overlap` each while the next is denoised.

        If something fails, or Ctrl-C is pressed, the chunk that is being decoded still comes first.

        Args:
            parts: of `latents`.
            clock: counts what denoising and decoding take.
            finished: takes the latents of every chunk once they are denoised.
        Yields:
            Frames (T, 3, H, W) in [-1, 1] of the next chunk, and its seconds of "denoise" and "decode".
        """
        overlap = self._request.overlap
        spent: list[float] = []

        def denoised() -> Generator[Tensor, None, None]:
            while True:
                before = clock.seconds.get("denoise", 0.0)
                with clock("denoise"):
                    latents = next(parts, None)
                if latents is None:
                    return
                spent.append(clock.seconds["denoise"] - before)
                finished.append(latents)
                yield latents

        def decode(input: Tensor, autoregressive_index: int, cache: Any) -> Tensor:
            return self.decode(input, autoregressive_index)

        with AsyncDecoder(decode, worker=overlap) as background:
            pending = decode_behind(denoised(), background.submit, behind=int(overlap), after=BaseException)
            for index, chunk in enumerate(pending):
                frames = chunk.on_host()
                clock.add("decode", chunk.seconds())
                yield frames, {"denoise": spent[index], "decode": chunk.seconds()}

    def decode(self, latents: Tensor, index: int) -> Tensor:
        """Frames (T, 3, H, W) in [-1, 1] of the next chunk."""
        frames = self._decoder(latents, index, self._decoder_cache)[0]
        if self._request.check_finite:
            check_finite(f"frames of chunk {index}", frames)
        return frames
