"""Small collectives that work with or without an initialised process group.

Decisions that must agree on every rank (chunk count, co-training coin, rollout length) are drawn on rank 0 and
broadcast; noise and times differ, each from a seed of its own place in the global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist


def is_initialized() -> bool:
    """True if a default process group exists."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Rank of this process, 0 without a process group."""
    return dist.get_rank() if is_initialized() else 0


def world_size() -> int:
    """Number of processes, 1 without a process group."""
    return dist.get_world_size() if is_initialized() else 1


def collective_device() -> torch.device:
    """Device on which the default group can communicate: the current GPU for NCCL, else the CPU."""
    if is_initialized() and "nccl" in str(dist.get_backend()):
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def broadcast_values(values: tuple[float, ...]) -> tuple[float, ...]:
    """The numbers that rank 0 passed, on every rank; float64 in transit, so integers up to 2**53 survive."""
    if world_size() == 1:
        return tuple(float(value) for value in values)
    buffer = torch.tensor(values, dtype=torch.float64, device=collective_device())
    dist.broadcast(buffer, src=0)
    return tuple(buffer.tolist())


def draw_uniform(count: int, generator: torch.Generator | None = None) -> tuple[float, ...]:
    """`count` numbers uniform in [0, 1), drawn on rank 0 and equal on every rank.

    Every rank advances its own CPU generator by the same amount, so that a resumed run needs no knowledge of the rank.
    """
    if count < 1:
        raise ValueError(f"count: got {count}, expected >= 1")
    return broadcast_values(tuple(torch.rand(count, generator=generator, dtype=torch.float64).tolist()))


def draw_integer(low: int, high: int, generator: torch.Generator | None = None) -> int:
    """An integer uniform in low..high, both included; drawn on rank 0 and equal on every rank."""
    if high < low:
        raise ValueError(f"high: got {high}, expected >= low={low}")
    (u,) = draw_uniform(1, generator)
    return low + min(int(u * (high - low + 1)), high - low)


def all_reduce_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum of `values` over all ranks, detached; the input is left as it is."""
    total = values.detach().clone()
    if world_size() > 1:
        device = total.device
        total = total.to(collective_device())
        dist.all_reduce(total)
        total = total.to(device)
    return total


def anywhere(value: bool) -> bool:
    """Whether it is true on any rank."""
    return value if world_size() == 1 else bool(all_reduce_sum(torch.tensor(float(value))))


def barrier() -> None:
    """Wait for all processes."""
    if world_size() > 1:
        dist.barrier()
