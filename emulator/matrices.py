"""Matrix instructions: ldmatrix, stmatrix, mma.sync and wgmma. The arithmetic is in `tensor_cores`.

A wgmma reads its operands when it is waited for, so that a buffer released too early shows, and until then its
accumulators read as NaN.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from . import tensor_cores
from .accesses import addresses
from .asynchronous import Groups
from .ptx import SHARED_BASE, EmulationError, Immediate, Instruction, Operand, Register, Vector
from .registers import LANES, Mask, elements

if TYPE_CHECKING:
    from .machine import Gang

    Run = Callable[[Mask], None]

POISON = np.uint32(0x7FC0DEAD)


def _registers(operand: Operand) -> list[Register]:
    found = elements(operand)
    if not all(isinstance(x, Register) for x in found):
        raise EmulationError(f"operand {operand}: expected registers")
    return found  # type: ignore[return-value]


def _matrix_access(gang: Gang, i: Instruction, registers: Operand, address: Operand) -> tuple:
    count = int(next(p[1:] for p in i.parts if re.fullmatch(r"x\d", p)))
    if "m8n8" not in i.parts or "b16" not in i.parts:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    arrays = [gang.array(r) for r in _registers(registers)]
    if len(arrays) != count:
        raise EmulationError(f"{i.opcode}: got {len(arrays)} registers, expected {count}: {i}")
    at = addresses(gang, address)
    used = np.arange(8 * count)

    def rows(m: Mask) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Warps; the rows' addresses, with the warp of each; [rows of matrices of 16 bytes]."""
        gang.need_whole_warps(m, i)
        warps = gang.rows(m)
        lanes = (warps[:, None] * LANES + used).reshape(-1)
        return warps, gang.lane_row[lanes], at(lanes)

    return count, arrays, rows


def _ldmatrix(gang: Gang, i: Instruction) -> Run:
    count, arrays, rows = _matrix_access(gang, i, i.operands[0], i.operands[1])
    transposed = "trans" in i.parts

    def run(m: Mask) -> None:
        warps, row, at = rows(m)
        data = gang.shared.read(row, at, 16, i)  # checked 16 bytes a row
        halves = data.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(-1, -2))
        values = halves.view(np.uint32).reshape(len(warps), count, LANES)  # lane 4 r + c holds elements 2 c of row r
        for j, array in enumerate(arrays):
            if len(warps) == gang.warps:
                array[:] = values[:, j]
            else:
                array[warps] = values[:, j]

    return run


def _stmatrix(gang: Gang, i: Instruction) -> Run:
    count, arrays, rows = _matrix_access(gang, i, i.operands[1], i.operands[0])
    transposed = "trans" in i.parts

    def run(m: Mask) -> None:
        warps, row, at = rows(m)
        values = np.stack([a[warps] for a in arrays], axis=1)
        halves = values.view(np.uint16).reshape(len(warps), count, 8, 8)
        if transposed:
            halves = np.ascontiguousarray(halves.swapaxes(-1, -2))
        gang.shared.write(row, at, np.ascontiguousarray(halves).view(np.complex128).reshape(-1), i)

    return run


def _block_scales(gang: Gang, i: Instruction, k: int, is_b: bool) -> Callable[[slice | np.ndarray], np.ndarray]:
    """Of the warps chosen; operand k holds the scales, the next one which of their bytes and lanes count."""
    register = np.broadcast_to(gang.source(i.operands[k], "b32"), (gang.warps, LANES))
    byte, lane = (x.bits for x in elements(i.operands[k + 1]) if isinstance(x, Immediate))
    return lambda chosen: tensor_cores.block_scales(register[chosen], byte, lane, is_b)


