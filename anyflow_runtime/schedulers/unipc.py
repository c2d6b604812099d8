"""UniPC predictor-corrector (B_h(h) = expm1(-h), the "bh2" variant) for flow matching, predicting the clean latent.

Source: Zhao et al., UniPC, arXiv 2302.04867, with lambda = ln((1 - sigma) / sigma) and B = expm1(-h); the grid and the
lower-order first and last steps are those of the Wan 2.1 inference code. With order 2 the steps are, h the interval,

    predictor  x' = (s' / s) x - (1 - s') B [ m_i + (m_{i-1} - m_i) / 2r ]
    corrector  x  = (s_i / s_{i-1}) x_{i-1}
                    - (1 - s_i) B [ m_{i-1} + (rho_0 / r)(m_{i-2} - m_{i-1}) + rho_1 (m_i - m_{i-1}) ]

with m_i = x_i - s_i v_i and x_{i-1} the corrected state from which the last predictor started.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .base import FlowPredictor, ScheduleError, Scheduler, StepsConfig, flow_function, solver_dtype, wan_grid

MAX_ORDER = 3


@dataclass(frozen=True, kw_only=True)
class FlowMatchUniPCSchedulerConfig(StepsConfig):
    """Config of `FlowMatchUniPCScheduler`; the defaults are those of Wan 2.1.

    Args:
        shift: warp of the grid; without effect on the Karras grid.
        num_train_timesteps: N, timesteps are N * sigma, truncated.
        solver_order: 1, 2 or 3.
        use_kerras_sigma: the grid of Karras et al. (arXiv 2206.00364) between 200 and 0.01 with rho 7, as s / (1 + s).
        Others: as `StepsConfig`.
    Raises:
        ScheduleError: at construction, for an order out of range.
    """

    _target: type[FlowMatchUniPCScheduler] = field(default_factory=lambda: FlowMatchUniPCScheduler)
    num_inference_steps: int = 50
    solver_order: int = 2
    use_kerras_sigma: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.solver_order not in range(1, MAX_ORDER + 1):
            raise ScheduleError(f"solver_order: got {self.solver_order!r}, expected 1, 2 or {MAX_ORDER}")


class FlowMatchUniPCScheduler(Scheduler):
    """UniPC sampler with all coefficients computed at construction.

    Tables: `timesteps` `(n,)` int64, `sigmas` `(n + 1,)` float32 with the final 0, and per step i a row of float32
    weights, `predictor` on `(x_i, m_i, m_{i-1} - m_i, m_{i-2} - m_i)` and `corrector` on
    `(x_{i-1}, m_{i-1}, m_{i-2} - m_{i-1}, m_{i-3} - m_{i-1}, m_i - m_{i-1})`, as many columns as the order needs.
    """

    timesteps: Tensor
    sigmas: Tensor
    predictor: Tensor
    corrector: Tensor

    def __init__(self, config: FlowMatchUniPCSchedulerConfig) -> None:
        super().__init__(config)
        n = config.num_inference_steps
        if config.use_kerras_sigma:
            grid = _karras_grid(n)
        else:
            grid = wan_grid(n, config.shift, config.num_train_timesteps)
        sigmas = np.append(grid, 0.0).astype(np.float32)
        predictor, corrector = _coefficients(sigmas.astype(np.float64), config.solver_order)
        # Truncated from float64: by way of float32 some entries would come out one lower.
        self._register_table("timesteps", (grid * config.num_train_timesteps).astype(np.int64))
        self._register_table("sigmas", sigmas)
        self._register_table("predictor", predictor.astype(np.float32))
        self._register_table("corrector", corrector.astype(np.float32))

    def sample(self, initial_noise: Tensor, predict_flow: FlowPredictor, rng: torch.Generator | None = None) -> Tensor:
        """Run the predictor-corrector loop; see `Scheduler.sample`. `rng` is not used.

        The predictor gets t, and r = t if it takes one (the solver needs the instantaneous flow), in the dtype of the
        noise. Solver arithmetic is float32 for every dtype; the state is rounded to the dtype of the noise after
        every corrector and predictor.
        """
        solver_dtype(initial_noise, "initial_noise")
        flow = flow_function(predict_flow, wants_r=False)
        timesteps = self._times("timesteps", initial_noise, predict_flow)
        depth = self.config.solver_order
        x = start = initial_noise
        past: list[Tensor] = []  # estimates of the clean latent, newest first, as many as there are yet
        for i in self._steps(len(timesteps)):
            v = flow(x, timesteps[i], timesteps[i])
            clean = x.float() - self.sigmas[i] * v.float()
            if i > 0:
                weights = self.corrector[i].unbind()
                corrected = weights[0] * start.float() + weights[1] * past[0] + weights[-1] * (clean - past[0])
                for weight, older in zip(weights[2:-1], past[1:], strict=False):
                    corrected = corrected + weight * (older - past[0])
                x = corrected.to(initial_noise.dtype)
            start = x
            past = [clean, *past[: depth - 1]]
            weights = self.predictor[i].unbind()
            predicted = weights[0] * x.float() + weights[1] * clean
            for weight, older in zip(weights[2:], past[1:], strict=False):
                predicted = predicted + weight * (older - clean)
            x = predicted.to(initial_noise.dtype)
        return x

    def add_noise(self, clean_input: Tensor, timestep: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """Noise at the inference step nearest to `timestep` truncated to an integer; see `Scheduler.add_noise`.

        The final sigma 0 is no step, so t = 0 gives the noise of the last one.
        """
        return self._noised_at_nearest(clean_input, timestep, self.timesteps, self.sigmas, rng)


def _karras_grid(n: int) -> np.ndarray:
    low, high, rho = 0.01, 200.0, 7.0
    ramp = np.linspace(high ** (1 / rho), low ** (1 / rho), n)
    sigmas = ramp**rho
    return sigmas / (1.0 + sigmas)


def _coefficients(sigmas: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
    """Predictor `(n, order + 1)` and corrector `(n, order + 2)` weights for float64 sigmas `(n + 1,)` ending in 0."""
    n = len(sigmas) - 1
    lam = np.log((1.0 - sigmas[:-1]) / sigmas[:-1])
    predictor, corrector = np.zeros((n, order + 1)), np.zeros((n, order + 2))
    for i in range(n - 1):
        used = _order_at(i, n, order)
        phi, ratios, rhs = _bh2_system(lam, i, used)
        scale = -(1.0 - sigmas[i + 1]) * phi
        # UniPC fixes the single weight of order 2 at 1/2 instead of solving for it.
        rho = np.full(1, 0.5) if used == 2 else _solve(ratios[:-1], rhs[:-1])
        predictor[i, :2] = sigmas[i + 1] / sigmas[i], scale
        predictor[i, 2 : 1 + used] = scale * rho / ratios[:-1]

        rho = np.full(1, 0.5) if used == 1 else _solve(ratios, rhs)
        corrector[i + 1, :2] = sigmas[i + 1] / sigmas[i], scale
        corrector[i + 1, 2 : 1 + used] = scale * rho[:-1] / ratios[:-1]
        corrector[i + 1, -1] = scale * rho[-1]
    # Into sigma = 0 every predictor has the limit x' = m.
    predictor[n - 1, 1] = 1.0
    return predictor, corrector


def _order_at(i: int, n: int, order: int) -> int:
    """Order of the predictor at step i: what the history allows at the start, falling to 1 at the end."""
    return min(order, i + 1, n - i)


def _bh2_system(lam: np.ndarray, i: int, used: int) -> tuple[float, np.ndarray, np.ndarray]:
    """expm1(-h) of the interval i -> i+1, the ratios r_k (1 for the new point, last), and the right-hand side b."""
    h = lam[i + 1] - lam[i]
    ratios = np.array([(lam[i - k] - lam[i]) / h for k in range(1, used)] + [1.0])
    phi = float(np.expm1(-h))
    rhs, term, factorial = [], phi / -h - 1.0, 1.0
    for k in range(1, used + 1):
        rhs.append(term * factorial / phi)
        factorial *= k + 1
        term = term / -h - 1.0 / factorial
    return phi, ratios, np.array(rhs)


def _solve(ratios: np.ndarray, rhs: np.ndarray) -> np.ndarray:
    """Weights rho with `sum_j r_j^k rho_j = b_k`."""
    return np.linalg.solve(np.vander(ratios, increasing=True).T, rhs)
