"""Rebalancing: bring every non-diffusion loss to the size of the mean diffusion loss of the global batch.

l_b <- l_b * stop_gradient(m / (l_b + 1e-5)): each such sample contributes the value m and the gradient m * grad log
l_b. Two scalars, the sum and the count of the diffusion losses, are all that ranks exchange.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .. import distributed


@dataclass
class DiffusionMean:
    """Running sum and count of the diffusion losses of one optimiser step, over ranks and micro-steps so far.

    Diffusion samples come first in a global batch (`GlobalBatch`), so the mean is complete when it is first needed
    and an accumulated step equals the step of one large batch. Make a new one for every optimiser step.
    """

    total: float = 0.0
    count: float = 0.0

    def add(self, losses: torch.Tensor, is_diffusion: torch.Tensor) -> float | None:
        """Include a micro-batch of every rank; the mean so far, or None if there was no diffusion sample yet.

        A collective: every rank calls it, also one whose samples are all, or not at all, diffusion.
        """
        mine = losses.detach().double()
        kept = torch.where(is_diffusion, mine, torch.zeros_like(mine))
        total, count = distributed.all_reduce_sum(torch.stack([kept.sum(), is_diffusion.double().sum()])).tolist()
        self.total, self.count = self.total + total, self.count + count
        return self.total / self.count if self.count else None


def rebalance(
    losses: torch.Tensor, is_diffusion: torch.Tensor, running: DiffusionMean | None = None, floor: float = 1e-5
) -> torch.Tensor:
    """Rescaled (B,) losses; unchanged if the global batch holds no diffusion sample.

    Args:
        losses: (B,) with gradient.  is_diffusion: (B,) bool.
        running: shared by the micro-steps of one optimiser step; None for a step without accumulation.
    """
    if losses.dim() != 1 or losses.shape != is_diffusion.shape:
        raise ValueError(
            f"is_diffusion: got shape {tuple(is_diffusion.shape)}, expected (B,) like losses {tuple(losses.shape)}"
        )
    mean = (running if running is not None else DiffusionMean()).add(losses, is_diffusion)
    if mean is None:
        return losses
    factor = mean / (losses.detach() + floor)
    return losses * torch.where(is_diffusion, torch.ones_like(factor), factor)
