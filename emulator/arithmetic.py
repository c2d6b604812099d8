"""Integer, floating-point, logic and comparison instructions.

A builder gets the register file and an instruction, and returns what runs it under a mask. Numpy's `out` and `where`
write straight into the register. `.ftz` flushes subnormal inputs and results; approximations (ex2, lg2, rsqrt, ...) are
exact to rounding. fma.f32 is computed in float64 and rounded once more: off by half an ulp at most in rare ties.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from .formats import decode, encode
from .ptx import EmulationError, Instruction, Pair
from .registers import DTYPES, Mask, RegisterFile, width

Run = Callable[[Mask], None]
Builder = Callable[[RegisterFile, Instruction], Run]
BUILDERS: dict[str, Builder] = {}


def instruction(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


_HALF = ("f16", "bf16", "f16x2", "bf16x2")
_SMALLEST_NORMAL = np.float32(2.0**-126)


def flush(x: np.ndarray) -> np.ndarray:
    """float32 with subnormals as zeros of their sign."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, np.copysign(np.float32(0), x), x)


def _plain(file: RegisterFile, i: Instruction, ufunc: Callable[..., Any], count: int) -> Run:
    """d = ufunc(a, ...) in the instruction's own type."""
    kind = i.parts[-1]
    if kind in _HALF:
        return _in_halves(file, i, ufunc, count)
    inputs = [file.source(x, kind) for x in i.operands[1 : 1 + count]]
    out = file.target(i.operands[0], kind)
    if kind == "f32" and ("ftz" in i.parts or "sat" in i.parts):
        return _adjusted(i, ufunc, inputs, out)

    def run(m: Mask) -> None:
        ufunc(*inputs, out=out, where=m)

    return run


def _adjusted(i: Instruction, function: Callable[..., Any], inputs: list[np.ndarray], out: np.ndarray) -> Run:
    ftz, sat = "ftz" in i.parts, "sat" in i.parts

    def run(m: Mask) -> None:
        value = function(*(flush(x) if ftz else x for x in inputs))
        if ftz:
            value = flush(value)
        if sat:
            value = np.clip(np.nan_to_num(value, nan=0.0), np.float32(0), np.float32(1))
        np.copyto(out, value, where=m)

    return run


def _in_halves(file: RegisterFile, i: Instruction, function: Callable[..., Any], count: int) -> Run:
    """f16 and bf16, one or two to a register: computed in float64 and rounded once."""
    kind = i.parts[-1]
    fmt = kind.removesuffix("x2")
    each = 2 if kind.endswith("x2") else 1
    bits = "b32" if each == 2 else "b16"
    inputs = [file.source(x, bits) for x in i.operands[1 : 1 + count]]
    out = file.target(i.operands[0], bits)
    relu = "relu" in i.parts

    def halves(x: np.ndarray) -> np.ndarray:
        x = np.ascontiguousarray(np.broadcast_to(x, out.shape))
        return decode(x.view(np.uint16).reshape(*out.shape, each), fmt).astype(np.float64)

    def run(m: Mask) -> None:
        value = function(*map(halves, inputs))
        if relu:
            value = np.maximum(value, 0.0)
        packed = np.ascontiguousarray(encode(value.astype(np.float32), fmt)).view(out.dtype)
        np.copyto(out, packed[..., 0], where=m)

    return run


def _saturating(file: RegisterFile, i: Instruction, ufunc: Callable[..., Any]) -> Run:
    a, b = (file.source(x, "s32") for x in i.operands[1:3])
    out = file.target(i.operands[0], "s32")

    def run(m: Mask) -> None:
        wide = ufunc(a.astype(np.int64), b.astype(np.int64))
        np.copyto(out, np.clip(wide, -(2**31), 2**31 - 1).astype(np.int32), where=m)

    return run


@instruction("add", "sub")
def _add(file: RegisterFile, i: Instruction) -> Run:
    ufunc = np.add if i.parts[0] == "add" else np.subtract
    if "sat" in i.parts and i.parts[-1] == "s32":
        return _saturating(file, i, ufunc)
    return _plain(file, i, ufunc, 2)


@instruction("neg", "abs", "not", "cnot")
def _unary(file: RegisterFile, i: Instruction) -> Run:
    if i.parts[0] == "cnot":
        return _plain(file, i, lambda a, out, where: np.copyto(out, a == 0, where=where), 1)
    if i.parts[0] == "not" and i.parts[-1] == "pred":
        return _plain(file, i, np.logical_not, 1)
    return _plain(file, i, {"neg": np.negative, "abs": np.absolute, "not": np.invert}[i.parts[0]], 1)


