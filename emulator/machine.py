"""A gang: the warps of one or several thread blocks, executed together, one PTX instruction at a time for all of them.

A register is an array [warps, 32] (`registers`): an instruction costs a few numpy calls however many warps take part.
Lanes carry a program counter; those at the same place run together up to the next branch or barrier, the lowest place
first, so that what diverged meets again. Without a seed that is the order, and asynchronous effects land as late as
their waits allow. With a seed the next place, how far it runs and when copies land are drawn at random.
"""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from . import accesses, arithmetic, asynchronous, bits, conversions, matrices, synchronisation, warps
from .memory import Memory
from .ptx import EmulationError, Instruction, Kernel, Label, Register
from .registers import LANES, Mask, RegisterFile
from .shared import Clocks, SharedMemory
from .synchronisation import Synchroniser

ENDED = 1 << 30  # the place of a lane that has returned
BUILDERS: dict[str, Callable[[Any, Instruction], Callable[[Mask], None]]] = {
    name: builder
    for module in (accesses, arithmetic, asynchronous, bits, conversions, matrices, synchronisation, warps)
    for name, builder in module.BUILDERS.items()
}
End = Callable[[Mask], "int | None"]  # the place where all lanes go on, or None: places are set, choose again


@dataclass
class Block:
    """Straight-line code."""

    start: int
    body: list[Callable[[Mask], None]]
    end: End
    length: int


@dataclass
class Statistics:
    """`instructions`: executed by warps. `notes`: what the ISA forbids and Triton does everywhere, with counts."""

    instructions: int = 0
    notes: Counter[str] = field(default_factory=Counter)


