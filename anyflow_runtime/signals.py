"""SIGTERM, which `docker stop`, schedulers and `timeout` send, ends work as Ctrl-C does: what is finished is kept."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Terminated(KeyboardInterrupt):
    """SIGTERM has come."""


@contextmanager
def handled(handler: Callable[[int, FrameType | None], Any], *numbers: int) -> Iterator[None]:
    """Signals go to `handler` within the block; only the main thread can say so, in another one nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)


@contextmanager
def terminable() -> Iterator[None]:
    """SIGTERM raises `Terminated` within the block."""

    def terminate(number: int, frame: FrameType | None) -> None:
        raise Terminated

    with handled(terminate, signal.SIGTERM):
        yield


class StopRequest:
    """A wish to stop at the next good moment, by SIGTERM or Ctrl-C; the second one does not wait."""

    def __init__(self, told: Callable[[], None]) -> None:
        self.error: type[KeyboardInterrupt] | None = None
        self._told = told

    @contextmanager
    def taken(self) -> Iterator[StopRequest]:
        """Signals are taken as wishes within the block."""
        with handled(self._take, signal.SIGTERM, signal.SIGINT):
            yield self

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self.error is not None:
            raise self.error
        self.error = Terminated if number == signal.SIGTERM else KeyboardInterrupt
        self._told()
