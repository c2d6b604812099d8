"""Device tables that launches read and a bounded cache owns: a CUDA graph has to keep those it was captured with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

Arguments = ParamSpec("Arguments")
Table = TypeVar("Table")
_KEPT: ContextVar[list[Any] | None] = ContextVar("kept_launch_tables", default=None)


def to_device(table: Tensor, device: torch.device) -> Tensor:
    """A tensor on a device. From the host to CUDA by way of pinned memory: any other copy waits for the device.

    Raises:
        RuntimeError: while a CUDA graph is captured: its replays would copy from memory that has long been another's.
    """
    if table.device.type == "cpu" and device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("capture: got a table to copy to the device, expected all of them from the first run")
        return table.pin_memory().to(device, non_blocking=True)
    return table.to(device)


@contextmanager
def keep_tables() -> Iterator[list[Any]]:
    """The tables that launches inside the block read, in a list that fills up; whoever holds it keeps them."""
    tables: list[Any] = []
    token = _KEPT.set(tables)
    try:
        yield tables
    finally:
        _KEPT.reset(token)


def read_by_launches(make: Callable[Arguments, Table]) -> Callable[Arguments, Table]:
    """Decorator of a function, itself cached, whose tables launches read: `keep_tables` notes them."""

    @functools.wraps(make)
    def noted(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Table:
        table, kept = make(*args, **kwargs), _KEPT.get()
        if kept is not None:
            kept.append(table)
        return table

    return noted
