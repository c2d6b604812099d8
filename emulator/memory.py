"""Global memory: the tensors that a launch was given, checked by address, by element and for conflicts between blocks.

Addresses are those of this process, so a load is one gather from it. What may be touched is known per granule (the
size of an element): an element of a tensor that was passed, not a gap between a view's rows. No thread block may touch
what another one writes: nothing orders them. Atomics among themselves are fine.
"""

from __future__ import annotations

import ctypes
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np
from torch import Tensor

from .ptx import EmulationError, Instruction

NOBODY, MANY, GAP, ATOMIC = -1, -2, -3, -4  # in place of a block's number
_ORIGIN = 4096


def planes(start: int, count: int) -> dict[int, np.ndarray]:
    """Memory from an address on, as arrays of 1 to 16 bytes an element."""
    dtypes = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64, 16: np.complex128}  # the last for its size alone
    raw = np.ctypeslib.as_array((ctypes.c_uint8 * count).from_address(start))
    return {size: raw[: count // size * size].view(dtype) for size, dtype in dtypes.items()}


_PROCESS = planes(_ORIGIN, (1 << 47) - 2 * _ORIGIN)


class _Region:
    def __init__(self, start: int, end: int, granule: int) -> None:
        self.start, self.end, self.granule = start, end, granule
        count = -(-(end - start) // granule)
        self.writer = np.full(count, GAP, np.int32)
        self.reader = np.full(count, NOBODY, np.int32)

    def allow(self, view: Tensor) -> None:
        """Elements of a view may be touched."""
        each = view.itemsize // self.granule
        first = (view.data_ptr() - self.start) // self.granule
        if view.is_contiguous():
            self.writer[first : first + view.numel() * each] = NOBODY
            return
        size, stride = (*view.shape, each), (*(4 * s * each for s in view.stride()), 4)
        np.lib.stride_tricks.as_strided(self.writer[first:], size, stride)[...] = NOBODY


def _span(view: Tensor) -> tuple[int, int]:
    last = sum((n - 1) * s for n, s in zip(view.shape, view.stride(), strict=True))
    return view.data_ptr(), view.data_ptr() + (last + 1) * view.itemsize


class Memory:
    """Of one launch.

    Args:
        views: tensors that may be touched; their storage must outlive this.
    """

    def __init__(self, views: Sequence[Tensor]) -> None:
        views = sorted((v for v in views if v.numel()), key=lambda v: v.data_ptr())
        self.regions: list[_Region] = []
        groups: list[tuple[int, int, list[Tensor]]] = []
        for view in views:
            start, end = _span(view)
            if groups and start < groups[-1][1]:
                first, last, others = groups[-1]
                groups[-1] = (first, max(last, end), [*others, view])
            else:
                groups.append((start, end, [view]))
        for start, end, members in groups:
            granule = min(v.itemsize for v in members)
            region = _Region(start, end, granule)
            for view in members:
                region.allow(view)
            self.regions.append(region)
        self._starts = [r.start for r in self.regions]

    def _each(self, at: np.ndarray, size: int, i: Instruction | str) -> list[tuple[_Region, np.ndarray | slice]]:
        """The region of every address, by groups."""
        low, high = int(at.min()), int(at.max())
        k = bisect_right(self._starts, low) - 1
        if k >= 0 and high + size <= self.regions[k].end:
            return [(self.regions[k], slice(None))]
        number = np.searchsorted(np.array(self._starts, np.int64), at, side="right") - 1
        found: list[tuple[_Region, np.ndarray | slice]] = []
        for k in np.unique(number):
            which = np.flatnonzero(number == k)
            region = self.regions[k] if k >= 0 else None
            if region is None or (at[which] + size > region.end).any():
                beyond = int(at[which].max()) - (region.end if region else 0)
                where = f"{beyond + size} bytes past the end of its tensor" if region else "below every tensor"
                raise EmulationError(f"global access outside every tensor, {where}: {i}")
            found.append((region, which))
        return found

    def _check(self, at: np.ndarray, size: int, cta: np.ndarray, i: Instruction | str, kind: str) -> None:
        if (at & (size - 1)).any():
            raise EmulationError(f"misaligned global access, {size} bytes at {int(at[at & (size - 1) > 0][0]):#x}: {i}")
        for region, which in self._each(at, size, i):
            granules = (at[which] - region.start) // region.granule
            who = cta[which]
            if size > region.granule:
                granules = granules[:, None] + np.arange(size // region.granule)
                who = np.broadcast_to(who[:, None], granules.shape)
            writer = region.writer[granules]
            free = (writer == NOBODY) | ((writer == ATOMIC) if kind == "atomic" else (writer == who))
            if not free.all():
                self._conflict(writer[~free][0], who[~free][0], kind, i)
            reader = region.reader[granules]
            if kind == "read":
                region.reader[granules] = np.where((reader == NOBODY) | (reader == who), who, MANY)
                shared = region.reader[granules] != who
                region.reader[granules[shared]] = MANY
                continue
            taken = (reader != NOBODY) & (reader != who)
            if taken.any():
                self._conflict(reader[taken][0], who[taken][0], "write what was read", i)
            region.writer[granules] = ATOMIC if kind == "atomic" else who
            if kind == "write" and (lost := region.writer[granules] != who).any():
                self._conflict(region.writer[granules][lost][0], who[lost][0], "write", i)

    @staticmethod
    def _conflict(other: int, cta: int, kind: str, i: Instruction | str) -> None:
        if other == GAP:
            raise EmulationError(f"global {kind} between the elements of a view: {i}")
        by = {MANY: "several blocks", ATOMIC: "an atomic"}.get(int(other), f"block {other}")
        raise EmulationError(f"conflict in global memory: {kind} by block {cta} meets {by}: {i}")

    def load(self, at: np.ndarray, size: int, cta: np.ndarray, i: Instruction | str) -> np.ndarray:
        """`size` bytes at every address [n], as unsigned integers (16: complex numbers, to be viewed)."""
        self._check(at, size, cta, i, "read")
        return _PROCESS[size][(at - _ORIGIN) >> (size.bit_length() - 1)]

    def store(self, at: np.ndarray, values: np.ndarray, cta: np.ndarray, i: Instruction | str) -> None:
        size = values.dtype.itemsize
        self._check(at, size, cta, i, "write")
        _PROCESS[size][(at - _ORIGIN) >> (size.bit_length() - 1)] = values

    def atomic(self, at: np.ndarray, size: int, cta: np.ndarray, i: Instruction) -> tuple[np.ndarray, np.ndarray]:
        """(memory, indices) of what atomics may change."""
        self._check(at, size, cta, i, "atomic")
        return _PROCESS[size], (at - _ORIGIN) >> (size.bit_length() - 1)
