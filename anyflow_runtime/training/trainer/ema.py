"""Exponential moving average of the trainable parameters, in float32.

At optimiser step s (0-based, before it is incremented) the decay is 0 while s < warmup, so the average is a copy until
then, and `decay` afterwards: shadow <- decay * shadow + (1 - decay) * parameter.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


class EMA:
    """The average of `model`'s parameters that require gradient when it is made.

    Args:
        decay: in [0, 1).
        warmup: optimiser steps during which the average is a copy.

    Shadows live where the parameters live (sharded ones stay sharded), in float32, or float64 where those are.
    """

    def __init__(self, model: nn.Module, decay: float = 0.999, warmup: int = 0) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay: got {decay}, expected 0 <= decay < 1")
        if warmup < 0:
            raise ValueError(f"warmup: got {warmup}, expected >= 0")
        self.decay, self.warmup = decay, warmup
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if not self._parameters:
            raise ValueError("model: got no parameter that requires gradient, expected at least one")
        self.shadow = {name: self._wide(p) for name, p in self._parameters.items()}

    @staticmethod
    def _wide(parameter: torch.Tensor) -> torch.Tensor:
        return parameter.detach().to(torch.promote_types(parameter.dtype, torch.float32), copy=True)

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Include the parameters as they are after optimiser step `step` (0-based)."""
        decay = 0.0 if step < self.warmup else self.decay
        for name, parameter in self._parameters.items():
            # lerp is exact at both ends, so a decay of 0 gives the very parameter.
            self.shadow[name].lerp_(parameter.detach().to(self.shadow[name].dtype), 1 - decay)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        """Write the average into the parameters of the same names, in their dtype."""
        parameters = dict(model.named_parameters())
        missing = sorted(set(self.shadow) - set(parameters))
        if missing:
            raise ValueError(f"model: lacks parameters {missing[:3]} ({len(missing)} in all) of the average")
        for name, shadow in self.shadow.items():
            parameters[name].copy_(shadow)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model has the averaged weights inside the block, its own again afterwards, bit for bit."""
        parameters = dict(model.named_parameters())
        backup = {name: parameters[name].detach().clone() for name in self.shadow if name in parameters}
        self.copy_to(model)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, value in backup.items():
                    parameters[name].copy_(value)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The shadows by parameter name, not copied."""
        return dict(self.shadow)

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Take over shadows; the names must be exactly those of the average."""
        if set(state) != set(self.shadow):
            differing = sorted(set(state) ^ set(self.shadow))
            raise ValueError(
                f"state: names differ from the trainable parameters: {differing[:3]} ({len(differing)} in all)"
            )
        for name, value in state.items():
            self.shadow[name].copy_(value)
