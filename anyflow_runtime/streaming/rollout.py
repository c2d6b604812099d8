"""The loop behind `stream`: the chunks of one video, the changes on the way, and decoding beside denoising."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from anyflow_kernels.launch_tables import to_device

from ..errors import check_finite
from .adapter import Condition, check_condition
from .adapters import check_lora, set_lora
from .async_decoder import AsyncDecoder, PendingFrames, decode_behind
from .pipeline import StreamInferencePipeline, StreamInferencePipelineCache, stage

Prompt = Any  # a string, several, or text embeddings


@dataclass(frozen=True, kw_only=True)
class Change:
    """What to do differently from the next chunk on; None leaves a setting as it is.

    Args:
        prompt: a string or a list of strings, or text embeddings (B, S, D).
        negative_prompt: likewise, with guidance.
        guidance_scale: above 1, and only in a rollout that began with guidance.
        steps: denoising steps per chunk.
        lora: weights of the model's adapters by name; those that are not named are off. See `open_model`. They are
            the model's: a later video begins with them.
    """

    prompt: Prompt | None = None
    negative_prompt: Prompt | None = None
    guidance_scale: float | None = None
    steps: int | None = None
    lora: Mapping[str, float] | None = None


@dataclass(frozen=True)
class Step:
    """A denoising step of chunk `index` has been issued, its `number`-th from 1."""

    index: int
    number: int


@dataclass(frozen=True)
class Denoised:
    """Chunk `index` has been issued: its clean `latents` (B, F, C, H, W)."""

    index: int
    latents: Tensor
    _seconds: Callable[[], float]

    @property
    def seconds(self) -> float:
        """What it took, the pass that made the chunk before it context included. Waits until the chunk is denoised."""
        return self._seconds()


@dataclass(frozen=True)
class Decoded:
    """The frames of chunk `index` are handed over."""

    index: int
    _seconds: Callable[[], float]

    @property
    def seconds(self) -> float:
        """What decoding them took. Waits until that is done."""
        return self._seconds()


Event = Step | Denoised | Decoded


class Settings(NamedTuple):
    """What a prompt function and a `Change` set."""

    prompt: Any
    negative_prompt: Any
    guidance_scale: float

    def keywords(self) -> dict[str, Any]:
        """As keywords of `make_condition`."""
        keywords: dict[str, Any] = {"guidance_scale": self.guidance_scale}
        for prefix, value in (("", self.prompt), ("negative_", self.negative_prompt)):
            if value is not None:
                keywords[prefix + ("text_embeddings" if isinstance(value, Tensor) else "prompt")] = value
        return keywords


class Prepared(NamedTuple):
    """A change that nothing can refuse any more; `condition` is None where the old one stays."""

    settings: Settings
    steps: int | None
    condition: Condition | None
    lora: Mapping[str, float] | None = None


class Video(Generator[Tensor, Any, None]):
    """The chunks of a video, as `stream` gives them: a generator that a refused change does not end."""

    def __init__(self, rollout: Rollout, cache: Any, chunks: Generator[Tensor, Any, None]) -> None:
        self._rollout, self._cache, self._chunks = rollout, cache, chunks

    def send(self, change: Prompt | Change | None) -> Tensor:
        """The next chunk, under a change from the next one on that has not begun.

        Raises:
            TypeError, ValueError: on a change that does not fit; the video can go on as if nothing had been sent.
            StopIteration: after the last chunk.
        """
        following = getattr(self._cache, "num_finished", 0) + 1  # a bidirectional rollout has a single chunk
        if change is not None and following != self._cache.num_chunks:
            change = self._rollout.prepare(change, following, self._cache)
        return self._chunks.send(change)

    def throw(self, *error: Any) -> Tensor:
        return self._chunks.throw(*error)

    def close(self) -> None:
        self._chunks.close()


class Rollout:
    """The settings of a video that may change between chunks, and the loop over them.

    Args:
        on_event: told of every step, of every denoised and of every decoded chunk; nothing waits for it.
        on_stats: told of the timings of every chunk, if the pipeline is profiling.
    """

    def __init__(
        self,
        pipeline: StreamInferencePipeline,
        prompt: Any,
        negative_prompt: Any,
        scale: float,
        steps: int | None,
        on_event: Callable[[Event], None] | None = None,
        on_stats: Callable[[int, dict[str, float]], None] | None = None,
    ) -> None:
        self.pipeline = pipeline
        self.transformer: Any = pipeline.diffusion_model.transformer
        self.prompt_at = prompt if callable(prompt) else None
        self.settings = Settings(prompt(0) if callable(prompt) else prompt, negative_prompt, scale)
        self.steps = steps
        self.on_event, self.on_stats = on_event, on_stats
        self.noise: Tensor | None = None
        self.decoder: AsyncDecoder | None = None

    def take_noise(self, noise: Tensor, cache: Any) -> None:
        """Check that the noise is that of a whole rollout, and keep it on the device as (B, T, C, H, W)."""
        if cache.num_chunks is None:
            raise ValueError("noise: got noise for a whole video with endless, expected None")
        frames = sum(cache.frames_in_chunk(i) for i in range(cache.num_chunks))
        batch, _, *rest = self.transformer.chunk_latent_shape(0, cache)
        expected = (batch, rest[0], frames, *rest[1:])
        if tuple(noise.shape) != expected:
            raise ValueError(f"noise: got {tuple(noise.shape)}, expected (B, C, T, H, W) = {expected}")
        self.noise = to_device(noise.to(self.transformer.dtype), self.transformer.device).transpose(1, 2)

    def prepare(self, change: Any, index: int, cache: Any) -> Prepared:
        """Everything of a change that can be refused or can fail, and what the prompt function says for the chunk.

        Raises:
            TypeError: for what is neither a prompt nor a `Change`.
            ValueError: for a prompt, steps or guidance that do not fit. The rollout is as it was.
        """
        if isinstance(change, Prepared):
            return change
        if change is not None and not isinstance(change, Change):
            if not isinstance(change, (str, list, tuple, Tensor)):
                raise TypeError(f"change: got {type(change).__name__}, expected a prompt, text embeddings or a Change")
            change = Change(prompt=change)
        change = change or Change()
        if change.steps is not None:
            self.pipeline.diffusion_model.scheduler_for(change.steps)
        if change.lora is not None:
            check_lora(self.transformer.model, change.lora)
        before = self.settings
        asked = self.prompt_at(index) if change.prompt is None and self.prompt_at is not None else change.prompt
        wanted = (asked, change.negative_prompt, change.guidance_scale)
        after = Settings(*(old if new is None else new for old, new in zip(before, wanted, strict=True)))
        condition = None
        if not all(_same(old, new) for old, new in zip(before[:2], after[:2], strict=True)):
            if self.decoder is not None and self.transformer.turns is not None:
                self.decoder.drain()  # its weights leave the device while the text encoder has it
            condition = self.transformer.make_condition(**after.keywords())
        elif before.guidance_scale != after.guidance_scale:
            scale = float(after.guidance_scale) if after.guidance_scale > 1 else None
            condition = replace(cache.condition, guidance_scale=scale)
        if condition is not None:
            check_condition(cache.condition, condition)
        return Prepared(after, change.steps or self.steps, condition, change.lora)

    def adopt(self, prepared: Prepared, cache: Any) -> None:
        """Go on under a change that has been prepared."""
        self.settings, self.steps = prepared.settings, prepared.steps
        if prepared.lora is not None:
            set_lora(self.transformer.model, prepared.lora)
            cache.far.forget()  # the context is encoded anew with these weights
        if prepared.condition is not None:
            self.transformer.change_condition(cache, prepared.condition)

    def frames(
        self, cache: StreamInferencePipelineCache, overlap: bool, on_host: bool, after: type[BaseException]
    ) -> Generator[Tensor, Any, None]:
        """Frames of every chunk, with `overlap` each decoded while the next is denoised; see `stream`."""
        finite, profiler = self.pipeline.config.diffusion_model.check_finite, cache.event_profiler
        with AsyncDecoder(self.pipeline.decoder, overlap, on_host) as decoder, closing(self.latents(cache)) as latents:
            self.decoder = decoder

            def submit(chunk: Tensor, index: int) -> PendingFrames:
                with stage(profiler, "decode"):
                    return decoder.submit(chunk, index, cache.decoder_cache)

            pending = decode_behind(latents, submit, behind=int(overlap), after=after)
            change = None
            for index in count():
                try:
                    made = pending.send(change)
                except StopIteration:
                    return
                frames = made.on_host() if on_host else made.wait()
                if finite:
                    check_finite(f"output of chunk {index}", frames)
                if self.on_event is not None:
                    self.on_event(Decoded(index, made.seconds))
                change = yield frames
                del frames, made  # not kept alive while the next chunk is made

    def latents(self, cache: StreamInferencePipelineCache) -> Generator[Tensor, Any, None]:
        """Clean latents (B, F, C, H, W) of every chunk; each becomes context when the next one is asked for."""
        pipeline, state, tell = self.pipeline, cache.transformer_cache, self.on_event
        start, begin = 0, self._mark()
        for index in count():
            noise = None
            if self.noise is not None:
                end = start + state.frames_in_chunk(index)
                noise, start = self.noise[:, start:end], end
            on_step = None if tell is None else lambda number, index=index: tell(Step(index, number))
            latents = pipeline.denoise(index, cache, noise=noise, steps=self.steps, on_step=on_step)
            if tell is not None:
                tell(Denoised(index, latents, _between(begin, self._mark())))
            last = index + 1 == state.num_chunks
            change = yield latents
            del latents
            begin, stats = self._mark(), None
            if not last:
                # First the change: the finished chunk then becomes context under the new prompt at once.
                self.adopt(self.prepare(change, index + 1, state), state)
                stats = pipeline.finalize(index, cache)
            elif cache.event_profiler is not None:
                stats = cache.event_profiler.summary()
            if stats is not None and self.on_stats is not None:
                self.on_stats(index, stats)
            if last:
                return

    def _mark(self) -> Any:
        """Now; on CUDA, if somebody is told of it, when the work issued to the current stream will be done."""
        device = self.transformer.device
        if self.on_event is None or device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(device))
        return event


def _between(begin: Any, end: Any) -> Callable[[], float]:
    """The seconds between two marks, for whoever asks."""

    def seconds() -> float:
        if isinstance(end, float):
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    return seconds


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a is b or (isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b))
    return bool(a == b)
