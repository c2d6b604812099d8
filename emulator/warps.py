"""Instructions across the lanes of a warp: shuffles, votes, reductions, elections."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .ptx import EmulationError, Immediate, Instruction, Pair
from .registers import LANES, Mask

if TYPE_CHECKING:
    from collections.abc import Callable

    from .machine import Gang

    Run = Callable[[Mask], None]

_LANE = np.arange(LANES)


def _shfl(gang: Gang, i: Instruction) -> Run:
    """A lane whose source lies outside its segment keeps its own value."""
    mode = i.parts[2]
    target = i.operands[0]
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    a, out = gang.source(i.operands[1], "b32"), gang.target(first, "b32")
    valid = gang.target(second, "pred")
    amount, clamp = (gang.source(x, "u32") for x in i.operands[2:4])
    constant = isinstance(i.operands[2], Immediate) and isinstance(i.operands[3], Immediate)
    shape = (gang.warps, LANES)

    def sources() -> tuple[np.ndarray, np.ndarray]:
        b, c = amount.astype(np.int64) & 31, clamp.astype(np.int64)
        segment, limit = (c >> 8) & 31, c & 31
        last = (_LANE & segment) | (limit & ~segment)
        if mode == "up":
            source = _LANE - b
            inside = source >= last
        elif mode == "idx":
            source = (_LANE & segment) | (b & ~segment & 31)
            inside = source <= last
        else:
            source = _LANE ^ b if mode == "bfly" else _LANE + b
            inside = source <= last
        return np.where(inside, source, _LANE), inside

    fixed = sources() if constant else None
    columns = fixed[0].reshape(-1) if fixed else None
    wants_valid = second is not None

    def run(m: Mask) -> None:
        gang.need_whole_warps(m, i)
        if columns is not None and a.shape == shape:
            np.copyto(out, a.take(columns, axis=1), where=m)
            if wants_valid:
                np.copyto(valid, fixed[1], where=m)  # type: ignore[index]
            return
        source, inside = sources()
        value = np.take_along_axis(np.broadcast_to(a, shape), np.broadcast_to(source, shape), axis=1)
        np.copyto(out, value, where=m)
        if wants_valid:
            np.copyto(valid, inside, where=m)

    return run


def _vote(gang: Gang, i: Instruction) -> Run:
    what = i.parts[2]
    source = i.operands[1]
    holds = gang.source(source, "pred")
    out = gang.target(i.operands[0], "b32" if what == "ballot" else "pred")

    def run(m: Mask) -> None:
        active = np.broadcast_to(m, (gang.warps, LANES))
        yes = np.where(active, holds, False)
        if what == "ballot":
            value = (yes.astype(np.uint64) << _LANE.astype(np.uint64)).sum(axis=1).astype(np.uint32)
        elif what == "any":
            value = yes.any(axis=1)
        elif what == "all":
            value = (yes == active).all(axis=1)
        elif what == "uni":
            value = (yes == active).all(axis=1) | ~yes.any(axis=1)
        else:
            raise EmulationError(f"no instruction {i.opcode}: {i}")
        np.copyto(out, value[:, None], where=m)

    return run


_REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}  # fmt: skip


def _redux(gang: Gang, i: Instruction) -> Run:
    """Over all lanes of a warp."""
    kind = i.parts[-1]
    a, out = gang.source(i.operands[1], kind), gang.target(i.operands[0], kind)
    ufunc = _REDUCTIONS[i.parts[2]]
    if kind == "f32":
        ufunc = {"min": np.fmin, "max": np.fmax}[i.parts[2]] if "NaN" not in i.parts else ufunc

    def run(m: Mask) -> None:
        gang.need_whole_warps(m, i)
        value = np.broadcast_to(a, out.shape)
        if "abs" in i.parts:
            value = np.abs(value)
        np.copyto(out, ufunc.reduce(value, axis=1, keepdims=True, dtype=out.dtype), where=m)

    return run


def _elect(gang: Gang, i: Instruction) -> Run:
    """The lowest active lane."""
    pair = i.operands[0]
    assert isinstance(pair, Pair)
    lane, chosen = gang.target(pair.first, "b32"), gang.target(pair.second, "pred")

    def run(m: Mask) -> None:
        leader = np.zeros((gang.warps, 1), np.int64) if m is True else m.argmax(axis=1)[:, None]
        np.copyto(lane, leader.astype(np.uint32), where=m)
        np.copyto(chosen, leader == _LANE, where=m)

    return run


def _activemask(gang: Gang, i: Instruction) -> Run:
    out = gang.target(i.operands[0], "b32")

    def run(m: Mask) -> None:
        active = np.broadcast_to(m, (gang.warps, LANES)).astype(np.uint64)
        np.copyto(out, (active << _LANE.astype(np.uint64)).sum(axis=1, keepdims=True).astype(np.uint32), where=m)

    return run


def _bar_warp(gang: Gang, i: Instruction) -> Run:
    """The lanes of a warp run in step."""
    return lambda m: gang.need_whole_warps(m, i)


BUILDERS = {
    "shfl": _shfl,
    "vote": _vote,
    "redux": _redux,
    "elect": _elect,
    "activemask": _activemask,
    "bar": _bar_warp,
    "barrier": _bar_warp,
}
