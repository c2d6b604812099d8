"""The GPUs that have launch rows: their limits, and which of them stands for a device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import torch

__all__ = ["ARCHITECTURES", "GPUS", "INTERPRETER", "Gpu", "architecture", "emulate", "pdl", "rows_for"]

INTERPRETER = 0  # the rows for TRITON_INTERPRET=1


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """What the chip has, per multiprocessor but for `shared_bytes`: the most that one block may ask for."""

    arch: int
    name: str
    multiprocessors: int
    shared_bytes: int
    shared_per_multiprocessor: int
    blocks: int = 32
    registers: int = 65536
    threads: int = 2048


def _gpu(arch: int, name: str, multiprocessors: int, shared_kib: int, **limits: int) -> Gpu:
    """The system takes 1 KiB of shared memory per block."""
    shared = {"shared_bytes": (shared_kib - 1) * 1024, "shared_per_multiprocessor": shared_kib * 1024}
    return Gpu(arch=arch, name=name, multiprocessors=multiprocessors, **shared, **limits)


# CUDA C++ programming guide, "Compute capabilities". Matrix products: mma.sync on 80, 86, 89 and 120, wgmma on 90,
# tcgen05 on 100. TMA from 90 on.
GPUS = {
    80: _gpu(80, "A100", multiprocessors=108, shared_kib=164),
    86: _gpu(86, "A40, RTX 3090", multiprocessors=84, shared_kib=100, threads=1536, blocks=16),
    89: _gpu(89, "L40S, RTX 4090", multiprocessors=142, shared_kib=100, threads=1536, blocks=24),
    90: _gpu(90, "H100, H200", multiprocessors=132, shared_kib=228),
    100: _gpu(100, "B200", multiprocessors=148, shared_kib=228),
    120: _gpu(120, "RTX PRO 6000, RTX 5090", multiprocessors=188, shared_kib=100, threads=1536, blocks=24),
}
ARCHITECTURES = tuple(GPUS)
# Chips with the instructions and at least the shared memory of another: they take its rows.
_SAME_ROWS = {(8, 7): 80, (10, 3): 100, (11, 0): 100, (12, 1): 120}


class _Row(Protocol):
    @property
    def arch(self) -> int: ...

    @property
    def reason(self) -> str: ...


Row = TypeVar("Row", bound=_Row)


_serves_cpu = INTERPRETER


def emulate(arch: int) -> None:
    """From now on the rows of a GPU serve CPU tensors: its kernels run in `emulator/`.

    Raises:
        ValueError: if the GPU has no rows.
    """
    global _serves_cpu
    if arch not in GPUS:
        raise ValueError(f"arch: got {arch}, expected one of {ARCHITECTURES}")
    _serves_cpu = arch


def architecture(device: torch.device | str) -> int:
    """The architecture whose rows serve a device: on a CPU 0 for the interpreter, or that of `emulate`.

    A chip without rows, and not known to be like one that has them, takes those of the newest architecture that is
    not newer than it, and a warning says so.

    Raises:
        RuntimeError: on a GPU older than 8.0, and on AMD's.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return _serves_cpu
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_architecture(index: int) -> int:
    if torch.version.hip:  # reports a capability as well: an MI300 is 9.4
        raise RuntimeError(
            f"device: got an AMD GPU (ROCm {torch.version.hip}), expected an NVIDIA GPU for the triton backend; "
            "the backend 'torch' runs there"
        )
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise RuntimeError(f"compute capability: got {major}.{minor}, expected 8.0 or newer for the triton backend")
    capability = 10 * major + minor
    if capability in GPUS:
        return capability
    if (major, minor) in _SAME_ROWS:
        return _SAME_ROWS[major, minor]
    # Instructions of 90 and 100 are theirs alone; mma.sync is everybody's.
    used = 120 if major >= 12 else next(arch for arch in (100, 90, 80) if arch <= capability)
    warnings.warn(
        f"compute capability: got {major}.{minor}, expected that of one of sm_{ARCHITECTURES}; kernels launch with the "
        f"rows of sm_{used} ({GPUS[used].name}), which nobody has compiled for this chip",
        stacklevel=2,
    )
    return used


def pdl(arch: int) -> bool:
    """Whether a kernel may start while the one before it ends (programmatic dependent launch): compute capability 9.0.

    Source: CUDA C++ Programming Guide, "Programmatic Dependent Launch and Synchronization".
    """
    return arch >= 90


def rows_for(rows: Iterable[Row], arch: int) -> list[Row]:
    """The rows of a table for one architecture.

    Raises:
        ValueError: if there are none.
    """
    found = [row for row in rows if row.arch == arch]
    if not found:
        raise ValueError(f"arch: got {arch}, expected one of {sorted({row.arch for row in rows})}")
    return found
