"""Loads, stores and atomics: from registers to memory and back, for all active lanes at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .ptx import Address, EmulationError, Instruction, Operand
from .registers import DTYPES, LANES, PARAMETERS, Mask, elements, unsigned, width

if TYPE_CHECKING:
    from .machine import Gang

    Run = Callable[[Mask], None]


def addresses(gang: Gang, operand: Operand) -> Callable[[Any], np.ndarray]:
    """A function from lanes to int64 addresses."""
    if not isinstance(operand, Address):
        raise EmulationError(f"operand {operand}: expected an address")
    offset = operand.offset
    kind = "b64"
    if getattr(operand.base, "kind", "b64") == "b32":
        kind = "b32"
    base = gang.source(operand.base, kind)
    if base.ndim == 0:  # a symbol
        fixed = np.full(gang.warps * LANES, int(base) + offset, np.int64)
        return lambda lanes: fixed[lanes]
    flat = base.reshape(-1)
    return lambda lanes: flat[lanes].astype(np.int64) + offset


def space(i: Instruction) -> str:
    for name in ("global", "shared", "param", "local", "const"):
        if any(p == name or p.startswith(name + "::") for p in i.parts[1:4]):
            return name
    return "generic"


def shape(i: Instruction) -> tuple[str, int, int]:
    """(type, bytes of an element, elements)"""
    kind = i.parts[-1]
    count = next((int(p[1:]) for p in i.parts if p in ("v2", "v4", "v8")), 1)
    return kind, width(kind), count


def _ld(gang: Gang, i: Instruction) -> Run:
    kind, size, count = shape(i)
    where = space(i)
    if where == "param":
        return _ld_param(gang, i)
    if where not in ("global", "shared") or size * count > 16:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    at = addresses(gang, next(x for x in i.operands[1:] if isinstance(x, Address)))
    element = DTYPES[kind] if kind[0] == "s" else unsigned(size)
    targets = [
        gang.extended(x, kind if kind[0] == "s" else f"b{8 * size}").reshape(-1) for x in elements(i.operands[0])
    ]
    if len(targets) != count:
        raise EmulationError(f"{i.opcode}: got {len(targets)} registers, expected {count}: {i}")

    def run(m: Mask) -> None:
        lanes = gang.lanes(m)
        row = gang.lane_row[lanes]
        if where == "global":
            data = gang.memory.load(at(lanes), size * count, gang.blocks_of(row, i), i)
        else:
            data = gang.shared.read(row, at(lanes), size * count, i)
        parts = data.view(element).reshape(-1, count)
        for j, target in enumerate(targets):
            target[lanes] = parts[:, j]

    return run


def _ld_param(gang: Gang, i: Instruction) -> Run:
    kind, size, count = shape(i)
    kind = kind if kind[0] == "s" else f"b{8 * size}"
    outs = [gang.extended(x, kind) for x in elements(i.operands[0])]
    address = i.operands[1]
    assert isinstance(address, Address)
    if count == 1:
        value = gang.parameter(address, kind)
        if value is not None:
            return lambda m: np.copyto(outs[0], value, where=m)
    at = addresses(gang, address)

    def run(m: Mask) -> None:
        lanes = gang.lanes(m)
        offset = at(lanes) - PARAMETERS
        for j, out in enumerate(outs):
            each = offset[:, None] + j * size + np.arange(size)
            out.reshape(-1)[lanes] = gang.parameters[each].view(DTYPES[kind])[:, 0]

    return run


def _st(gang: Gang, i: Instruction) -> Run:
    _, size, count = shape(i)
    where = space(i)
    if where not in ("global", "shared") or size * count > 16:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    at = addresses(gang, i.operands[0])
    values = [
        np.broadcast_to(gang.source(x, f"b{8 * size}"), (gang.warps, LANES)) for x in elements(i.operands[1])
    ]  # fmt: skip
    dtype = unsigned(size)
    whole = np.complex128 if size * count == 16 else unsigned(size * count)

    def run(m: Mask) -> None:
        lanes = gang.lanes(m)
        row = gang.lane_row[lanes]
        data = np.empty((len(row), count), dtype)
        for j, value in enumerate(values):
            data[:, j] = value.reshape(-1)[lanes] if m is True else value[m]
        if where == "global":
            gang.memory.store(at(lanes), data.view(whole)[:, 0], gang.blocks_of(row, i), i)
        else:
            gang.shared.write(row, at(lanes), data.view(whole)[:, 0], i)

    return run


_ATOMICS: dict[str, Callable[[Any, Any], Any]] = {
    "add": lambda old, x: old + x,
    "min": np.minimum,
    "max": np.maximum,
    "and": lambda old, x: old & x,
    "or": lambda old, x: old | x,
    "xor": lambda old, x: old ^ x,
    "exch": lambda old, x: x,
}


def _atom(gang: Gang, i: Instruction) -> Run:
    """Lane after lane."""
    returns = i.parts[0] == "atom"
    kind = i.parts[-1]
    what = next((p for p in i.parts if p in (*_ATOMICS, "cas")), None)
    where = space(i)
    if what is None or where not in ("global", "shared") or kind not in DTYPES or kind in ("f16x2", "bf16x2", "bf16"):
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    rest = i.operands[1:] if returns else i.operands
    at = addresses(gang, rest[0])
    inputs = [np.broadcast_to(gang.source(x, kind), (gang.warps, LANES)) for x in rest[1:]]
    out = gang.target(i.operands[0] if returns else None, kind).reshape(-1)

    def run(m: Mask) -> None:
        lanes = gang.lanes(m)
        numbers = np.arange(gang.warps * LANES)[lanes]
        row = gang.lane_row[lanes]
        if where == "global":
            plane, index = gang.memory.atomic(at(lanes), width(kind), gang.blocks_of(row, i), i)
        else:
            plane, index = gang.shared.atomic(row, at(lanes), width(kind), i)
        memory = plane.view(out.dtype)
        given = [x.reshape(-1)[lanes] for x in inputs]
        for k, position in enumerate(index):
            old = memory[position]
            if what == "cas":
                memory[position] = given[1][k] if old == given[0][k] else old
            else:
                memory[position] = _ATOMICS[what](old, given[0][k])
            out[numbers[k]] = old

    return run


BUILDERS = {"ld": _ld, "ldu": _ld, "st": _st, "atom": _atom, "red": _atom}
