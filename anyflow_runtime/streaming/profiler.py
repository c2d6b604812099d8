"""Time per stage of a chunk: CUDA events on a GPU, the wall clock elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

STAGES = ("encode", "diffuse", "decode", "finalize")
GIB = 2**30


class EventProfiler:
    """Times the stages of one chunk; stages that did not run count 0.

    Args:
        device: of the work. On CUDA marks are events in the current stream, and only `summary` waits for them.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._cuda = device.type == "cuda"
        self._spans: dict[str, tuple[torch.cuda.Event, torch.cuda.Event] | tuple[float, float]] = {}

    def reset(self) -> None:
        """Forget all stages: a new chunk begins."""
        self._spans = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the block; a stage entered again, after a failure, is timed anew."""
        if self._cuda:
            stream = torch.cuda.current_stream(self.device)
            events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            events[0].record(stream)
            yield
            events[1].record(stream)
            self._spans[name] = events
        else:
            start = time.perf_counter()
            yield
            self._spans[name] = (start, time.perf_counter())

    def summary(self) -> dict[str, float]:
        """`<stage>_ms` of all four stages, `total_ms`, `total_ms_wo_finalize` (sums of the stages), on CUDA also
        `mem_alloc_gib`, `mem_reserved_gib` and `mem_peak_gib` (of the process).
        """
        if self._cuda:
            torch.cuda.synchronize(self.device)
        stats = {f"{name}_ms": self._milliseconds(name) for name in STAGES}
        total = sum(stats.values())
        stats |= {"total_ms": total, "total_ms_wo_finalize": total - stats["finalize_ms"]}
        if self._cuda:
            stats["mem_alloc_gib"] = torch.cuda.memory_allocated(self.device) / GIB
            stats["mem_reserved_gib"] = torch.cuda.memory_reserved(self.device) / GIB
            stats["mem_peak_gib"] = torch.cuda.max_memory_allocated(self.device) / GIB
        return stats

    def _milliseconds(self, name: str) -> float:
        if name not in self._spans:
            return 0.0
        start, end = self._spans[name]
        if isinstance(start, float) and isinstance(end, float):
            return (end - start) * 1e3
        return start.elapsed_time(end)  # type: ignore[union-attr, arg-type]
