"""Checkpoints of a training run: a directory per step that exists either completely or not at all.

Tensors are written by `torch.distributed.checkpoint`, each process its part, so that a run can go on on another number
of processes. All goes into a hidden directory, which is flushed to the disk and then renamed; older checkpoints go only
after that. Whatever kills the run, the last renamed one is whole.
"""

from __future__ import annotations

import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import Tensor

from ...files import read_json, write_json
from .. import distributed
from ..distributed import barrier

PREFIX = "step-"
RUN = "run.json"  # what of a checkpoint is no tensor


def step_directories(root: Path) -> list[tuple[int, Path]]:
    """(step, directory) of the complete checkpoints, oldest first."""
    found = [(path.name.removeprefix(PREFIX), path) for path in root.glob(f"{PREFIX}*")]
    return sorted((int(step), path) for step, path in found if step.isdecimal())


def save_checkpoint(root: Path, step: int, run: Mapping[str, Any], tensors: Mapping[str, Tensor], keep: int) -> Path:
    """Write the checkpoint after `step` steps, unless it is there; a collective.

    Args:
        run: plain values, of the first process.
        tensors: by name, sharded ones as DTensors; whole ones are equal on every process, and written once.
        keep: how many of the newest checkpoints stay, this one included.
    """
    final, partial = root / f"{PREFIX}{step:08}", root / f".{PREFIX}{step:08}.partial"
    if final.exists():
        return final
    if distributed.rank() == 0:
        _remove_leftovers(root)
        partial.mkdir(parents=True)
        write_json(partial / RUN, dict(run))
    barrier()
    if tensors:
        with _quiet():
            dcp.save(dict(tensors), checkpoint_id=partial, no_dist=distributed.world_size() == 1)
    barrier()
    if distributed.rank() == 0:
        sync_directory(partial)
        partial.rename(final)
        sync_directory(root)
        for _, old in step_directories(root)[:-keep]:
            shutil.rmtree(old)
    barrier()
    return final


def latest_checkpoint(root: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint's directory, and its plain values; None if there is none.

    Raises:
        FileNotFoundError: if it has another form.
    """
    found = step_directories(root)
    if not found:
        return None
    return found[-1][1], read_json("checkpoint", found[-1][1] / RUN, "a checkpoint of this version")


def tensor_names(directory: Path) -> set[str]:
    """The names of a checkpoint's tensors."""
    return set(dcp.FileSystemReader(directory).read_metadata().state_dict_metadata)


def load_tensors(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a checkpoint's values into tensors of the same names, sharded as they are now; a collective."""
    with _quiet():
        dcp.load(dict(tensors), checkpoint_id=directory, no_dist=distributed.world_size() == 1)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that one process writes alone, which is meant."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is")
        yield


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