def _mma(gang: Gang, i: Instruction) -> Run:
    """mma.sync.aligned.shape.row.col{.satfinite}.d.a.b.c; sm_120: .kind.block_scale.scale_vec::1X.d.a.b.c.ue8m0"""
    scaled = "block_scale" in i.parts
    d_fmt, a_fmt, b_fmt, _ = i.parts[-5:-1] if scaled else i.parts[-4:]
    unknown_scale = scaled and not {"scale_vec::1X", "ue8m0"} <= set(i.parts)
    if "sp" in i.parts or unknown_scale or "row" not in i.parts or "col" not in i.parts:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    kind = "b64" if d_fmt == "f64" else "b32"
    shape = (gang.warps, LANES)
    a, b, c = ([np.broadcast_to(gang.source(x, kind), shape) for x in elements(v)] for v in i.operands[1:4])
    d = [gang.target(x, kind) for x in elements(i.operands[0])]
    rows = 8 if i.parts[3].startswith("m8") else 16
    saturate = "satfinite" in i.parts
    of_a, of_b = (_block_scales(gang, i, k, is_b) for k, is_b in ((4, False), (6, True))) if scaled else (None, None)

    def run(m: Mask) -> None:
        gang.need_whole_warps(m, i)
        chosen = slice(None) if m is True else gang.rows(m)
        scales = (of_a(chosen), of_b(chosen)) if of_a and of_b else None
        x, y, z = ([r[chosen] for r in fragment] for fragment in (a, b, c))
        found = tensor_cores.mma_sync(x, y, z, a_fmt, b_fmt, d_fmt, saturate=saturate, scales=scales, rows=rows)
        for array, value in zip(d, found, strict=True):
            array[chosen] = value.view(array.dtype)

    return run


class Accumulator:
    """The accumulator registers of wgmma instructions that name the same ones, and their values while in flight."""

    def __init__(self, gang: Gang, registers: list[Register]) -> None:
        self.values = np.zeros((len(registers), gang.warps, LANES), np.uint32)
        self.adopted = gang.adopt(registers, self.values)
        self.arrays = [gang.array(r) for r in registers]
        self.live = np.zeros_like(self.values)
        self.flying = np.zeros(gang.warps, np.int64)

    def issue(self, rows: np.ndarray) -> None:
        fresh = rows[self.flying[rows] == 0]
        if self.adopted:
            self.live[:, fresh] = self.values[:, fresh]
            self.values[:, rows] = POISON
        else:
            for j, array in enumerate(self.arrays):
                self.live[j, fresh] = array[fresh]
                array[rows] = POISON
        self.flying[rows] += 1

    def finish(self, rows: np.ndarray, values: list[np.ndarray]) -> None:
        self.live[:, rows] = np.stack(values).view(np.uint32)
        self.flying[rows] -= 1
        done = rows[self.flying[rows] == 0]
        if self.adopted:
            self.values[:, done] = self.live[:, done]
        else:
            for j, array in enumerate(self.arrays):
                array[done] = self.live[j, done]


def adopt_accumulators(gang: Gang) -> dict[tuple[str, ...], Accumulator]:
    """Accumulators by the names of their registers, made before any other instruction uses those."""
    found: dict[tuple[str, ...], Accumulator] = {}
    for i in gang.kernel.instructions:
        if i.opcode.startswith("wgmma.mma_async"):
            registers = _registers(i.operands[0])
            key = tuple(r.name for r in registers)
            if key not in found:
                found[key] = Accumulator(gang, registers)
    return found


class _Products(Groups):
    """wgmma in flight, of whole warpgroups. `ordered` warps have run wgmma.fence since they last waited: the first
    product after a wait needs it, for registers may have been touched in between.
    """

    def __init__(self, gang: Gang) -> None:
        super().__init__(gang.warps, _finish_products)
        self.ordered = np.zeros(gang.warps, np.bool_)
        self.leader = np.arange(gang.warps) - gang.warp_in_cta % 4

    def reset(self) -> None:
        super().reset()
        self.ordered[:] = False

    def wait(self, rows: np.ndarray, pending: int) -> None:
        """A group is its warpgroup's: complete for all four warps when the first has waited. FlashAttention-3 releases
        its buffers so, by one warp and without a barrier.
        """
        self.ordered[rows] = False
        limit = np.full(len(self.committed), -1)
        np.maximum.at(limit, self.leader[rows], self.committed[rows] - pending)
        self.finish_before(limit[self.leader])


