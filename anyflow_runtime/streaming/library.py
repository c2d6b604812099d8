"""Video as a Python generator: frames arrive chunk by chunk, and the prompt may change on the way.

for frames in stream(pipeline, "a red fox in the snow", num_chunks=7, seed=0):
    show(frames)  # (B, T, 3, H, W) in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import check_finite
from .adapter import AnyFlowStream, check_partition
from .async_decoder import AsyncDecoder, PendingFrames, decode_behind
from .pipeline import StreamInferencePipeline, StreamInferencePipelineCache

Prompt = Any  # a string, several, or text embeddings


@dataclass(frozen=True, kw_only=True)
class Change:
    """What to do differently from the next chunk on; None leaves a setting as it is.

    Args:
        prompt: a string or a list of strings, or text embeddings (B, S, D).
        negative_prompt: likewise, with guidance.
        guidance_scale: above 1, and only in a rollout that began with guidance.
        steps: denoising steps per chunk.
    """

    prompt: Prompt | None = None
    negative_prompt: Prompt | None = None
    guidance_scale: float | None = None
    steps: int | None = None


def stream(
    pipeline: StreamInferencePipeline,
    prompt: Prompt | Callable[[int], Prompt | None],
    *,
    negative_prompt: Prompt | None = None,
    guidance_scale: float = 1.0,
    num_chunks: int | None = None,
    chunk_partition: Sequence[int] | None = None,
    endless: bool = False,
    steps: int | None = None,
    seed: int | None = None,
    noise: Tensor | None = None,
    height: int | None = None,
    width: int | None = None,
    context_latents: Tensor | None = None,
    context_video: Tensor | None = None,
    video_encoder: nn.Module | None = None,
    on_stats: Callable[[int, dict[str, float]], None] | None = None,
    overlap: bool | None = None,
) -> Generator[Tensor, Prompt | Change | None, None]:
    """Generate a video with an AnyFlow pipeline, one chunk per iteration.

    Arguments are checked, and given context is encoded, before this returns. `send(x)` goes on under a `Change`, or
    under a prompt alone, from the next chunk that has not begun. A chunk becomes context when the next one is asked
    for, so the frames come first and stopping early costs nothing; `close()`, `break` or an exception leave the
    pipeline ready for the next rollout.

    With `overlap` a chunk is decoded while the next one is denoised. The frames are the same, but those of chunk i
    come when chunk i + 1 has begun, so what is sent then is for chunk i + 2; only the first chunk comes at once.

    Args:
        pipeline: with an AnyFlow transformer and no encoder of its own for inputs per chunk.
        prompt: a string or a list of strings (with a context encoder), or text embeddings (B, S, D). A function is
            asked before every chunk, given its index; None means no change.
        negative_prompt: with guidance; the empty string if the prompts are text.
        guidance_scale: above 1 classifier-free guidance is on.
        num_chunks: length of the video; chunks beyond the partition have its largest size.
        chunk_partition: latent frames per chunk instead; None is the default of the model.
        endless: go on until stopped. Give the transformer `max_context_chunks` for constant memory.
        steps: denoising steps per chunk; None as configured.
        seed: of this video.
        noise: initial noise of the whole video, (B, C, T, H, W) as diffusers draws it, instead of draws per chunk.
        height, width: of the frames in pixels, of the latents without a decoder; None is the default of the model.
        context_latents: (B, F, C, H, W) normalised latents of the first chunks, which are given.
        context_video: (B, T, 3, H, W) in the range of `video_encoder`, which makes `context_latents` of it: one frame
            for image-to-video.
        video_encoder: a streaming video encoder.
        on_stats: called with the index and the timings of every chunk, if the pipeline is profiling.
        overlap: see above; on a CPU the decoder then has a thread of its own, which competes for the cores. None
            overlaps on CUDA, unless the pipeline is profiling, for which it waits after every stage.
    Yields:
        Frames (B, T, 3, H, W) in [-1, 1]; without a decoder clean latents (B, F, C, H, W).
    Raises:
        TypeError: for a pipeline with another transformer.
        ValueError: on arguments that contradict each other or do not fit.
    """
    transformer: Any = pipeline.diffusion_model.transformer
    if not isinstance(transformer, AnyFlowStream):
        raise TypeError(f"pipeline: its transformer is {type(transformer).__name__}, expected an AnyFlow adapter")
    if context_video is not None:
        if context_latents is not None or video_encoder is None:
            raise ValueError("context_video: expected with video_encoder and without context_latents")
        context_latents = video_encoder(context_video)
    scale = getattr(pipeline.decoder, "spatial_compression_ratio", 1)
    context = {
        "height": _latent_side("height", height, scale),
        "width": _latent_side("width", width, scale),
        "context_latents": context_latents,
        "chunk_partition": _partition(transformer, num_chunks, chunk_partition),
    }
    if endless:
        if num_chunks is not None:
            raise ValueError(f"num_chunks: got {num_chunks} with endless, expected None")
        context["endless"] = True
    overlap = _overlap(pipeline, overlap)
    pipeline.diffusion_model.scheduler_for(steps)
    rollout = _Rollout(pipeline, prompt, negative_prompt, guidance_scale, steps)
    cache = pipeline.initialize_cache(
        {k: v for k, v in context.items() if v is not None} | rollout.prompts(), seed=seed
    )
    if noise is not None:
        rollout.take_noise(noise, cache.transformer_cache)
    return rollout.run_overlapped(cache) if overlap else rollout.run(cache, pipeline.generate, on_stats)


class _Rollout:
    """The settings of a video that may change between chunks, and the loop over them."""

    def __init__(
        self, pipeline: StreamInferencePipeline, prompt: Any, negative_prompt: Any, scale: float, steps: int | None
    ) -> None:
        self.pipeline = pipeline
        self.transformer: Any = pipeline.diffusion_model.transformer
        self.prompt_at = prompt if callable(prompt) else None
        self.prompt = prompt(0) if callable(prompt) else prompt
        self.negative_prompt, self.guidance_scale, self.steps = negative_prompt, scale, steps
        self.noise: Tensor | None = None

    def prompts(self) -> dict[str, Any]:
        """The prompts as keywords of `make_condition`."""
        keywords: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        for prefix, value in (("", self.prompt), ("negative_", self.negative_prompt)):
            if value is not None:
                keywords[prefix + ("text_embeddings" if isinstance(value, Tensor) else "prompt")] = value
        return keywords

    def take_noise(self, noise: Tensor, cache: Any) -> None:
        """Check that the noise is that of a whole rollout, and keep it as (B, T, C, H, W)."""
        if cache.num_chunks is None:
            raise ValueError("noise: got noise for a whole video with endless, expected None")
        frames = sum(cache.frames_in_chunk(i) for i in range(cache.num_chunks))
        batch, _, *rest = self.transformer.chunk_latent_shape(0, cache)
        expected = (batch, rest[0], frames, *rest[1:])
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise: got {tuple(noise.shape)}, expected (B, C, T, H, W) = {expected}")
        self.noise = noise.transpose(1, 2)

    def apply(self, change: Any, index: int, cache: Any) -> None:
        """Take over what was sent, and what the prompt function says for the next chunk."""
        if change is not None and not isinstance(change, Change):
            change = Change(prompt=change)
        change = change or Change()
        if change.steps is not None:
            self.pipeline.diffusion_model.scheduler_for(change.steps)
            self.steps = change.steps
        before = (self.prompt, self.negative_prompt, self.guidance_scale)
        if change.prompt is not None:
            self.prompt = change.prompt
        elif self.prompt_at is not None:
            asked = self.prompt_at(index)
            self.prompt = self.prompt if asked is None else asked
        if change.negative_prompt is not None:
            self.negative_prompt = change.negative_prompt
        if change.guidance_scale is not None:
            self.guidance_scale = change.guidance_scale
        after = (self.prompt, self.negative_prompt, self.guidance_scale)
        if not all(_same(a, b) for a, b in zip(before, after, strict=True)):
            self.transformer.change_condition(cache, self.transformer.make_condition(**self.prompts()))

    def run_overlapped(self, cache: StreamInferencePipelineCache) -> Generator[Tensor, Any, None]:
        """Frames of the chunks, each decoded while the next one is denoised."""
        finite = self.pipeline.config.diffusion_model.check_finite
        latents = self.run(cache, self.pipeline.denoise, None)
        with AsyncDecoder(self.pipeline.decoder, worker=True) as decoder, closing(latents):

            def submit(chunk: Tensor, index: int) -> PendingFrames:
                return decoder.submit(chunk, index, cache.decoder_cache)

            pending = decode_behind(latents, submit, from_first=False)
            change = None
            for index in count():
                try:
                    frames = pending.send(change).wait()
                except StopIteration:
                    return
                if finite:
                    check_finite(f"output of chunk {index}", frames)
                change = yield frames
                del frames

    def run(
        self,
        cache: StreamInferencePipelineCache,
        generate: Callable[..., Tensor],
        on_stats: Callable[[int, dict[str, float]], None] | None,
    ) -> Generator[Tensor, Any, None]:
        """What `generate`, a method of the pipeline, makes of every chunk."""
        pipeline, state = self.pipeline, cache.transformer_cache
        start = 0
        for index in count():
            noise = None
            if self.noise is not None:
                end = start + state.frames_in_chunk(index)
                noise, start = self.noise[:, start:end], end
            frames = generate(index, cache, noise=noise, steps=self.steps)
            last = index + 1 == state.num_chunks
            change = yield frames
            del frames  # not kept alive while the next chunk is made
            stats = None
            if not last:
                # First the change: the finished chunk then becomes context under the new prompt at once.
                self.apply(change, index + 1, state)
                stats = pipeline.finalize(index, cache)
            elif cache.event_profiler is not None:
                stats = cache.event_profiler.summary()
            if stats is not None and on_stats is not None:
                on_stats(index, stats)
            if last:
                return


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    return bool(a == b)


def _overlap(pipeline: StreamInferencePipeline, overlap: bool | None) -> bool:
    profiling = pipeline.config.enable_sync_and_profile
    if overlap and (pipeline.decoder is None or profiling):
        why = "without a decoder" if pipeline.decoder is None else "with a profiling pipeline, which waits every time"
        raise ValueError(f"overlap: got True {why}, expected False or None")
    if overlap is None:
        on_gpu = pipeline.diffusion_model.transformer.device.type == "cuda"
        return on_gpu and pipeline.decoder is not None and not profiling
    return overlap


def _latent_side(name: str, side: int | None, scale: int) -> int | None:
    if side is not None and (side < scale or side % scale):
        raise ValueError(f"{name}: got {side}, expected a positive multiple of {scale}")
    return None if side is None else side // scale


def _partition(transformer: Any, num_chunks: int | None, partition: Sequence[int] | None) -> tuple[int, ...] | None:
    """The partition asked for, one of so many chunks made from the default, or None for the default."""
    if num_chunks is None:
        return None if partition is None else check_partition(partition)
    if partition is not None:
        raise ValueError(
            f"num_chunks, chunk_partition: got {num_chunks} and {list(partition)}, expected one of the two"
        )
    if isinstance(num_chunks, bool) or not isinstance(num_chunks, int) or num_chunks < 1:
        raise ValueError(f"num_chunks: got {num_chunks!r}, expected an integer >= 1")
    default = transformer.default_partition
    if num_chunks <= len(default):
        return default[:num_chunks]
    # The default may end in a short chunk, which belongs at the end of a video only.
    return (default[0],) + (max(default),) * (num_chunks - 1)
