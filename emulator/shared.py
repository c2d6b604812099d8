"""Shared memory of the thread blocks of a gang, and what must have happened before an access to it.

Every access is compared, by vector clocks, with the last write and the last reads of the same granule: what no barrier
orders is a race. Actors are the warps of a block, the tensor cores of a warpgroup (reads of wgmma), bulk copies out of
shared memory, cp.async of a warp, and TMA by mbarrier. A write in flight counts from its issue, so whoever touches its
place before the wait is a race too.

Source: FastTrack (Flanagan and Freund, PLDI 2009) for epochs; PTX ISA 8.7, 8.6 "Proxies".
"""

from __future__ import annotations

from typing import NoReturn

import numpy as np

from .memory import planes
from .ptx import SHARED_BASE, EmulationError, Instruction, Kernel
from .registers import RegisterFile

MBARRIERS = 64  # at once in a block


class Clocks:
    """Vector clocks [warps, actors]: what a warp knows to have happened, and what of it a proxy fence has covered."""

    def __init__(self, file: RegisterFile) -> None:
        kernel, warps = file.kernel, file.warps_per_cta
        self.tensor = warps
        self.bulk = self.tensor + (-(-warps // 4) if kernel.has("wgmma") else 0)
        self.copy = self.bulk + (warps if kernel.has("cp.async.bulk") else 0)
        self.readers = self.copy
        self.mbarrier = self.copy + (warps if kernel.has("cp.async.c") else 0)
        actors = self.mbarrier + (MBARRIERS if kernel.has("mbarrier") else 0)
        self.known = np.zeros((file.warps, actors), np.int32)
        self.fenced = np.zeros((file.warps, actors), np.int32)
        self.own = file.warp_in_cta

    def reset(self) -> None:
        self.known[:] = 0
        self.fenced[:] = 0
        self.known[np.arange(len(self.own)), self.own] = 1

    def tick(self, rows: np.ndarray) -> None:
        """What a warp does from here on is not covered by what it has published."""
        self.known[rows, self.own[rows]] += 1

    def fence(self, rows: np.ndarray) -> None:
        self.fenced[rows] = np.maximum(self.fenced[rows], self.known[rows])
        self.tick(rows)

    def describe(self, actor: int) -> str:
        if actor < self.tensor:
            return f"warp {actor}"
        if actor < self.bulk:
            return f"wgmma of warpgroup {actor - self.tensor}"
        if actor < self.copy:
            return f"a bulk copy of warp {actor - self.bulk}"
        return f"cp.async of warp {actor - self.copy}" if actor < self.mbarrier else "TMA"


class SharedMemory:
    """[blocks, bytes], as one flat array; `planes` are its views by element size."""

    def __init__(self, file: RegisterFile, size: int, clocks: Clocks) -> None:
        self.file, self.clocks = file, clocks
        self.end = SHARED_BASE + size
        self.pitch = -(-self.end // 1024) * 1024
        self._buffer = np.empty(file.ctas * self.pitch + 16, np.uint8)
        start = self._buffer.ctypes.data
        self.planes = planes(start + -start % 16, file.ctas * self.pitch)
        self.granule = _granule(file.kernel)
        words = file.ctas * self.pitch // self.granule
        self.writer = np.zeros(words, np.int64)
        self.write_clock = np.zeros(words, np.int32)
        self.written_by = np.zeros(words, np.int32)  # instruction
        self.atomics = np.array([i.parts[0] in ("atom", "red") for i in file.kernel.instructions], np.bool_)
        self.read_clock = np.zeros((clocks.readers, words), np.int32)

    def reset(self) -> None:
        self.planes[1][:] = 0xFF  # NaN in every format
        self.write_clock[:] = 0
        self.read_clock[:] = 0

    def bytes_at(self, row: np.ndarray, at: np.ndarray, size: int, i: Instruction, aligned: int = 0) -> np.ndarray:
        """Checked positions in `planes[1]` of addresses [n] of warps [n]."""
        if (at & ((aligned or size) - 1)).any():
            raise EmulationError(f"misaligned shared access, {size} bytes: {i}")
        if (at < SHARED_BASE).any() or (at + size > self.end).any():
            worst = int(at.max()) if (at + size > self.end).any() else int(at.min())
            allocation = f"{SHARED_BASE} to {self.end}"
            raise EmulationError(f"shared access outside the allocation {allocation}: {size} bytes at {worst}: {i}")
        return self.file.cta_of_warp[row] * self.pitch + at

    def words(self, position: np.ndarray, size: int) -> np.ndarray:
        """Granules of positions [n]: [n, granules]."""
        first = position // self.granule
        return first[:, None] + np.arange(max(size // self.granule, 1))

    def check_read(self, row: np.ndarray, known: np.ndarray, words: np.ndarray, i: Instruction) -> None:
        """Reads of words [n, k] by warps [n] that know [n, actors]."""
        writer, clock = self.writer[words], self.write_clock[words]
        late = np.take_along_axis(known, writer, axis=1) < clock
        if late.any():
            self._race("read", row, words, late, writer, i)

    def mark_read(self, actor: np.ndarray, words: np.ndarray, clock: np.ndarray) -> None:
        """Reads of actors [n], which end at `clock` [n] of theirs."""
        self.read_clock[actor[:, None], words] = clock[:, None]

    def check_write(self, row: np.ndarray, words: np.ndarray, i: Instruction) -> None:
        writer, clock = self.writer[words], self.write_clock[words]
        known = self.clocks.known[row]
        late = np.take_along_axis(known, writer, axis=1) < clock
        if late.any():
            self._race("write", row, words, late, writer, i)
        early = self.read_clock[:, words] > known[:, : self.clocks.readers].T[:, :, None]
        if early.any():
            actor = int(np.argwhere(early)[0][0])
            self._race("write after read", row, words, early[actor], np.full_like(writer, actor), i)

    def claim(self, row: int, words: slice, actor: int, clock: int, i: Instruction) -> None:
        """`check_write` and `mark_write` of a whole range, on behalf of `actor`."""
        known = self.clocks.known[row]
        readers = self.clocks.readers
        late = known[self.writer[words]] < self.write_clock[words]
        early = self.read_clock[:, words] > known[:readers, None]
        if late.any() or early.any():  # again, slowly, for the message
            every = np.arange(words.start, words.stop)[None, :]
            self.check_write(np.array([row]), every, i)
        self.writer[words], self.write_clock[words], self.written_by[words] = actor, clock, i.number

    def mark_write(self, words: np.ndarray, actor: np.ndarray, clock: np.ndarray, i: Instruction) -> None:
        self.writer[words] = actor[:, None]
        self.write_clock[words] = clock[:, None]
        self.written_by[words] = i.number

    def _race(
        self, what: str, row: np.ndarray, words: np.ndarray, bad: np.ndarray, other: np.ndarray, i: Instruction
    ) -> NoReturn:
        k = tuple(np.argwhere(bad)[0])
        word = int(words[k])
        address = word * self.granule % self.pitch
        by = "" if what == "write after read" else f"({self.file.kernel.instructions[self.written_by[word]]})"
        warp, earlier = self.file.warp_in_cta[row[k[0]]], self.clocks.describe(int(other[k]))
        raise EmulationError(
            f"race in shared memory at {address}: {what} by warp {warp} is not ordered after {earlier} {by}: {i}"
        )

    def read(self, row: np.ndarray, at: np.ndarray, size: int, i: Instruction) -> np.ndarray:
        """`size` bytes at addresses [n] of warps [n], as unsigned integers (16: complex numbers, to be viewed)."""
        position = self.bytes_at(row, at, size, i)
        words, own = self.words(position, size), self.clocks.own[row]
        known = self.clocks.known[row]
        self.check_read(row, known, words, i)
        self.mark_read(own, words, self.clocks.known[row, own])
        return self.planes[size][position >> (size.bit_length() - 1)]

    def write(self, row: np.ndarray, at: np.ndarray, values: np.ndarray, i: Instruction) -> None:
        """Several warps may store one replicated value: what changes nothing is no race."""
        size = values.dtype.itemsize
        position = self.bytes_at(row, at, size, i)
        plane, index = self.planes[size], position >> (size.bit_length() - 1)
        changed = np.flatnonzero((plane[index].view(np.uint8) != values.view(np.uint8)).reshape(len(row), size).any(1))
        if len(changed):
            words, who = self.words(position[changed], size), row[changed]
            self.check_write(who, words, i)
            own = self.clocks.own[who]
            self.mark_write(words, own, self.clocks.known[who, own], i)
        plane[index] = values
        lost = (plane[index].view(np.uint8) != values.view(np.uint8)).reshape(len(row), size).any(1)
        if lost.any():
            raise EmulationError(
                f"race in shared memory: lanes store different values at {int(at[lost][0])} in one instruction: {i}"
            )

    def atomic(self, row: np.ndarray, at: np.ndarray, size: int, i: Instruction) -> tuple[np.ndarray, np.ndarray]:
        """(memory, indices) of what atomics may change. They need no order among themselves; of several, a later access
        is compared with the last.
        """
        position = self.bytes_at(row, at, size, i)
        words, own = self.words(position, size), self.clocks.own[row]
        by_atomic = self.atomics[self.written_by[words]] & (self.write_clock[words] > 0)
        ordinary = ~by_atomic.all(axis=1)
        self.check_write(row[ordinary], words[ordinary], i)
        self.mark_write(words, own, self.clocks.known[row, own], i)
        return self.planes[size], position >> (size.bit_length() - 1)

    def check_fenced(self, fenced: np.ndarray, words: np.ndarray, i: Instruction) -> bool:
        """Before the async proxy reads words [n, k] for warps that know of fences [n, actors]: what warps stored must
        have passed one.

        Returns: True where words come from cp.async: Triton reads those with wgmma and no fence (see README).
        """
        writer, clock = self.writer[words], self.write_clock[words]
        ordinary = writer < self.clocks.tensor
        missing = ordinary & (np.take_along_axis(fenced, writer, axis=1) < clock)
        if missing.any():
            k = tuple(np.argwhere(missing)[0])
            raise EmulationError(
                f"the async proxy reads what warp {int(writer[k])} stored without fence.proxy.async in between: {i}; "
                f"stored by {self.file.kernel.instructions[self.written_by[words[k]]]}"
            )
        return bool(((writer >= self.clocks.copy) & (writer < self.clocks.mbarrier) & (clock > 0)).any())


def _granule(kernel: Kernel) -> int:
    """The smallest shared access, of up to 4 bytes."""
    smallest = 4
    for i in kernel.instructions:
        if i.parts[0] in ("ld", "st", "atom", "red") and "shared" in i.opcode:
            smallest = min(smallest, int(i.parts[-1].lstrip("bufs") or 32) // 8)
    return smallest
