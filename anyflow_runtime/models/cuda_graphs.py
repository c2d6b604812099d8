"""Denoising steps and prefills as CUDA graphs: a step launches several hundred kernels, a replay is one launch.

The graphs live beside the memory they read (`workspaces`). A step of one key runs eagerly the first time (kernels
compile, libraries take their workspaces), is captured the second time and replayed from then on, in later rollouts
too; a failed capture leaves nothing behind. Inputs are copied into buffers of the graph, the result is copied out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels.launch_tables import keep_tables

Step = Callable[..., Tensor | None]
Replay = Callable[[], None]
Capture = Callable[[Step, tuple[Tensor, ...], Any], tuple[Replay, Tensor | None]]


@dataclass
class _Known:
    """A step that has run: its input buffers and, once it is captured, how to replay it."""

    inputs: tuple[Tensor, ...]
    replay: Replay | None = None
    output: Tensor | None = None
    reads: Any = None  # what the graph reads besides its inputs, kept alive; not the step, which knows its model


def capture_cuda(step: Step, inputs: tuple[Tensor, ...], pool: Any) -> tuple[Replay, Tensor | None]:
    """Record `step(*inputs)`; returns what replays it and the tensor each replay writes.

    Unlike `torch.cuda.graph` it neither waits for the device nor gives all cached memory back to the driver, but where
    memory runs out; and other threads may go on using CUDA.
    """
    try:
        return _record(step, inputs, pool)
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()  # a capture cannot take what the allocator has cached outside its pool
        return _record(step, inputs, pool)


def _record(step: Step, inputs: tuple[Tensor, ...], pool: Any) -> tuple[Replay, Tensor | None]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(_capture_stream(inputs[0].device)):
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            output = step(*inputs)
        finally:
            graph.capture_end()
    return graph.replay, output


@cache
def _capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The default stream cannot be captured; a single other one, because cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


class StepGraphs:
    """Captured steps by key, those used last: an endless video meets new keys with every chunk.

    Args:
        capture: how to record a step; `capture_cuda` but in tests.

    Attributes:
        captures, replays: counts, for reports and tests.
    """

    KEPT = 32  # the chunks of a long video, denoised and made context

    def __init__(self, capture: Capture | None = None) -> None:
        self._capture = capture or capture_cuda
        self._known: dict[Hashable, _Known] = {}  # by last use
        self._pool: Any = None
        self.captures = 0
        self.replays = 0

    def run(self, key: Hashable, step: Step, *inputs: Tensor, reads: Any = None) -> Any:
        """`step(*inputs)`, replayed if this key was captured.

        Args:
            key: what the step depends on besides the values of its inputs and of what it reads: shapes, addresses.
            step: makes no synchronisation; gives a tensor, or None for what it writes elsewhere.
            reads: tensors, or what holds them, that the step reads at addresses that stay.

        Returns:
            What the step gives, as a tensor of its own: the next replay does not change it.
        """
        signature = (key, *((x.shape, x.dtype, x.device) for x in inputs))
        known = self._known.pop(signature, None)
        if known is None:
            # Through the buffers from the first: a kernel compiled for them is what the capture will find.
            buffers = tuple(x.clone(memory_format=torch.contiguous_format) for x in inputs)
            output = step(*buffers)
            self._known[signature] = _Known(buffers)
            while len(self._known) > self.KEPT:
                del self._known[next(iter(self._known))]
            return output
        self._known[signature] = known
        for buffer, value in zip(known.inputs, inputs, strict=True):
            buffer.copy_(value)
        if known.replay is None:
            if self._pool is None and inputs[0].is_cuda:
                self._pool = torch.cuda.graph_pool_handle()
            with keep_tables() as tables:
                replay, known.output = self._capture(step, known.inputs, self._pool)
            known.replay, known.reads = replay, (reads, tables)
            self.captures += 1
        known.replay()
        self.replays += 1
        return None if known.output is None else known.output.clone()

    def __len__(self) -> int:
        """Steps known: captured, or run once."""
        return len(self._known)

    def clear(self) -> None:
        """Forget every captured step."""
        self._known.clear()
