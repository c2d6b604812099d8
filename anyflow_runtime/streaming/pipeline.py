"""The streaming loop: encoder, diffusion model and decoder, one chunk at a time.

    cache = pipeline.initialize_cache(transformer_context={"prompt": "a red fox"}, seed=0)
    for i in range(7):
        frames = pipeline.generate(i, cache)
        pipeline.finalize(i, cache)  # optional after the last chunk

A call commits only when it has succeeded: a `generate` or `finalize` that raised may simply be called again.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ..config import InstantiateConfig
from ..decoders.base import DecoderConfig, StreamingDecoderCacheT
from ..encoders.base import EncoderConfig, StreamingEncoderCacheT
from ..errors import LifecycleError, check_finite, check_finite_weights, noting
from .diffusion_model import DiffusionModel, DiffusionModelConfig, FinalState
from .profiler import EventProfiler
from .transformer import Transformer, TransformerCacheT

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class StreamInferencePipelineConfig(InstantiateConfig):
    """Config of `StreamInferencePipeline`.

    Args:
        name: slug of this variant.
        diffusion_model: transformer and scheduler.
        decoder: latents to frames; None returns the clean latents.
        encoder: encodes the input of every chunk; None for a pipeline without one.
        video_encoder: encodes frames that a video is to begin with; built when the first ones come.
        enable_sync_and_profile: time every stage, log a line per chunk. Waits for the device once per chunk.
    """

    _target: type[StreamInferencePipeline] = field(default_factory=lambda: StreamInferencePipeline)
    name: str
    diffusion_model: DiffusionModelConfig
    decoder: DecoderConfig | None = None
    encoder: EncoderConfig | None = None
    video_encoder: EncoderConfig | None = None
    enable_sync_and_profile: bool = False


@dataclass(kw_only=True)
class StreamInferencePipelineCache(Generic[StreamingEncoderCacheT, TransformerCacheT, StreamingDecoderCacheT]):
    """State of one rollout. Rollouts may interleave, each with a cache of its own.

    Attributes:
        transformer_cache, encoder_cache, decoder_cache: of the parts; None for an absent part.
        final_state: of the latest chunk, until `finalize` has consumed it.
        autoregressive_index: of the latest chunk that was generated, None before the first.
        event_profiler: of the latest chunk, None unless profiling is on.
        rng: generator of this rollout alone; None draws from the model's.
    """

    transformer_cache: TransformerCacheT
    encoder_cache: StreamingEncoderCacheT | None = None
    decoder_cache: StreamingDecoderCacheT | None = None
    final_state: FinalState[TransformerCacheT] | None = None
    autoregressive_index: int | None = None
    event_profiler: EventProfiler | None = None
    rng: torch.Generator | None = None

    @property
    def next_index(self) -> int:
        """The index `generate` has to be called with next."""
        return 0 if self.autoregressive_index is None else self.autoregressive_index + 1


class StreamInferencePipeline(nn.Module, Generic[StreamingEncoderCacheT, TransformerCacheT, StreamingDecoderCacheT]):
    """Generates video chunk by chunk.

    Args:
        config: a `StreamInferencePipelineConfig`.
        transformer, encoder, decoder, video_encoder: parts to use instead of building those of the config, such as
            modules that share weights with a diffusers pipeline.
    Raises:
        TypeError: if the encoder or decoder is none that streams.
    """

    def __init__(
        self,
        config: StreamInferencePipelineConfig,
        *,
        transformer: Transformer | None = None,
        encoder: nn.Module | None = None,
        decoder: nn.Module | None = None,
        video_encoder: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        given = {} if transformer is None else {"transformer": transformer}
        self.diffusion_model: DiffusionModel = config.diffusion_model.setup(**given)
        self.encoder: Any = _part("encoder", encoder, config.encoder)
        self.decoder: Any = _part("decoder", decoder, config.decoder)
        self.video_encoder: Any = video_encoder

    @torch.no_grad()
    def encode_video(self, video: Tensor) -> Tensor:
        """Latents (B, F, C, h, w) of frames (B, T, 3, H, W) that a video is to begin with.

        Raises:
            ValueError: for a pipeline without a video encoder.
        """
        transformer = self.diffusion_model.transformer
        if self.video_encoder is None:
            if self.config.video_encoder is None:
                raise ValueError("context_video: got it for a pipeline without a video encoder, expected video_encoder")
            self.video_encoder = self.config.video_encoder.setup()
            if transformer.turns is None:
                self.video_encoder.to(transformer.device)
        finite = self.config.diffusion_model.check_finite
        if finite:
            check_finite_weights("video_encoder", self.video_encoder)
        with nullcontext() if transformer.turns is None else transformer.turns.lend(self.video_encoder):
            latents = self.video_encoder(video.to(transformer.device)).to(transformer.dtype)
        if finite:
            check_finite("context latents", latents)
        return latents

    def initialize_cache(
        self,
        transformer_context: dict[str, Any] | None = None,
        encoder_context: dict[str, Any] | None = None,
        decoder_context: dict[str, Any] | None = None,
        *,
        seed: int | None = None,
    ) -> StreamInferencePipelineCache[StreamingEncoderCacheT, TransformerCacheT, StreamingDecoderCacheT]:
        """A fresh cache for a new rollout.

        Args:
            transformer_context, encoder_context, decoder_context: keywords of the parts'
                `initialize_autoregressive_cache`; ignored for a part that is absent.
            seed: of this rollout: equal seeds give equal rollouts, whatever ran before. None draws from the model's
                generator.
        Raises:
            NonFiniteError: with `check_finite`, if a weight is not finite.
        """
        if self.config.diffusion_model.check_finite:
            self.diffusion_model.check_weights()
            for name, part in (("encoder", self.encoder), ("decoder", self.decoder)):
                if part is not None:
                    check_finite_weights(name, part)
        transformer = self.diffusion_model.transformer
        return StreamInferencePipelineCache(
            transformer_cache=transformer.initialize_autoregressive_cache(**(transformer_context or {})),
            encoder_cache=_cache_of(self.encoder, encoder_context),
            decoder_cache=_cache_of(self.decoder, decoder_context),
            event_profiler=EventProfiler(transformer.device) if self.config.enable_sync_and_profile else None,
            rng=None if seed is None else self.diffusion_model.new_rng(seed),
        )

    @torch.no_grad()
    def generate(
        self,
        autoregressive_index: int,
        cache: StreamInferencePipelineCache[StreamingEncoderCacheT, TransformerCacheT, StreamingDecoderCacheT],
        input: Any = None,
        *,
        noise: Tensor | None = None,
        steps: int | None = None,
    ) -> Tensor:
        """Generate one chunk.

        If anything raises, the cache is as before and the same call may be repeated: generators are rewound and the
        encoder's and decoder's caches put back, provided these replace their tensors instead of writing into them.

        Args:
            autoregressive_index: 0 first, then one more each time, every earlier chunk finalized.
            cache: of the rollout.
            input: what the encoder takes; required with an encoder, not allowed without.
            noise: initial noise (..., T, C, H, W) instead of a draw.
            steps: denoising steps of this chunk; None as configured.
        Returns:
            Frames of the decoder, or the clean latent (..., T, C, H, W) without one.
        Raises:
            LifecycleError: (a ValueError and AssertionError) on a call out of order.
        """
        return self._generate(autoregressive_index, cache, input, self.decoder, noise=noise, steps=steps)

    @torch.no_grad()
    def denoise(
        self,
        autoregressive_index: int,
        cache: StreamInferencePipelineCache[StreamingEncoderCacheT, TransformerCacheT, StreamingDecoderCacheT],
        input: Any = None,
        *,
        noise: Tensor | None = None,
        steps: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> Tensor:
        """`generate` without the decoder: the clean latent (..., T, C, H, W).

        For a caller that decodes it elsewhere, every chunk and in order, with `cache.decoder_cache`. `on_step` is
        called after each call of the network, with its number from 1.
        """
        return self._generate(autoregressive_index, cache, input, None, noise=noise, steps=steps, on_step=on_step)

    def _generate(self, index: int, cache: Any, input: Any, decoder: Any, **sampling: Any) -> Tensor:
        self._check_generate(index, cache, input)
        model, finite = self.diffusion_model, self.config.diffusion_model.check_finite
        rng = model.rng if cache.rng is None else cache.rng
        profiler = cache.event_profiler
        if profiler is not None:
            profiler.reset()
        # A decoder's cache that is not used here may be in use elsewhere.
        caches = (cache.encoder_cache, *(() if decoder is None else (cache.decoder_cache,)))
        with _undone_on_error(rng, *caches):
            encoded = None
            with stage(profiler, "encode"):
                if self.encoder is not None:
                    encoded = self.encoder(input=input, autoregressive_index=index, cache=cache.encoder_cache)
            if finite and isinstance(encoded, Tensor):
                check_finite(f"encoder output of chunk {index}", encoded)
            with stage(profiler, "diffuse"):
                output, state = model.generate(index, cache.transformer_cache, encoded, rng=rng, **sampling)
            with stage(profiler, "decode"), noting(f"while decoding chunk {index}"):
                if decoder is not None:
                    output = decoder(input=output, autoregressive_index=index, cache=cache.decoder_cache)
            if finite:
                check_finite(f"output of chunk {index}", output)
        cache.autoregressive_index, cache.final_state = index, state
        return output

    @torch.no_grad()
    def finalize(
        self,
        autoregressive_index: int,
        cache: StreamInferencePipelineCache[StreamingEncoderCacheT, TransformerCacheT, StreamingDecoderCacheT],
    ) -> dict[str, float] | None:
        """Make the latest chunk the context of the next one.

        Args:
            autoregressive_index: that of the latest `generate`.
            cache: of the rollout; its `final_state` is consumed.
        Returns:
            With profiling on `encode_ms`, `diffuse_ms`, `decode_ms`, `finalize_ms`, `total_ms`,
            `total_ms_wo_finalize`, on CUDA also `mem_alloc_gib`, `mem_reserved_gib`, `mem_peak_gib`; else None.
        Raises:
            LifecycleError: (a ValueError and AssertionError) for another index, or if there is nothing to finalize.
        """
        if cache.final_state is None or autoregressive_index != cache.autoregressive_index:
            state = "nothing to finalize" if cache.final_state is None else f"chunk {cache.autoregressive_index}"
            raise LifecycleError(f"autoregressive_index: got {autoregressive_index} to finalize, expected {state}")
        with _undone_on_error(cache.final_state.rng), stage(cache.event_profiler, "finalize"):
            self.diffusion_model.finalize(cache.final_state)
        cache.final_state = None
        if cache.event_profiler is None:
            return None
        stats = cache.event_profiler.summary()
        parts = ", ".join(f"{key} {value:.2f}" for key, value in stats.items())
        logger.info("%s chunk %d: %s", self.config.name, autoregressive_index, parts)
        return stats

    def _check_generate(self, index: int, cache: Any, input: Any) -> None:
        if index != cache.next_index:
            raise LifecycleError(f"autoregressive_index: got {index}, expected {cache.next_index}")
        if cache.final_state is not None:
            raise LifecycleError(
                f"autoregressive_index: got {index}, but chunk {cache.autoregressive_index} is not finalized"
            )
        if self.encoder is None and input is not None:
            raise LifecycleError(f"input: got {type(input).__name__}, expected None: the pipeline has no encoder")
        if self.encoder is not None and input is None:
            raise LifecycleError("input: got None, expected what the encoder takes")


def _part(name: str, given: nn.Module | None, config: InstantiateConfig | None) -> nn.Module | None:
    part = config.setup() if given is None and config is not None else given
    if part is not None and not hasattr(part, "initialize_autoregressive_cache"):
        raise TypeError(
            f"{name}: got {type(part).__name__}, expected a streaming {name} (with initialize_autoregressive_cache); "
            "one-shot encoders belong in the transformer's context_encoder"
        )
    return part


def _cache_of(part: Any, context: dict[str, Any] | None) -> Any:
    return None if part is None else part.initialize_autoregressive_cache(**(context or {}))


def stage(profiler: EventProfiler | None, name: str) -> AbstractContextManager[None]:
    """Time the block as this stage, if anything is timed."""
    return nullcontext() if profiler is None else profiler.stage(name)


@contextmanager
def _undone_on_error(rng: torch.Generator | None, *caches: Any) -> Iterator[None]:
    """Rewind the generator and put the caches' attributes back if the block raises, be it by Ctrl-C."""
    state = None if rng is None else rng.get_state()
    saved = [(vars(cache), _attributes(cache)) for cache in caches if hasattr(cache, "__dict__")]
    try:
        yield
    except BaseException:
        if rng is not None and state is not None:
            rng.set_state(state)
        for attributes, before in saved:
            attributes.clear()
            attributes.update(before)
        raise


def _attributes(cache: Any) -> dict[str, Any]:
    return {name: _without_tensors_copied(value) for name, value in vars(cache).items()}


def _without_tensors_copied(value: Any) -> Any:
    """Containers are copied, as a cache may append to them; tensors and other objects are not."""
    if type(value) in (list, tuple, set):
        return type(value)(_without_tensors_copied(item) for item in value)
    if type(value) is dict:
        return {key: _without_tensors_copied(item) for key, item in value.items()}
    return value
