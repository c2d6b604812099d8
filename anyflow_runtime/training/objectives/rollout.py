"""On-policy rollouts with gradient through every forward.

An N-step schedule and an index g give at most three flow-map steps, (t0, t_g), (t_g, t_{g+1}), (t_{g+1}, 0): the
student jumps to step g, takes that step, and jumps to the end. All three carry gradient, so the loss reaches long and
short jumps alike (running all N steps with gradient on one gives another gradient, mostly far smaller).
Source: AnyFlow (arXiv 2605.13724), on-policy distillation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ...models.far import FarCache
from .. import distributed
from .timesteps import NUM_TRAIN_TIMESTEPS, schedule
from .velocity import Velocity

STEP_CHOICES = (2, 4, 8, 16, 50)
Segment = tuple[float, float]


@dataclass(frozen=True)
class RolloutDraw:
    """Length of the schedule and index of its emphasised step, 0 <= index < num_steps."""

    num_steps: int
    index: int

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.num_steps:
            raise ValueError(f"index: got {self.index}, expected 0 <= index < num_steps={self.num_steps}")

    def segments(self, shift: float = 5.0) -> list[Segment]:
        """(from, to) in fractions, 1 to 0, empty segments dropped."""
        times = schedule(self.num_steps, shift)
        bounds = [times[0], times[self.index], times[self.index + 1], 0.0]
        return [(a, b) for a, b in pairwise(bounds) if a != b]


def draw_rollout(choices: Sequence[int] = STEP_CHOICES, generator: torch.Generator | None = None) -> RolloutDraw:
    """N uniform in `choices`, g uniform in 0..N-1, drawn on rank 0 and equal on every rank."""
    if not choices or min(choices) < 1:
        raise ValueError(f"choices: got {tuple(choices)}, expected at least one number of steps >= 1")
    num_steps = choices[distributed.draw_integer(0, len(choices) - 1, generator)]
    return RolloutDraw(num_steps, distributed.draw_integer(0, num_steps - 1, generator))


def rollout(velocity: Velocity, noise: torch.Tensor, text: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Generated latents like `noise` (B, F, C, H, W): x <- x - (p - q) u(x, p, q) per segment; gradient as set."""
    x = noise
    for p, q in segments:
        x = x - (p - q) * velocity(x, _times(noise, p), _times(noise, q), text).to(noise.dtype)
    return x


def far_rollout(
    model: nn.Module,
    noise: torch.Tensor,
    text: torch.Tensor,
    chunk_partition: Sequence[int],
    segments: Sequence[Segment],
    input_dtype: torch.dtype | None = None,
    single_time: bool = False,
) -> torch.Tensor:
    """Generated latents chunk by chunk, by the same segments; every chunk sees the finished ones through the cache.

    Finished chunks are encoded at t = r = 0 without gradient: none crosses chunks, coupling comes from scoring the
    whole clip. The cache is immutable: every encoding fills new tensors, so that a backward pass, or the
    recomputation of gradient checkpointing, meets the keys its forward has seen.

    Args:
        model: `AnyFlowFARTransformer3DModel`.
        noise: (B, F, C, H, W), F = sum(chunk_partition).
        input_dtype: latents and text are cast to it before the model; times and the rollout state never are.
        single_time: send t as r, for a model that has only learned flow matching: plain Euler steps.
    """
    if noise.dim() != 5 or noise.shape[1] != sum(chunk_partition):
        raise ValueError(
            f"noise: got shape {tuple(noise.shape)}, "
            f"expected (B, F={sum(chunk_partition)}, C, H, W) for {list(chunk_partition)}"
        )
    far: Any = model
    dtype = noise.dtype if input_dtype is None else input_dtype
    condition = text if input_dtype is None else text.to(input_dtype)
    cache = FarCache.for_model(
        far, chunk_partition, noise.shape[3], noise.shape[4], batch_size=noise.shape[0], immutable=True
    )
    chunks: list[torch.Tensor] = []
    for i, chunk_noise in enumerate(noise.split(list(chunk_partition), dim=1)):
        known = list(chunk_partition[: i + 1])

        def velocity(
            x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, text: torch.Tensor, known: list[int] = known
        ) -> torch.Tensor:
            return far(
                hidden_states=x.to(dtype),
                timestep=t,
                r_timestep=t if single_time else r,
                encoder_hidden_states=text,
                chunk_partition=known,
                kv_cache=cache,
                return_dict=False,
            )[0]

        chunks.append(rollout(velocity, chunk_noise, condition, segments))
        if i + 1 < len(chunk_partition):
            finished = torch.cat(chunks, dim=1).detach().to(dtype)
            # Through forward, not a method of its own, so that the hooks of a sharded model see it.
            with torch.no_grad():
                far(
                    hidden_states=finished,
                    timestep=_times(finished, 0.0),
                    r_timestep=_times(finished, 0.0),
                    encoder_hidden_states=condition,
                    chunk_partition=known,
                    kv_cache=cache,
                    kv_cache_flag={"is_cache_step": True},
                )
    return torch.cat(chunks, dim=1)


def _times(like: torch.Tensor, fraction: float) -> torch.Tensor:
    """(B, F) of one time; float64 for float64 latents, else float32."""
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return torch.full(like.shape[:2], NUM_TRAIN_TIMESTEPS * fraction, dtype=dtype, device=like.device)
