"""Parts of a pipeline that have a GPU by turns, where they do not fit on it together.

What a chunk needs (the transformer, and the decoder, which is small) has the device while chunks are made; an encoder
comes for one call, for which the others leave. Weights move as a whole: fetching them layer by layer would take longer
than denoising.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
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
        self.device, self._residents = device, residents
        self._settled = False
        self._guest: nn.Module | None = None

    def settle(self) -> None:
        """Bring the residents to the device, if they are not there."""
        if not self._settled:
            self._move(self.device)
            self._settled = True

    @contextmanager
    def lend(self, module: nn.Module) -> Iterator[None]:
        """The device is the module's for the block; the residents come back when they are needed. May be nested."""
        if self._guest is module:
            yield
            return
        if self._settled:
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)  # other streams may still read the weights
            self._settled = False
            self._move(torch.device("cpu"))
        self._guest = module
        try:
            module.to(self.device)
            yield
        finally:
            self._guest = None
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

    def turn(self) -> AbstractContextManager[None]:
        """Have the device for several calls."""
        return self._turns.lend(self.module)

    def forward(self, *inputs: Any) -> Tensor:
        with self.turn():
            return self.module(*inputs)
