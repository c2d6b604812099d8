"""Few-step flow matching with renoising, as the self-forcing Wan checkpoints are sampled.

Every step estimates the clean latent, `c = x - sigma * v`, and all but the last noise it again to the next sigma.
Table: `shift(linspace(sigma_max, sigma_min, N + 1)[:-1])`.
Source: Self-Forcing (arXiv 2506.08009), `FlowMatchScheduler` of guandeh17/Self-Forcing utils/scheduler.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import FlowPredictor, ScheduleError, Scheduler, StepsConfig, flow_function, shifted, solver_dtype


@dataclass(frozen=True, kw_only=True)
class FlowMatchSchedulerConfig(StepsConfig):
    """Config of `FlowMatchScheduler`.

    Args:
        shift: warp of the training table.
        denoising_timesteps: integers in [0, num_train_timesteps], one per step.
        warp_denoising_step: requested timesteps are positions in the warped table; False takes them as they are.
        num_train_timesteps: also the length N of the training table.
        sigma_max, sigma_min: ends of the grid before warping.
        extra_one_step: N + 1 grid points of which the last is dropped, instead of N.
        timestep_dtype: dtype in which the timesteps are kept; an integer dtype truncates them.
        Others: as `StepsConfig`.
    Raises:
        ScheduleError: at construction, if the counts differ or a timestep or sigma is out of range.
        TypeError: for a timestep that is not an integer.
    """

    _target: type[FlowMatchScheduler] = field(default_factory=lambda: FlowMatchScheduler)
    shift: float = 8.0
    denoising_timesteps: Sequence[int] = (1000, 750, 500, 250)
    warp_denoising_step: bool = True
    sigma_max: float = 1.0
    sigma_min: float = 0.0
    extra_one_step: bool = True
    timestep_dtype: torch.dtype = torch.float32

    def __post_init__(self) -> None:
        super().__post_init__()
        for t in self.denoising_timesteps:
            if isinstance(t, bool) or not isinstance(t, int):
                raise TypeError(f"denoising_timesteps: got {t!r}, expected integers")
        self._check_values("denoising_timesteps", self.num_train_timesteps)
        if not 0.0 <= self.sigma_min < self.sigma_max <= 1.0:
            raise ScheduleError(
                f"sigma_min, sigma_max: got {self.sigma_min}, {self.sigma_max}, expected 0 <= min < max <= 1"
            )


class FlowMatchScheduler(Scheduler):
    """Renoising flow-matching sampler.

    Tables: `denoising_step_list` and `denoising_sigmas` `(steps,)`, `training_timesteps` and `training_sigmas` `(N,)`.
    """

    denoising_step_list: Tensor
    denoising_sigmas: Tensor
    training_timesteps: Tensor
    training_sigmas: Tensor

    def __init__(self, config: FlowMatchSchedulerConfig) -> None:
        super().__init__(config)
        count = config.num_train_timesteps
        points = count + 1 if config.extra_one_step else count
        grid = torch.linspace(config.sigma_max, config.sigma_min, points, dtype=torch.float32, device="cpu")[:count]
        sigmas = shifted(grid, config.shift)
        timesteps = sigmas * count

        requested = torch.tensor(config.denoising_timesteps, dtype=torch.int64, device="cpu")
        if config.warp_denoising_step:
            # Position N is one past the table: there the network is told t = 0 while sigma stays at the last entry.
            rows = count - requested
            steps = torch.cat([timesteps, timesteps.new_zeros(1)])[rows]
            rows = rows.clamp(max=count - 1)
        else:
            steps = requested.to(torch.float32)
            rows = (timesteps[None, :] - steps[:, None]).abs().argmin(dim=1)

        self._register_table("denoising_step_list", steps.to(config.timestep_dtype))
        self._register_table("denoising_sigmas", sigmas[rows])
        self._register_table("training_timesteps", timesteps)
        self._register_table("training_sigmas", sigmas)

    def sample(self, initial_noise: Tensor, predict_flow: FlowPredictor, rng: torch.Generator | None = None) -> Tensor:
        """Run the renoising loop; see `Scheduler.sample`.

        The predictor gets t rounded to the dtype of the noise and, if it takes one, r = 0: the flow is used to reach
        the clean latent. Between steps one eps of the shape and dtype of the noise is drawn, `steps - 1` in all.
        """
        dtype = solver_dtype(initial_noise, "initial_noise")
        flow = flow_function(predict_flow, wants_r=False)
        timesteps = self._times("denoising_step_list", initial_noise, predict_flow)
        zero = torch.zeros_like(timesteps[0])
        x = clean = initial_noise
        for i in self._steps(len(timesteps)):
            sigma = self.denoising_sigmas[i]
            if i > 0:
                eps = torch.empty_like(x).normal_(generator=rng)
                x = ((1.0 - sigma) * clean + sigma * eps.to(dtype)).to(initial_noise.dtype)
            # From x as the network saw it, so that rounding x to bf16 does not count as flow.
            clean = x.to(dtype) - sigma * flow(x, timesteps[i], zero).to(dtype)
        return clean.to(initial_noise.dtype)

    def add_noise(self, clean_input: Tensor, timestep: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Noise at the training-table entry nearest to `timestep` (the first on ties); see `Scheduler.add_noise`."""
        return self._noised_at_nearest(clean_input, timestep, self.training_timesteps, self.training_sigmas, rng)
