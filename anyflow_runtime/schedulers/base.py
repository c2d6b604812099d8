"""What the streaming schedulers share: the contract, fp32 tables, scalar timesteps and calling the network.

A scheduler owns the whole denoising loop and knows nothing of shapes: every operation broadcasts a per-step scalar.
Sigma is the share of noise, `x_t = (1 - sigma) * x_0 + sigma * eps`; timesteps are `num_train_timesteps * sigma`.
Tensor arithmetic runs in float32 (float64 for float64 input) and is rounded to the dtype of the noise where stated.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from anyflow_kernels import Ops

from ..config import InstantiateConfig

FlowFunction = Callable[[Tensor, Tensor, Tensor], Any]


class ScheduleError(ValueError, AssertionError):
    """A schedule or timestep that cannot be sampled.

    Also an AssertionError, which is what programs written for other streaming runtimes catch here.
    """


class FlowPredictor(Protocol):
    """The network as a scheduler sees it: `(noisy_latent, timestep) -> flow`, or `(noisy_latent, timestep, r)`.

    `timestep` and `r` are 0-d tensors on the device of the latent; in host memory for a predictor with a true
    attribute `host_times`, since schedules are known there and to read one off a GPU would wait for it. A third
    parameter that is required, or that is named `r` or `r_timestep`, receives the timestep the flow is used to reach.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True)
class GuidedFlow:
    """A flow that is still to be guided, for samplers whose step does that in the same pass.

    Args:
        flow: of the prompt.
        unconditional: of the negative prompt; None without guidance.
        guidance: scale s in u_n + s (u - u_n).
        ops: what the step runs on; see `anyflow_kernels.load_ops`.
    """

    flow: Tensor
    unconditional: Tensor | None
    guidance: float
    ops: Ops

    def combined(self) -> Tensor:
        """The guided flow, for samplers that need it as such."""
        if self.unconditional is None:
            return self.flow
        return self.unconditional + self.guidance * (self.flow - self.unconditional)

    def step(self, x: Tensor, sigma_t: float, sigma_r: float) -> Tensor:
        """`x` carried from one noise level to another: guidance and step in one kernel."""
        return self.ops.flow_map_step(x, self.flow, sigma_t, sigma_r, self.unconditional, self.guidance)


@dataclass(frozen=True, kw_only=True)
class SchedulerConfig(InstantiateConfig):
    """Base of the scheduler configs; it declares no settings of its own."""

    _target: type[Scheduler] = field(default_factory=lambda: Scheduler)  # type: ignore[type-abstract]


@dataclass(frozen=True, kw_only=True)
class StepsConfig(SchedulerConfig):
    """Settings of a schedule of steps.

    Args:
        num_inference_steps: number of steps, any from 1.
        shift: warp of the grid.
        num_train_timesteps: N, timesteps are N * sigma.
        enable_tqdm: show a progress bar.
    Raises:
        TypeError: at construction, for a count that is no integer.
        ScheduleError: at construction, for a count below 1 or a shift that is not positive.
    """

    num_inference_steps: int = 4
    shift: float = 5.0
    num_train_timesteps: int = 1000
    enable_tqdm: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_inference_steps", "num_train_timesteps"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}: got {value!r}, expected an integer")
            if value < 1:
                raise ScheduleError(f"{name}: got {value}, expected at least 1")
        if not (math.isfinite(self.shift) and self.shift > 0):
            raise ScheduleError(f"shift: got {self.shift!r}, expected a positive number")

    def _check_values(self, name: str, limit: float, extra: int = 0) -> None:
        values, count = getattr(self, name), self.num_inference_steps + extra
        if len(values) != count:
            steps = f"num_inference_steps + {extra}" if extra else "num_inference_steps"
            raise ScheduleError(f"{name}: got {len(values)} values, expected {steps} = {count}")
        for value in values:
            if not 0 <= value <= limit:
                raise ScheduleError(f"{name}: got {value}, expected values in [0, {limit}]")


