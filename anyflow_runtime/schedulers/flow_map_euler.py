"""`FlowMapEulerDiscreteScheduler`, interchangeable with the diffusers class of that name.

Source: behaviour of diffusers 0.42 `FlowMapEulerDiscreteScheduler` (AnyFlow, arXiv 2605.13724). Sigmas are
`shift(linspace(1, 0, n + 1)[:-1])` in float64 with a 0 appended, timesteps `N * sigma`, and a step is
`x_r = x_t - (sigma_t - sigma_r) * u`, computed in float64 and rounded to the dtype of u.

Unlike there, the schedule is also kept on the host, so that stepping through `timesteps` on a GPU never waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import Ops, available_backends, load_ops

from .base import shifted
from .config_io import SchedulerConfigMixin

try:
    # Pipelines of diffusers save and load only components that derive from this class.
    from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteSchedulerOutput
    from diffusers.schedulers.scheduling_utils import SchedulerMixin
except (ImportError, RuntimeError):  # not installed, or installed but broken

    class SchedulerMixin:  # type: ignore[no-redef]
        """Stands in for the diffusers base class where diffusers is missing."""

    @dataclass
    class FlowMapEulerDiscreteSchedulerOutput:  # type: ignore[no-redef]
        """Result of `step`; `prev_sample` can also be had by name or position, `out["prev_sample"]`, `out[0]`."""

        prev_sample: Tensor

        def __getitem__(self, key: str | int | slice) -> Any:
            return {"prev_sample": self.prev_sample}[key] if isinstance(key, str) else self.to_tuple()[key]

        def to_tuple(self) -> tuple[Tensor]:
            return (self.prev_sample,)


# How far a timestep may be from an entry of the schedule and still mean that entry, as in diffusers.
ON_SCHEDULE = 1e-3


class FlowMapEulerDiscreteScheduler(SchedulerConfigMixin, SchedulerMixin):  # type: ignore[misc]
    """Euler sampler for flow maps: `step` goes from any timestep t to any timestep r.

    Args:
        num_train_timesteps: N, the timestep at sigma = 1.
        shift: warp of every schedule, `shift * s / (1 + (shift - 1) * s)`; 1 changes nothing.
    Raises:
        ValueError: if either is not positive.
    """

    order = 1
    kernels: Ops | None = None  # those of the model that is sampled, where one is known

    def __init__(self, num_train_timesteps: int = 1000, shift: float = 1.0) -> None:
        for name, value in (("num_train_timesteps", num_train_timesteps), ("shift", shift)):
            if not value > 0:
                raise ValueError(f"{name}: got {value!r}, expected a positive number")
        self.register_to_config(num_train_timesteps=num_train_timesteps, shift=shift)
        self._step_index: int | None = None
        self._begin_index: int | None = None
        self.set_timesteps(num_train_timesteps, device="cpu")

    @property
    def step_index(self) -> int | None:
        """Steps taken on the current schedule; None before the first `step` after `set_timesteps`."""
        return self._step_index

    @property
    def begin_index(self) -> int | None:
        """Index from which `step_index` counts, see `set_begin_index`."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Start counting `step_index` here; for pipelines that enter a schedule half-way."""
        self._begin_index = begin_index

    @property
    def timesteps(self) -> Tensor:
        """`(n,)` float64, N * sigma of every step, on the device given to `set_timesteps`."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        self._timesteps = value
        self._host_copy: tuple[int | None, Tensor] | None = None

    def scale_model_input(self, sample: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`sample` itself; part of the interface of diffusers schedulers."""
        return sample

    def scale_noise(self, sample: Tensor, timestep: float | Tensor, noise: Tensor | None = None) -> Tensor:
        """`s * noise + (1 - s) * sample` with `s = timestep / N`, all in the dtype of `sample`.

        Args:
            sample, noise: tensors of one shape.
            timestep: a number or a tensor of leading dimensions of `sample`, e.g. `(B,)` or `(B, F)`.
        Raises:
            ValueError: if `noise` is missing.
        """
        if noise is None:
            raise ValueError("noise: got None, expected a tensor of the shape of `sample`")
        s = torch.as_tensor(timestep).to(device=sample.device, dtype=sample.dtype) / self.config.num_train_timesteps
        s = _with_ndim(s, noise.ndim)
        return s * noise + (1.0 - s) * sample

    def apply_shift(self, sigmas: Tensor) -> Tensor:
        """Warp sigmas by the configured shift."""
        return sigmas if self.config.shift == 1.0 else shifted(sigmas, self.config.shift)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        sigmas: Any = None,
        timesteps: Any = None,
    ) -> None:
        """Build `sigmas` `(n + 1,)` and `timesteps` `(n,)`, float64 (float32 on MPS and NPU), and reset the indices.

        Args:
            num_inference_steps: n; may be left out where one of the lists gives it.
            device: where the two tensors go.
            sigmas: n custom sigmas, before the shift; the final 0 is appended.
            timesteps: the same as N * sigma. Not used where sigmas are given as well.
        Raises:
            ValueError: if lengths disagree or nothing gives n, or n < 1.
        """
        if sigmas is not None and timesteps is not None and len(sigmas) != len(timesteps):
            raise ValueError(
                f"`sigmas` and `timesteps` should have the same length, got {len(sigmas)} and {len(timesteps)}"
            )
        custom = sigmas if sigmas is not None else timesteps
        if num_inference_steps is None and custom is None:
            raise ValueError("`num_inference_steps` must be provided when both `sigmas` and `timesteps` are `None`")
        if num_inference_steps is None:
            num_inference_steps = len(custom)
        elif custom is not None and len(custom) != num_inference_steps:
            raise ValueError(
                "`sigmas` and `timesteps` should have the same length as `num_inference_steps`, "
                f"got {len(custom)} values for {num_inference_steps} steps"
            )
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps: got {num_inference_steps}, expected at least 1")

        if custom is None:
            grid = torch.linspace(1.0, 0.0, num_inference_steps + 1, dtype=torch.float64, device="cpu")[:-1]
        else:
            grid = torch.as_tensor(custom, dtype=torch.float64, device="cpu").detach().clone()
            if sigmas is None:
                grid = grid / self.config.num_train_timesteps
        grid = self.apply_shift(grid)

        device = torch.device(device) if device is not None else grid.device
        dtype = torch.float32 if device.type in ("mps", "npu") else torch.float64
        host_sigmas = torch.cat([grid, grid.new_zeros(1)]).to(dtype)
        host_timesteps = host_sigmas[:-1] * self.config.num_train_timesteps
        self.num_inference_steps = num_inference_steps
        self.sigmas = host_sigmas.to(device)
        self.timesteps = host_timesteps.to(device)
        self._host_copy = _version(self._timesteps), host_timesteps.clone()
        self._step_index = None
        self._begin_index = None

    def index_for_timestep(self, timestep: float | Tensor) -> int | None:
        """Index of the schedule entry within 1e-3 of `timestep` (its first element), or None if there is none."""
        if self.timesteps is None:
            return None
        distance = (self._host_timesteps().float() - self._value_of(timestep)).abs()
        index = int(distance.argmin())
        return index if distance[index] <= ON_SCHEDULE else None

    def step(
        self,
        model_output: Tensor,
        timestep: float | Tensor,
        sample: Tensor,
        r_timestep: float | Tensor | None = None,
        return_dict: bool = True,
    ) -> FlowMapEulerDiscreteSchedulerOutput | tuple[Tensor]:
        """Carry `sample` from `timestep` to `r_timestep` along the mean flow `model_output`.

        Timesteps on the schedule stand for their sigma, others for `value / N`, and a tensor of several values (leading
        dimensions of `sample`) is read value by value.

        Args:
            model_output, sample: tensors of one shape.
            timestep: t, a number or tensor.
            r_timestep: r likewise; None is the next entry of the schedule. `r == t` changes nothing.
            return_dict: an output object, or else a 1-tuple.
        Returns:
            The sample at r, in the dtype of `model_output`.
        Raises:
            ValueError: if shapes differ, if the schedule is unset, or r is None while t is not on the schedule.
        """
        if self.sigmas is None or self.timesteps is None:
            raise ValueError("`set_timesteps` has not been called.")
        if model_output.shape != sample.shape:
            raise ValueError(
                f"model_output: got {tuple(model_output.shape)}, expected the shape of sample, {tuple(sample.shape)}"
            )
        sigma_t, sigma_next = self._sigmas_at(timestep, sample.device)
        if r_timestep is not None:
            sigma_r = self._sigmas_at(r_timestep, sample.device)[0]
        elif sigma_next is not None:
            sigma_r = sigma_next
        else:
            raise ValueError(
                "`r_timestep` is None but `timestep` is not on the current schedule, so `r` cannot be inferred. "
                "Please pass an explicit `r_timestep` for any-step sampling outside the schedule."
            )

        prev_sample = flow_map_step(sample, model_output, sigma_t, sigma_r, self.kernels)

        if self._step_index is None:
            start = self._begin_index if self._begin_index is not None else self.index_for_timestep(timestep)
            self._step_index = start or 0
        self._step_index += 1
        return FlowMapEulerDiscreteSchedulerOutput(prev_sample) if return_dict else (prev_sample,)

    def _sigmas_at(self, timestep: float | Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Sigma of a timestep and sigma of the entry after it, None where the timestep is not on the schedule."""
        if isinstance(timestep, Tensor) and timestep.numel() > 1:
            return self._sigmas_at_each(timestep, device)
        index = self.index_for_timestep(timestep)
        if index is not None:
            return self.sigmas[index].to(device), self.sigmas[index + 1].to(device)
        value = timestep.to(self.sigmas.dtype) if isinstance(timestep, Tensor) else torch.tensor(timestep)
        return (value / self.config.num_train_timesteps).to(device, self.sigmas.dtype), None

    def _sigmas_at_each(self, timesteps: Tensor, device: torch.device) -> tuple[Tensor, Tensor | None]:
        values = timesteps.detach().to("cpu", self.sigmas.dtype)
        distance, index = (self._host_timesteps().float() - values.float()[..., None]).abs().min(dim=-1)
        found = distance <= ON_SCHEDULE
        sigmas = self.sigmas.to("cpu")
        at = torch.where(found, sigmas[index], values / self.config.num_train_timesteps)
        return at.to(device), sigmas[index + 1].to(device) if bool(found.all()) else None

    def _host_timesteps(self) -> Tensor:
        # Keyed on the version counter: a caller may have written into the tensor itself.
        version = _version(self._timesteps)
        if self._host_copy is None or self._host_copy[0] != version:
            self._host_copy = version, self._timesteps.detach().to("cpu", copy=True)
        return self._host_copy[1]

    def _value_of(self, timestep: float | Tensor) -> float:
        if not isinstance(timestep, Tensor):
            return float(timestep)
        table = self._timesteps
        # A row of our own table, as `for t in scheduler.timesteps` yields it: its value is known on the host.
        if (
            timestep.device.type != "cpu"
            and timestep.numel() == 1
            and (timestep.device, timestep.dtype) == (table.device, table.dtype)
            and timestep.untyped_storage().data_ptr() == table.untyped_storage().data_ptr()
        ):
            row, rest = divmod(int(timestep.storage_offset() - table.storage_offset()), max(table.stride(0), 1))
            if rest == 0 and 0 <= row < len(table):
                return self._host_timesteps()[row].item()
        return timestep.flatten()[0].item()


def flow_map_step(
    sample: Tensor, model_output: Tensor, sigma_t: Tensor, sigma_r: Tensor, ops: Ops | None = None
) -> Tensor:
    """`sample` at sigma_r, in the dtype of `model_output`: one kernel, to the bit what diffusers computes.

    Args:
        sigma_t, sigma_r: of no or of leading dimensions, float64 (float32 on MPS and NPU).
        ops: of the model that is sampled; None, or if they cannot run where the sample lies: those that can.
    """
    if sample.dtype == model_output.dtype and sigma_t.dtype == torch.float64 and max(sigma_t.ndim, sigma_r.ndim) <= 2:
        triton = _runs_triton(sample)
        # Without a GPU, Triton operations are those of its interpreter, and were asked for.
        elsewhere = ops is not None and ops.backend == "triton" and torch.cuda.is_available() and not triton
        if ops is None or sample.dtype == torch.float64 or elsewhere:
            ops = load_ops("triton" if triton else "torch")
        return ops.flow_map_step(sample, model_output, sigma_t, sigma_r)
    # Given dimensions, float64 sigmas promote the whole expression to float64.
    sigma_t, sigma_r = _with_ndim(sigma_t, sample.ndim), _with_ndim(sigma_r, sample.ndim)
    return (sample - (sigma_t - sigma_r) * model_output).to(model_output.dtype)


def _runs_triton(x: Tensor) -> bool:
    if not x.is_cuda or x.dtype == torch.float64 or available_backends()["triton"] is not None:
        return False
    return torch.cuda.get_device_capability(x.device) >= (8, 0)


def _with_ndim(sigma: Tensor, ndim: int) -> Tensor:
    return sigma.view(*sigma.shape, *([1] * (ndim - sigma.ndim)))


def _version(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version
