"""Instructions on bits and bytes: moves, fields, permutations, counts, dot products; and those that only advise."""

from __future__ import annotations

import numpy as np

from .arithmetic import Builder, Run
from .ptx import Instruction, Vector
from .registers import DTYPES, Mask, RegisterFile, width

BUILDERS: dict[str, Builder] = {}


def _selp(file: RegisterFile, i: Instruction) -> Run:
    kind = "b" + i.parts[-1][1:]
    a, b = (file.source(x, kind) for x in i.operands[1:3])
    choice, out = file.source(i.operands[3], "pred"), file.target(i.operands[0], kind)
    return lambda m: np.copyto(out, np.where(choice, a, b), where=m)


def _mov(file: RegisterFile, i: Instruction) -> Run:
    target, source = i.operands[:2]
    kind = i.parts[-1]
    kind = kind if kind == "pred" else "b" + kind[1:]
    if isinstance(target, Vector):
        return _unpack(file, i, kind)
    if isinstance(source, Vector):
        return _pack(file, i, kind)
    a, out = file.source(source, kind), file.target(target, kind)
    return lambda m: np.copyto(out, a, where=m)


def _unpack(file: RegisterFile, i: Instruction, kind: str) -> Run:
    targets = i.operands[0].elements  # type: ignore[union-attr]
    small = f"b{8 * width(kind) // len(targets)}"
    whole = file.source(i.operands[1], kind)
    outs = [(j, file.target(x, small)) for j, x in enumerate(targets) if x is not None]

    def run(m: Mask) -> None:
        parts: np.ndarray = np.ascontiguousarray(np.broadcast_to(whole, outs[0][1].shape)).view(DTYPES[small])
        for j, out in outs:
            np.copyto(out, parts[:, j :: len(targets)], where=m)

    return run


def _pack(file: RegisterFile, i: Instruction, kind: str) -> Run:
    sources = i.operands[1].elements  # type: ignore[union-attr]
    small = f"b{8 * width(kind) // len(sources)}"
    parts: list[np.ndarray] = [file.source(x, small) for x in sources]
    out = file.target(i.operands[0], kind)

    def run(m: Mask) -> None:
        whole: np.ndarray = np.empty((*out.shape, len(parts)), DTYPES[small])
        for j, part in enumerate(parts):
            whole[..., j] = part
        np.copyto(out, whole.view(out.dtype)[..., 0], where=m)

    return run


def _cvta(file: RegisterFile, i: Instruction) -> Run:
    """Addresses are numbers of one space already."""
    a, out = file.source(i.operands[1], "b64"), file.target(i.operands[0], "b64")
    return lambda m: np.copyto(out, a, where=m)


def _bfe(file: RegisterFile, i: Instruction) -> Run:
    """Bits beyond the top read as zero, or as the sign."""
    kind = i.parts[-1]
    bits, dtype = 8 * width(kind), np.dtype(np.int64 if kind[0] == "s" else np.uint64)
    a = file.source(i.operands[1], kind)
    start, length = (file.source(x, "u32") for x in i.operands[2:4])
    out = file.target(i.operands[0], kind)

    def run(m: Mask) -> None:
        first, count = (start & 0xFF).astype(np.int64), (length & 0xFF).astype(np.int64)
        shifted = a.astype(dtype) >> np.minimum(first, 63).astype(dtype)
        if kind[0] == "u":
            shifted = np.where(first >= bits, dtype.type(0), shifted)
            kept = np.where(
                count >= 64, ~np.uint64(0), (np.uint64(1) << np.minimum(count, 63).astype(np.uint64)) - np.uint64(1)
            )
            value = shifted & kept
        else:
            drop = (64 - np.minimum(count, bits)).astype(np.int64)
            value = np.where(count == 0, 0, shifted << np.minimum(drop, 63) >> np.minimum(drop, 63))
        np.copyto(out, value.astype(out.dtype), where=m)

    return run


def _bfi(file: RegisterFile, i: Instruction) -> Run:
    kind = i.parts[-1]
    bits = 8 * width(kind)
    inserted, base = (file.source(x, kind) for x in i.operands[1:3])
    start, length = (file.source(x, "u32") for x in i.operands[3:5])
    out = file.target(i.operands[0], kind)

    def run(m: Mask) -> None:
        first, count = (start & 0xFF).astype(np.uint64), (length & 0xFF).astype(np.uint64)
        count = np.minimum(count, np.uint64(bits) - np.minimum(first, np.uint64(bits)))
        ones = np.where(count >= 64, ~np.uint64(0), (np.uint64(1) << count) - np.uint64(1))
        field = np.where(first >= 64, np.uint64(0), ones << first)
        value = (base.astype(np.uint64) & ~field) | ((inserted.astype(np.uint64) << first) & field)
        np.copyto(out, value.astype(out.dtype), where=m)

    return run


