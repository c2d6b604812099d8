"""What was fastest on this card: the table that `anyflow tune` writes, as launches read it.

A file is read once per process and architecture; a launch then pays a look-up in a dictionary, with no file, no
synchronisation and nothing that a compiler or a CUDA graph would see. A table counts on the very card, versions and
kernels it was made with: any other is named in one warning and the rows of this package serve.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from .gpus import INTERPRETER, architecture

FORMAT = 1
VARIABLE = "ANYFLOW_TUNING"
Fields = Mapping[str, int | str | None]
Row = TypeVar("Row")
_IDENTITY = {"operation", "arch", "archs", "head_dim", "itemsize", "max_channels", "precision", "bound", "reason"}


class Key(NamedTuple):
    """What a choice is made for.

    size: channels per head of an attention, channels of a row, width of a matrix; 0 where none matters.
    shape: the class of shapes, such as "dense, long".
    """

    operation: str
    dtype: torch.dtype
    size: int = 0
    shape: str = ""

    def __str__(self) -> str:
        parts = (self.operation, str(self.dtype).removeprefix("torch."), str(self.size or ""), self.shape)
        return " ".join(filter(None, parts))


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which implementation serves (`way`), with which launch parameters of its row; `reason` for people."""

    way: str = "triton"
    fields: Fields
    reason: str = ""


_tables: dict[int, dict[Key, Choice]] = {}
_on_trial: set[Key] = set()


def choice_for(arch: int, key: Key) -> Choice | None:
    """What won on this machine, or None where nothing did: the defaults serve."""
    table = _tables.get(arch)
    if table is None:
        table = _tables[arch] = _load(arch)
    return table.get(key)


def tuned_row(default: Row, arch: int, key: Key) -> Row:
    """A row with the launch parameters that won, or itself."""
    choice = choice_for(arch, key)
    if choice is None:
        return default
    try:
        return replace(default, **choice.fields, reason=choice.reason)  # type: ignore[type-var]
    except TypeError as error:
        del _tables[arch][key]
        warnings.warn(f"tuning table, {key}: not used, it has unknown parameters ({error})", stacklevel=2)
        return default


def launch_fields(row: Any) -> dict[str, Any]:
    """The launch parameters of a row: all but what it is for, and why."""
    return {f.name: getattr(row, f.name) for f in fields(row) if f.name not in _IDENTITY}


@contextmanager
def forced(arch: int, choices: Mapping[Key, Choice]) -> Iterator[None]:
    """These choices in place of the table's: how a trial runs a candidate as a launch would."""
    before = {key: choice_for(arch, key) for key in choices}
    table = _tables[arch]
    table.update(choices)
    _on_trial.update(choices)
    try:
        yield
    finally:
        _on_trial.difference_update(choices)
        for key, choice in before.items():
            if choice is None:
                table.pop(key, None)
            else:
                table[key] = choice


def declined(key: Key, why: str) -> None:
    """A launch cannot take what won for its key, and a default serves.

    Raises:
        ValueError: in a trial, which would time that default under another's name.
    """
    if key in _on_trial:
        raise ValueError(f"{key}: {why}")


def forget_tables() -> None:
    """Read the files again at the next launch."""
    _tables.clear()


def table_path(card: str) -> Path | None:
    """The file of a card: that of ANYFLOW_TUNING, else one in the user's cache directory. None where the variable is
    empty, or the user has no home."""
    override = os.environ.get(VARIABLE)
    if override is not None:
        return Path(override) if override else None
    if sys.platform == "darwin":
        directory = Path("~/Library/Caches")
    elif sys.platform == "win32":
        directory = Path(os.environ.get("LOCALAPPDATA") or "~/AppData/Local")
    else:
        directory = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
    name = re.sub(r"[^a-z0-9]+", "_", card.lower()).strip("_")
    try:
        return directory.expanduser() / "anyflow" / f"tuning_{name}.json"
    except RuntimeError:
        return None


