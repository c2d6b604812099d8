"""What takes effect later than its instruction: cp.async, TMA and bulk stores, until the wait that promises them.

Each keeps what it needs until a wait asks for it, or, for TMA loads, until no warp can go on (with a seed: at random).
Their places in shared memory count as being written, or read, from the issue on.

Source: PTX ISA 8.7, 9.7.9.25 "Asynchronous copy", 9.7.9.27 "Tensor copy".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from .accesses import addresses
from .ptx import Address, EmulationError, Immediate, Instruction, Operand, TensorAddress
from .registers import LANES, PARAMETERS, Mask
from .synchronisation import Mbarrier
from .tma import Box, TensorMap, box

if TYPE_CHECKING:
    from .machine import Gang

    Run = Callable[[Mask], None]


class Groups:
    """Commit groups per warp, and items that complete with them. An item is of `rows` [n] and in `group` [n]."""

    def __init__(self, warps: int, finish: Callable[[dict[str, np.ndarray]], None]) -> None:
        self.committed = np.zeros(warps, np.int64)
        self.finish = finish
        self.items: list[dict[str, np.ndarray]] = []

    def reset(self) -> None:
        self.committed[:] = 0
        self.items = []

    def add(self, row: np.ndarray, **fields: np.ndarray) -> None:
        self.items.append({"row": row, "group": self.committed[row], **fields})

    def wait(self, rows: np.ndarray, pending: int) -> None:
        """Finish all but the latest `pending` groups of these warps."""
        limit = np.full(len(self.committed), -1)
        limit[rows] = self.committed[rows] - pending
        self.finish_before(limit)

    def finish_before(self, limit: np.ndarray) -> None:
        """Finish the groups below `limit` [warps]."""
        left = []
        for item in self.items:
            due = item["group"] < limit[item["row"]]
            if due.all():
                self.finish(item)
            elif due.any():
                self.finish({name: value[due] for name, value in item.items()})
                left.append({name: value[~due] for name, value in item.items()})
            else:
                left.append(item)
        self.items = left


@dataclass
class Copy:
    """A TMA load in flight."""

    row: int
    barrier: Mbarrier
    tensor_map: TensorMap
    box: Box
    clock: int
    instruction: Instruction


class Pending:
    """Everything in flight in a gang."""

    def __init__(self, gang: Gang) -> None:
        self.gang = gang
        self.copies: list[Copy] = []
        self.async_copies = Groups(gang.warps, self._finish_async_copy)
        self.bulk_stores = Groups(gang.warps, self._finish_bulk_store)
        self.products: Groups | None = None  # of wgmma: see `matrices`

    def reset(self) -> None:
        self.copies = []
        for groups in (self.async_copies, self.bulk_stores, self.products):
            if groups is not None:
                groups.reset()

    def check_finished(self) -> None:
        # The end of a kernel completes its bulk stores.
        self.bulk_stores.committed += 1
        self.bulk_stores.wait(np.arange(self.gang.warps), 0)
        left = {"a TMA load": bool(self.copies), "wgmma": bool(self.products and self.products.items)}
        for name, flying in left.items():
            if flying:
                raise EmulationError(f"{self.gang.kernel.name}: ends with {name} in flight")

    def land(self, number: int) -> None:
        """A TMA load arrives."""
        copy = self.copies.pop(number)
        gang = self.gang
        size = copy.tensor_map.element_size
        base = gang.cta_of_warp[copy.row] * gang.shared.pitch
        plane = gang.shared.planes[size]
        index = (base + copy.box.shared) // size
        plane[index] = 0
        inside = copy.box.valid
        if inside.any():
            at = copy.tensor_map.base + copy.box.offsets[inside]
            cta = np.full(len(at), gang.cta_ids[copy.row])
            plane[index[inside]] = gang.memory.load(at, size, cta, copy.instruction)
        if copy.tensor_map.nan_fill and not inside.all():
            raise EmulationError(f"TMA: filling with NaN is not known: {copy.instruction}")
        gang.sync.landed(copy.barrier, copy.tensor_map.bytes, copy.clock)

    def _finish_async_copy(self, item: dict[str, np.ndarray]) -> None:
        size = item["data"].dtype.itemsize
        self.gang.shared.planes[size][item["position"] >> (size.bit_length() - 1)] = item["data"]

    def _finish_bulk_store(self, item: dict[str, np.ndarray]) -> None:
        for row, tensor_map, box_, i in zip(item["row"], item["map"], item["box"], item["instruction"], strict=True):
            self.store_box(int(row), tensor_map, box_, i)

    def store_box(self, row: int, tensor_map: TensorMap, box_: Box, i: Instruction) -> None:
        gang, size = self.gang, tensor_map.element_size
        position = gang.cta_of_warp[row] * gang.shared.pitch + box_.shared[box_.valid]
        data = gang.shared.planes[size][position // size]
        at = tensor_map.base + box_.offsets[box_.valid]
        if len(at):
            gang.memory.store(at, data, np.full(len(at), gang.cta_ids[row]), i)


def _cp(gang: Gang, i: Instruction) -> Run:
    """cp.async.*"""
    if "tensor" in i.parts:
        return _tensor_copy(gang, i)
    groups = gang.pending.bulk_stores if "bulk" in i.parts else gang.pending.async_copies
    actor = gang.clocks.bulk if "bulk" in i.parts else gang.clocks.copy
    if "commit_group" in i.parts:

        def commit(m: Mask) -> None:
            groups.committed[gang.rows(m)] += 1

        return commit
    if "wait_group" in i.parts or "wait_all" in i.parts:
        left = i.operands[0].bits if isinstance(i.operands[0] if i.operands else None, Immediate) else 0  # type: ignore[union-attr]

        def wait(m: Mask) -> None:
            rows = gang.rows(m)
            if "wait_all" in i.parts:
                groups.committed[rows] += 1
            groups.wait(rows, left)
            own = actor + gang.warp_in_cta[rows]
            gang.clocks.known[rows, own] = np.maximum(gang.clocks.known[rows, own], groups.committed[rows] - left)

        return wait
    if "bulk" in i.parts or "mbarrier" in i.parts:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    return _async_copy(gang, i)


def _async_copy(gang: Gang, i: Instruction) -> Run:
    """cp.async.c[ag].shared.global: 4, 8 or 16 bytes a lane; what the source lacks of them is zero."""
    to, source = (addresses(gang, x) for x in i.operands[:2])
    size = next(x.bits for x in i.operands if isinstance(x, Immediate))
    rest: Operand = i.operands[3] if len(i.operands) > 3 else Immediate(size, "int")
    given = gang.source(rest, "u32")

    def run(m: Mask) -> None:
        lanes = gang.lanes(m)
        row = gang.lane_row[lanes]
        count = np.broadcast_to(given, (gang.warps, LANES)).reshape(-1)[lanes].astype(np.int64)
        data: np.ndarray = np.zeros(len(row), {4: np.uint32, 8: np.uint64, 16: np.complex128}[size])
        whole = count == size
        if ((count != 0) & ~whole).any():
            raise EmulationError(f"cp.async of a part of its {size} bytes is not known: {i}")
        if whole.any():
            data[whole] = gang.memory.load(source(lanes)[whole], size, gang.blocks_of(row[whole], i), i)
        position = gang.shared.bytes_at(row, to(lanes), size, i)
        words = gang.shared.words(position, size)
        gang.shared.check_write(row, words, i)
        clock = gang.pending.async_copies.committed[row] + 1
        gang.shared.mark_write(words, gang.clocks.copy + gang.warp_in_cta[row], clock, i)
        gang.pending.async_copies.add(row, position=position, data=data)

    return run


def _in_chunks(tensor_map: TensorMap, first: int) -> int:
    """The largest unit, up to 16 bytes, that rows of a box consist of."""
    size = tensor_map.element_size
    while size < 16 and all(n * tensor_map.element_size % (2 * size) == 0 for n in (first, tensor_map.sizes[0])):
        size *= 2
    return size if set(tensor_map.element_strides) == {1} else tensor_map.element_size


def _box(tensor_map: TensorMap, coordinates: list[int], shared: int) -> tuple[TensorMap, Box]:
    """`tma.box` in units as large as possible."""
    size = _in_chunks(tensor_map, coordinates[0])
    ratio = size // tensor_map.element_size
    if ratio > 1:
        sizes, inner = tensor_map.sizes, tensor_map.box
        tensor_map = replace(
            tensor_map, sizes=(sizes[0] // ratio, *sizes[1:]), box=(inner[0] // ratio, *inner[1:]), element_size=size
        )
        coordinates = [coordinates[0] // ratio, *coordinates[1:]]
    return tensor_map, box(tensor_map, coordinates, shared)


def _tensor_copy(gang: Gang, i: Instruction) -> Run:
    """cp.async.bulk.tensor, tiled: global to shared, completing on an mbarrier, or back, in bulk groups."""
    loads = i.opcode.index("shared") < i.opcode.index("global")
    if any(p.startswith(("im2col", "tile::", "multicast")) for p in i.parts) or "reduce" in i.parts:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    tensor = i.operands[1 if loads else 0]
    place = addresses(gang, i.operands[0 if loads else 1])
    if not isinstance(tensor, TensorAddress):
        raise EmulationError(f"operand {tensor}: expected [descriptor, {{coordinates}}]: {i}")
    shape = (gang.warps, LANES)
    descriptor = np.broadcast_to(gang.source(tensor.descriptor, "b64"), shape)
    coordinates = [np.broadcast_to(gang.source(x, "s32"), shape) for x in tensor.coordinates]
    completes = addresses(gang, i.operands[2]) if loads and isinstance(i.operands[2], Address) else None

    def run(m: Mask) -> None:
        gang.blocks_of(gang.rows(m), i)
        for lane in np.arange(gang.warps * LANES)[gang.lanes(m)]:
            row, column = divmod(int(lane), LANES)
            where = int(descriptor[row, column]) - PARAMETERS
            if where not in gang.descriptors:
                raise EmulationError(f"TMA: no descriptor at parameter offset {where}: {i}")
            at = int(place(np.array([lane]))[0])
            first = [int(c[row, column]) for c in coordinates]
            tensor_map, box_ = _box(gang.descriptors[where], first, at)
            # Swizzling moves elements inside the box's bytes.
            ends = np.array([at, at + tensor_map.bytes - 1])
            start, last = gang.shared.bytes_at(np.array([row, row]), ends, 1, i) // gang.shared.granule
            words = slice(int(start), int(last) + 1)
            if completes is not None:
                barrier = gang.sync.find_for_copy(row, int(completes(np.array([lane]))[0]), i)
                _issue_load(gang, row, barrier, tensor_map, box_, words, i)
            else:
                _issue_store(gang, row, tensor_map, box_, words, i)

    return run


def _issue_load(
    gang: Gang, row: int, barrier: Mbarrier, tensor_map: TensorMap, box_: Box, words: slice, i: Instruction
) -> None:
    clock = gang.sync.issue()
    gang.shared.claim(row, words, barrier.slot, clock, i)
    gang.pending.copies.append(Copy(row, barrier, tensor_map, box_, clock, i))


def _issue_store(gang: Gang, row: int, tensor_map: TensorMap, box_: Box, span: slice, i: Instruction) -> None:
    rows, words = np.array([row]), np.arange(span.start, span.stop)[None, :]
    gang.shared.check_read(rows, gang.clocks.known[rows], words, i)
    gang.shared.check_fenced(gang.clocks.fenced[rows], words, i)
    clock = gang.pending.bulk_stores.committed[rows] + 1
    gang.shared.mark_read(gang.clocks.bulk + gang.warp_in_cta[rows], words, clock)
    fields = {"map": tensor_map, "box": box_, "instruction": i}
    held = {}
    for name, value in fields.items():
        held[name] = np.empty(1, object)
        held[name][0] = value
    gang.pending.bulk_stores.add(rows, **held)


BUILDERS = {"cp": _cp}
