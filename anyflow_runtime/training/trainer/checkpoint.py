"""Checkpoints of a training run: a directory per step that exists either completely or not at all.

Every process writes its part into a hidden directory, which is flushed to the disk and then renamed; older checkpoints
go only after that. Whatever kills the run, the last renamed one is whole.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..distributed import barrier

PREFIX = "step-"


def step_directories(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the complete checkpoints, oldest first."""
    found = [(path.name.removeprefix(PREFIX), path) for path in root.glob(f"{PREFIX}*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def save_checkpoint(root: Path, step: int, content: dict[str, Any], keep: int) -> Path:
    """Write this process's part of the checkpoint after `step` steps, unless it is there; a collective.

    Args:
        content: tensors and plain values.
        keep: how many of the newest checkpoints stay, this one included.
    """
    final, partial = root / f"{PREFIX}{step:08}", root / f".{PREFIX}{step:08}.partial"
    if final.exists():
        return final
    if distributed.rank() == 0:
        _remove_leftovers(root)
        partial.mkdir(parents=True)
    barrier()
    path = partial / part_name(distributed.rank())
    with path.open("wb") as file:
        torch.save(content, file)
        file.flush()
        os.fsync(file.fileno())
    barrier()
    if distributed.rank() == 0:
        sync_directory(partial)
        partial.rename(final)
        sync_directory(root)
        for _, old in step_directories(root)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def load_checkpoint(root: Path) -> dict[str, Any] | None:
    """This process's part of the newest checkpoint, on the CPU; None if there is no checkpoint.

    Raises:
        ValueError: if it was written by another number of processes.
    """
    found = step_directories(root)
    if not found:
        return None
    directory = found[-1][1]
    parts, world = len(list(directory.glob("rank-*.pt"))), distributed.world_size()
    if parts != world:
        raise ValueError(f"{directory}: was written by {parts} processes, expected as many as now, {world}")
    return torch.load(directory / part_name(distributed.rank()), map_location="cpu", weights_only=True)


def part_name(rank: int) -> str:
    """File of a process's part."""
    return f"rank-{rank:05}.pt"


def sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove_leftovers(root: Path) -> None:
    """What a killed run has left half written."""
    for partial in root.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(partial)
