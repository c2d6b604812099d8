"""The number formats of PTX as bit patterns: decode to float32, encode with PTX's roundings.

    format  bits  exponent  mantissa  largest   infinity  canonical NaN
    f16      16      5         10     65504       yes     0x7fff
    bf16     16      8          7     3.39e38     yes     0x7fff
    tf32     32      8         10     3.40e38     yes     0x7fffffff   the upper 19 of 32 bits
    e4m3      8      4          3     448         no      0x7f
    e5m2      8      5          2     57344       yes     0x7f
    f32      32      8         23     3.40e38     yes     0x7fffffff
    f64      64     11         52     1.80e308    yes     as it came
    ue8m0     8      8          0     2^127       no      0xff         scales of blocks: powers of two; decoded only

Source: PTX ISA 9.0, 5.2.3 "Alternate Floating-Point Data Formats" and 9.7.9.21 "cvt" (rounding, .satfinite, canonical
NaN).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Format(NamedTuple):
    storage: type[np.unsignedinteger]
    mantissa: int
    smallest: int  # exponent of the smallest normal number
    shift: int  # unused low bits of the storage
    largest: int  # bits, without sign and shift, of the largest finite number
    infinity: int  # likewise; -1 where the format has none
    nan: int  # with shift


FORMATS = {
    "f16": Format(np.uint16, 10, -14, 0, 0x7BFF, 0x7C00, 0x7FFF),
    "bf16": Format(np.uint16, 7, -126, 0, 0x7F7F, 0x7F80, 0x7FFF),
    "tf32": Format(np.uint32, 10, -126, 13, 0x3FBFF, 0x3FC00, 0x7FFFFFFF),
    "e4m3": Format(np.uint8, 3, -6, 0, 0x7E, -1, 0x7F),
    "e5m2": Format(np.uint8, 2, -14, 0, 0x7B, 0x7C, 0x7F),
    "f32": Format(np.uint32, 23, -126, 0, 0x7F7FFFFF, 0x7F800000, 0x7FFFFFFF),
}


def _decode_by_value(fmt: str) -> np.ndarray:
    """Every bit pattern of an 8-bit format, read by its definition."""
    f = FORMATS[fmt]
    bits = np.arange(256)
    magnitude, sign = bits & 0x7F, np.where(bits & 0x80, -1.0, 1.0)
    exponent, fraction = magnitude >> f.mantissa, magnitude & ((1 << f.mantissa) - 1)
    implicit = np.where(exponent > 0, 1 << f.mantissa, 0)
    value = np.ldexp((implicit + fraction).astype(np.float64), np.maximum(exponent, 1) - 1 + f.smallest - f.mantissa)
    value = np.where(magnitude > f.largest, np.inf if f.infinity > 0 else np.nan, value)
    value = np.where(magnitude > max(f.infinity, f.largest), np.nan, value)
    return (sign * value).astype(np.float32)


_TABLES = {fmt: _decode_by_value(fmt) for fmt in ("e4m3", "e5m2")}


def decode(bits: np.ndarray, fmt: str) -> np.ndarray:
    """The values of bit patterns.

    Args:
        bits: unsigned integers of at least the format's width, any shape; higher bits are ignored. tf32 ignores its
            low 13 bits, as the tensor cores do.
        fmt: "f16", "bf16", "tf32", "e4m3", "e5m2", "f32", "f64" or "ue8m0".

    Returns: float32 (float64 for "f64"), exact.

    Raises: ValueError on another format.
    """
    if fmt == "f64":
        return np.asarray(bits, np.uint64).view(np.float64)
    if fmt in _TABLES:
        return _TABLES[fmt][np.asarray(bits) & 0xFF]
    if fmt == "ue8m0":
        exponent = np.asarray(bits).astype(np.int32) & 0xFF
        return np.where(exponent == 0xFF, np.nan, np.ldexp(1.0, exponent - 127)).astype(np.float32)
    if fmt == "f16":
        return np.asarray(bits).astype(np.uint16).view(np.float16).astype(np.float32)
    if fmt == "bf16":
        return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)
    if fmt == "tf32":
        return (np.asarray(bits).astype(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)
    if fmt == "f32":
        return np.asarray(bits).astype(np.uint32).view(np.float32)
    raise ValueError(f"fmt: got {fmt!r}, expected one of {[*FORMATS, 'f64', 'ue8m0']}")


def _encode_numpy(x: np.ndarray, fmt: str) -> np.ndarray:
    """To nearest f16 or f32, which numpy has."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        narrow = np.atleast_1d(x.astype(np.float16 if fmt == "f16" else np.float32)).reshape(x.shape)
    return np.where(np.isnan(x), FORMATS[fmt].storage(FORMATS[fmt].nan), narrow.view(FORMATS[fmt].storage))