@instruction("min", "max")
def _extremum(file: RegisterFile, i: Instruction) -> Run:
    """A number wins against NaN, unless .NaN says otherwise."""
    smallest = i.parts[0] == "min"
    strict = "NaN" in i.parts or i.parts[-1][0] in "us"
    count = len(i.operands) - 1
    ufunc = (np.minimum if smallest else np.maximum) if strict else (np.fmin if smallest else np.fmax)
    if count == 2:
        return _plain(file, i, ufunc, 2)

    def three(a: np.ndarray, b: np.ndarray, c: np.ndarray, out: np.ndarray, where: Mask = True) -> None:
        ufunc(ufunc(a, b), c, out=out, where=where)

    return _plain(file, i, three, 3)


@instruction("mul")
def _mul(file: RegisterFile, i: Instruction) -> Run:
    if "wide" in i.parts:
        return _wide(file, i, None)
    if "hi" not in i.parts:
        return _plain(file, i, np.multiply, 2)
    return _high(file, i)


def _wide(file: RegisterFile, i: Instruction, addend: Any) -> Run:
    kind = i.parts[-1]
    double = f"{kind[0]}{2 * int(kind[1:])}"
    dtype = DTYPES[double]
    a, b = (file.source(x, kind) for x in i.operands[1:3])
    out = file.target(i.operands[0], double)
    if addend is None:
        return lambda m: np.multiply(a, b, out=out, dtype=dtype, where=m)
    c = file.source(addend, double)

    def run(m: Mask) -> None:
        np.add(np.multiply(a, b, dtype=dtype), c, out=out, where=m)

    return run


def _high(file: RegisterFile, i: Instruction) -> Run:
    kind = i.parts[-1]
    bits = 8 * width(kind)
    a, b = (file.source(x, kind) for x in i.operands[1:3])
    out = file.target(i.operands[0], kind)

    def run(m: Mask) -> None:
        if bits == 64:  # no wider integer in numpy
            high: Any = (a.astype(object) * b.astype(object) >> 64).astype(out.dtype)
        else:
            wide = np.int64 if kind[0] == "s" else np.uint64
            high = (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(out.dtype)
        np.copyto(out, high, where=m)

    return run


@instruction("mad", "fma")
def _mad(file: RegisterFile, i: Instruction) -> Run:
    kind = i.parts[-1]
    if "wide" in i.parts:
        return _wide(file, i, i.operands[3])
    if kind == "f32":
        return _fma(file, i)
    if kind == "f64":
        return _fma64(file, i)
    if kind in _HALF:
        return _in_halves(file, i, lambda a, b, c: a * b + c, 3)
    if "lo" not in i.parts:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    a, b, c = (file.source(x, kind) for x in i.operands[1:4])
    out = file.target(i.operands[0], kind)

    def run(m: Mask) -> None:
        np.add(np.multiply(a, b), c, out=out, where=m)

    return run


def _fma(file: RegisterFile, i: Instruction) -> Run:
    inputs = [file.source(x, "f32") for x in i.operands[1:4]]
    out = file.target(i.operands[0], "f32")
    x, y = file.scratch(np.float64, 0), file.scratch(np.float64, 1)
    if "ftz" in i.parts or "sat" in i.parts:
        return _adjusted(i, lambda a, b, c: (a.astype(np.float64) * b + c).astype(np.float32), inputs, out)
    a, b, c = inputs

    def run(m: Mask) -> None:
        np.copyto(x, a)
        np.copyto(y, b)
        np.multiply(x, y, out=x)
        np.copyto(y, c)
        np.add(x, y, out=x)
        np.copyto(out, x, casting="same_kind", where=m)

    return run


def _fma64(file: RegisterFile, i: Instruction) -> Run:
    a, b, c = (file.source(x, "f64") for x in i.operands[1:4])
    out = file.target(i.operands[0], "f64")

    def run(m: Mask) -> None:
        exact = a.astype(np.longdouble) * b + c  # 64 bits of mantissa
        np.copyto(out, exact.astype(np.float64), where=m)

    return run


@instruction("div", "rem")
def _div(file: RegisterFile, i: Instruction) -> Run:
    kind = i.parts[-1]
    if kind[0] == "f":
        return _plain(file, i, np.divide, 2)
    remainder = i.parts[0] == "rem"
    a, b = (file.source(x, kind) for x in i.operands[1:3])
    out = file.target(i.operands[0], kind)

    def run(m: Mask) -> None:
        """Toward zero; by zero it is undefined, and numpy says 0."""
        if kind[0] == "u":
            value = np.remainder(a, b) if remainder else np.floor_divide(a, b)
        else:
            value = np.fmod(a, b)
            if not remainder:
                value = np.floor_divide(a - value, b)
        np.copyto(out, value, where=m)

    return run


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "ex2": np.exp2,
    "lg2": np.log2,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "tanh": np.tanh,
    "sin": np.sin,
    "cos": np.cos,
}


