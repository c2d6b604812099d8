"""Parts of a pipeline that have a GPU by turns, where they do not fit on it together.

What a chunk needs (the transformer, and the decoder, which is small) has the device while chunks are made; an encoder
comes for one call, for which the others leave. Weights move as a whole: fetching them layer by layer would take longer
than denoising.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Turns:
    """Who has the device.

    Args:
        device: of the work; whoever has no turn lies on the CPU.
        residents: the modules that have it while chunks are made.
    """

    def __init__(self, device: torch.device, residents: Sequence[nn.Module]) -> None:
        self.device, self._residents, self._settled = device, residents, False

    def settle(self) -> None:
        """Bring the residents to the device, if they are not there."""
        if not self._settled:
            self._move(self.device)
            self._settled = True

    @contextmanager
    def lend(self, module: nn.Module) -> Iterator[torch.device]:
        """The device is the module's for the block; the residents come back when they are needed."""
        if self._settled:
            self._move(torch.device("cpu"))
            self._settled = False
        module.to(self.device)
        try:
            yield self.device
        finally:
            module.to("cpu")

    def _move(self, device: torch.device) -> None:
        for module in self._residents:
            module.to(device)


class OnTurn(nn.Module):
    """A one-shot encoder that has the device for each of its calls."""

    def __init__(self, module: nn.Module, turns: Turns) -> None:
        super().__init__()
        self.module = module
        self._turns = turns

    def forward(self, *inputs: Any) -> Tensor:
        with self._turns.lend(self.module):
            return self.module(*inputs)