def _encode_float32(x: np.ndarray, fmt: str, rounding: str) -> np.ndarray:
    """float32 to bf16 or tf32, which share its exponent: a carry out of the dropped bits rounds."""
    f = FORMATS[fmt]
    dropped = 16 if fmt == "bf16" else f.shift
    half = 1 << (dropped - 1)
    u = np.atleast_1d(x).view(np.uint32).reshape(x.shape)
    if rounding == "rn":  # one less than half plus the last kept bit sends ties to the even neighbour
        u = u + ((u >> dropped) & 1) + (half - 1)
    elif rounding == "rna":
        u = u + half
    return np.where(np.isnan(x), f.nan, u >> dropped << f.shift).astype(f.storage)


def encode(x: np.ndarray, fmt: str, rounding: str = "rn", saturate: bool = False) -> np.ndarray:
    """The bit patterns of values.

    Args:
        x: float32 or float64, any shape.
        fmt: "f16", "bf16", "tf32", "e4m3", "e5m2" or "f32" (of a float64); "f64" keeps the bits of a float64.
        rounding: "rn" to nearest, ties to even; "rz" toward zero; "rna" to nearest, ties away from zero.
        saturate: .satfinite: what is larger than the largest finite number, infinity included, becomes that number.
            Without it "rn" and "rna" overflow to infinity (e4m3: NaN, it has no infinity).

    Returns: unsigned integers of the format's storage width. NaN becomes the canonical NaN.

    Raises: ValueError on another format or rounding.
    """
    x = np.asarray(x)
    if fmt == "f64":
        return x.astype(np.float64).view(np.uint64)
    if fmt not in FORMATS:
        raise ValueError(f"fmt: got {fmt!r}, expected one of {[*FORMATS, 'f64']}")
    if rounding not in ("rn", "rz", "rna"):
        raise ValueError(f"rounding: got {rounding!r}, expected 'rn', 'rz' or 'rna'")
    f = FORMATS[fmt]
    if rounding == "rn" and fmt in ("f16", "f32") and not saturate:
        return _encode_numpy(x, fmt)
    if x.dtype == np.float32 and fmt in ("bf16", "tf32") and not saturate:
        return _encode_float32(x, fmt, rounding)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        x = x.astype(np.float64)
    finite = np.where(np.isfinite(x), np.abs(x), 0.0)
    # One unit of the last place that the format keeps at this size; a power of two, so the division is exact.
    exponent = np.where(finite > 0, np.maximum(np.frexp(finite)[1] - 1, f.smallest), f.smallest)
    units = np.ldexp(finite, f.mantissa - exponent)
    if rounding == "rn":
        count = np.rint(units)
    else:
        count = np.trunc(units)
        if rounding == "rna":
            count += units - count >= 0.5
    # A number is its exponent field times 2^mantissa plus its units; a carry moves into the exponent by itself.
    bits = ((exponent - f.smallest).astype(np.int64) << f.mantissa) + count.astype(np.int64)
    bits = np.where(bits > f.largest, f.largest if saturate or rounding == "rz" else f.infinity, bits)
    bits = np.where(np.isinf(x), f.largest if saturate else f.infinity, bits)
    sign_bit = np.int64(1) << (8 * np.dtype(f.storage).itemsize - 1)
    signed = (bits << f.shift) | np.where(np.signbit(x), sign_bit, 0)
    return np.where(np.isnan(x) | (bits < 0), f.nan, signed).astype(f.storage)
