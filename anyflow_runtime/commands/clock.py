"""Seconds of each part of a command's work, and the most memory it took."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Clock:
    """Adds up wall seconds per part, in the order the parts first ran. On CUDA a part ends when its kernels have, those
    of the current stream; with `wait=False`, for what the host does beside them, when the host is done.

    Attributes:
        seconds: by part.
    """

    def __init__(self, device: torch.device) -> None:
        self.seconds: dict[str, float] = {}
        self._device = device
        self._begin = time.perf_counter()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)

    @contextmanager
    def __call__(self, part: str, wait: bool = True) -> Iterator[None]:
        start = self.now(wait)
        try:
            yield
        finally:
            self.add(part, self.now(wait) - start)

    def add(self, part: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self.seconds[part] = self.seconds.get(part, 0.0) + seconds

    def now(self, wait: bool = True) -> float:
        """A time in seconds; with `wait` one at which all work issued to the current CUDA stream is done."""
        if wait and self._device.type == "cuda":
            torch.cuda.current_stream(self._device).synchronize()
        return time.perf_counter()

    def elapsed(self) -> float:
        """Seconds since the clock was made; less than the sum of parts that ran side by side."""
        return self.now() - self._begin

    def peak_memory(self) -> dict[str, int]:
        """Bytes: `process` resident at its peak, where the system tells, and on CUDA `device` allocated at its peak."""
        peak = {}
        if sys.platform != "win32":
            import resource

            resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            peak["process"] = resident if sys.platform == "darwin" else resident * 1024  # Linux counts in KiB
        if self._device.type == "cuda":
            peak["device"] = torch.cuda.max_memory_allocated(self._device)
        return peak
