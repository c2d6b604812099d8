"""Several processes that share the tokens of one video, as a model sees them.

Which tokens, modulation rows and keys each holds (integers, the same on every process), and what is asked of them.
`anyflow_runtime.parallel` has the processes; a model knows them by the protocols here.

Source: the sequence split of DeepSpeed-Ulysses (arXiv 2309.14509) and ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow_kernels import AttentionPlan
from anyflow_kernels.operations import FrameMap

Spans = tuple[tuple[int, int], ...]  # ascending and disjoint (start, end), none empty


class SharedAttention(Protocol):
    """Self-attention over the tokens of all processes, given this one's; the cache is in its hands."""

    def store(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Put own tokens' keys and values, (B, l, H, d) each, into the cache."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attention of own tokens to all that the plan lets them see, (B, l, H, d) each; the cache takes k and v."""
        ...


class TokenSharing(Protocol):
    """How processes share the tokens of a model; `anyflow_runtime.parallel.ContextParallel`."""

    @property
    def rank(self) -> int: ...

    @property
    def world(self) -> int: ...

    @property
    def mode(self) -> str: ...

    def heads_held(self, heads: int) -> int: ...

    def shards(self, frame_map: FrameMap) -> TokenShards: ...

    def split(self, x: Tensor, inputs: Any) -> tuple[Tensor, Any]: ...

    def gather(self, x: Tensor, shards: TokenShards) -> Tensor: ...


@dataclass(frozen=True)
class TokenShards:
    """The query tokens of a sequence, shared out evenly: shares differ by one token per part at most.

    Even shares of equal frames end with a frame wherever the processes divide the frames.

    Args:
        frame_map: runs `(frames, tokens_per_frame)` of the whole sequence.
        world: number of processes.
        by_run: share out each run of the frame map for itself, so that compressed and full tokens are both spread over
            all processes; else the sequence as a whole, so that shares in the order of the processes are the sequence.
    """

    frame_map: FrameMap
    world: int
    by_run: bool

    def spans(self, rank: int) -> Spans:
        """The tokens of a process."""
        sizes = [frames * tokens for frames, tokens in self.frame_map]
        parts = sizes if self.by_run else [sum(sizes)]
        ends = zip(accumulate(parts), parts, strict=True)
        cuts = ((end - n + n * rank // self.world, end - n + n * (rank + 1) // self.world) for end, n in ends)
        return tuple((a, b) for a, b in cuts if a < b)

    @property
    def counts(self) -> list[int]:
        """Tokens of each process."""
        return [sum(b - a for a, b in self.spans(rank)) for rank in range(self.world)]

    def frames(self, rank: int) -> tuple[Spans, FrameMap]:
        """The frames that a process has tokens of, and the frame map of its tokens. A part of a frame is a frame."""
        touched: list[tuple[int, int]] = []  # frame, tokens of it
        spans = self.spans(rank)
        token = frame = 0
        for frames, per_frame in self.frame_map:
            for i in range(frames):
                start = token + i * per_frame
                held = sum(max(0, min(b, start + per_frame) - max(a, start)) for a, b in spans)
                if held:
                    touched.append((frame + i, held))
            token, frame = token + frames * per_frame, frame + frames
        rows = tuple((i, i + 1) for i, _ in touched)
        runs = tuple((len(list(run)), tokens) for tokens, run in groupby(held for _, held in touched))
        return _joined(rows), runs


@dataclass(frozen=True)
class HeldKeys:
    """The key positions that each process holds, in the order of its slab.

    Positions of one range of the sequence are one range of every slab.

    Args:
        spans: per process.
    """

    spans: tuple[Spans, ...]

    @classmethod
    def none(cls, world: int) -> HeldKeys:
        return cls(((),) * world)

    def before(self, position: int) -> HeldKeys:
        """Without the keys from a position on."""
        return HeldKeys(tuple(_clipped(spans, 0, position) for spans in self.spans))

    def followed_by(self, shards: TokenShards, offset: int) -> HeldKeys:
        """With the keys of queries whose first is key `offset`, in place of all from there on."""
        new = (tuple((offset + a, offset + b) for a, b in shards.spans(rank)) for rank in range(shards.world))
        return HeldKeys(tuple(_joined(old + own) for old, own in zip(self.before(offset).spans, new, strict=True)))

    def count(self, rank: int, before: int | None = None) -> int:
        """Keys of a process, or those before a position."""
        spans = self.spans[rank] if before is None else _clipped(self.spans[rank], 0, before)
        return sum(b - a for a, b in spans)


@dataclass(frozen=True)
class Piece:
    """Attention, by `plan` and from query `start` on, of one process to what it sees of the keys of another."""

    start: int
    plan: AttentionPlan


def pieces(plan: AttentionPlan, queries: Spans, held: HeldKeys, owner: int, phantom_keys: int = 0) -> list[Piece]:
    """The part of `plan` that lies between these queries and the keys of process `owner`.

    Queries that see none of these keys are in no piece.
    """
    runs: list[tuple[int, int, Spans]] = []
    local = 0  # of the first query of the span
    for start, end in queries:
        for q_start, q_end, keys in plan.ranges:
            low, high = max(start, q_start), min(end, q_end)
            if low < high:
                seen = _joined(tuple((held.count(owner, a), held.count(owner, b)) for a, b in keys))
                runs.append((local + low - start, local + high - start, seen))
        local += end - start
    result = []
    for visible, group in groupby(runs, key=lambda run: bool(run[2])):
        if visible:
            block = list(group)
            first, last = block[0][0], block[-1][1]
            shifted = tuple((a - first, b - first, keys) for a, b, keys in block)
            result.append(Piece(first, AttentionPlan(last - first, held.count(owner), shifted, phantom_keys)))
    return result


def take(x: Tensor, spans: Spans, dim: int) -> Tensor:
    """These positions of a dimension: a view if they are one span."""
    parts = [x.narrow(dim, a, b - a) for a, b in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _clipped(spans: Spans, low: int, high: int) -> Spans:
    return tuple((max(a, low), min(b, high)) for a, b in spans if a < high and b > low)


def _joined(spans: Sequence[tuple[int, int]]) -> Spans:
    """Ascending spans with empty ones dropped and adjacent ones joined."""
    result: list[tuple[int, int]] = []
    for a, b in spans:
        if result and result[-1][1] == a < b:
            result[-1] = (result[-1][0], b)
        elif a < b:
            result.append((a, b))
    return tuple(result)
