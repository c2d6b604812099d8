"""The metrics file of a run and its progress lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from ..files import whole_file


class MetricsFile:
    """One JSON object per line and logged step, on disk when `write` returns.

    Args:
        path: appended to; lines of steps from `step` on, and a half-written last line, are removed first, so that after
            a resume every step stands there once.
    """

    def __init__(self, path: Path, step: int = 0) -> None:
        self.path = path
        kept = [line for line in _complete_lines(path) if json.loads(line)["step"] < step]
        with whole_file(path) as partial:
            partial.write_text("".join(f"{line}\n" for line in kept))

    def write(self, values: Mapping[str, float | int | str]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(dict(values)) + "\n")
            file.flush()
            os.fsync(file.fileno())


class Progress:
    """Progress lines with the time that is left, from the mean pace since the start of this process.

    Args:
        first, total: steps done before, and in all.
    """

    def __init__(self, first: int, total: int, stream: TextIO) -> None:
        self.first, self.total, self.stream = first, total, stream
        self.start = time.perf_counter()

    def show(self, done: int, values: Mapping[str, float | int | str]) -> None:
        """Print a line after `done` steps."""
        pace = (time.perf_counter() - self.start) / (done - self.first)
        numbers = "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in values.items())
        left = duration(pace * (self.total - done))
        print(f"step {done}/{self.total}  {numbers}  {pace:.3g} s/step  {left} left", file=self.stream, flush=True)


def duration(seconds: float) -> str:
    """`2 h 05 min`, `3 min 10 s` or `8 s`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    return f"{whole // 60} min {whole % 60:02} s" if whole >= 60 else f"{whole} s"


def is_loss(key: str) -> bool:
    """Whether a metric is the value of a loss."""
    return key.endswith(("/loss", "/total", "/fake_score", "/gan_discriminator"))


def _complete_lines(path: Path) -> list[str]:
    if not path.exists():
        return []
    text = path.read_text()
    return [line for line in text[: text.rfind("\n") + 1].splitlines() if line]
