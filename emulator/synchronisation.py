"""Barriers and mbarriers: who waits, who is released, and what they then know to have happened.

Source: PTX ISA 8.7, 9.7.13.1 barrier, 9.7.13.15 mbarrier.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from .ptx import Address, EmulationError, Instruction
from .registers import LANES, Mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from .machine import Gang


@dataclass
class _Barrier:
    """`bar`: who has arrived in this phase."""

    clock: np.ndarray
    fenced: np.ndarray
    arrived: int = 0
    waiting: list[int] = field(default_factory=list)


@dataclass
class Mbarrier:
    count: int
    slot: int  # actor of the TMA copies that complete on it
    owner: int  # the warp that initialised it, in the gang
    initialised: int  # at this clock of the owner's
    clock: np.ndarray
    fenced: np.ndarray
    done_clock: np.ndarray
    done_fenced: np.ndarray
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    waiting: list[int] = field(default_factory=list)


class Synchroniser:
    """Of one gang."""

    def __init__(self, gang: Gang) -> None:
        self.gang, self.clocks = gang, gang.clocks
        self.reset()

    def reset(self, dependent: bool = False) -> None:
        warps = self.gang.warps
        self._may_touch = np.full(warps, not dependent)  # global memory
        self._waited_at = np.zeros(warps, np.int32)  # own clock at griddepcontrol.wait
        self._barriers: dict[tuple[int, int], _Barrier] = {}
        self.mbarriers: dict[tuple[int, int], Mbarrier] = {}
        self._slots: dict[tuple[int, int], int] = {}
        self._issued = 0

    # the kernel in front of a dependent launch

    def predecessor_ended(self, m: Mask) -> None:
        """griddepcontrol.wait"""
        rows = self.gang.rows(m)
        self._may_touch[rows] = True
        self._waited_at[rows] = self.clocks.known[rows, self.clocks.own[rows]]
        self.clocks.tick(rows)

    def check_predecessor(self, rows: np.ndarray, i: Instruction) -> None:
        """Global memory may be touched after griddepcontrol.wait, one's own or that of a warp that a barrier joined."""
        if self._may_touch.all():
            return
        for row in np.unique(rows[~self._may_touch[rows]]):
            waited = self._waited_at[self.gang.cta_of_warp == self.gang.cta_of_warp[row]]
            self._may_touch[row] = ((waited > 0) & (self.clocks.known[row, : len(waited)] >= waited)).any()
            if not self._may_touch[row]:
                raise EmulationError(f"global memory touched before griddepcontrol.wait: {i}")

    # barriers

    def barrier(self, rows: np.ndarray, number: int, threads: int, after: int, waits: bool = True) -> bool:
        """Warps arrive. True where nobody has to wait; else they are blocked until their barrier is complete, and go
        on at `after`.
        """
        gang, per_cta = self.gang, self.gang.warps_per_cta
        if threads % LANES or threads > gang.kernel.threads:
            raise EmulationError(f"barrier {number}: got {threads} threads, expected whole warps of the block")
        counts = np.bincount(gang.cta_of_warp[rows], minlength=gang.ctas)
        ctas = np.flatnonzero(counts)
        if threads == gang.kernel.threads and waits and (counts[ctas] == per_cta).all():
            if not any((cta, number) in self._barriers for cta in ctas):
                self._join_blocks(ctas)
                return True
        if waits:
            gang.block(rows, after, f"barrier {number}")
        for row in rows:
            self._arrive(int(row), number, threads // LANES, waits)
        return False

    def _join_blocks(self, ctas: np.ndarray) -> None:
        for clock in (self.clocks.known, self.clocks.fenced):
            blocks = clock.reshape(self.gang.ctas, self.gang.warps_per_cta, -1)
            blocks[ctas] = blocks[ctas].max(axis=1, keepdims=True)
        self.clocks.tick(np.flatnonzero(np.isin(self.gang.cta_of_warp, ctas)))

    def _arrive(self, row: int, number: int, expected: int, waits: bool) -> None:
        known, fenced = self.clocks.known, self.clocks.fenced
        key = (int(self.gang.cta_of_warp[row]), number)
        barrier = self._barriers.setdefault(key, _Barrier(known[row].copy(), fenced[row].copy()))
        np.maximum(barrier.clock, known[row], out=barrier.clock)
        np.maximum(barrier.fenced, fenced[row], out=barrier.fenced)
        barrier.arrived += 1
        if waits:
            barrier.waiting.append(row)
        else:
            self.clocks.tick(np.array([row]))
        if barrier.arrived == expected:
            del self._barriers[key]
            released = np.array(barrier.waiting, np.int64)
            known[released] = np.maximum(known[released], barrier.clock)
            fenced[released] = np.maximum(fenced[released], barrier.fenced)
            self.clocks.tick(released)
            self.gang.wake(barrier.waiting)

    # mbarriers

    def initialise(self, row: int, address: int, count: int, i: Instruction) -> None:
        if address % 8:
            raise EmulationError(f"mbarrier: got address {address}, expected a multiple of 8: {i}")
        key = (int(self.gang.cta_of_warp[row]), address)
        used = sum(cta == key[0] for cta, _ in self._slots)
        slot = self._slots.setdefault(key, self.clocks.mbarrier + used)
        width = self.clocks.known.shape[1]
        if slot >= width:
            raise EmulationError(f"mbarrier: got more than {width - self.clocks.mbarrier} in a block: {i}")
        now = int(self.clocks.known[row, self.clocks.own[row]])
        clocks = [np.zeros(width, np.int32) for _ in range(4)]
        self.mbarriers[key] = Mbarrier(count, slot, row, now, *clocks, pending=count)  # type: ignore[arg-type, misc]

    def invalidate(self, row: int, address: int, i: Instruction) -> None:
        self.find(row, address, i)
        del self.mbarriers[int(self.gang.cta_of_warp[row]), address]

    def find(self, row: int, address: int, i: Instruction) -> Mbarrier:
        """The mbarrier at an address, whose initialisation the warp must know of."""
        barrier = self.mbarriers.get((int(self.gang.cta_of_warp[row]), address))
        if barrier is None:
            raise EmulationError(f"mbarrier at {address}: used before its initialisation: {i}")
        if self.clocks.known[row, self.clocks.own[barrier.owner]] < barrier.initialised:
            raise EmulationError(
                f"mbarrier at {address}: nothing orders its use by warp {self.gang.warp_in_cta[row]} after its "
                f"initialisation by warp {self.gang.warp_in_cta[barrier.owner]}: {i}"
            )
        return barrier

    def find_for_copy(self, row: int, address: int, i: Instruction) -> Mbarrier:
        """As `find`, for the async proxy: it must have been told of the initialisation by a fence."""
        barrier = self.find(row, address, i)
        if self.clocks.fenced[row, self.clocks.own[barrier.owner]] < barrier.initialised:
            self.gang.forbid("a copy completes on an mbarrier without a proxy fence since its initialisation", i)
        return barrier

    def arrive(self, row: int, address: int, arrivals: int, expected: int, i: Instruction) -> None:
        barrier = self.find(row, address, i)
        np.maximum(barrier.clock, self.clocks.known[row], out=barrier.clock)
        np.maximum(barrier.fenced, self.clocks.fenced[row], out=barrier.fenced)
        self.clocks.tick(np.array([row]))
        barrier.bytes += expected
        barrier.pending -= arrivals
        if barrier.pending < 0:
            raise EmulationError(f"mbarrier at {address}: more arrivals than the {barrier.count} that it counts: {i}")
        self._complete(barrier)

    def issue(self) -> int:
        """The clock of a copy: copies are numbered."""
        self._issued += 1
        return self._issued

    def landed(self, barrier: Mbarrier, count: int, clock: int) -> None:
        """`count` bytes of a copy are there."""
        barrier.clock[barrier.slot] = max(barrier.clock[barrier.slot], clock)
        barrier.bytes -= count
        self._complete(barrier)

    def _complete(self, barrier: Mbarrier) -> None:
        if barrier.pending or barrier.bytes:
            return
        barrier.phase += 1
        barrier.pending = barrier.count
        np.maximum(barrier.done_clock, barrier.clock, out=barrier.done_clock)
        np.maximum(barrier.done_fenced, barrier.fenced, out=barrier.done_fenced)
        self.gang.wake(barrier.waiting)
        barrier.waiting = []

    def passes(self, row: int, address: int, parity: int, i: Instruction) -> bool:
        """Whether the phase of that parity is complete; else the warp is put on the list of those that wait."""
        barrier = self.find(row, address, i)
        if barrier.phase & 1 == parity:
            barrier.waiting.append(row)
            return False
        np.maximum(self.clocks.known[row], barrier.done_clock, out=self.clocks.known[row])
        np.maximum(self.clocks.fenced[row], barrier.done_fenced, out=self.clocks.fenced[row])
        return True


def _address(gang: Gang, operand: object) -> Callable[[int, int], int]:
    assert isinstance(operand, Address)
    base = gang.source(operand.base, "b32")
    return lambda row, lane: int(np.broadcast_to(base, (gang.warps, LANES))[row, lane]) + operand.offset


def _mbarrier(gang: Gang, i: Instruction) -> Callable[[Mask], None]:
    what = i.parts[1]
    sync = gang.sync
    place = next(k for k, x in enumerate(i.operands) if isinstance(x, Address))
    at = _address(gang, i.operands[place])
    rest = i.operands[place + 1 :]
    number = gang.source(rest[0], "u32") if rest else np.array(1, np.uint32)

    def run(m: Mask) -> None:
        for row in gang.rows(m):
            lanes = gang.lanes_of(m, row)
            each = np.broadcast_to(number, (gang.warps, LANES))[row, lanes]
            address = at(row, lanes[0])
            if what == "init":
                if len(lanes) > 1:
                    raise EmulationError(f"mbarrier.init by {len(lanes)} lanes: {i}")
                sync.initialise(row, address, int(each[0]), i)
            elif what == "inval":
                sync.invalidate(row, address, i)
            elif "expect_tx" in i.parts and what == "arrive":
                sync.arrive(row, address, len(lanes), int(each.sum()), i)
            elif what == "expect_tx":
                sync.arrive(row, address, 0, int(each.sum()), i)
            else:
                sync.arrive(row, address, int(each.sum()), 0, i)

    if what not in ("init", "inval", "arrive", "expect_tx"):
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    return run


def wait_mbarrier(gang: Gang, i: Instruction, index: int) -> Callable[[Mask], int | None]:
    """try_wait and test_wait: a warp that has to wait sleeps here until the phase ends, so the answer is always yes."""
    done, operand, parity = i.operands[:3]
    if "parity" not in i.parts or i.predicate is not None:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    complete, at = gang.target(done, "pred"), _address(gang, operand)
    parities = gang.source(parity, "u32")

    def end(m: Mask) -> int | None:
        waiting = []
        rows = gang.rows(m)
        for row in rows:
            lane = gang.lanes_of(m, row)[0]
            wanted = int(np.broadcast_to(parities, (gang.warps, LANES))[row, lane]) & 1
            if not gang.sync.passes(row, at(row, lane), wanted, i):
                waiting.append(row)
        np.copyto(complete, True, where=m)
        if not waiting:
            return index + 1
        gang.advance(m, index + 1)
        gang.block(np.array(waiting), index, "mbarrier")  # looks again when woken
        return None

    return end


def wait_barrier(gang: Gang, i: Instruction, index: int) -> Callable[[Mask], int | None]:
    """bar.sync, bar.arrive and their synonyms."""
    waits = "arrive" not in i.parts
    if "red" in i.parts or i.predicate is not None:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    number = gang.source(i.operands[0], "u32")
    threads = gang.source(i.operands[1], "u32") if len(i.operands) > 1 else np.array(gang.kernel.threads, np.uint32)

    def end(m: Mask) -> int | None:
        gang.need_whole_warps(m, i)
        rows = gang.rows(m)
        numbers = np.broadcast_to(number, (gang.warps, LANES))[rows, 0]
        counts = np.broadcast_to(threads, (gang.warps, LANES))[rows, 0]
        if not waits:
            for n in np.unique(numbers):
                gang.sync.barrier(rows[numbers == n], int(n), int(counts[0]), index + 1, waits=False)
            return index + 1
        if (numbers == numbers[0]).all() and (counts == counts[0]).all():
            return index + 1 if gang.sync.barrier(rows, int(numbers[0]), int(counts[0]), index + 1) else None
        gang.advance(m, index + 1)
        for n in np.unique(numbers):
            which = numbers == n
            gang.sync.barrier(rows[which], int(n), int(counts[which][0]), index + 1)
        return None

    return end


def _fence(gang: Gang, i: Instruction) -> Callable[[Mask], None]:
    """Only proxy fences matter here: memory is strongly ordered."""
    if not ("proxy" in i.parts and "async" in i.opcode) and "mbarrier_init" not in i.parts:
        return lambda m: None
    return lambda m: gang.clocks.fence(gang.rows(m))


def _griddepcontrol(gang: Gang, i: Instruction) -> Callable[[Mask], None]:
    """One kernel runs after the other here; `check_predecessor` checks that none relies on it."""
    return gang.sync.predecessor_ended if "wait" in i.parts else lambda m: None


BUILDERS = {"griddepcontrol": _griddepcontrol, "mbarrier": _mbarrier, "fence": _fence}
