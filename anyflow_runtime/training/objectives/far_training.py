"""The causal training clip of the FAR model: compressed context, noisy chunks, clean copy.

The first n chunks of a video are kept. All but the last `full_chunk_limit` are clean context (compressed by the
model); the last ones are noised with one (t, r) per sample and come a second time clean, at the same positions, so
that every noisy chunk sees its clean past.
Source: FAR (arXiv 2503.19325), AnyFlow (arXiv 2605.13724).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .. import distributed
from .timesteps import require_precise_time


def draw_num_chunks(
    num_chunks: int,
    full_chunk_limit: int = 3,
    long_context_ratio: float = 0.5,
    generator: torch.Generator | None = None,
) -> int:
    """How many leading chunks a step trains on, drawn on rank 0 and equal on every rank.

    With probability `long_context_ratio` uniform in limit..num_chunks, else the limit: no compressed context.
    """
    if not 0 <= long_context_ratio <= 1:
        raise ValueError(f"long_context_ratio: got {long_context_ratio}, expected 0 <= long_context_ratio <= 1")
    if full_chunk_limit < 1 or num_chunks < 1:
        raise ValueError(f"num_chunks: got {num_chunks} with full_chunk_limit={full_chunk_limit}, expected both >= 1")
    shortest = min(full_chunk_limit, num_chunks)
    coin, u = distributed.draw_uniform(2, generator)
    span = num_chunks - shortest + 1
    return shortest + min(int(u * span), span - 1) if coin < long_context_ratio else shortest


@dataclass(frozen=True)
class FarClip:
    """The latents of one causal step.

    Attributes:
        context: (B, F_context, C, H, W), clean; F_context may be 0.
        target: (B, F_full, C, H, W), clean; what is noised, predicted, and repeated clean.
        partition: frames per chunk of context and target together.
    """

    context: torch.Tensor
    target: torch.Tensor
    partition: tuple[int, ...]

    @classmethod
    def from_latents(
        cls, latents: torch.Tensor, partition: Sequence[int], num_chunks: int, full_chunk_limit: int = 3
    ) -> FarClip:
        """The first `num_chunks` chunks of a video (B, F, C, H, W), F = sum(partition)."""
        if latents.dim() != 5 or latents.shape[1] != sum(partition):
            raise ValueError(
                f"latents: got shape {tuple(latents.shape)}, "
                f"expected (B, F={sum(partition)}, C, H, W) for {list(partition)}"
            )
        if not 1 <= num_chunks <= len(partition):
            raise ValueError(f"num_chunks: got {num_chunks}, expected 1 <= num_chunks <= {len(partition)}")
        kept = tuple(partition[:num_chunks])
        context_frames = sum(kept[: max(0, num_chunks - full_chunk_limit)])
        return cls(latents[:, :context_frames], latents[:, context_frames : sum(kept)], kept)

    @property
    def starts_video(self) -> bool:
        """True if the first target frame is the first of the video: only then can it be a given image."""
        return self.context.shape[1] == 0


class FarVelocity:
    """Velocity of the noisy frames of a `FarClip`, `(x, t, r, text) -> u`, all (B, F_full, ...).

    Args:
        model: `AnyFlowFARTransformer3DModel`.
        clip: its context and clean copy stay as they are whatever x is, also under the probes of the flow-map target.
        input_dtype: latents and text are cast to it before the model; times never are.
    """

    def __init__(self, model: nn.Module, clip: FarClip, input_dtype: torch.dtype | None = None) -> None:
        self.model, self.clip, self.input_dtype = model, clip, input_dtype

    def __call__(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        require_precise_time("t", t)
        require_precise_time("r", r)
        context, clean = self.clip.context, self.clip.target
        dtype = x.dtype if self.input_dtype is None else self.input_dtype
        zeros = t.new_zeros(t.shape[0], context.shape[1])
        return self.model(
            hidden_states=torch.cat([context.to(dtype), x.to(dtype)], dim=1),
            timestep=torch.cat([zeros, t], dim=1),
            r_timestep=torch.cat([zeros, r], dim=1),
            encoder_hidden_states=text if self.input_dtype is None else text.to(dtype),
            chunk_partition=list(self.clip.partition),
            clean_hidden_states=clean.to(dtype),
            clean_timestep=torch.zeros_like(t),
            return_dict=False,
        )[0]

    def select(self, rows: torch.Tensor) -> FarVelocity:
        """The same for some samples of the batch."""
        clip = FarClip(self.clip.context[rows], self.clip.target[rows], self.clip.partition)
        return FarVelocity(self.model, clip, self.input_dtype)