class _Product:
    """One wgmma instruction.

    wgmma.mma_async.sync.aligned.m64nNkK.d.a.b  d, a or its descriptor, b's descriptor, scale-d, imm-scale-a,
    imm-scale-b {, imm-trans-a}, imm-trans-b
    """

    def __init__(self, gang: Gang, i: Instruction) -> None:
        self.gang, self.i = gang, i
        shape = re.fullmatch(r"m64n(\d+)k(\d+)", i.parts[4])
        if shape is None or "sp" in i.parts:
            raise EmulationError(f"no instruction {i.opcode}: {i}")
        self.columns = int(shape[1])
        self.d_fmt, self.a_fmt, self.b_fmt = i.parts[5:8] if i.parts[5] != "satfinite" else i.parts[6:9]
        self.itemsize = tensor_cores.BITS[self.a_fmt] // 8
        self.accumulator = gang.accumulators[tuple(r.name for r in _registers(i.operands[0]))]
        a, b, scale, *constants = i.operands[1:]
        self.from_registers = isinstance(a, Vector)
        self.a = [gang.array(r) for r in _registers(a)] if self.from_registers else []
        self.a_descriptor = None if self.from_registers else np.broadcast_to(gang.source(a, "b64"), (gang.warps, LANES))
        self.b_descriptor = np.broadcast_to(gang.source(b, "b64"), (gang.warps, LANES))
        self.scale = scale
        self.use = np.broadcast_to(gang.source(scale, "pred"), (gang.warps, LANES))
        bits = [c.bits for c in constants if isinstance(c, Immediate)]
        integer = self.d_fmt == "s32"
        self.negate = [False, False] if integer else [b & 0xFFFFFFFF == 0xFFFFFFFF for b in bits[:2]]
        transposed = [] if integer else bits[2:]
        self.b_mn = bool(transposed and transposed[-1])
        self.a_mn = bool(len(transposed) == 2 and transposed[0])
        self.saturate = "satfinite" in i.parts

    def issue(self, m: Mask) -> None:
        gang, i = self.gang, self.i
        gang.need_whole_warps(m, i)
        rows = gang.rows(m)
        if not self._whole(rows):
            raise EmulationError(
                f"{i.opcode} by warps {gang.warp_in_cta[rows].tolist()}, expected whole warpgroups: {i}"
            )
        leaders = rows[::4]
        groups = gang.pending.products
        assert isinstance(groups, _Products)
        if not groups.ordered[rows].all():
            raise EmulationError(f"{i.opcode} without wgmma.fence since the last wait: {i}")
        self._check(leaders, self.b_descriptor[leaders, 0], self.columns, self.b_mn)
        if self.a_descriptor is not None:
            self._check(leaders, self.a_descriptor[leaders, 0], 64, self.a_mn)
        self.accumulator.issue(rows)
        product = np.empty(len(rows), object)
        product[:] = self
        zero = np.zeros(len(rows), np.uint64)
        groups.add(
            rows,
            product=product,
            a=zero if self.a_descriptor is None else self.a_descriptor[rows, 0].copy(),
            b=self.b_descriptor[rows, 0].copy(),
            use=self.use[rows, 0].copy(),
        )

    def _whole(self, rows: np.ndarray) -> bool:
        """Whether they are warpgroups."""
        if len(rows) % 4 or (self.gang.warp_in_cta[rows[::4]] % 4).any():
            return False
        return bool((rows.reshape(-1, 4) == rows[::4, None] + np.arange(4)).all())

    def _check(self, leaders: np.ndarray, descriptors: np.ndarray, count: int, mn: bool) -> None:
        gang = self.gang
        clocks = gang.clocks
        members = leaders[:, None] + np.arange(4)
        known, fenced = clocks.known[members].min(axis=1), clocks.fenced[members].min(axis=1)
        granule = gang.shared.granule
        words = np.stack([_words(int(bits), count, self.itemsize, mn, granule) for bits in descriptors])
        low, high = int(words.min()) * granule, (int(words.max()) + 1) * granule
        if low < SHARED_BASE or high > gang.shared.end:
            raise EmulationError(f"wgmma operand outside the allocation, {low} to {high}: {self.i}")
        each = words + (gang.cta_of_warp[leaders] * (gang.shared.pitch // granule))[:, None]
        gang.shared.check_read(leaders, known, each, self.i)
        if gang.shared.check_fenced(fenced, each, self.i):
            gang.forbid("wgmma reads what cp.async wrote without fence.proxy.async", self.i)
        clock = gang.pending.products.committed[leaders] + 1  # type: ignore[union-attr]
        gang.shared.mark_read(clocks.tensor + gang.warp_in_cta[leaders] // 4, each, clock)

    def _from_shared(self, rows: np.ndarray, descriptors: np.ndarray, count: int, mn: bool) -> np.ndarray:
        """Bits [n, count, K]."""
        gang = self.gang
        at = np.stack([tensor_cores.wgmma_addresses(int(d), count, self.itemsize, mn) for d in descriptors])
        position = at + (gang.cta_of_warp[rows] * gang.shared.pitch)[:, None, None]
        return gang.shared.planes[self.itemsize][position // self.itemsize]

    def finish(self, rows: np.ndarray, a: np.ndarray, b: np.ndarray, use: np.ndarray) -> None:
        """Rows are whole warpgroups."""
        lead = rows[::4]
        y = self._from_shared(lead, b[::4], self.columns, self.b_mn)[:, None]
        if self.from_registers:
            x = tensor_cores.operand([r[rows] for r in self.a], self.a_fmt)
        else:
            x = self._from_shared(lead, a[::4], 64, self.a_mn)
        x = x.reshape(len(lead), 4, 16, -1)
        if not (use == use[0]).all():
            raise EmulationError(f"{self.i.opcode}: warps disagree on scale-d: {self.i}")
        old = list(self.accumulator.live[:, rows].reshape(-1, len(lead), 4, LANES)) if use[0] else None
        found = tensor_cores.multiply(
            x, y, old, self.a_fmt, self.b_fmt, self.d_fmt,
            saturate=self.saturate, negate_a=self.negate[0:1] == [True], negate_b=self.negate[1:2] == [True],
        )  # fmt: skip
        self.accumulator.finish(rows, [f.reshape(len(rows), LANES) for f in found])


@lru_cache(4096)
def _words(bits: int, count: int, itemsize: int, mn: bool, granule: int) -> np.ndarray:
    """Granules of an operand in a block's shared memory, each once."""
    return np.unique(tensor_cores.wgmma_addresses(bits, count, itemsize, mn) // granule)


def _finish_products(item: dict[str, np.ndarray]) -> None:
    item["product"][0].finish(item["row"], item["a"], item["b"], item["use"])


def _wgmma(gang: Gang, i: Instruction) -> Run:
    if gang.pending.products is None:
        gang.pending.products = _Products(gang)
    groups = gang.pending.products
    assert isinstance(groups, _Products)
    what = i.parts[1]
    if what == "mma_async":
        return _Product(gang, i).issue

    def fence(m: Mask) -> None:
        gang.need_whole_warps(m, i)
        groups.ordered[gang.rows(m)] = True

    if what == "fence":
        return fence

    def commit(m: Mask) -> None:
        groups.committed[gang.rows(m)] += 1

    if what == "commit_group":
        return commit
    if what != "wait_group" or not isinstance(i.operands[0], Immediate):
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    left = i.operands[0].bits

    def wait(m: Mask) -> None:
        rows = gang.rows(m)
        groups.wait(rows, left)
        actor = gang.clocks.tensor + gang.warp_in_cta[rows] // 4
        known = gang.clocks.known
        known[rows, actor] = np.maximum(known[rows, actor], groups.committed[rows] - left)

    return wait


BUILDERS = {"ldmatrix": _ldmatrix, "stmatrix": _stmatrix, "mma": _mma, "wgmma": _wgmma}
