"""Loss weights over time: beta08, gaussian and uniform, tabulated on the shifted grid of 1001 points.

The grid is G_j = 1000 * shift(1 - j / 1000), j = 0..1000. beta08 is t * sqrt(1 - t), gaussian is exp(-2 (t - 1/2)^2)
minus its grid minimum; both are scaled so that the grid sums to 1000, once, never per call. uniform is 1.
Source: NVlabs/AnyFlow's training scheduler.
"""

from __future__ import annotations

import torch

from .timesteps import NUM_TRAIN_TIMESTEPS, require_precise_time, shift_time

WEIGHTINGS = ("beta08", "gaussian", "uniform")


class LossWeight:
    """w(T) of one weighting and shift.

    Args:
        weighting: "beta08" | "gaussian" | "uniform".
        shift: of the time grid.

    Calling it looks up the nearest grid point, as NVlabs/AnyFlow does; `continuous` evaluates the same curve at T
    itself (0.6 % apart at most for T >= 250).
    """

    def __init__(self, weighting: str = "beta08", shift: float = 5.0) -> None:
        if weighting not in WEIGHTINGS:
            raise ValueError(f"weighting: got {weighting!r}, expected one of {WEIGHTINGS}")
        self.weighting, self.shift = weighting, shift
        fractions = 1 - torch.arange(NUM_TRAIN_TIMESTEPS + 1, dtype=torch.float64) / NUM_TRAIN_TIMESTEPS
        t = torch.as_tensor(shift_time(fractions, shift))
        self.grid = NUM_TRAIN_TIMESTEPS * t
        self.offset, self.constant = 0.0, 1.0
        if weighting != "uniform":
            self.offset = self._curve(t).min().item()
            self.constant = NUM_TRAIN_TIMESTEPS / (self._curve(t) - self.offset).sum().item()
        self.table = self.constant * (self._curve(t) - self.offset)

    def _curve(self, t: torch.Tensor) -> torch.Tensor:
        if self.weighting == "beta08":
            return t * (1 - t).sqrt()
        if self.weighting == "gaussian":
            return torch.exp(-2 * (t - 0.5) ** 2)
        return torch.ones_like(t)

    def __call__(self, t: torch.Tensor) -> torch.Tensor:
        """Weights at the grid points nearest to `t` (any shape, 0..1000), in the dtype and on the device of `t`."""
        require_precise_time("t", t)
        grid, table = self.grid.to(t.device), self.table.to(t.device)
        nearest = (grid - t.detach().double().unsqueeze(-1)).abs().argmin(-1)
        return table[nearest].to(t.dtype)

    def continuous(self, t: torch.Tensor) -> torch.Tensor:
        """Weights evaluated at `t` itself, with the constant of the grid."""
        require_precise_time("t", t)
        fraction = t.detach().double() / NUM_TRAIN_TIMESTEPS
        return (self.constant * (self._curve(fraction) - self.offset)).clamp_min(0).to(t.dtype)