def _prmt(file: RegisterFile, i: Instruction) -> Run:
    """A byte of the result is one of the eight of a and b, or, with bit 3 of its selector, that one's sign."""
    a, b, selector = (file.source(x, "u32") for x in i.operands[1:4])
    out = file.target(i.operands[0], "u32")

    def run(m: Mask) -> None:
        both = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32))
        value = np.zeros((), np.uint32)
        for k in range(4):
            chosen = (selector >> np.uint32(4 * k)) & np.uint32(15)
            byte = (both >> ((chosen & 7).astype(np.uint64) * np.uint64(8))).astype(np.uint32) & np.uint32(255)
            byte = np.where(chosen & 8, np.where(byte & 128, np.uint32(255), np.uint32(0)), byte)
            value = value | (byte << np.uint32(8 * k))
        np.copyto(out, value, where=m)

    return run


def _lop3(file: RegisterFile, i: Instruction) -> Run:
    a, b, c = (file.source(x, "u32") for x in i.operands[1:4])
    table = int(file.source(i.operands[4], "u32"))
    out = file.target(i.operands[0], "u32")

    def run(m: Mask) -> None:
        value = np.zeros(out.shape, np.uint32)
        for row in range(8):
            if table >> row & 1:
                value |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
        np.copyto(out, value, where=m)

    return run


def _count(file: RegisterFile, i: Instruction) -> Run:
    """popc, clz; brev turns the order of the bits."""
    kind = i.parts[-1]
    bits = 8 * width(kind)
    a = file.source(i.operands[1], kind)
    name = i.parts[0]
    out = file.target(i.operands[0], kind if name == "brev" else "u32")

    def run(m: Mask) -> None:
        bytes_ = np.ascontiguousarray(np.broadcast_to(a, out.shape)).view(np.uint8).reshape(*out.shape, bits // 8)
        each = np.unpackbits(bytes_, axis=-1, bitorder="little")  # lowest bit first
        if name == "popc":
            value = each.sum(-1)
        elif name == "clz":
            value = np.where(each.any(-1), np.argmax(each[..., ::-1], axis=-1), bits)
        else:
            value = np.packbits(each[..., ::-1], axis=-1, bitorder="little").view(out.dtype)[..., 0]
        np.copyto(out, value.astype(out.dtype), where=m)

    return run


def _dp4a(file: RegisterFile, i: Instruction) -> Run:
    kinds = i.parts[1:3]
    a, b = (file.source(x, "b32") for x in i.operands[1:3])
    c = file.source(i.operands[3], "s32")
    out = file.target(i.operands[0], "s32")

    def run(m: Mask) -> None:
        parts = [
            np.ascontiguousarray(np.broadcast_to(x, out.shape)).view(np.int8 if kind[0] == "s" else np.uint8)
            for x, kind in zip((a, b), kinds, strict=True)
        ]
        x, y = (p.reshape(*out.shape, 4).astype(np.int64) for p in parts)
        np.copyto(out, ((x * y).sum(-1) + c).astype(np.int32), where=m)

    return run


def _zero(file: RegisterFile, i: Instruction) -> Run:
    """createpolicy: what a cache does with a line changes no value."""
    out = file.target(i.operands[0], "b64")
    return lambda m: np.copyto(out, np.uint64(0), where=m)


def _nothing(file: RegisterFile, i: Instruction) -> Run:
    """Register budgets, prefetches, memory fences."""
    return lambda m: None


BUILDERS |= {
    "mov": _mov,
    "selp": _selp,
    "cvta": _cvta,
    "bfe": _bfe,
    "bfi": _bfi,
    "prmt": _prmt,
    "lop3": _lop3,
    "dp4a": _dp4a,
}
BUILDERS |= dict.fromkeys(("popc", "clz", "brev"), _count)
BUILDERS |= {"createpolicy": _zero}
BUILDERS |= dict.fromkeys(("setmaxnreg", "prefetch", "prefetchu", "membar", "nanosleep"), _nothing)
