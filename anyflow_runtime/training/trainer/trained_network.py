"""A network in training: fp32 master weights, optimiser, average, and a state that restores all of it to the bit."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..config import EmaSettings, OptimiserSettings, Phase
from .ema import EMA
from .parallel import average_gradients, drop_gathered, gradient_norm


class TrainedNetwork:
    """The trainable parameters of some modules and what updates them.

    Half-precision parameters have fp32 masters, which gather the gradients, are stepped and averaged, and are then
    rounded into the parameters; wider parameters are their own masters.

    Args:
        modules: by the prefix of their parameters' names.
        ema: None: no average.
        save_frozen: also put parameters without gradient into the state; False where they come from a file again.
    """

    def __init__(
        self,
        modules: Mapping[str, nn.Module],
        settings: OptimiserSettings,
        phase: Phase,
        ema: EmaSettings | None,
        save_frozen: bool = True,
    ) -> None:
        self.modules = tuple(modules.values())
        named = {f"{prefix}.{name}": p for prefix, module in modules.items() for name, p in module.named_parameters()}
        self.parameters = {name: p for name, p in named.items() if p.requires_grad}
        self.frozen = {name: p for name, p in named.items() if not p.requires_grad} if save_frozen else {}
        self.masters = {name: _master(p) for name, p in self.parameters.items()}
        # AdamW's grouped kernels do not take sharded and whole tensors together.
        groups = [[p for p in self.masters.values() if isinstance(p, DTensor) == sharded] for sharded in (True, False)]
        self.optimiser = torch.optim.AdamW(
            [{"params": group} for group in groups if group],
            lr=phase.lr,
            betas=settings.betas,
            weight_decay=settings.weight_decay,
        )
        self.phase, self.clip = phase, settings.clip
        self.average = None if ema is None else EMA(self._as_module(), ema.decay, ema.warmup)

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The masters: what the average follows."""
        return iter(self.masters.items())

    def _as_module(self) -> nn.Module:
        return cast("nn.Module", self)  # the average only asks for `named_parameters`

    def backward(self, loss: Tensor) -> None:
        """Add a loss's gradients to those of the step."""
        loss.backward()
        self.gather()

    @torch.no_grad()
    def gather(self) -> None:
        """Move gradients from half-precision parameters into their masters."""
        for name, parameter in self.parameters.items():
            master = self.masters[name]
            if master is not parameter and parameter.grad is not None:
                wide = parameter.grad.to(master.dtype)
                master.grad = wide if master.grad is None else master.grad + wide
                parameter.grad = None

    @torch.no_grad()
    def step(self, index: int) -> dict[str, float]:
        """Take step `index` (0-based, of the phase) with the gathered gradients; a collective.

        Returns: gradient norm before clipping, and the learning rate.

        Raises:
            FloatingPointError: if a gradient is not finite; nothing has been changed then.
        """
        average_gradients(self.masters.values())
        norm = gradient_norm(self.masters.values())
        if not math.isfinite(norm):
            raise FloatingPointError(f"the gradient's norm is {norm}")
        if self.clip is not None and norm > self.clip:
            for p in self.masters.values():
                if p.grad is not None:
                    p.grad.mul_(self.clip / norm)
        lr = self.phase.lr_at(index)
        for group in self.optimiser.param_groups:
            group["lr"] = lr
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.publish()
        if self.average is not None:
            self.average.update(index)
        return {"gradient_norm": norm, "lr": lr}

    @torch.no_grad()
    def publish(self) -> None:
        """Let forwards see the masters: rounded into half-precision parameters, gathered anew where sharded."""
        for name, parameter in self.parameters.items():
            if self.masters[name] is not parameter:
                parameter.copy_(self.masters[name])
        for module in self.modules:
            drop_gathered(module)

    def keep_average(self) -> None:
        """Take the average as the weights, for good."""
        if self.average is not None:
            self.average.copy_to(self._as_module())
            self.publish()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The weights are the average inside the block, their own again afterwards, to the bit."""
        if self.average is None:
            yield
            return
        with self.average.applied(self._as_module()):
            self.publish()
            yield
        self.publish()

    def state_dict(self) -> dict[str, Tensor]:
        """Everything that training changes, by name ("weights/...", "optimiser/exp_avg/..."), not copied: what is
        written into these tensors is the network's new state, once `publish` has been called.
        """
        state = {f"weights/{name}": p.detach() for name, p in self.masters.items()}
        state |= {f"frozen/{name}": p.detach() for name, p in self.frozen.items()}
        for name, p in self.masters.items():
            state |= {f"optimiser/{key}/{name}": value for key, value in self.optimiser.state.get(p, {}).items()}
        if self.average is not None:
            state |= {f"average/{name}": shadow for name, shadow in self.average.state_dict().items()}
        return state

    def expect_state(self, names: Set[str]) -> None:
        """Make room for a state of these names: moments of what has been stepped there.

        Raises:
            ValueError: if its parameters are not those of this network.
        """
        for name in names:
            if name.startswith("optimiser/"):
                _, key, parameter = name.split("/", 2)
                master = self.masters.get(parameter)
                if master is not None:
                    # AdamW counts steps in a scalar on the CPU.
                    moment = torch.zeros(()) if key == "step" else torch.zeros_like(master)
                    self.optimiser.state[master][key] = moment
        differing = sorted(names ^ set(self.state_dict()))
        if differing:
            raise ValueError(f"checkpoint: its state differs: {differing[:3]} ({len(differing)} in all)")


def _master(parameter: nn.Parameter) -> nn.Parameter:
    wide = torch.promote_types(parameter.dtype, torch.float32)
    return parameter if parameter.dtype == wide else nn.Parameter(parameter.detach().to(wide))
