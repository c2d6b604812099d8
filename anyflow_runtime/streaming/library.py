"""Video as a Python generator: frames arrive chunk by chunk, and the prompt may change on the way.

for frames in stream(pipeline, "a red fox in the snow", num_chunks=7, seed=0):
    show(frames)  # (B, T, 3, H, W) in [-1, 1]
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..causal_time import partition_of
from ..errors import check_finite
from .adapter import AnyFlowStream, check_partition
from .pipeline import StreamInferencePipeline
from .rollout import Change, Event, Prompt, Rollout, Video


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
    on_event: Callable[[Event], None] | None = None,
    overlap: bool | None = None,
    on_host: bool = False,
    frames_before_interrupt: bool = False,
) -> Generator[Tensor, Prompt | Change | None, None]:
    """Generate a video with an AnyFlow pipeline, one chunk per iteration.

    Arguments are checked, and given context is encoded, before this returns. `send(x)` goes on under a `Change`, or
    under a prompt alone, from the next chunk that has not begun. A change that does not fit raises, and the video can
    go on as if nothing had been sent. A chunk becomes context when the next one is asked for, so the frames come first
    and stopping early costs nothing; `close()`, `break` or an exception leave the pipeline ready for the next rollout.

    With `overlap` a chunk is decoded while the next one is denoised. The frames are the same, but those of chunk i
    come when chunk i + 1 has begun, so what is sent then is for chunk i + 2; only the first chunk comes at once. If
    something fails, the chunk that is being decoded still comes first.

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
        context_video: (B, T, 3, H, W) in the range of the video encoder, [0, 1] for that of `open_model`, which makes
            `context_latents` of it: one frame for image-to-video.
        video_encoder: a streaming video encoder instead of the pipeline's own.
        on_stats: called with the index and the timings of every chunk, if the pipeline is profiling.
        on_event: called with every `Step`, `Denoised` and `Decoded`; to read the `seconds` of the latter two waits for
            the device, which before the next chunk is asked for leaves it without work.
        overlap: see above; on a CPU the decoder then has a thread of its own, which competes for the cores. None
            overlaps on CUDA, unless the pipeline is profiling, for which it waits after every stage.
        on_host: give the frames in host memory (on CUDA pinned), without waiting for what is denoised beside them.
        frames_before_interrupt: give the chunk that is being decoded also before Ctrl-C is raised, for a caller that is
            sure to ask again.
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
        encode = pipeline.encode_video if video_encoder is None else video_encoder
        if context_latents is not None:
            raise ValueError("context_video: got it with context_latents, expected one of the two")
        context_latents = encode(context_video)
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
    rollout = Rollout(pipeline, prompt, negative_prompt, guidance_scale, steps, on_event, on_stats)
    cache = pipeline.initialize_cache(
        {k: v for k, v in context.items() if v is not None} | rollout.settings.keywords(), seed=seed
    )
    if pipeline.config.diffusion_model.check_finite:
        check_finite("text embeddings", cache.transformer_cache.condition.text)
    if noise is not None:
        rollout.take_noise(noise, cache.transformer_cache)
    if pipeline.decoder is None:
        chunks = rollout.latents(cache)
    else:
        chunks = rollout.frames(cache, overlap, on_host, BaseException if frames_before_interrupt else Exception)
    return Video(rollout, cache.transformer_cache, chunks)


def video_noise(pipeline: StreamInferencePipeline, latent_frames: int, height: int, width: int, seed: int) -> Tensor:
    """The initial noise of one whole video as diffusers' pipelines draw it: at once, on the CPU, in fp32.

    Equal seeds so give equal videos on every device, and those of diffusers.

    Args:
        latent_frames: of the video, given ones included.
        height, width: as `stream` takes them.
    Returns:
        (1, C, F, h, w), the `noise` of `stream`.
    """
    scale = getattr(pipeline.decoder, "spatial_compression_ratio", 1)
    transformer: Any = pipeline.diffusion_model.transformer
    channels = transformer.model.config.in_channels
    shape = (1, channels, latent_frames, height // scale, width // scale)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


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
    return partition_of(num_chunks, transformer.default_partition)