@instruction(*_FUNCTIONS)
def _function(file: RegisterFile, i: Instruction) -> Run:
    function, kind = _FUNCTIONS[i.parts[0]], i.parts[-1]
    if kind in _HALF:
        return _in_halves(file, i, function, 1)
    a, out = file.source(i.operands[1], kind), file.target(i.operands[0], kind)
    if kind == "f64":
        return lambda m: np.copyto(out, function(a), where=m)
    if i.parts[0] in ("ex2", "lg2", "tanh", "sin", "cos"):  # numpy's are more accurate than the GPU's
        return _adjusted(i, function, [a], out)
    return _adjusted(i, lambda x: function(x.astype(np.float64)).astype(np.float32), [a], out)


@instruction("and", "or", "xor")
def _logic(file: RegisterFile, i: Instruction) -> Run:
    return _plain(file, i, {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[i.parts[0]], 2)


@instruction("shl", "shr")
def _shift(file: RegisterFile, i: Instruction) -> Run:
    """Amounts beyond the width shift everything out, as in numpy."""
    kind = i.parts[-1]
    a, amount = file.source(i.operands[1], kind), file.source(i.operands[2], "u32")
    out = file.target(i.operands[0], kind)
    ufunc = np.left_shift if i.parts[0] == "shl" else np.right_shift
    largest = 8 * out.dtype.itemsize
    if amount.ndim == 0:
        constant = np.minimum(amount, largest).astype(out.dtype)
        return lambda m: ufunc(a, constant, out=out, where=m)
    return lambda m: ufunc(a, np.minimum(amount, largest).astype(out.dtype), out=out, where=m)


@instruction("shf")
def _funnel(file: RegisterFile, i: Instruction) -> Run:
    low, high, amount = (file.source(x, "u32") for x in i.operands[1:4])
    out = file.target(i.operands[0], "u32")
    wrap, left = "wrap" in i.parts, "l" in i.parts

    def run(m: Mask) -> None:
        n = (amount & 31 if wrap else np.minimum(amount, 32)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        value = both << n >> np.uint64(32) if left else both >> n
        np.copyto(out, value.astype(np.uint32), where=m)

    return run


_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_OPPOSITE = {"lt": "ge", "le": "gt", "gt": "le", "ge": "lt"}


def _comparison(name: str, floating: bool) -> Callable[..., Any]:
    """A function of (a, b, out, where)."""
    if not floating:
        return _COMPARISONS[name]
    if name in ("lt", "le", "gt", "ge", "eq"):
        return _COMPARISONS[name]  # false with NaN, as numpy's
    if name in ("ltu", "leu", "gtu", "geu"):
        opposite = _COMPARISONS[_OPPOSITE[name[:-1]]]
        return lambda a, b, out, where: np.logical_not(opposite(a, b), out=out, where=where)
    if name == "neu":
        return np.not_equal
    unordered = lambda a, b: np.isnan(a) | np.isnan(b)  # noqa: E731
    results: dict[str, Callable[..., Any]] = {
        "ne": lambda a, b: np.not_equal(a, b) & ~unordered(a, b),
        "equ": lambda a, b: np.equal(a, b) | unordered(a, b),
        "nan": unordered,
        "num": lambda a, b: ~unordered(a, b),
    }
    result = results[name]
    return lambda a, b, out, where: np.copyto(out, result(a, b), where=where)


@instruction("setp")
def _setp(file: RegisterFile, i: Instruction) -> Run:
    kind = i.parts[-1]
    compare = _comparison(i.parts[1], kind[0] == "f" or kind == "bf16")
    if kind in _HALF:
        raise EmulationError(f"no instruction {i.opcode}: {i}")
    a, b = (file.source(x, kind) for x in i.operands[1:3])
    target = i.operands[0]
    combine = next((p for p in i.parts[2:] if p in ("and", "or", "xor")), None)
    if combine is None and not isinstance(target, Pair):
        out = file.target(target, "pred")
        return lambda m: compare(a, b, out=out, where=m)
    first, second = (target.first, target.second) if isinstance(target, Pair) else (target, None)
    out, other = file.target(first, "pred"), file.target(second, "pred")
    with_predicate = file.source(i.operands[3], "pred") if combine else np.array(True)
    ufunc = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}[combine or "and"]

    def run(m: Mask) -> None:
        result = np.empty(out.shape, np.bool_)
        compare(a, b, out=result, where=True)
        both = ufunc(result, with_predicate), ufunc(~result, with_predicate)
        np.copyto(out, both[0], where=m)
        np.copyto(other, both[1], where=m)

    return run