def machine(device: torch.device) -> dict[str, str]:
    """Card and versions: what a table is valid for. `kernels` is a digest of the sources of kernels and rows."""
    cuda = device.type == "cuda"
    capability = ".".join(map(str, torch.cuda.get_device_capability(device))) if cuda else "none"
    return {
        "card": _card(device),
        "capability": capability,
        "driver": _driver() if cuda else "none",
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda),
        "cudnn": str(torch.backends.cudnn.version()),
        "triton": _version("triton"),
        "anyflow-kernels": _version("anyflow-kernels"),
        "kernels": _digest(),
    }


def read_table(path: Path) -> dict[str, Any]:
    """The content of a table: `machine`, and `choices`, a list of what was found for each key.

    Raises:
        OSError, ValueError: if it cannot be read, or is no table.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"format: expected {FORMAT}")
    if not isinstance(content.get("machine"), dict) or not isinstance(content.get("choices"), list):
        raise ValueError("expected machine and choices")
    for entry in content["choices"]:
        key_of(entry), choice_of(entry)
    return content


def key_of(entry: dict[str, Any]) -> Key:
    """The key of an entry. Raises ValueError if it has none."""
    try:
        dtype = getattr(torch, entry["dtype"])
        key = Key(str(entry["operation"]), dtype, int(entry["size"]), str(entry["shape"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"an entry without a key ({type(error).__name__}: {error})") from error
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"dtype: got {entry['dtype']!r}, expected one of torch")
    return key


def choice_of(entry: dict[str, Any]) -> Choice | None:
    """The winner of an entry; None where no candidate passed. Raises ValueError if it is neither."""
    winner = entry.get("winner")
    if winner is None:
        return None
    values = winner.get("fields") if isinstance(winner, dict) else None
    if not isinstance(values, dict) or not all(isinstance(value, int | str | None) for value in values.values()):
        raise ValueError(f"{entry['operation']}: got winner {winner!r}, expected a way and its fields")
    return Choice(way=str(winner.get("way")), fields=values, reason=str(entry.get("reason", "")))


def _load(arch: int) -> dict[Key, Choice]:
    devices = _devices(arch)
    cards = {_card(device) for device in devices}
    paths = [path for card in sorted(cards) if (path := table_path(card)) is not None]
    try:
        paths = [path for path in paths if path.is_file()]
    except OSError as error:
        return _unused(paths[0], f"it cannot be read ({error})")
    if not paths:
        return {}
    if len(cards) > 1:
        return _unused(paths[0], f"{' and '.join(sorted(cards))} share launch parameters here")
    try:
        content = read_table(paths[0])
    except (OSError, ValueError) as error:
        return _unused(paths[0], f"it is no tuning table ({error})")
    here, there = machine(devices[0]), content["machine"]
    other = [f"{name} {there.get(name)}, here {value}" for name, value in here.items() if there.get(name) != value]
    if other:
        return _unused(paths[0], f"it was made for {'; '.join(other)}")
    found = ((key_of(entry), choice_of(entry)) for entry in content["choices"])
    return {key: choice for key, choice in found if choice is not None}


def _unused(path: Path, why: str) -> dict[Key, Choice]:
    warnings.warn(
        f"{path}: not used, {why}; the default launch parameters serve. `anyflow tune` makes it anew, "
        "`anyflow tune --clear` deletes it",
        stacklevel=2,
    )
    return {}


def _devices(arch: int) -> list[torch.device]:
    """Those that launch with the rows of an architecture."""
    if arch == INTERPRETER:
        return [torch.device("cpu")]
    devices = [torch.device("cuda", i) for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)]
    return [d for d in devices if torch.cuda.get_device_capability(d) >= (8, 0) and architecture(d) == arch]


def _card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"interpreter on {platform.machine()}"


def _driver() -> str:
    try:
        found = re.search(r"Module.*?\s(\d+(?:\.\d+)+)\s", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        found = None
    return found[1] if found else "unknown"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "unknown"


def _digest() -> str:
    digest = hashlib.sha256()
    for room in ("triton_ops", "launch_configs"):
        for path in sorted((Path(__file__).parents[1] / room).glob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]
