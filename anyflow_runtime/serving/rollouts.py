"""Rollouts and their queue: one runs, the others wait in order and are told their place."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ..streaming import Change
from .errors import RequestError
from .limits import RolloutRequest

logger = logging.getLogger(__name__)

Message = dict[str, Any] | bytes


class Rollout:
    """A video that was asked for. `change` and `stop` may be called from any thread.

    Args:
        request: what to make.
        emit: takes messages for the browser, from any thread, and returns at once.
    """

    def __init__(self, request: RolloutRequest, emit: Callable[[Message], None]) -> None:
        self.request = request
        self.emit = emit
        self._lock = threading.Lock()
        self._change = Change()
        self._stop = threading.Event()

    @property
    def stopping(self) -> bool:
        """Whether it is to end after the chunk under way."""
        return self._stop.is_set()

    def stop(self) -> None:
        """End after the chunk under way."""
        self._stop.set()

    def change(self, change: Change) -> None:
        """Go on differently from the next chunk on; of several changes to one setting the last counts."""
        with self._lock:
            new = {name: value for name, value in vars(change).items() if value is not None}
            self._change = replace(self._change, **new)

    def take_change(self) -> Change:
        """What has changed since the last call."""
        with self._lock:
            change, self._change = self._change, Change()
        return change


class RolloutQueue:
    """Runs rollouts one at a time, in order, on a thread of its own.

    Args:
        run: makes the video of a rollout; what it raises is logged and told to the browser as an internal error.
        max_waiting: rollouts that may wait.
    """

    def __init__(self, run: Callable[[Rollout], None], max_waiting: int) -> None:
        self._run = run
        self._max_waiting = max_waiting
        self._ready = threading.Condition()
        self._waiting: deque[Rollout] = deque()
        self._running: Rollout | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="anyflow-rollouts")

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def submit(self, rollout: Rollout) -> None:
        """Append a rollout and tell it its place, 0 if it is the next.

        Raises:
            RequestError: if the queue is full or closed.
        """
        with self._ready:
            if self._closed:
                raise RequestError("the server is shutting down")
            if len(self._waiting) >= self._max_waiting + (self._running is None):
                raise RequestError(f"the queue is full, {len(self._waiting)} videos are waiting; try again later")
            self._waiting.append(rollout)
            rollout.emit({"type": "queued", "position": self._position(len(self._waiting) - 1)})
            self._ready.notify()

    def cancel(self, rollout: Rollout) -> bool:
        """Take a rollout out of the queue, or stop it if it runs already.

        Returns:
            True if it was still waiting: then nothing more is emitted for it.
        """
        rollout.stop()
        with self._ready:
            if rollout not in self._waiting:
                return False
            self._waiting.remove(rollout)
            self._tell_positions()
        return True

    def close(self) -> None:
        """Stop what runs after its chunk, turn away what waits, and end the thread."""
        with self._ready:
            self._closed = True
            for rollout in self._waiting:
                rollout.emit({"type": "error", "message": "the server is shutting down", "video": None})
            self._waiting.clear()
            if self._running is not None:
                self._running.stop()
            self._ready.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _position(self, index: int) -> int:
        """Rollouts that come before the one at `index`."""
        return index + (self._running is not None)

    def _tell_positions(self) -> None:
        for i, rollout in enumerate(self._waiting):
            rollout.emit({"type": "queued", "position": self._position(i)})

    def _work(self) -> None:
        while True:
            with self._ready:
                self._running = None
                self._ready.wait_for(lambda: self._waiting or self._closed)
                if self._closed:
                    return
                rollout = self._running = self._waiting.popleft()
                self._tell_positions()
            try:
                self._run(rollout)
            except Exception:
                # One video must not take the server down; its log has the traceback, the browser needs no more.
                logger.exception("a rollout failed")
                message = "internal error, the log of the server has the details"
                rollout.emit({"type": "error", "message": message, "video": None})
