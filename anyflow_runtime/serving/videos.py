"""Finished videos, kept in a private temporary directory until newer ones take their place."""

from __future__ import annotations

import secrets
import tempfile
import threading
from pathlib import Path


class VideoStore:
    """Files under names made here. A browser only ever gives a token, which is looked up and never part of a path.

    Args:
        keep: how many finished videos; the oldest goes first.
    """

    def __init__(self, keep: int = 16) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="anyflow-serve-")
        self._keep = keep
        self._lock = threading.Lock()
        self._finished: dict[str, Path] = {}
        self._count = 0

    def new_path(self) -> Path:
        """Where to write the next video."""
        with self._lock:
            self._count += 1
            return Path(self._directory.name) / f"{self._count}.mp4"

    def add(self, path: Path) -> str:
        """Offer a finished file for download: its token, which cannot be guessed."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._finished[token] = path
            while len(self._finished) > self._keep:
                self._finished.pop(next(iter(self._finished))).unlink(missing_ok=True)
        return token

    def get(self, token: str) -> Path | None:
        """The file of a token, if there is one."""
        with self._lock:
            return self._finished.get(token)

    def close(self) -> None:
        """Delete all of them."""
        with self._lock:
            self._finished.clear()
        self._directory.cleanup()
