"""cvt: between integers of all widths, and every floating-point format, one or two to a register.

Source: PTX ISA 8.7, 9.7.9.21 cvt. Packed results hold the first source in the upper half.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .arithmetic import Builder, Run, flush
from .formats import decode, encode
from .ptx import EmulationError, Instruction
from .registers import DTYPES, Mask, RegisterFile, width

SMALL = {"f16": 2, "bf16": 2, "tf32": 4, "e4m3": 1, "e5m2": 1}  # bytes; formats that numpy does not compute in
ROUNDINGS = {"rn", "rz", "rna", "rm", "rp"}
Convert = Callable[[np.ndarray], np.ndarray]


def _limits(dtype: Any) -> Any:
    return np.iinfo(dtype)


def _is_float(kind: str) -> bool:
    return kind in SMALL or kind in ("f32", "f64")


def _storage(kind: str) -> str:
    """The PTX type that carries the bits."""
    return f"b{8 * SMALL[kind]}" if kind in SMALL else kind


def _reader(kind: str) -> Convert:
    """Bits to values: float32, float64 or an integer type."""
    return (lambda x: decode(x, kind)) if kind in SMALL else (lambda x: x)


def _writer(i: Instruction, to: str, source: str) -> Convert:
    """Values to what `_storage(to)` holds."""
    parts = set(i.parts)
    saturate = bool(parts & {"satfinite", "sat"})
    rounding = next((p for p in i.parts if p in ROUNDINGS), "rn")
    if not _is_float(to):
        return _to_integer(i, to, source)

    def write(x: np.ndarray) -> np.ndarray:
        if "relu" in parts:
            x = np.where(np.isnan(x), x, np.maximum(x, 0))
        if "ftz" in parts and x.dtype == np.float32:
            x = flush(x)
        if parts & {"rni", "rzi", "rmi", "rpi"} and _is_float(source):
            x = _to_whole(i)(x)
        if to in SMALL:
            if "sat" in parts:
                return encode(np.clip(np.nan_to_num(x, nan=0.0), 0, 1), to)
            return encode(x if x.dtype.kind == "f" else x.astype(np.float64), to, rounding, saturate)
        if to == "f32":
            value = _rounded_to_f32(x, rounding)
            return np.clip(np.nan_to_num(value, nan=0.0), np.float32(0), np.float32(1)) if "sat" in parts else value
        return x.astype(np.float64)

    return write


def _rounded_to_f32(x: np.ndarray, rounding: str) -> np.ndarray:
    nearest = x.astype(np.float32)
    if rounding == "rn" or x.dtype == np.float32:
        return nearest
    exact, back = x.astype(np.longdouble), nearest.astype(np.longdouble)
    toward = {"rz": np.float32(0), "rm": np.float32(-np.inf), "rp": np.float32(np.inf)}[rounding]
    wrong = {"rz": np.abs(back) > np.abs(exact), "rm": back > exact, "rp": back < exact}[rounding]
    return np.where(wrong, np.nextafter(nearest, toward), nearest)


def _to_whole(i: Instruction) -> Convert:
    chosen = next((p for p in i.parts if p in ("rni", "rzi", "rmi", "rpi")), "rzi")
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[chosen]


def _to_integer(i: Instruction, to: str, source: str) -> Convert:
    dtype = np.dtype(DTYPES[to])
    limits = _limits(dtype)
    if _is_float(source):
        whole = _to_whole(i)

        def from_float(x: np.ndarray) -> np.ndarray:
            """Out of range goes to the nearest end, NaN to 0."""
            x = whole(x.astype(np.float64))
            low, high = float(limits.min), float(limits.max)
            inside = np.where((x > low) & (x < high), x, 0).astype(dtype)
            return np.where(x >= high, limits.max, np.where(x <= low, limits.min, inside)).astype(dtype)

        return from_float
    if "sat" in i.parts:
        bottom = _limits(np.dtype(DTYPES[source]))
        return lambda x: np.clip(x, max(limits.min, bottom.min), min(limits.max, bottom.max)).astype(dtype)
    return lambda x: x.astype(dtype)


def _cvt(file: RegisterFile, i: Instruction) -> Run:
    if i.parts[1] == "pack":
        return _integers(file, i)
    to, source = i.parts[-2:]
    if to.endswith("x2") or source.endswith("x2"):
        return _pair(file, i, to, source)
    if not {to, source} <= {*DTYPES, *SMALL}:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    read, write = _reader(source), _writer(i, to, source)
    a = file.source(i.operands[1], _storage(source))
    out = file.extended(i.operands[0], _storage(to))
    if not _is_float(to) and not _is_float(source) and "sat" not in i.parts and width(to) == out.dtype.itemsize:
        return lambda m: np.copyto(out, a, casting="unsafe", where=m)
    return lambda m: np.copyto(out, write(read(a)), casting="unsafe", where=m)


def _pair(file: RegisterFile, i: Instruction, to: str, source: str) -> Run:
    """d = (a, b) with a in the upper half; or both halves of a register from one of another format."""
    small, old = to.removesuffix("x2"), source.removesuffix("x2")
    write = _writer(i, small, old)
    size = SMALL.get(small, 4)
    if source.endswith("x2"):
        packed = file.source(i.operands[1], f"b{16 * SMALL[old]}")

        def halves() -> list[np.ndarray]:
            parts = np.ascontiguousarray(np.broadcast_to(packed, out.shape)).view(f"u{SMALL[old]}")
            return [decode(parts[:, j::2], old) for j in (0, 1)]

    else:
        upper, lower = (file.source(x, old) for x in i.operands[1:3])

        def halves() -> list[np.ndarray]:
            return [lower, upper]

    out = file.target(i.operands[0], f"b{16 * size}")
    whole = f"u{2 * size}"

    def run(m: Mask) -> None:
        low, high = (write(x).astype(whole) for x in halves())
        np.copyto(out, low | (high << np.array(8 * size, whole)), where=m)

    return run


def _integers(file: RegisterFile, i: Instruction) -> Run:
    """cvt.pack.sat.convertType.abType{.b32}: two saturated integers on top of what c holds."""
    to, source = i.parts[3:5]
    a, b = (file.source(x, source) for x in i.operands[1:3])
    out = file.target(i.operands[0], "b32")
    limits, bits = _limits(np.dtype(DTYPES[to])), 8 * width(to)
    c = file.source(i.operands[3], "b32") if len(i.operands) > 3 else np.array(0, np.uint32)

    def run(m: Mask) -> None:
        high, low = (np.clip(x, limits.min, limits.max).astype(np.int64) & ((1 << bits) - 1) for x in (a, b))
        both = (high << bits) | low
        value = both if bits == 16 else both | (c.astype(np.int64) << 2 * bits)
        np.copyto(out, value.astype(np.uint64).astype(np.uint32), where=m)

    return run


BUILDERS: dict[str, Builder] = {"cvt": _cvt}
