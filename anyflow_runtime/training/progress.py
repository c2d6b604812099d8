"""The metrics of a run: its file, trackers, and progress lines."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from ..files import whole_file
from ..optional import optional


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


class Trackers:
    """The metrics in TensorBoard, W&B, trackio and what else accelerate has a tracker for; close it at the end.

    Args:
        names: those of accelerate.
        run: name of the run.
        directory: of those that write files.
        config: what the run is, as plain data.
    Raises:
        ValueError: for a name that accelerate does not have.
        ImportError: for a tracker that is not installed.
    """

    def __init__(self, names: Sequence[str], run: str, directory: Path, config: Mapping[str, Any]) -> None:
        self._trackers: list[Any] = []
        if not names:
            return
        tracking = optional("accelerate.tracking", "a tracker", "diffusers")
        for name in names:
            kind = tracking.LOGGER_TYPE_TO_CLASS.get(name)
            if kind is None:
                known = ", ".join(sorted(tracking.LOGGER_TYPE_TO_CLASS))
                raise ValueError(f"trackers: got {name!r}, expected some of {known}")
            try:
                tracker = kind(run, *([directory] if kind.requires_logging_directory else []))
                tracker.start()
            except ImportError as error:
                raise ImportError(f"the tracker {name} is not installed: pip install {name} ({error})") from error
            tracker.store_init_configuration(_flat(config))
            self._trackers.append(tracker)

    def log(self, step: int, values: Mapping[str, float | int | str]) -> None:
        """The metrics after a step."""
        for tracker in self._trackers:
            tracker.log(dict(values), step=step)

    def close(self) -> None:
        """Write out what is left."""
        for tracker in self._trackers:
            tracker.finish()


def _flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str | float | int | bool]:
    """Nested settings under dotted names, as trackers take them."""
    flat: dict[str, str | float | int | bool] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (str, float, int, bool)) else str(value)
    return flat


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
