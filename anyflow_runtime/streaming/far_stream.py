"""AnyFlow-FAR as a streaming transformer: causal chunks of varying size, older ones as compressed context.

State of a rollout is a pure function of the finished latents that are kept and of the current prompt: whatever led
there (given chunks, generated chunks, a changed prompt, a window that moved on), the next chunk is that of a fresh
rollout with those latents as given context.

Source: FAR (arXiv 2503.19325) and AnyFlow (arXiv 2605.13724); diffusers' `AnyFlowFARPipeline`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..causal_time import frames_of_chunk, partition_of
from ..errors import LifecycleError
from ..models.cache import FarCache
from ..models.far import AnyFlowFARTransformer3DModel
from ..schedulers.base import GuidedFlow
from .adapter import AnyFlowStream, AnyFlowStreamConfig, Condition, check_condition, check_partition, per_frame
from .transformer import TransformerAutoregressiveCache


@dataclass(frozen=True, kw_only=True)
class AnyFlowFARStreamConfig(AnyFlowStreamConfig):
    """Config of `AnyFlowFARStream`; see also `AnyFlowStreamConfig`.

    Args:
        phantom_padding: True reproduces the zero keys of diffusers' softmax, False does not; None keeps the setting of
            a given model, and is False for one that is loaded.
        max_context_chunks: finished chunks kept as context, so that memory and time per chunk stay constant in an
            endless video; None keeps all. The kept chunks take consecutive positions from 0.
        sink_chunks: of these, how many are the first ones of the video; the others are the latest.
    Raises:
        ValueError: at construction, unless 0 <= sink_chunks < max_context_chunks.
    """

    _target: type[AnyFlowFARStream] = field(default_factory=lambda: AnyFlowFARStream)
    phantom_padding: bool | None = None
    max_context_chunks: int | None = None
    sink_chunks: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sink_chunks < 0 or (
            self.max_context_chunks is not None and self.sink_chunks >= self.max_context_chunks
        ):
            raise ValueError(
                f"sink_chunks, max_context_chunks: got {self.sink_chunks}, {self.max_context_chunks}, expected "
                "0 <= sink_chunks < max_context_chunks"
            )


@dataclass(frozen=True)
class FinishedChunk:
    """A chunk as the context holds it: (B, F, C, H, W) latents, the same once per row of the cache (with guidance 2B),
    and their timestep, 0 unless kept noisy.
    """

    latents: Tensor
    rows: Tensor
    timestep: Tensor

    @property
    def frames(self) -> int:
        return self.latents.shape[1]


class AnyFlowFARStreamCache(TransformerAutoregressiveCache):
    """State of one rollout; made by `AnyFlowFARStream.initialize_autoregressive_cache`.

    Attributes:
        far: keys and values.
        condition: the current prompt.
        chunk_partition: frames per chunk; an endless rollout repeats the largest.
        num_chunks: None if endless.
        given: the chunks that are given, first to last.
        finished: the chunks that are the context of the next one.
        num_finished: how many chunks are finalized, dropped ones included.
    """

    def __init__(
        self,
        stream: AnyFlowFARStream,
        far: FarCache,
        condition: Condition,
        chunk_partition: tuple[int, ...],
        num_chunks: int | None,
        given: tuple[Tensor, ...],
    ) -> None:
        self.far, self.condition = far, condition
        self.chunk_partition, self.num_chunks, self.given = chunk_partition, num_chunks, given
        self.finished: tuple[FinishedChunk, ...] = ()
        self.num_finished = 0
        self.encoded: Condition | None = None  # the prompt under which `finished` is in `far`; None if it is not
        self._staged: tuple[FinishedChunk, ...] | None = None
        self._stream = stream

    def frames_in_chunk(self, autoregressive_index: int) -> int:
        """Latent frames of a chunk.

        Raises:
            LifecycleError: for an index beyond the rollout.
        """
        if autoregressive_index < 0 or (self.num_chunks is not None and autoregressive_index >= self.num_chunks):
            raise LifecycleError(
                f"autoregressive_index: got {autoregressive_index}, expected 0 to "
                f"{'any' if self.num_chunks is None else self.num_chunks - 1}: chunks {list(self.chunk_partition)}"
            )
        return frames_of_chunk(autoregressive_index, self.chunk_partition)

    def start(self, autoregressive_index: int) -> None:
        """Check the order, and encode the context if the prompt has changed since."""
        self.frames_in_chunk(autoregressive_index)
        if autoregressive_index != self.num_finished:
            raise LifecycleError(
                f"autoregressive_index: got {autoregressive_index}, but {self.num_finished} chunks are finalized"
            )
        if autoregressive_index >= len(self.given) and self.finished and self.encoded is not self.condition:
            self._stream.encode_context(self, self.finished)

    def stage(self, finished: tuple[FinishedChunk, ...]) -> None:
        """Note what `finalize` will commit."""
        self._staged = finished

    def finalize(self, autoregressive_index: int) -> None:
        """Commit the chunk that `finalize_kv_cache` has just added."""
        if self._staged is None or autoregressive_index != self.num_finished:
            raise LifecycleError(f"autoregressive_index: got {autoregressive_index}, expected {self.num_finished}")
        self.finished, self._staged = self._staged, None
        self.num_finished += 1

    @property
    def nbytes(self) -> int:
        """Memory of keys, values and latents."""
        return self.far.nbytes + sum(chunk.latents.nbytes for chunk in self.finished)


class AnyFlowFARStream(AnyFlowStream[AnyFlowFARStreamCache]):
    """Streams an `AnyFlowFARTransformer3DModel`; see `AnyFlowStream` for the arguments.

    A model taken from a diffusers pipeline by `accelerate` will do: the two then share their weights.
    """

    model_class = AnyFlowFARTransformer3DModel

    def __init__(
        self, config: AnyFlowFARStreamConfig, model: Any = None, context_encoder: Any = None, device: Any = None
    ) -> None:
        super().__init__(config, model, context_encoder, device)
        if config.phantom_padding is not None:
            self.model.phantom_padding = config.phantom_padding

    @torch.no_grad()
    def initialize_autoregressive_cache(
        self,
        *,
        chunk_partition: Sequence[int] | None = None,
        endless: bool = False,
        height: int | None = None,
        width: int | None = None,
        context_latents: Tensor | None = None,
        **prompts: Any,
    ) -> AnyFlowFARStreamCache:
        """A fresh cache.

        Args:
            chunk_partition: latent frames per chunk; None is the config's, or else the model's.
            endless: go on after the partition, with chunks of its largest size.
            height, width: latent size; None is that of `context_latents`, or else the config's.
            context_latents: (B, F, C, H, W) normalised latents of the first chunks, which are given and not generated:
                one frame for image-to-video, more for video-to-video. They are returned by the first calls of
                `generate` as they are.
            prompts: the keywords of `make_condition`.

        Raises:
            ValueError: on shapes that do not fit, or context that covers a chunk only partly.
        """
        condition = self.make_condition(**prompts)
        default = self.default_partition
        # The default may end in a short chunk, which belongs at the end of a video.
        default = partition_of(len(default) + 1, default) if endless else default
        partition = check_partition(default if chunk_partition is None else chunk_partition)
        size = self.latent_size(height, width, context_latents)
        given = self.given_latents(context_latents, condition, size)
        chunks = () if given is None else given.split(_covered_chunks(given.shape[1], partition, endless), dim=1)
        limit = self.config.max_context_chunks
        slots = partition
        if limit is not None and (endless or limit + 1 < len(partition)):
            slots = (max(partition),) * (limit + 1)
        far = FarCache.for_model(self.model, slots, *size, condition.text.shape[0])
        num_chunks = None if endless else len(partition)
        return self.remembered(AnyFlowFARStreamCache(self, far, condition, partition, num_chunks, tuple(chunks)))

    def chunk_latent_shape(self, autoregressive_index: int, cache: AnyFlowFARStreamCache) -> tuple[int, ...]:
        """(B, F, C, H, W) of a chunk."""
        frames = cache.frames_in_chunk(autoregressive_index)
        return (cache.condition.batch, frames, self.model.config.in_channels, *cache.far.latent_size)

    def known_latent(self, autoregressive_index: int, cache: AnyFlowFARStreamCache) -> Tensor | None:
        """The chunk, if it is given."""
        return cache.given[autoregressive_index] if autoregressive_index < len(cache.given) else None

    def change_condition(self, cache: AnyFlowFARStreamCache, condition: Condition) -> None:
        """Go on under another prompt, made by `make_condition`, from the next chunk on; between chunks only.

        The context is encoded anew under it, so that the old prompt leaves no trace but in the latents.

        Raises:
            ValueError: for another batch size, or guidance where there was none or the other way round.
        """
        check_condition(cache.condition, condition)
        cache.condition = condition

    def flow_of_frames(self, x: Tensor, t: Tensor, r: Tensor, cache: AnyFlowFARStreamCache) -> GuidedFlow:
        """The average velocity of the current chunk; see `AnyFlowStream.predict_flow`."""
        condition, far = cache.condition, cache.far
        partition = (*(chunk.frames for chunk in cache.finished), x.shape[1])

        def network(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return self.model(x, t, r, condition.text, partition, condition.image, kv_cache=far).sample

        return self._on_rows(network, condition, x, t, r)

    def finalize_kv_cache(
        self, noisy_latent: Tensor, timestep: Tensor, cache: AnyFlowFARStreamCache, input: Any = None
    ) -> None:
        """Add the chunk to the context: what leaves full resolution is encoded compressed, the full chunks anew.

        Nothing is encoded while the next chunk is given as well, or after the last one.
        """
        self.no_input(input)
        chunk = FinishedChunk(noisy_latent, cache.condition.rows(noisy_latent), timestep.float())
        finished = self._windowed((*cache.finished, chunk))
        following = cache.num_finished + 1
        if following < len(cache.given) or following == cache.num_chunks:
            cache.encoded = None
        else:
            self.encode_context(cache, finished)
        cache.stage(finished)

    @torch.no_grad()
    def encode_context(self, cache: AnyFlowFARStreamCache, chunks: Sequence[FinishedChunk]) -> None:
        """Make these chunks the cached context under the current prompt; only what the cache lacks is computed."""
        condition = cache.condition
        cache.encoded = None
        times = torch.cat([per_frame(chunk.timestep, chunk.rows) for chunk in chunks], dim=1)
        partition = tuple(chunk.frames for chunk in chunks)
        self.model.prefill(
            cache.far, [chunk.rows for chunk in chunks], partition, condition.text, condition.image, times
        )
        cache.encoded = condition

    def _windowed(self, chunks: tuple[FinishedChunk, ...]) -> tuple[FinishedChunk, ...]:
        limit, sink = self.config.max_context_chunks, self.config.sink_chunks
        if limit is None or len(chunks) <= limit:
            return chunks
        return chunks[:sink] + chunks[len(chunks) - (limit - sink) :]


def _covered_chunks(frames: int, partition: tuple[int, ...], endless: bool) -> list[int]:
    """Sizes of the leading chunks that hold exactly these frames."""
    sizes: list[int] = []
    while sum(sizes) < frames and (endless or len(sizes) < len(partition)):
        sizes.append(frames_of_chunk(len(sizes), partition))
    if sum(sizes) != frames:
        ends = [sum(partition[: i + 1]) for i in range(len(partition))]
        raise ValueError(
            f"context_latents: got {frames} frames, which cover a chunk of {list(partition)} only partly; expected one "
            f"of {ends}{' or whole chunks beyond' if endless else ''}: trim the context or change chunk_partition"
        )
    return sizes
