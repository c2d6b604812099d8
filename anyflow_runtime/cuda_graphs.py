"""Denoising steps as CUDA graphs: a step launches several hundred kernels, a replay is one launch.

The graphs of a rollout live in its `FarCache`, whose slabs keep their addresses, and die with it. A step of one key
runs eagerly the first time (kernels compile, libraries take their workspaces), is captured the second time and
replayed from then on; a failed capture leaves nothing behind. Inputs are copied into buffers that the graph reads,
the result is copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Step = Callable[..., Tensor]
Replay = Callable[[], None]
Capture = Callable[[Step, tuple[Tensor, ...], Any], tuple[Replay, Tensor]]


@dataclass
class _Captured:
    step: Step  # keeps alive what the graph reads besides its inputs
    inputs: tuple[Tensor, ...]
    replay: Replay
    output: Tensor


def capture_cuda(step: Step, inputs: tuple[Tensor, ...], pool: Any) -> tuple[Replay, Tensor]:
    """Record `step(*inputs)`; returns what replays it and the tensor each replay writes."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool):
        output = step(*inputs)
    return graph.replay, output


class StepGraphs:
    """Captured steps by key, the latest few: a chunk that is finished is not denoised again, and its key holds its
    prompt.

    Args:
        capture: how to record a step; `capture_cuda` but in tests.

    Attributes:
        captures, replays: counts, for reports and tests.
    """

    KEPT = 4

    def __init__(self, capture: Capture = capture_cuda) -> None:
        self._capture = capture
        self._captured: dict[Hashable, _Captured | None] = {}  # oldest first; None where a step has run eagerly only
        self._pool: Any = None
        self.captures = 0
        self.replays = 0

    def run(self, key: Hashable, step: Step, *inputs: Tensor) -> Tensor:
        """`step(*inputs)`, replayed if this key was captured.

        Args:
            key: everything the step depends on besides the values of `inputs`: shapes, addresses, prompt.
            step: reads no other tensor that changes; makes no synchronisation.

        Returns:
            A tensor of its own: the next replay does not change it.
        """
        signature = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        captured = self._captured.get(signature)
        if captured is None:
            if signature not in self._captured:
                self._captured[signature] = None
                while len(self._captured) > self.KEPT:
                    del self._captured[next(iter(self._captured))]
                return step(*inputs)
            if self._pool is None and self._capture is capture_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            buffers = tuple(x.clone() for x in inputs)
            replay, output = self._capture(step, buffers, self._pool)
            captured = self._captured[signature] = _Captured(step, buffers, replay, output)
            self.captures += 1
        for buffer, value in zip(captured.inputs, inputs, strict=True):
            buffer.copy_(value)
        captured.replay()
        self.replays += 1
        return captured.output.clone()
