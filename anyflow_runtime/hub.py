"""Models by the name of their repository on the Hugging Face Hub: what a download takes is said before it begins."""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from .optional import optional

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CARD = "README.md"


def model_files(name: str | os.PathLike[str], patterns: Sequence[str] | None = None) -> Path:
    """The directory of that name, or the local snapshot of the hub repository, downloaded where it is not complete.

    Without a network, or with HF_HUB_OFFLINE=1, what the hub's cache holds is taken as it is.

    Args:
        name: a directory, or a hub id ("owner/name").
        patterns: of the files that are needed, such as "transformer/*"; None: all. The model card always comes along.
    Raises:
        FileNotFoundError: if it is neither, or cannot be had.
        OSError: if the disk has no room for it.
        ImportError: if huggingface_hub is missing.
    """
    directory = Path(name)
    text = os.fspath(name)
    if directory.is_dir():
        return directory
    if not _HUB_ID.fullmatch(text) or text.startswith("."):
        raise FileNotFoundError(f"no directory {directory}, and {text!r} is no name on the hub (owner/name)")
    hub = optional("huggingface_hub", f"{text}, which is no directory here but may be a model on the hub,", "hub")
    for part in ("constants", "errors"):  # attributes of the package only once somebody has imported them
        importlib.import_module(f"huggingface_hub.{part}")
    wanted = None if patterns is None else [*patterns, _CARD]
    try:
        info = None if hub.constants.HF_HUB_OFFLINE else hub.HfApi().model_info(text, files_metadata=True)
    except hub.errors.HfHubHTTPError as error:  # unknown, gated or private: the cache is no answer
        raise FileNotFoundError(f"{text} is no directory here, and the hub refuses it: {error}") from error
    except Exception:  # no network: requests, httpx and urllib each have their own errors
        info = None
    try:
        if info is None:
            return Path(hub.snapshot_download(text, allow_patterns=wanted, local_files_only=True))
        _announce(hub, text, info, wanted)
        return Path(hub.snapshot_download(text, revision=info.sha, allow_patterns=wanted))
    except OSError as error:
        if error.errno is not None:
            raise
        raise FileNotFoundError(f"{text} is no directory here, and cannot be had from the hub: {error}") from error
    except Exception as error:  # the hub raises a dozen unrelated classes: offline, interrupted, proxy
        raise FileNotFoundError(f"{text} is no directory here, and cannot be had from the hub: {error}") from error


def licence(directory: Path) -> str | None:
    """What the model card in a directory says of its licence; None if there is no card or it says nothing."""
    card = directory / _CARD
    if not card.is_file():
        return None
    header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    entries = dict(re.findall(r"^(license\w*):\s*(\S.*?)\s*$", header[1] if header else "", re.MULTILINE))
    name = entries.get("license_name") or entries.get("license")
    if name is None:
        return None
    return f"{name} ({entries['license_link']})" if "license_link" in entries else name


def _announce(hub: Any, name: str, info: Any, wanted: Sequence[str] | None) -> None:
    """Say how large the missing part is, where it goes and under which licence; refuse what does not fit."""
    files = [f for f in info.siblings if wanted is None or any(fnmatch(f.rfilename, pattern) for pattern in wanted)]
    missing = sum(
        f.size or 0
        for f in files
        if not isinstance(hub.try_to_load_from_cache(name, f.rfilename, revision=info.sha), str)
    )
    if not missing:
        return
    cache = Path(hub.constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(path for path in (cache, *cache.parents) if path.exists())).free
    size = f"{missing / 1e9:.1f} GB"
    if missing > free:
        raise OSError(
            errno.ENOSPC, f"{name} takes {size}, and {cache} has {free / 1e9:.1f} GB free (HF_HOME names another disk)"
        )
    card = info.card_data
    terms = None if card is None else card.get("license_name") or card.get("license")
    print(
        f"{name}: downloading {size} to {cache}, which has {free / 1e9:.1f} GB free; licence: {terms or 'not stated'}, "
        f"see https://huggingface.co/{name}",
        file=sys.stderr,
        flush=True,
    )
