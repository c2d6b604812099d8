"""FastGen's key layouts.

Both move the delta embedder: `condition_embedder.delta_embedder.X` <-> `r_embedder.time_embedder.X`, behind an
optional prefix `transformer.`. The first posted one ("fastgen_old") also keeps copies `r_embedder.time_proj.*` of the
shared projection. After gated training there the copy is the live one, the original got no gradient.
Source: FastGen's AnyFlow pull request (no. 25), key remapping.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch

from .renames import Report, Rule, State, rename_all

PREFIX = "transformer."
DELTA = "condition_embedder.delta_embedder."
SHARED_PROJ = "condition_embedder.time_proj."
R_PROJ = "r_embedder.time_proj."

TO_FASTGEN = (Rule(r"((?:transformer\.)?)condition_embedder\.delta_embedder\.(.+)", r"\1r_embedder.time_embedder.\2"),)
FROM_FASTGEN = (
    Rule(r"((?:transformer\.)?)r_embedder\.time_embedder\.(.+)", r"\1condition_embedder.delta_embedder.\2"),
)


def to_fastgen(state: State, old: bool = False) -> tuple[State, Report]:
    """FastGen's layout of a diffusers state dict, prefix kept as it is.

    Args:
        old: also add the copies of `time_proj` (clones, so that training one cannot move the other).

    Returns: the *same object* if there is no delta embedder to rename, else a new dict of the same tensors.

    Raises:
        ValueError: if keys of both layouts are present.
    """
    if not _has(state, DELTA):
        return state, Report()
    _refuse_both(state)
    renamed, report = rename_all(state, TO_FASTGEN)
    if old:
        copies = [key for key in renamed if _bare(key).startswith(SHARED_PROJ)]
        if not copies:
            raise ValueError(f"state: got no {SHARED_PROJ}*, expected it beside {DELTA}*")
        for key in copies:
            copy = key.replace(SHARED_PROJ, R_PROJ)
            renamed[copy] = renamed[key].clone()
            report.added.append(copy)
    return renamed, report


def from_fastgen(state: State) -> tuple[State, Report]:
    """The diffusers layout of either FastGen layout, prefix kept as it is.

    Copies of `time_proj` are dropped if equal. If they differ, gated training has moved the copy alone: it is taken as
    the shared projection, with a warning.

    Returns: the *same object* if there is no FastGen key, else a new dict.

    Raises:
        ValueError: if keys of both layouts are present.
    """
    if not _has(state, "r_embedder."):
        return state, Report()
    _refuse_both(state)
    renamed, report = rename_all(state, FROM_FASTGEN)
    for key in [k for k in renamed if _bare(k).startswith(R_PROJ)]:
        live, shared = renamed.pop(key), key.replace(R_PROJ, SHARED_PROJ)
        report.dropped.append(key)
        if shared not in renamed:
            raise ValueError(f"state: got {key!r} without {shared!r}, expected both")
        if not _equal(live, renamed[shared]):
            note = f"{key} differs from {shared}: taken as the shared projection (the other got no gradient there)"
            warnings.warn(note, stacklevel=2)
            renamed[shared] = live
            report.notes.append(note)
    return renamed, report


def _refuse_both(state: State) -> None:
    if _has(state, DELTA) and _has(state, "r_embedder."):
        raise ValueError(f"state: got both {DELTA}* and r_embedder.*, expected the keys of one layout")


def _bare(key: str) -> str:
    return key.removeprefix(PREFIX)


def _has(state: State, start: str) -> bool:
    return any(_bare(key).startswith(start) for key in state)


def _equal(a: Any, b: Any) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and torch.equal(a, b)
