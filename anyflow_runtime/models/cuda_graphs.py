"""Denoising steps as CUDA graphs: a step launches several hundred kernels, a replay is one launch.

The graphs live beside the memory they read (`workspaces`). A step of one key runs eagerly the first time (kernels
compile, libraries take their workspaces), is captured the second time and replayed from then on, in later rollouts
too; a failed capture leaves nothing behind. Inputs are copied into buffers of the graph, the result is copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels.launch_tables import keep_tables

Step = Callable[..., Tensor]
Replay = Callable[[], None]
Capture = Callable[[Step, tuple[Tensor, ...], Any], tuple[Replay, Tensor]]


@dataclass
class _Captured:
    inputs: tuple[Tensor, ...]
    replay: Replay
    output: Tensor
    reads: Any  # what the graph reads besides its inputs, kept alive; not the step, which knows its model


def capture_cuda(step: Step, inputs: tuple[Tensor, ...], pool: Any) -> tuple[Replay, Tensor]:
    """Record `step(*inputs)`; returns what replays it and the tensor each replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = step(*inputs)
    return graph.replay, output


class StepGraphs:
    """Captured steps by key, those used last: an endless video meets a new key per chunk.

    Args:
        capture: how to record a step; `capture_cuda` but in tests.

    Attributes:
        captures, replays: counts, for reports and tests.
    """

    KEPT = 16  # the chunks of a long video

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or capture_cuda
        self._captured: dict[Hashable, _Captured | None] = {}  # by last use; None where a step has run eagerly only
        self._pool: Any = None
        self.captures = 0
        self.replays = 0

    def run(self, key: Hashable, step: Step, *inputs: Tensor, reads: Any = None) -> Tensor:
        """`step(*inputs)`, replayed if this key was captured.

        Args:
            key: what the step depends on besides the values of its inputs and of what it reads: shapes, addresses.
            step: makes no synchronisation.
            reads: tensors, or what holds them, that the step reads at addresses that stay.

        Returns:
            A tensor of its own: the next replay does not change it.
        """
        signature = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        known = signature in self._captured
        captured = self._captured.pop(signature, None)
        if not known:
            self._captured[signature] = None
            while len(self._captured) > self.KEPT:
                del self._captured[next(iter(self._captured))]
            return step(*inputs)
        self._captured[signature] = captured
        if captured is None:
            if self._pool is None and inputs[0].is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            buffers = tuple(x.clone() for x in inputs)
            with keep_tables() as tables:
                replay, output = self._capture(step, buffers, self._pool)
            captured = self._captured[signature] = _Captured(buffers, replay, output, (reads, tables))
            self.captures += 1
        for buffer, value in zip(captured.inputs, inputs, strict=True):
            buffer.copy_(value)
        captured.replay()
        self.replays += 1
        return captured.output.clone()

    def __len__(self) -> int:
        """Steps known: captured, or run once."""
        return len(self._captured)

    def clear(self) -> None:
        """Forget every captured step."""
        self._captured.clear()
