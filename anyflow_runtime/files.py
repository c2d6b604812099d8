"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """A path beside `path` to write to, of the same suffix; it takes the name when the block ends without an error.

    The bytes are on the disk before the name is: whatever kills the process, a file of that name is complete. Several
    processes may write the same file; the last one stays.
    """
    final = Path(path)
    partial = final.with_name(f".{final.stem}.{os.getpid()}.partial{final.suffix}")
    try:
        yield partial
        with partial.open("rb+") as written:
            os.fsync(written.fileno())
        partial.replace(final)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], **options: Any) -> None:
    """`content` as JSON in a file that is whole; `options` are those of `json.dumps`, by default `indent=2`."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, **{"indent": 2, **options}) + "\n")
