"""Device tables that launches read and a bounded cache owns: a CUDA graph has to keep those it was captured with."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

Table = TypeVar("Table")
_KEPT: ContextVar[list[Any] | None] = ContextVar("kept_launch_tables", default=None)


@contextmanager
def keep_tables() -> Iterator[list[Any]]:
    """The tables that launches inside the block read, in a list that fills up; whoever holds it keeps them."""
    tables: list[Any] = []
    token = _KEPT.set(tables)
    try:
        yield tables
    finally:
        _KEPT.reset(token)


def read_by_launch(table: Table) -> Table:
    """`table`, noted for `keep_tables`."""
    kept = _KEPT.get()
    if kept is not None:
        kept.append(table)
    return table
