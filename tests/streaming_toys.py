"""Toy parts of a pipeline: they count, remember and fail as told, so that the loop around them can be seen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from anyflow_runtime.decoders.base import DecoderConfig, StreamingDecoder, StreamingDecoderCache
from anyflow_runtime.encoders.base import EncoderConfig, StreamingEncoder, StreamingEncoderCache
from anyflow_runtime.schedulers import FlowMapEulerSchedulerConfig, SchedulerConfig
from anyflow_runtime.streaming import (
    DiffusionModelConfig,
    RollingKVCache,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    Transformer,
    TransformerAutoregressiveCache,
    TransformerConfig,
)

FRAMES, CHANNELS, SIDE = 2, 3, 4
STAGE_KEYS = {"encode_ms", "diffuse_ms", "decode_ms", "finalize_ms", "total_ms", "total_ms_wo_finalize"}


class Breaks(RuntimeError):
    """What a toy part raises when told to."""


@dataclass(frozen=True, kw_only=True)
class ToyTransformerConfig(TransformerConfig):
    _target: type = field(default_factory=lambda: ToyTransformer)
    batch: int = 1


class ToyCache(TransformerAutoregressiveCache):
    """One rolling layer, and a log of what was called."""

    def __init__(self, batch: int, width: int, tokens: int) -> None:
        self.kv = RollingKVCache(batch, 1, width, sink=tokens, window=2 * tokens, chunk=tokens)
        self.log: list[Any] = []

    def start(self, autoregressive_index: int) -> None:
        self.log.append(("start", autoregressive_index))
        self.kv.before_update(autoregressive_index)

    def finalize(self, autoregressive_index: int) -> None:
        self.log.append(("finalize", autoregressive_index))
        self.kv.after_update(autoregressive_index)


class ToyTransformer(Transformer[ToyCache]):
    """One attention layer over 2 x 2 patches, in the manner of a streaming Wan; `breaks` makes it fail."""

    def __init__(self, config: ToyTransformerConfig) -> None:
        super().__init__(config)
        width = 4 * CHANNELS
        generator = torch.Generator().manual_seed(1)
        self.weight = nn.Parameter(torch.randn(3, width, width, generator=generator) / width**0.5)
        self.breaks = False
        self.timesteps: list[Tensor] = []

    @property
    def latent_shape(self) -> tuple[int, ...]:
        return (self.config.batch, FRAMES * SIDE * SIDE // 4, 4 * CHANNELS)

    def initialize_autoregressive_cache(self, **context: Any) -> ToyCache:
        return ToyCache(self.config.batch, self.latent_shape[2], self.latent_shape[1])

    def predict_flow(self, noisy_latent: Tensor, timestep: Tensor, cache: ToyCache, input: Any = None) -> Tensor:
        cache.log.append(("flow", float(timestep)))
        self.timesteps.append(timestep)
        if self.breaks:
            raise Breaks("transformer")
        x = noisy_latent if input is None else noisy_latent + input
        q, k, v = (x @ weight for weight in self.weight)
        cache.kv.update(k.unsqueeze(2).float(), v.unsqueeze(2).float())
        k, v = (part.squeeze(2).to(q.dtype) for part in (cache.kv.cached_k(), cache.kv.cached_v()))
        attention = torch.softmax(q @ k.transpose(1, 2), dim=-1) @ v
        return attention + timestep.to(x.dtype) / 1000

    def patchify_and_maybe_split_cp(self, x: Any) -> Any:
        b, t, c, h, w = x.shape
        patches = x.reshape(b, t, c, h // 2, 2, w // 2, 2).permute(0, 1, 3, 5, 2, 4, 6)
        return patches.reshape(b, t * h * w // 4, c * 4)

    def unpatchify_and_maybe_gather_cp(self, x: Tensor) -> Tensor:
        patches = x.reshape(x.shape[0], FRAMES, SIDE // 2, SIDE // 2, CHANNELS, 2, 2)
        return patches.permute(0, 1, 4, 2, 5, 3, 6).reshape(x.shape[0], FRAMES, CHANNELS, SIDE, SIDE)


@dataclass
class CountingEncoderCache(StreamingEncoderCache):
    """Both kinds of state a retry has to find as it was."""

    calls: int = 0
    seen: list[int] = field(default_factory=list)


class CountingEncoder(StreamingEncoder[CountingEncoderCache]):
    """Adds the number of calls, so a call too many shows in the output."""

    breaks = False

    def initialize_autoregressive_cache(self, **context: Any) -> CountingEncoderCache:
        return CountingEncoderCache(**context)

    def forward(
        self, input: Tensor, autoregressive_index: int = 0, cache: CountingEncoderCache | None = None
    ) -> Tensor:
        assert cache is not None and cache.calls == autoregressive_index
        cache.calls += 1
        cache.seen.append(autoregressive_index)
        if self.breaks:
            raise Breaks("encoder")
        return input + 0.1 * cache.calls


@dataclass(frozen=True, kw_only=True)
class CountingEncoderConfig(EncoderConfig):
    _target: type = field(default_factory=lambda: CountingEncoder)


@dataclass
class SumDecoderCache(StreamingDecoderCache):
    total: Tensor | float = 0.0


class SumDecoder(StreamingDecoder[SumDecoderCache]):
    """Adds up the latents of all chunks so far, so a chunk decoded twice shows in the output."""

    breaks = False

    def initialize_autoregressive_cache(self, **context: Any) -> SumDecoderCache:
        return SumDecoderCache(**context)

    def forward(self, *, input: Tensor, autoregressive_index: int, cache: SumDecoderCache) -> Tensor:  # type: ignore[override]
        cache.total = cache.total + input
        if self.breaks:
            raise Breaks("decoder")
        return cache.total


@dataclass(frozen=True, kw_only=True)
class SumDecoderConfig(DecoderConfig):
    _target: type = field(default_factory=lambda: SumDecoder)


def toy_config(
    encoder: EncoderConfig | None = None,
    decoder: DecoderConfig | None = None,
    profile: bool = False,
    scheduler: SchedulerConfig | None = None,
    **model: Any,
) -> StreamInferencePipelineConfig:
    return StreamInferencePipelineConfig(
        name="toy",
        diffusion_model=DiffusionModelConfig(
            transformer=ToyTransformerConfig(), scheduler=scheduler or FlowMapEulerSchedulerConfig(), **model
        ),
        encoder=encoder,
        decoder=decoder,
        enable_sync_and_profile=profile,
    )


def toy_pipeline(**kwargs: Any) -> StreamInferencePipeline:
    return toy_config(**kwargs).setup()


def control(index: int) -> Tensor:
    """The encoder's input for a chunk."""
    shape = (1, FRAMES, CHANNELS, SIDE, SIDE)
    return torch.randn(shape, generator=torch.Generator().manual_seed(100 + index))


def rollout(pipeline: StreamInferencePipeline, chunks: int, seed: int | None = 0) -> list[Tensor]:
    """All chunks of an undisturbed rollout."""
    cache = pipeline.initialize_cache(seed=seed)
    outputs = []
    for i in range(chunks):
        outputs.append(pipeline.generate(i, cache, None if pipeline.encoder is None else control(i)))
        pipeline.finalize(i, cache)
    return outputs
