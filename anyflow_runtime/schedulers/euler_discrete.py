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

from .base import FlowPredictor, Scheduler, StepsConfig, flow_function, solver_dtype, wan_grid


@dataclass(frozen=True, kw_only=True)
class EulerDiscreteSchedulerConfig(StepsConfig):
    """Config of `EulerDiscreteScheduler`.

    Args:
        fixed_timesteps: `num_inference_steps + 1` timesteps in [0, N] to use instead of the grid, usually ending in 0;
            the shift is then without effect.
        Others: as `StepsConfig`.
    Raises:
        ScheduleError: at construction, if the count or a value does not fit.
    """

    _target: type[EulerDiscreteScheduler] = field(default_factory=lambda: EulerDiscreteScheduler)
    fixed_timesteps: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fixed_timesteps is not None:
            self._check_values("fixed_timesteps", self.num_train_timesteps, extra=1)


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
        timesteps = self._times("timesteps", initial_noise, predict_flow)
        x = initial_noise
        for i in self._steps(len(timesteps) - 1):
            step = self.sigmas[i + 1] - self.sigmas[i]
            v = flow(x, timesteps[i], timesteps[i + 1])
            x = (x.to(dtype) + step * v.to(dtype)).to(initial_noise.dtype)
        return x

    def add_noise(self, clean_input: Tensor, timestep: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Noise at the schedule entry nearest to `timestep`, the terminal one included; see `Scheduler.add_noise`."""
        return self._noised_at_nearest(clean_input, timestep, self.timesteps, self.sigmas, rng)
