"""What the tensor-core instructions compute and where their operands lie: mma.sync, ldmatrix, stmatrix, wgmma.

A fragment is a list of registers, each an unsigned array [..., 32] whose last axis is the lane; leading axes are
warps. One pattern covers all types: lane l belongs to group g = l // 4 with t = l % 4, a register packs e neighbours
along K, and

    A (16 x K)  register r: row g + 8 (r % 2), k = 4 e (r // 2) + e t + 0..e-1
    B (K x N)   register r: column g, k = 4 e r + e t + 0..e-1
    C (16 x N)  value v: row g + 8 (v // 2 % 2), column 8 (v // 4) + 2 t + v % 2; f16 packs two values in a register

Rounding. Products are exact; a row's products and the accumulator are summed in float64 and rounded once to the
accumulator's type. Tensor cores align the products to the largest exponent, drop what falls below a few guard bits,
and truncate the sum (Fasi, Higham, Mikaitis, Pranesh, "Numerical behavior of NVIDIA tensor cores", PeerJ Computer
Science 7, 2021): per instruction they differ from this by about one unit of the last place of the largest term. FP8
differs far more, see `hopper_fp8`.

Source: PTX ISA 9.0, 9.7.14.5 (fragments of mma, ldmatrix, stmatrix) and 9.7.15.5 (wgmma: registers, descriptors,
canonical layouts).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from math import prod
from typing import NamedTuple

import numpy as np

from emulator.formats import decode, encode
from emulator.tma import swizzle

BITS = {"f16": 16, "bf16": 16, "tf32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "f64": 64}
GROUP, THREAD = np.divmod(np.arange(32), 4)


def operand(registers: Sequence[np.ndarray], fmt: str, is_b: bool = False, rows: int = 16) -> np.ndarray:
    """A fragment of A or B as a matrix of bit patterns, [..., rows of A or columns of B, K].

    Args:
        registers: of 32 bits (f64: 64), each [..., 32].
        fmt: "f16", "bf16", "tf32", "e4m3", "e5m2", "s8", "u8" or "f64".
        is_b: the fragment is of B; it has 8 columns.
        rows: of A, 16 or (m8n8k4 of f64) 8.
    """
    rows, bits = 8 if is_b else rows, BITS[fmt]
    elements = np.stack(registers, axis=-2).view(f"u{bits // 8}")
    lead, each = elements.shape[:-2], max(32 // bits, 1)
    # axes 1.. : block of K, block of rows, g, t, element -> block of rows, g, block of K, t, element
    matrix = elements.reshape(prod(lead), -1, rows // 8, 8, 4, each).transpose(0, 2, 3, 1, 4, 5)
    return matrix.reshape(*lead, rows, -1)


def accumulator(registers: Sequence[np.ndarray], fmt: str, rows: int = 16) -> np.ndarray:
    """A fragment of C or D as a matrix of values, [..., rows, N]: float32, float64 or (s32) int64.

    Args:
        registers: each [..., 32]; f16 holds two values in one.
        fmt: "f32", "f16", "s32" or "f64".
        rows: 16 or 8.
    """
    values = np.stack(registers, axis=-2)
    lead = values.shape[:-2]
    # axes 1.. : block of columns, block of rows, g, t, element -> block of rows, g, block of columns, t, element
    if fmt == "f16":
        values = values.view(np.uint16).reshape(prod(lead), -1, rows // 8, 8, 4, 2).transpose(0, 2, 3, 1, 4, 5)
    else:  # a register of its own for each of the two elements
        values = values.reshape(prod(lead), -1, rows // 8, 2, 8, 4).transpose(0, 2, 4, 1, 5, 3)
    matrix = values.reshape(*lead, rows, -1)
    return matrix.view(np.int32).astype(np.int64) if fmt == "s32" else decode(matrix, fmt)


def accumulator_registers(matrix: np.ndarray, fmt: str) -> list[np.ndarray]:
    """The inverse of `accumulator`, of bit patterns [..., rows, N]: registers, each [..., 32]."""
    *lead, rows, columns = matrix.shape
    values = matrix.reshape(prod(lead), rows // 8, 8, columns // 8, 4, 2)
    if fmt == "f16":
        values = np.ascontiguousarray(values.transpose(0, 3, 1, 2, 4, 5)).view(np.uint32)
    else:
        values = values.transpose(0, 3, 1, 5, 2, 4)
    registers = values.reshape(*lead, -1, 32)
    return [registers[..., r, :] for r in range(registers.shape[-2])]


def _values(bits: np.ndarray, fmt: str) -> np.ndarray:
    if fmt in ("s8", "u8"):
        return bits.view(np.int8 if fmt == "s8" else np.uint8).astype(np.float64)
    with np.errstate(invalid="ignore"):  # a signalling NaN
        return decode(bits, fmt).astype(np.float64)


def _hopper_fp8_sum(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """Terms aligned to the largest, 14 of its bits kept of each, the sum truncated to 13 mantissa bits."""
    terms = a[..., :, None, :] * b[..., None, :, :]
    terms = np.concatenate([terms, c[..., None].astype(np.float64)], axis=-1)
    exponent = np.frexp(np.abs(terms).max(axis=-1, keepdims=True))[1]
    unit = np.ldexp(1.0, exponent - 14)
    total = (np.trunc(terms / unit) * unit).sum(axis=-1)
    unit = np.ldexp(1.0, np.frexp(total)[1] - 14)
    kept = np.trunc(total / unit) * unit
    return np.where(np.isfinite(terms).all(axis=-1), kept, terms.sum(axis=-1))


def multiply(
    a: np.ndarray,
    b: np.ndarray,
    c: Sequence[np.ndarray] | None,
    a_fmt: str,
    b_fmt: str,
    d_fmt: str = "f32",
    *,
    saturate: bool = False,
    negate_a: bool = False,
    negate_b: bool = False,
    scales: tuple[np.ndarray, np.ndarray] | None = None,
    hopper_fp8: bool = False,
) -> list[np.ndarray]:
    """D = A B + C on matrices of bit patterns; accumulators in registers. This is wgmma; mma.sync brings its operands
    as registers.

    Args:
        a: [..., M, K], M = 16 (or 8), one warp's rows; K of one instruction. wgmma has four warps, each with 16 of 64
            rows.
        b: [..., N, K], shared by the warps where it has fewer axes.
        c: accumulator registers, each [..., 32]; None where scale-d is false.
        a_fmt, b_fmt: of the operands.
        d_fmt: "f32", "f16", "s32" or "f64", of C and D.
        saturate: .satfinite of s32: clamp instead of wrapping around.
        negate_a, negate_b: imm-scale-a, imm-scale-b of -1.
        scales: one per row of A [..., M] and per column of B [..., N], multiplied into the products (.block_scale).
        hopper_fp8: sum FP8 products as Hopper is described to: aligned to the largest term, 14 bits kept, a 22-bit
            accumulator (8 exponent, 13 mantissa bits) instead of fp32.

    Returns: the registers of D, as many as C has.

    Source of hopper_fp8: DeepSeek-V3, arXiv 2412.19437, 3.3.2 and 3.5.2 (alignment, 14 bits); SageAttention2, arXiv
        2411.10958, 3.2
    (the 22-bit accumulator, also of sm_89).
    """
    x, y = _values(a, a_fmt), _values(b, b_fmt)
    if negate_a != negate_b:
        x = -x
    if scales is not None:  # powers of two: exact
        x, y = x * scales[0][..., None], y * scales[1][..., None]
    old = accumulator(c, d_fmt, x.shape[-2]) if c is not None else np.zeros((*x.shape[:-1], y.shape[-2]))
    with np.errstate(invalid="ignore", over="ignore"):  # infinities and NaN are values like others
        if hopper_fp8 and {a_fmt, b_fmt} <= {"e4m3", "e5m2"}:
            total = _hopper_fp8_sum(x, y, old)
        else:
            total = x @ np.swapaxes(y, -1, -2) + old
        if d_fmt == "s32":
            if saturate:
                total = np.clip(total, -(2.0**31), 2.0**31 - 1)
            bits = total.astype(np.int64).astype(np.uint32)
        else:
            bits = encode(total, d_fmt)
    return accumulator_registers(bits, d_fmt)


def mma_sync(
    a: Sequence[np.ndarray],
    b: Sequence[np.ndarray],
    c: Sequence[np.ndarray],
    a_fmt: str,
    b_fmt: str,
    d_fmt: str = "f32",
    *,
    saturate: bool = False,
    scales: tuple[np.ndarray, np.ndarray] | None = None,
    hopper_fp8: bool = False,
    rows: int = 16,
) -> list[np.ndarray]:
    """mma.sync.aligned.m16n8kX.row.col (m8n8k4 of f64: rows=8); K follows from the number of registers and the type.

    Args:
        a, b, c: fragments: lists of uint32 arrays [..., 32] (f64: uint64), leading axes are warps.
        a_fmt, b_fmt, d_fmt, saturate, scales, hopper_fp8: see `multiply`.
        rows: of A.

    Returns: the registers of D.

    Raises: ValueError where A and B do not have the same K.
    """
    x, y = operand(a, a_fmt, rows=rows), operand(b, b_fmt, is_b=True)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"b: got {len(b)} registers, K = {y.shape[-1]}, expected K = {x.shape[-1]} as A has")
    return multiply(x, y, c, a_fmt, b_fmt, d_fmt, saturate=saturate, scales=scales, hopper_fp8=hopper_fp8)


def block_scales(register: np.ndarray, byte: int, thread: int, is_b: bool = False) -> np.ndarray:
    """The ue8m0 scales of mma.sync with .block_scale and .scale_vec::1X, sm_120: one of each row or column.

    Args:
        register: uint32 [..., 32].
        byte: which of its four bytes, 0 to 3 (byte-id).
        thread: whose register (thread-id): of A 0 or 1, lanes 4 g + 2 thread and the next hold rows g and g + 8; of B
            0 to 3, lane 4 g + thread holds column g.

    Returns: float64 [..., 16] of A, [..., 8] of B.

    Source: PTX ISA 9.0, 9.7.14.3 "Block Scaling for mma.sync".
    """
    values = decode((register >> np.uint32(8 * byte)) & np.uint32(0xFF), "ue8m0").astype(np.float64)
    if is_b:
        return values[..., thread::4]
    return np.concatenate([values[..., 2 * thread :: 4], values[..., 2 * thread + 1 :: 4]], axis=-1)


def matrix_addresses(rows: np.ndarray, count: int, transposed: bool = False) -> np.ndarray:
    """Where ldmatrix reads and stmatrix writes: 8x8 matrices of 16-bit elements.

    Args:
        rows: integer [..., 32], the address operand of every lane: lane 8 i + j holds row j of matrix i; others are
            ignored.
        count: matrices, the 1, 2 or 4 of .x1, .x2, .x4.
        transposed: .trans.

    Returns: integer [..., count, 32, 2]: byte addresses of the low and the high half of register i in every lane.

    Raises: ValueError where a row's address is not a multiple of 16.
    """
    used = np.asarray(rows)[..., : 8 * count].astype(np.int64)
    if (used % 16).any():
        raise ValueError(f"rows: got address {int(used[used % 16 > 0][0]):#x}, expected a multiple of 16")
    matrices = used.reshape(*used.shape[:-1], count, 8)
    half = np.arange(2)
    if transposed:
        return matrices[..., 2 * THREAD[:, None] + half] + 2 * GROUP[:, None]
    return matrices[..., GROUP[:, None] + 0 * half] + 4 * THREAD[:, None] + 2 * half


class MatrixDescriptor(NamedTuple):
    """The 64-bit description of a wgmma operand in shared memory; all in bytes but `base_offset`."""

    start: int  # bits 0-13, in 16 bytes
    leading: int  # bits 16-29, in 16 bytes
    stride: int  # bits 32-45, in 16 bytes
    base_offset: int  # bits 49-51: the line, of eight, at which the swizzling pattern starts
    swizzle: int  # bits 62-63: 0, 128, 64, 32

    @classmethod
    def from_bits(cls, bits: int) -> MatrixDescriptor:
        start, leading, stride = (((bits >> at) & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, (bits >> 49) & 7, (0, 128, 64, 32)[(bits >> 62) & 3])


@lru_cache(512)
def wgmma_addresses(bits: int, rows: int, itemsize: int, mn_major: bool = False) -> np.ndarray:
    """Byte addresses of the elements of a wgmma operand: 32 bytes along K of each row.

    The canonical layouts, with T = 16 / itemsize elements in 16 bytes, W = swizzle / itemsize, before swizzling:
    K-major     none      row r at (r % 8) 16 + (r // 8) stride, k at (k // T) leading + (k % T)
                swizzled  row r at (r % 8) W  + (r // 8) stride, k at k; the leading offset is not used
    MN-major    none      row r at (r % T) + (r // T) stride, k at (k % 8) T + (k // 8) leading
                swizzled  row r at (r % W) + (r // W) leading, k at (k % 8) W + (k // 8) stride

    Args:
        bits: the descriptor.
        rows: M or N.
        itemsize: bytes of an element.
        mn_major: the transposed operand, of 2-byte types.

    Returns: int64 [rows, 32 // itemsize], not writable.

    Raises: ValueError for a transposed operand of another type.
    """
    if mn_major and itemsize != 2:
        raise ValueError(f"itemsize: got {itemsize}, expected 2: only f16 and bf16 can be MN-major")
    d = MatrixDescriptor.from_bits(bits)
    r, k = np.arange(rows)[:, None], np.arange(32 // itemsize)[None, :]
    chunk, width = 16 // itemsize, max(d.swizzle, 16) // itemsize
    if mn_major:
        along_row, along_k = (d.leading, d.stride) if d.swizzle else (d.stride, d.leading)
        offset = (r // width) * along_row + (r % width) * itemsize + (k // 8) * along_k + (k % 8) * width * itemsize
    else:
        offset = (r // 8) * d.stride + (r % 8) * width * itemsize
        offset = offset + (k * itemsize if d.swizzle else (k // chunk) * d.leading + (k % chunk) * itemsize)
    address = swizzle(d.start + offset, d.swizzle, d.base_offset)
    address.setflags(write=False)
    return address
