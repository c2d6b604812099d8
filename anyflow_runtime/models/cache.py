"""The KV cache of a FAR rollout: one slab per block, allocated once, holding what is visible and nothing else.

A slab is `[compressed chunks | full chunks | newest chunk]` along its token axis, keys rotated (positions are
absolute, so that is final), so every path sees one contiguous range. When a chunk is finished, compressed keys stay
as they are (their context never changes); a chunk that has just been demoted is encoded compressed, and the full
chunks again because their context changed. Measured on the reference: exact to 2e-6 over a five-chunk rollout.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow_kernels import FarLayout, Segment

from .conditioning import TimeMemo
from .cuda_graphs import StepGraphs
from .prompt_keys import PromptKeys, Seen
from .token_shards import HeldKeys, TokenSharing
from .workspaces import IdleWorkspaces, Slabs, Workspace


class FarModel(Protocol):
    """What a cache asks of its model; `AnyFlowFARTransformer3DModel` is one."""

    config: Any
    condition_embedder: Any
    parallel: TokenSharing | None
    idle_workspaces: IdleWorkspaces

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def layout(
        self, mode: str, chunk_partition: Sequence[int], height: int, width: int, clean: bool = False, cached: int = 0
    ) -> FarLayout: ...

    def rotary(self, segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor]: ...

    def _captured_weights(self, device: torch.device) -> Hashable | None: ...


@dataclass(frozen=True)
class Context:
    """Finished chunks: what the cache was, or is to be, made from.

    Attributes:
        partition: frames per chunk.
        latents: (B, F, C, H, W), or None if the keys came from elsewhere.
        times: (2, B, F), source and target time of each frame (0 for clean frames).
        prompt: the condition under which they are encoded.
        chunks: the tensors that the latents are of, if there was one for each chunk.
    """

    partition: tuple[int, ...]
    latents: Tensor | None
    times: Tensor
    prompt: PromptKeys
    chunks: tuple[Seen, ...] | None = None

    def begins_as(self, other: Context, chunks: int) -> bool:
        """Whether the latents of so many leading chunks are the other's: known, or else compared on their device."""
        if self.chunks and other.chunks:
            pairs = zip(self.chunks[:chunks], other.chunks[:chunks], strict=True)
            if all(mine.is_still(its) for mine, its in pairs):
                return True
        frames = sum(self.partition[:chunks])
        if self.latents is None or other.latents is None:
            return False
        return torch.equal(self.latents[:, :frames], other.latents[:, :frames])