class Scheduler(nn.Module, ABC):
    """Denoising scheduler: `sample` turns noise into a clean latent, `add_noise` goes the other way.

    Tables are non-persistent buffers that follow the module between devices and keep their values and dtype through
    `.to(dtype)`, `.half()` and `.double()`: rounding 999 to bf16 would give 1000.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self._tables: dict[str, Tensor] = {}

    @abstractmethod
    def sample(self, initial_noise: Tensor, predict_flow: FlowPredictor, rng: torch.Generator | None = None) -> Tensor:
        """Run the whole denoising loop.

        Args:
            initial_noise: floating-point tensor of any shape, taken as the sample at the first sigma.
            predict_flow: called once per step, see `FlowPredictor`.
            rng: generator on the device of the noise, for the schedulers that draw; None is the global one.
        Returns:
            The clean latent: shape, device and dtype of `initial_noise`.
        """

    @abstractmethod
    def add_noise(self, clean_input: Tensor, timestep: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """`(1 - sigma) * clean_input + sigma * eps` at the sigma of a 0-d timestep, in the dtype of the input.

        Raises:
            ScheduleError: if `timestep` is not a 0-d tensor, or (checked on the CPU only, where it costs no
                synchronisation) lies outside [0, num_train_timesteps].
        """

    def _register_table(self, name: str, values: np.ndarray | Tensor) -> None:
        # Made on the CPU even under `with torch.device(...)`, so that a model built on meta gets real tables.
        table = values.clone() if isinstance(values, Tensor) else torch.from_numpy(np.ascontiguousarray(values))
        self._tables[name] = table
        self.register_buffer(name, table.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Scheduler:
        super()._apply(fn, recurse)
        for name, table in self._tables.items():
            setattr(self, name, table.to(getattr(self, name).device))
        return self

    def _times(self, name: str, noise: Tensor, predict_flow: FlowPredictor) -> Tensor:
        """A table of timesteps in the dtype of the noise, where the predictor wants them."""
        if wants_host_times(predict_flow):
            return self._tables[name].to(noise.dtype)
        return getattr(self, name).to(noise.device, noise.dtype)

    def _steps(self, count: int) -> Iterable[int]:
        if not self.config.enable_tqdm:
            return range(count)
        from tqdm import tqdm

        return tqdm(range(count), desc=type(self).__name__)

    def _noised_at_nearest(
        self, clean: Tensor, timestep: Tensor, timesteps: Tensor, sigmas: Tensor, rng: torch.Generator | None
    ) -> Tensor:
        """`noised` at the sigma of the timestep that is nearest, the first on ties."""
        t = self._scalar_timestep(timestep).to(timesteps.device, timesteps.dtype)
        row = (timesteps - t).abs().argmin().reshape(1)
        return noised(clean, sigmas.index_select(0, row).reshape(()), rng)

    def _scalar_timestep(self, timestep: Tensor) -> Tensor:
        if not isinstance(timestep, Tensor) or timestep.ndim != 0:
            got = tuple(timestep.shape) if isinstance(timestep, Tensor) else type(timestep).__name__
            raise ScheduleError(f"timestep: got {got}, expected a 0-d tensor")
        limit = self.config.num_train_timesteps
        if timestep.device.type == "cpu" and not 0 <= timestep.item() <= limit:
            raise ScheduleError(f"timestep: got {timestep.item()}, expected a value in [0, {limit}]")
        return timestep


def noised(clean: Tensor, sigma: Tensor, rng: torch.Generator | None) -> Tensor:
    """`(1 - sigma) * clean + sigma * eps` with one draw of the shape and dtype of `clean`; result in that dtype."""
    eps = torch.empty_like(clean).normal_(generator=rng)
    dtype = solver_dtype(clean, "clean_input")
    return ((1.0 - sigma) * clean.to(dtype) + sigma * eps.to(dtype)).to(clean.dtype)


def solver_dtype(x: Tensor, name: str) -> torch.dtype:
    """float32, or float64 for float64 input. Raises TypeError unless `x` is real floating point."""
    if not isinstance(x, Tensor) or not x.is_floating_point():
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name}: got {got}, expected a floating-point tensor")
    return torch.promote_types(x.dtype, torch.float32)


def wants_host_times(predict_flow: FlowPredictor) -> bool:
    """Whether the predictor takes its timesteps in host memory; see `FlowPredictor`."""
    return getattr(predict_flow, "host_times", False)


def flow_function(predict_flow: FlowPredictor, *, wants_r: bool) -> FlowFunction:
    """`predict_flow` as a function of (x, t, r) that drops r where the predictor does not take it.

    Args:
        wants_r: what to do for a predictor whose signature does not tell (`*args`, or none to be read).
    Raises:
        TypeError: if the predictor takes neither (x, t) nor (x, t, r).
    """
    pass_r = _how_to_pass_r(predict_flow, wants_r)

    def flow(x: Tensor, t: Tensor, r: Tensor) -> Any:
        if pass_r == "positional":
            out = predict_flow(x, t, r)
        elif pass_r is None:
            out = predict_flow(x, t)
        else:
            out = predict_flow(x, t, **{pass_r: r})
        shape = (out.flow if isinstance(out, GuidedFlow) else out).shape
        if shape != x.shape:
            raise ValueError(
                f"predict_flow: got {tuple(shape)}, expected a flow of shape {tuple(x.shape)}, like its input"
            )
        return out

    return flow


def _how_to_pass_r(predict_flow: Any, wants_r: bool) -> str | None:
    if not callable(predict_flow):
        raise TypeError(f"predict_flow: got {type(predict_flow).__name__}, expected a callable (x, t) or (x, t, r)")
    function = predict_flow.forward if isinstance(predict_flow, nn.Module) else predict_flow
    unknown = "positional" if wants_r else None
    try:
        parameters = inspect.signature(function).parameters.values()
    except ValueError:  # builtins without a signature
        return unknown
    places = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    open_ended = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    required = [p for p in places if p.default is p.empty]
    if len(required) > 3 or (len(places) < 2 and not open_ended):
        raise TypeError(f"predict_flow: got {inspect.signature(function)}, expected a callable (x, t) or (x, t, r)")
    if len(required) == 3 or (len(places) > 2 and places[2].name in ("r", "r_timestep")):
        return "positional"
    # A later parameter with a default (`cache=cache`) is the caller's own business unless it bears the name of r.
    for parameter in parameters:
        if parameter.name in ("r", "r_timestep") and parameter.kind is not parameter.VAR_KEYWORD:
            return parameter.name
    return unknown if open_ended and len(places) <= 2 else None


def shifted(sigmas: Any, shift: float) -> Any:
    """`shift * s / (1 + (shift - 1) * s)`: moves the steps towards noise for shift > 1, 1 changes nothing."""
    return shift * sigmas / (1.0 + (shift - 1.0) * sigmas)


def wan_grid(steps: int, shift: float, num_train_timesteps: int) -> np.ndarray:
    """`steps` float64 sigmas from 1 - 1/N towards 0, shifted; the 0 that ends the schedule is not included."""
    return shifted(np.linspace(1.0 - 1.0 / num_train_timesteps, 0.0, steps + 1)[:-1], shift)