class Gang(RegisterFile):
    """`ctas` thread blocks of a kernel, with `shared` bytes of dynamic shared memory each.

    `strict`: proxy fences that Triton's own compiler leaves out everywhere are errors too.
    """

    def __init__(self, kernel: Kernel, ctas: int, shared: int, strict: bool = True) -> None:
        if kernel.threads % LANES:
            raise EmulationError(f"{kernel.name}: got {kernel.threads} threads, expected whole warps")
        super().__init__(kernel, ctas)
        self.strict = strict
        self.clocks = Clocks(self)
        self.shared = SharedMemory(self, shared, self.clocks)
        self.sync = Synchroniser(self)
        self.pending = asynchronous.Pending(self)
        self.memory = Memory([])
        self.descriptors: dict[int, Any] = {}
        self.statistics = Statistics()
        self.rng: random.Random | None = None
        self.place = np.zeros((self.warps, LANES), np.int64)
        self.blocked = np.zeros(self.warps, np.bool_)
        self.cta_ids = np.zeros(self.warps, np.int64)
        self._reasons: dict[int, str] = {}
        self._every = np.arange(self.warps)
        self.lane_row = np.repeat(self._every, LANES)
        self.accumulators = matrices.adopt_accumulators(self)
        self._blocks: dict[int, Block] = {}
        self._leaders = self._find_leaders()
        # Blocks that a warpgroup enters together, since they hold wgmma.
        self._together = np.array(
            sorted({self._leader(i) for i in kernel.instructions if "mma_async" in i.parts}), np.int64
        )

    # binding

    def _find_leaders(self) -> list[int]:
        kernel = self.kernel
        named = {x.name for i in kernel.instructions for x in i.operands if isinstance(x, Label)}
        named |= {name for targets in kernel.branch_targets.values() for name in targets}
        found = {0} | {at for name, at in kernel.labels.items() if name in named}
        for k, i in enumerate(kernel.instructions):
            if _is_end(i):
                found |= {k + 1}
            if _is_wait(i):
                found |= {k}
        return sorted(found)

    def _leader(self, i: Instruction) -> int:
        return self._leaders[bisect_right(self._leaders, i.number) - 1]

    def _block(self, start: int) -> Block:
        """Bound when it is first reached."""
        if start in self._blocks:
            return self._blocks[start]
        instructions = self.kernel.instructions
        if start >= len(instructions):
            raise EmulationError(f"{self.kernel.name}: ran past its last instruction")
        index = bisect_right(self._leaders, start)
        following = self._leaders[index] if index < len(self._leaders) else len(instructions)
        body: list[Callable[[Mask], None]] = []
        for k in range(start, following):
            i = instructions[k]
            try:
                if _is_end(i):
                    block = Block(start, body, self._end(i, k), k + 1 - start)
                    break
                body.append(self._bind(i))
            except (EmulationError, ValueError, KeyError, IndexError, StopIteration) as error:
                raise EmulationError(f"{error!s} [binding {i}]") from error
        else:
            block = Block(start, body, lambda m: following, following - start)
        self._blocks[start] = block
        return block

    def _bind(self, i: Instruction) -> Callable[[Mask], None]:
        if i.parts[0] not in BUILDERS:
            raise EmulationError(f"no instruction {i.opcode}: {i}")
        run = BUILDERS[i.parts[0]](self, i)
        if i.predicate is None:
            return run
        return self._guarded(i.predicate, run)

    def _guarded(self, predicate: Register, run: Callable[[Mask], None]) -> Callable[[Mask], None]:
        holds, negated = self.array(predicate), predicate.negated
        chosen = self.scratch(np.bool_, 7)
        size = holds.size

        def guarded(m: Mask) -> None:
            if negated:
                np.logical_not(holds, out=chosen)
                if m is not True:
                    np.logical_and(chosen, m, out=chosen)
            else:
                np.logical_and(holds, m, out=chosen)
            count = np.count_nonzero(chosen)
            if count == size:
                run(True)
            elif count:
                run(chosen)

        return guarded

    def _end(self, i: Instruction, k: int) -> End:
        if _is_wait(i):
            return synchronisation.wait_mbarrier(self, i, k)
        if i.parts[0] in ("bar", "barrier"):
            return synchronisation.wait_barrier(self, i, k)
        if i.parts[0] == "brx":
            return self._indexed_branch(i)
        target = ENDED
        if i.parts[0] == "bra":
            label = i.operands[0]
            assert isinstance(label, Label)
            target = self.kernel.labels[label.name]
        if i.parts[0] == "trap":
            raise_at = lambda m: _trap(i)  # noqa: E731
            return raise_at
        return self._branch(i.predicate, target, k + 1)

    def _branch(self, predicate: Register | None, target: int, following: int) -> End:
        if predicate is None:
            return lambda m: target
        holds, negated = self.array(predicate), predicate.negated

        def end(m: Mask) -> int | None:
            taken = ~holds if negated else holds
            if m is not True:
                taken = taken & m
            count = np.count_nonzero(taken)
            if count == 0:
                return following
            if count == (taken.size if m is True else np.count_nonzero(m)):
                return target
            self.advance(m, following)
            self.place[taken] = target
            return None

        return end

    def _indexed_branch(self, i: Instruction) -> End:
        label = i.operands[1]
        assert isinstance(label, Label)
        targets = np.array([self.kernel.labels[name] for name in self.kernel.branch_targets[label.name]])
        index = self.source(i.operands[0], "u32")

        def end(m: Mask) -> int | None:
            np.copyto(self.place, targets[np.minimum(index, len(targets) - 1)], where=m)
            return None

        return end

    # state

    def start(
        self,
        grid: tuple[int, int, int],
        ctas: Sequence[int],
        memory: Memory,
        descriptors: dict[int, Any],
        seed: int | None,
        dependent: bool = False,
    ) -> None:
        """Make it these blocks (numbers in the grid, x fastest) of a launch; `parameters` are set by the caller.

        `dependent`: a programmatic dependent launch, which may start before the kernel in front of it has ended.
        """
        numbers = np.asarray(ctas)
        x, y, z = numbers % grid[0], numbers // grid[0] % grid[1], numbers // (grid[0] * grid[1])
        for axis, value, extent in zip("xyz", (x, y, z), grid, strict=True):
            self.specials[f"%ctaid.{axis}"][:, 0] = value[self.cta_of_warp]
            self.specials[f"%nctaid.{axis}"][:] = extent
        self.cta_ids[:] = numbers[self.cta_of_warp]
        self.memory, self.descriptors = memory, descriptors
        self.rng = None if seed is None else random.Random(seed)
        self.statistics = Statistics()
        self.place[:] = 0
        self.blocked[:] = False
        self._reasons.clear()
        self.shared.reset()
        self.clocks.reset()
        self.sync.reset(dependent)
        self.pending.reset()

    def rows(self, m: Mask) -> np.ndarray:
        """Warps that have an active lane."""
        return self._every if m is True else np.flatnonzero(m.any(axis=1))

    def lanes(self, m: Mask) -> Any:
        """Index of the active lanes into flattened registers."""
        return slice(None) if m is True else np.flatnonzero(m)

    @staticmethod
    def lanes_of(m: Mask, row: int) -> np.ndarray:
        return np.arange(LANES) if m is True else np.flatnonzero(m[row])

    def blocks_of(self, rows: np.ndarray, i: Instruction) -> np.ndarray:
        """Numbers of the blocks of warps that are about to touch global memory, and may."""
        self.sync.check_predecessor(rows, i)
        return self.cta_ids[rows]

    def need_whole_warps(self, m: Mask, i: Instruction) -> None:
        if m is not True:
            count = m.sum(axis=1)
            running = (self.place < ENDED).sum(axis=1)
            if ((count > 0) & (count < running) & (count < LANES)).any():
                raise EmulationError(f"{i.opcode} by some lanes of a warp: {i}")

    def advance(self, m: Mask, place: int) -> None:
        np.copyto(self.place, place, where=m)

    def block(self, rows: np.ndarray, place: int, reason: str) -> None:
        """Warps, all of whose running lanes are here, sleep until `wake` and go on at `place`."""
        self.place[rows] = np.where(self.place[rows] < ENDED, place, ENDED)
        self.blocked[rows] = True
        self._reasons.update((int(row), reason) for row in rows)

    def wake(self, rows: Sequence[int]) -> None:
        self.blocked[list(rows)] = False

    def forbid(self, what: str, i: Instruction) -> None:
        """An error, or a note where Triton's compiler is to blame (README)."""
        if self.strict:
            raise EmulationError(f"{what}: {i}")
        self.statistics.notes[what] += 1

    # execution

    def run(self) -> Statistics:
        """Until every lane has returned.

        Raises:
            EmulationError: on what `README.md` lists, with the instruction and its line of Python.
        """
        with np.errstate(all="ignore"):
            while (chosen := self._choose()) is not None:
                self._run(*chosen)
        self.pending.check_finished()
        return self.statistics

    def _choose(self) -> tuple[int, Mask, int, int] | None:
        """(place, lanes, place at which to look again, blocks to run); None at the end."""
        while True:
            awake = np.where(self.blocked[:, None], ENDED, self.place)
            first = awake.min(axis=1)
            if len(self._together):
                groups = first.reshape(-1, min(4, self.warps_per_cta))
                alone = np.repeat((groups != groups[:, :1]).any(axis=1), groups.shape[1])
                first = np.where(alone & np.isin(first, self._together), ENDED, first)
            lowest = int(first.min())
            if self.rng is not None and self.pending.copies and (lowest == ENDED or self.rng.random() < 0.3):
                self.pending.land(self.rng.randrange(len(self.pending.copies)))
            elif lowest < ENDED:
                break
            elif self.pending.copies:
                self.pending.land(0)
            elif (self.place == ENDED).all():
                return None
            else:
                raise EmulationError(self._deadlock())
        if self.rng is None:
            mask = (awake == lowest) & (first == lowest)[:, None]
            if mask.all():
                return lowest, True, ENDED + 1, 1 << 30
            return lowest, mask, int(awake[~mask].min()), 1 << 30
        place = self.rng.choice(np.unique(first[first < ENDED]).tolist())
        here = first == place
        if self.rng.random() < 0.5:  # some of them only
            each = 4 if place in self._together else 1
            drawn = np.random.default_rng(self.rng.randrange(1 << 30)).random(self.warps // each) < 0.5
            some = here & np.repeat(drawn, each)
            here = some if some.any() else here
        mask = (awake == place) & here[:, None]
        others = awake[here][~mask[here]]
        horizon = int(others.min()) if others.size else ENDED + 1
        return place, True if mask.all() else mask, horizon, self.rng.randrange(1, 8)

    def _run(self, place: int, m: Mask, horizon: int, budget: int) -> None:
        active = self.warps if m is True else int(m.any(axis=1).sum())
        while True:
            block = self._block(place)
            step = 0
            try:
                for step, run in enumerate(block.body):  # noqa: B007
                    run(m)
                step = block.length - 1
                following = block.end(m)
            except EmulationError:
                raise
            except Exception as error:
                i = self.kernel.instructions[block.start + step]
                raise EmulationError(f"{type(error).__name__}: {error}: {i}") from error
            self.statistics.instructions += block.length * active
            if following is None:
                return
            budget -= 1
            apart = m is not True and following in self._together
            if following >= horizon or following == ENDED or budget <= 0 or apart:
                self.advance(m, following)
                return
            place = following

    def _deadlock(self) -> str:
        lines = []
        for row in np.flatnonzero((self.place < ENDED).any(axis=1)):
            place = int(self.place[row].min())
            i = self.kernel.instructions[min(place, len(self.kernel.instructions) - 1)]
            who = f"block {self.cta_ids[row]} warp {self.warp_in_cta[row]}"
            lines.append(f"  {who} waits for {self._reasons.get(int(row), '?')} before {i}")
        return f"deadlock in {self.kernel.name}:\n" + "\n".join(lines[:40])


def _is_wait(i: Instruction) -> bool:
    return i.parts[0] == "mbarrier" and i.parts[1] in ("try_wait", "test_wait")


def _is_end(i: Instruction) -> bool:
    if i.parts[0] in ("bar", "barrier"):
        return i.parts[1] != "warp"
    return _is_wait(i) or i.parts[0] in ("bra", "brx", "ret", "exit", "trap")


def _trap(i: Instruction) -> int:
    raise EmulationError(f"trap: {i}")
