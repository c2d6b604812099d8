"""Times of flow-map training: the shift, schedules, and (t, r) pairs in diffusion, consistency and free buckets.

Fractions are called `s` and lie in [0, 1]; `t` and `r` tensors are in thousandths, 0..1000, float32 or float64, never a
half type: in bfloat16 `t +- 5` is off by up to a fifth above 256.
Source: AnyFlow (arXiv 2605.13724); the bucket rule of NVlabs/AnyFlow, indexed over the accumulated global batch.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch

NUM_TRAIN_TIMESTEPS = 1000
DIFFUSION, CONSISTENCY, FREE = 0, 1, 2


def shift_time(s: torch.Tensor | float, shift: float) -> torch.Tensor | float:
    """`shift * s / (1 + (shift - 1) * s)`: keeps 0, 1 and order, moves the rest towards noise for shift > 1."""
    if shift <= 0:
        raise ValueError(f"shift: got {shift}, expected > 0")
    return shift * s / (1 + (shift - 1) * s)


def schedule(num_steps: int, shift: float = 5.0) -> list[float]:
    """The num_steps + 1 boundaries from 1 to 0 of a sampling run, in fractions, as Python floats (float64)."""
    if num_steps < 1:
        raise ValueError(f"num_steps: got {num_steps}, expected >= 1")
    return [float(shift_time(1 - i / num_steps, shift)) for i in range(num_steps + 1)]


def require_precise_time(name: str, time: torch.Tensor) -> None:
    """Raise TypeError unless `time` is float32 or float64."""
    if time.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name}: got {time.dtype}, expected float32 or float64 (half types round t +- epsilon)")


@dataclass(frozen=True)
class GlobalBatch:
    """Where a local batch stands in the global one.

    Samples are numbered micro-step first, then rank, then position, so that under gradient accumulation all diffusion
    samples come before any other: their mean loss is known when the first of the others needs it (`rebalance`).
    """

    local: int
    rank: int = 0
    world_size: int = 1
    micro_step: int = 0
    micro_steps: int = 1

    def __post_init__(self) -> None:
        for name in ("local", "world_size", "micro_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        for name, limit in (("rank", self.world_size), ("micro_step", self.micro_steps)):
            if not 0 <= getattr(self, name) < limit:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected 0 <= {name} < {limit}")

    @property
    def size(self) -> int:
        """Samples in one optimiser step over all ranks."""
        return self.local * self.world_size * self.micro_steps

    @property
    def indices(self) -> torch.Tensor:
        """(local,) int64: global index of each local sample."""
        return (self.micro_step * self.world_size + self.rank) * self.local + torch.arange(self.local)


def bucket_counts(
    global_size: int, diffusion_ratio: float = 0.5, consistency_ratio: float = 0.25, draw: float | None = None
) -> tuple[int, int]:
    """How many samples of a global batch are diffusion (r = t) and consistency (r = 0).

    Args:
        draw: None rounds half to even, as Python's `round`. A number uniform in [0, 1), equal on every rank, rounds at
            random instead, so that the expected counts are exact even for a global batch of one.
    """
    for name, ratio in (("diffusion_ratio", diffusion_ratio), ("consistency_ratio", consistency_ratio)):
        if not 0 <= ratio <= 1:
            raise ValueError(f"{name}: got {ratio}, expected 0 <= {name} <= 1")
    if diffusion_ratio + consistency_ratio > 1:
        raise ValueError(
            f"consistency_ratio: got {consistency_ratio} with diffusion_ratio={diffusion_ratio}, expected a sum <= 1"
        )
    if global_size < 1:
        raise ValueError(f"global_size: got {global_size}, expected >= 1")
    if draw is None:
        diffusion = round(diffusion_ratio * global_size)
        consistency = round(consistency_ratio * global_size)
    else:
        # One draw per bucket would overfill a batch of one; rounding the cumulative bounds with the same draw cannot.
        diffusion = math.floor(diffusion_ratio * global_size + draw)
        consistency = math.floor((diffusion_ratio + consistency_ratio) * global_size + draw) - diffusion
    return diffusion, min(consistency, global_size - diffusion)


def assign_buckets(
    batch: GlobalBatch, diffusion_ratio: float = 0.5, consistency_ratio: float = 0.25, draw: float | None = None
) -> torch.Tensor:
    """(local,) int64 of DIFFUSION, CONSISTENCY or FREE by global index: the first are diffusion, the next consistency.

    Warns if the rounding leaves no diffusion sample although the ratio asks for some (a global batch of one).
    """
    diffusion, consistency = bucket_counts(batch.size, diffusion_ratio, consistency_ratio, draw)
    if draw is None and diffusion_ratio > 0 and diffusion == 0:
        warnings.warn(
            f"a global batch of {batch.size} holds no diffusion sample at ratio {diffusion_ratio}: the flow map is "
            "never anchored; enlarge or accumulate the batch, or draw the bucket sizes",
            stacklevel=2,
        )
    index = batch.indices
    labels = torch.full_like(index, FREE)
    labels[index < diffusion + consistency] = CONSISTENCY
    labels[index < diffusion] = DIFFUSION
    return labels


@dataclass(frozen=True)
class TimePairs:
    """Source and target times of a batch: `t`, `r` (B,) in 0..1000 with r <= t, and the bucket `labels` (B,)."""

    t: torch.Tensor
    r: torch.Tensor
    labels: torch.Tensor

    @property
    def is_diffusion(self) -> torch.Tensor:
        """(B,) bool: r = t by rule."""
        return self.labels == DIFFUSION

    def per_frame(self, frames: int) -> tuple[torch.Tensor, torch.Tensor]:
        """`t` and `r` as (B, frames)."""
        return self.t[:, None].repeat(1, frames), self.r[:, None].repeat(1, frames)


def pair_times(u1: torch.Tensor, u2: torch.Tensor, labels: torch.Tensor, shift: float = 5.0) -> TimePairs:
    """Pairs from two uniforms per sample: t = max, r = min, the bucket rule, then the shift and the scale of 1000.

    Args:
        u1, u2: (B,) in [0, 1], float32 or float64.  labels: (B,) from `assign_buckets`.
    """
    require_precise_time("u1", u1)
    labels = labels.to(u1.device)
    t, r = torch.maximum(u1, u2), torch.minimum(u1, u2)
    r = torch.where(labels == DIFFUSION, t, r)
    r = torch.where(labels == CONSISTENCY, torch.zeros_like(r), r)
    scale = NUM_TRAIN_TIMESTEPS
    return TimePairs(
        scale * torch.as_tensor(shift_time(t, shift)), scale * torch.as_tensor(shift_time(r, shift)), labels
    )


def sample_time_pairs(
    labels: torch.Tensor,
    shift: float = 5.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> TimePairs:
    """Draw (t, r) for every label; the draws happen on the generator's device and move to `device`."""
    source = generator.device if generator is not None else device
    u = torch.rand(2, labels.numel(), generator=generator, device=source, dtype=dtype).to(device or source)
    return pair_times(u[0], u[1], labels, shift)


def sample_logit_normal(
    batch_size: int,
    shift: float = 5.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(B,) times 1000 * shift(sigmoid(z)), z ~ N(0, 1): for flow matching and for the fake score."""
    source = generator.device if generator is not None else device
    z = torch.randn(batch_size, generator=generator, device=source, dtype=dtype).to(device or source)
    return NUM_TRAIN_TIMESTEPS * torch.as_tensor(shift_time(torch.sigmoid(z), shift))


def sample_uniform(
    batch_size: int,
    shift: float = 5.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """(B,) times 1000 * shift(u), u ~ U(0, 1): for the distribution-matching gradient."""
    source = generator.device if generator is not None else device
    u = torch.rand(batch_size, generator=generator, device=source, dtype=dtype).to(device or source)
    return NUM_TRAIN_TIMESTEPS * torch.as_tensor(shift_time(u, shift))
