"""What a source of training samples is, and which samples an optimiser step takes.

A source is a function of the position alone, so a resumed run, or one on another number of processes, meets the very
samples of an uninterrupted one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

from ..objectives.timesteps import GlobalBatch

Shapes = tuple[tuple[int, ...], tuple[int, ...] | None]


@dataclass(frozen=True)
class Samples:
    """A local batch.

    Attributes:
        latents: (B, F, C, H, W) float32.
        names: what each sample is, for messages.
        text: (B, S, D) prompt embeddings, or None where there are captions.
        captions: texts for a text encoder that trains along, or None.
    """

    latents: torch.Tensor
    names: tuple[str, ...]
    text: torch.Tensor | None = None
    captions: tuple[str, ...] | None = None


class Source(Protocol):
    """Where samples come from.

    Attributes:
        negative: (S, D) embedding of the negative prompt, None where captions come.
        shapes: (F, C, H, W) of the latents, and (S, D) of the embeddings, None where captions come.
    """

    negative: torch.Tensor | None
    shapes: Shapes

    def samples(self, draw: int, position: GlobalBatch) -> Samples:
        """The local part, at `position`, of global batch number `draw`."""
        ...


class EpochOrder:
    """An endless order of `count` samples: every epoch a new permutation that follows from (seed, epoch)."""

    def __init__(self, count: int, seed: int) -> None:
        if count < 1:
            raise ValueError(f"count: got {count} samples, expected >= 1")
        self.count, self.seed = count, seed
        self._permutation = lru_cache(maxsize=2)(self._draw)

    def __getitem__(self, n: int) -> int:
        epoch, place = divmod(n, self.count)
        return int(self._permutation(epoch)[place])

    def _draw(self, epoch: int) -> torch.Tensor:
        return torch.randperm(self.count, generator=torch.Generator().manual_seed(self.seed * 1_000_003 + epoch))

    def indices(self, draw: int, position: GlobalBatch) -> list[int]:
        """The samples of one process in global batch number `draw`."""
        return [self[draw * position.size + i] for i in position.indices.tolist()]


def check_sample(name: str, latents: Sequence[int], text: Sequence[int], expected: tuple[Sequence[int], ...]) -> None:
    """Raise ValueError, naming the sample, unless its shapes (F, C, H, W) and (S, D) are the expected ones."""
    if len(latents) != 4 or len(text) != 2:
        raise ValueError(
            f"{name}: got latents {tuple(latents)} and prompt_embeds {tuple(text)}, expected (F, C, H, W) and (S, D)"
        )
    for kind, got, first in (("latents", latents, expected[0]), ("prompt_embeds", text, expected[1])):
        if tuple(got) != tuple(first):
            raise ValueError(f"{name}: got {kind} {tuple(got)}, expected {tuple(first)} as in the first sample")
