"""Files that appear whole or not at all, and JSON objects read with errors that name the file."""

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
    except OSError as error:
        if error.errno is not None and error.filename is None:  # that of a write to a full disk names no file
            error.filename = str(final)
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any], **options: Any) -> None:
    """`content` as JSON in a file that is whole; `options` are those of `json.dumps`, by default `indent=2`."""
    with whole_file(path) as partial:
        partial.write_text(json.dumps(content, **{"indent": 2, **options}) + "\n")


def read_json(name: str, path: Path, expected: str) -> dict[str, Any]:
    """The JSON object in a file.

    Args:
        name: of the argument that led to it, for messages.
        expected: what the file is.
    Raises:
        FileNotFoundError, ValueError: if it is not there, or holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no {path.name} in {path.parent}, expected {expected}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{name}: {path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {path}: got a JSON {type(content).__name__}, expected an object")
    return content
