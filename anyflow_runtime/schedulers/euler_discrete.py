"""First-order Euler steps on the shifted Wan grid, or on a fixed list of timesteps.

`x += (sigma_next - sigma) * v`; grid `linspace(1 - 1/N, 0, n + 1)[:-1]` shifted, then 0.
Source: the grid is the default of diffusers' FlowMatchEulerDiscreteScheduler.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .base import (
    FlowPredictor,
    ScheduleError,
    Scheduler,
    SchedulerConfig,
    check_steps,
    flow_function,
    noised,
    solver_dtype,
    wan_grid,
)


@dataclass(frozen=True, kw_only=True)
class EulerDiscreteSchedulerConfig(SchedulerConfig):
    """Config of `EulerDiscreteScheduler`.

    Args:
        num_inference_steps: number of steps.
        shift: warp of the grid; without effect on fixed timesteps.
        num_train_timesteps: N, timesteps are N * sigma.
        fixed_timesteps: `num_inference_steps + 1` timesteps in [0, N] to use instead of the grid, usually ending in 0.
        enable_tqdm: show a progress bar.
    Raises:
        ScheduleError: at construction, if the count or a value does not fit.
    """

    _target: type[EulerDiscreteScheduler] = field(default_factory=lambda: EulerDiscreteScheduler)
    num_inference_steps: int = 4
    shift: float = 5.0
    num_train_timesteps: int = 1000
    fixed_timesteps: Sequence[float] | None = None
    enable_tqdm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_steps(self)
        if self.fixed_timesteps is None:
            return
        if len(self.fixed_timesteps) != self.num_inference_steps + 1:
            raise ScheduleError(
                f"fixed_timesteps: got {len(self.fixed_timesteps)} values, expected num_inference_steps + 1 = "
                f"{self.num_inference_steps + 1}"
            )
        for t in self.fixed_timesteps:
            if not 0 <= t <= self.num_train_timesteps:
                raise ScheduleError(f"fixed_timesteps: got {t}, expected values in [0, {self.num_train_timesteps}]")


class EulerDiscreteScheduler(Scheduler):
    """Explicit Euler sampler. Tables, terminal entry included: `timesteps` and `sigmas` `(steps + 1,)` float32."""

    timesteps: Tensor
    sigmas: Tensor

    def __init__(self, config: EulerDiscreteSchedulerConfig) -> None:
        super().__init__(config)
        count = np.float32(config.num_train_timesteps)
        if config.fixed_timesteps is not None:
            timesteps = np.asarray(config.fixed_timesteps, dtype=np.float32)
            sigmas = timesteps / count
        else:
            grid = wan_grid(config.num_inference_steps, config.shift, config.num_train_timesteps)
            sigmas = np.append(grid, 0.0).astype(np.float32)
            timesteps = sigmas * count
        self._register_table("timesteps", timesteps)
        self._register_table("sigmas", sigmas)

    def sample(self, initial_noise: Tensor, predict_flow: FlowPredictor, rng: torch.Generator | None = None) -> Tensor:
        """Run the Euler loop; see `Scheduler.sample`. `rng` is not used.

        The predictor gets t, and r = the next timestep if it takes one, rounded to the dtype of the noise. The
        state is rounded to that dtype after every step, the arithmetic of a step is float32.
        """
        dtype = solver_dtype(initial_noise, "initial_noise")
        flow = flow_function(predict_flow, wants_r=False)
        timesteps = self.timesteps.to(initial_noise.device, initial_noise.dtype)
        x = initial_noise
        for i in self._steps(len(timesteps) - 1):
            step = self.sigmas[i + 1] - self.sigmas[i]
            v = flow(x, timesteps[i], timesteps[i + 1])
            x = (x.to(dtype) + step * v.to(dtype)).to(initial_noise.dtype)
        return x

    def add_noise(self, clean_input: Tensor, timestep: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Noise at the schedule entry nearest to `timestep`, the terminal one included; see `Scheduler.add_noise`."""
        t = self._scalar_timestep(timestep).to(self.timesteps.device, self.timesteps.dtype)
        row = (self.timesteps - t).abs().argmin().reshape(1)
        return noised(clean_input, self.sigmas.index_select(0, row).reshape(()), rng)
