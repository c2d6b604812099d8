"""Flow-map Euler: one network call carries the sample from any timestep t to any timestep r.

`x_r = x_t - (sigma_t - sigma_r) * u(x_t, t, r)`, where u is the mean flow between t and r (AnyFlow, arXiv 2605.13724).
Grid `linspace(1, 0, n + 1)` in float64, shifted; timesteps are N * sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .base import (
    FlowPredictor,
    GuidedFlow,
    ScheduleError,
    Scheduler,
    StepsConfig,
    flow_function,
    noised,
    shifted,
    solver_dtype,
    wants_host_times,
)


@dataclass(frozen=True, kw_only=True)
class FlowMapEulerSchedulerConfig(StepsConfig):
    """Config of `FlowMapEulerScheduler`; the defaults are those of the released AnyFlow models.

    Args:
        sigmas: `num_inference_steps` values in [0, 1] to use instead of the grid, then shifted; a final 0 is added.
        timesteps: the same as N * sigma; give at most one of the two.
        use_mean_velocity: False tells the network r = t (instantaneous flow, plain Euler).
        Others: as `StepsConfig`.
    Raises:
        ScheduleError: at construction, if a count or value does not fit, or both lists are given.
    """

    _target: type[FlowMapEulerScheduler] = field(default_factory=lambda: FlowMapEulerScheduler)
    sigmas: Sequence[float] | None = None
    timesteps: Sequence[float] | None = None
    use_mean_velocity: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigmas is not None and self.timesteps is not None:
            raise ScheduleError("sigmas, timesteps: got both, expected at most one of the two")
        if self.sigmas is not None:
            self._check_values("sigmas", 1)
        if self.timesteps is not None:
            self._check_values("timesteps", self.num_train_timesteps)


class FlowMapEulerScheduler(Scheduler):
    """Any-step flow-map sampler.

    Tables, terminal 0 included: `timesteps` and `sigmas` `(steps + 1,)` float32. Step lengths are differences of
    float64 sigmas. The network gets t and r as float32 whatever the dtype of the latent.
    """

    timesteps: Tensor
    sigmas: Tensor

    def __init__(self, config: FlowMapEulerSchedulerConfig) -> None:
        super().__init__(config)
        count = config.num_train_timesteps
        if config.sigmas is not None:
            sigmas = np.asarray(config.sigmas, dtype=np.float64)
        elif config.timesteps is not None:
            sigmas = np.asarray(config.timesteps, dtype=np.float64) / count
        else:
            sigmas = np.linspace(1.0, 0.0, config.num_inference_steps + 1)[:-1]
        sigmas = np.append(shifted(sigmas, config.shift), 0.0)
        self._schedule: list[float] = (sigmas * count).tolist()
        self._register_table("timesteps", (sigmas * count).astype(np.float32))
        self._register_table("sigmas", sigmas.astype(np.float32))

    def sample(self, initial_noise: Tensor, predict_flow: FlowPredictor, rng: torch.Generator | None = None) -> Tensor:
        """Run the schedule; see `Scheduler.sample`. `rng` is not used.

        Steps of length zero (custom schedules with repeated values) are skipped without calling the network.
        """
        solver_dtype(initial_noise, "initial_noise")
        moves = [(t, r) for t, r in pairwise(self._schedule) if t != r]
        x = initial_noise
        for i in self._steps(len(moves)):
            x = self.step(x, predict_flow, *moves[i])
        return x

    def step(self, sample: Tensor, predict_flow: FlowPredictor, timestep: float, r_timestep: float) -> Tensor:
        """Carry `sample` from `timestep` to `r_timestep`, any two values in [0, N], by one network call.

        The arithmetic is float32 (float64 for float64 samples); the result has the dtype of `sample`. A predictor that
        leaves its guidance to the step (`GuidedFlow`) gets both in one kernel, in float64.

        Raises:
            ScheduleError: if a timestep is out of range.
            TypeError: if `sample` is not floating point.
        """
        dtype = solver_dtype(sample, "sample")
        count = self.config.num_train_timesteps
        for name, value in (("timestep", timestep), ("r_timestep", r_timestep)):
            if not (math.isfinite(value) and 0 <= value <= count):
                raise ScheduleError(f"{name}: got {value}, expected a value in [0, {count}]")
        told_r = r_timestep if self.config.use_mean_velocity else timestep
        if wants_host_times(predict_flow):
            t, r = (torch.tensor(value, dtype=torch.float32, device="cpu") for value in (timestep, told_r))
        else:  # filled there: a copy would wait for the device
            t, r = (torch.full((), v, dtype=torch.float32, device=sample.device) for v in (timestep, told_r))
        u: Any = flow_function(predict_flow, wants_r=True)(sample, t, r)
        if isinstance(u, GuidedFlow):
            return u.step(sample, timestep / count, r_timestep / count)
        length = timestep / count - r_timestep / count
        return (sample.to(dtype) - length * u.to(dtype)).to(sample.dtype)

    def add_noise(self, clean_input: Tensor, timestep: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Noise at exactly `timestep / N`: a flow map is defined at every t, so nothing is snapped to a grid."""
        sigma = self._scalar_timestep(timestep).to(torch.float32) / self.config.num_train_timesteps
        return noised(clean_input, sigma, rng)