class FarCache:
    """Keys and values of the finished chunks of one rollout.

    Args:
        layout: an "inference" layout of all chunks of the video; its sizes fix the slabs.
        num_layers, num_heads, head_dim: of the model.
        batch_size: rows, classifier-free guidance counted (two per video).
        device, dtype: of the slabs.
        immutable: take new slabs at every prefill, for training: what a backward pass saved stays.
        parallel: the processes that share the tokens of the model; the slabs then hold this one's part.
        model: whose finished rollouts leave slabs and captured steps to this one, and this one to later ones; None:
            the memory is this rollout's own.

    Attributes:
        model_size: layers, heads and channels per head of the model it serves.
        context: the chunks whose keys are in the slabs, or None.
        pending: chunks that are finished but not encoded yet; the next query encodes them all in one pass.
        times: embeddings of the time pairs met so far, once per schedule.
        workspace: slabs, and denoising steps and prefills captured as CUDA graphs.
        held: which keys each process holds, where it holds those of its tokens (ring), else None.
    """

    def __init__(
        self,
        layout: FarLayout,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        batch_size: int,
        device: torch.device | str,
        dtype: torch.dtype,
        immutable: bool = False,
        parallel: TokenSharing | None = None,
        model: FarModel | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size: got {batch_size}, expected >= 1")
        self._layout = layout
        self.model_size = (num_layers, num_heads, head_dim)
        self.immutable, self.parallel = immutable, parallel
        self.held = HeldKeys.none(parallel.world) if parallel and parallel.mode == "ring" else None
        self.context: Context | None = None
        self.pending: Context | None = None
        self.times: TimeMemo = {}
        self._prompts: list[PromptKeys] = []
        partition = layout.chunk_partition
        tokens = max(self._share(self.layout("inference", partition[: i + 1])) for i in range(len(partition)))
        kind = torch.device(device).type
        if torch.is_autocast_enabled(kind):  # the linears before give keys and values of that dtype
            dtype = torch.get_autocast_dtype(kind)
        shape = (batch_size, tokens, parallel.heads_held(num_heads) if parallel else num_heads, head_dim)
        weights = None if model is None or immutable or parallel else model._captured_weights(torch.device(device))
        if model is None or weights is None:
            self.workspace = Workspace.allocated(num_layers, shape, dtype, device)
        else:
            self.workspace = model.idle_workspaces.lend(self, weights, num_layers, shape, dtype, device)

    @classmethod
    def for_model(
        cls,
        model: FarModel,
        chunk_partition: Sequence[int],
        height: int,
        width: int,
        batch_size: int = 1,
        immutable: bool = False,
    ) -> FarCache:
        """An empty cache for a rollout of `chunk_partition` at latent size height x width, on the model's device."""
        config = model.config
        layout = model.layout("inference", chunk_partition, height, width)
        size = (config.num_layers, config.num_attention_heads, config.attention_head_dim)
        return cls(layout, *size, batch_size, model.device, model.dtype, immutable, model.parallel, model)

    @property
    def slabs(self) -> Slabs:
        """Per block the keys and values, (B, capacity, H, d) each."""
        return self.workspace.slabs

    @property
    def graphs(self) -> StepGraphs:
        """The captured denoising steps and prefills."""
        return self.workspace.graphs

    @property
    def batch_size(self) -> int:
        return self.slabs[0][0].shape[0]

    @property
    def capacity(self) -> int:
        """Tokens a slab holds."""
        return self.slabs[0][0].shape[1]

    @property
    def latent_size(self) -> tuple[int, int]:
        """Height and width of the latents."""
        return self._layout.height, self._layout.width

    @property
    def nbytes(self) -> int:
        """Memory of all slabs of this process."""
        return sum(k.nbytes + v.nbytes for k, v in self.slabs)

    @property
    def num_cached_chunks(self) -> int:
        """Finished chunks, encoded or pending."""
        context = self.pending or self.context
        return len(context.partition) if context else 0

    def layout(self, mode: str, partition: Sequence[int], cached: int = 0) -> FarLayout:
        """The layout of this rollout's first chunks."""
        return replace(self._layout, chunk_partition=tuple(partition), mode=mode, cached=cached)

    def prompt(self, embedder: Any, text: Tensor, image: Tensor | None) -> PromptKeys:
        """The keys of a prompt, kept for the latest two: a prefill may run under another prompt than the steps."""
        for compare in (False, True):  # values last: the host waits for them
            for prompt in self._prompts:
                if prompt.matches(text, image, compare):
                    return prompt
        self._prompts = [PromptKeys(embedder, text, image), *self._prompts[:1]]
        return self._prompts[0]

    def forget(self) -> None:
        """Count nothing as known that the model's weights made: they have changed."""
        self.context, self.times, self._prompts = None, {}, []

    def reusable_chunks(self, new: Context) -> int:
        """Leading chunks of `new` whose keys in the slabs are those an encoding from scratch would give."""
        old = self.context
        if old is None or old.latents is None or new.latents is None or old.prompt is not new.prompt:
            return 0
        compressed_before = self.layout("prefill", old.partition).num_compressed_chunks
        compressed_now = self.layout("prefill", new.partition).num_compressed_chunks
        # Where the boundary moved, only chunks compressed before and now are the same; the others changed resolution.
        common = min(compressed_before, compressed_now)
        chunks = len(old.partition) if compressed_now == compressed_before else common
        chunks = min(chunks, len(new.partition))
        frames = sum(new.partition[:chunks])
        same = (
            old.partition[:chunks] == new.partition[:chunks]
            and old.latents.shape[0] == new.latents.shape[0]
            and old.times.device == new.times.device
            and torch.equal(old.times[:, :, :frames], new.times[:, :, :frames])
            and new.begins_as(old, chunks)
        )
        return chunks if same else 0

    def slabs_for(self, layout: FarLayout) -> Slabs:
        """The slabs, large enough for the layout. Its queries may be written behind the context."""
        context, tokens = self._tokens(layout)
        if self.capacity < tokens:
            self.workspace.resize(tokens, keep=context)
        return self.slabs

    def begin_write(self, layout: FarLayout) -> Slabs:
        """Slabs to overwrite from the layout's first query on; their context counts as lost until `end_write`."""
        self.context = None
        if self.immutable:
            context, tokens = self._tokens(layout)
            self.workspace.resize(max(self.capacity, tokens), keep=context)
        slabs = self.slabs_for(layout)
        if self.held is not None and self.parallel is not None:
            self.held = self.held.followed_by(self.parallel.shards(layout.frame_map), layout.cache_offset)
        return slabs

    def end_write(self, context: Context) -> None:
        """Declare the slabs filled from `context`."""
        self.context, self.pending = context, None

    def _tokens(self, layout: FarLayout) -> tuple[int, int]:
        """Slab positions of the layout's context, and of it and the queries together."""
        if self.held is None or self.parallel is None:
            return layout.cache_offset, layout.num_key_tokens
        rank, shards = self.parallel.rank, self.parallel.shards(layout.frame_map)
        together = self.held.followed_by(shards, layout.cache_offset)
        return self.held.count(rank, before=layout.cache_offset), together.count(rank)

    def _share(self, layout: FarLayout) -> int:
        """Slab positions that the layout takes when its chunks came one by one."""
        if self.held is None or self.parallel is None:
            return layout.num_key_tokens
        return sum(math.ceil(segment.tokens / self.parallel.world) for segment in layout.segments)
