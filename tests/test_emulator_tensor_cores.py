"""The emulator's tensor-core instructions: fragments laid out by the formulas of the PTX ISA, results against numpy
products."""

import numpy as np
import pytest

from emulator.formats import decode, encode
from emulator.tensor_cores import (
    accumulator,
    accumulator_registers,
    block_scales,
    matrix_addresses,
    mma_sync,
    multiply,
    operand,
    wgmma_addresses,
)

WARPS = 3
# a, b, d, K and the registers of A, B, C, as in the tables of PTX ISA 9.7.14.5.
SHAPES = [
    ("f16", "f16", "f32", 16, 4, 2, 4),
    ("f16", "f16", "f32", 8, 2, 1, 4),
    ("f16", "f16", "f16", 16, 4, 2, 2),
    ("f16", "f16", "f16", 8, 2, 1, 2),
    ("bf16", "bf16", "f32", 16, 4, 2, 4),
    ("bf16", "bf16", "f32", 8, 2, 1, 4),
    ("tf32", "tf32", "f32", 8, 4, 2, 4),
    ("tf32", "tf32", "f32", 4, 2, 1, 4),
    ("s8", "s8", "s32", 32, 4, 2, 4),
    ("s8", "u8", "s32", 16, 2, 1, 4),
    ("u8", "s8", "s32", 32, 4, 2, 4),
    ("u8", "u8", "s32", 16, 2, 1, 4),
    ("e4m3", "e4m3", "f32", 32, 4, 2, 4),
    ("e5m2", "e4m3", "f32", 32, 4, 2, 4),
    ("e5m2", "e5m2", "f16", 32, 4, 2, 2),
    ("f64", "f64", "f64", 16, 8, 4, 4),
    ("f64", "f64", "f64", 8, 4, 2, 4),
]
IDS = "{0[0]}-{0[1]}-{0[2]}-k{0[3]}".format
WIDTH = {"f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "s32": 32, "e4m3": 8, "e5m2": 8, "s8": 8, "u8": 8, "f64": 64}


def numbers(rng, shape, fmt):
    """(bits, values): values as int64 or float64."""
    if fmt in ("s8", "u8"):
        low, high = (-128, 128) if fmt == "s8" else (0, 256)
        values = rng.integers(low, high, shape)
        return values.astype(np.int8 if fmt == "s8" else np.uint8).view(np.uint8), values
    if fmt == "s32":
        values = rng.integers(-(2**31), 2**31, shape)
        return values.astype(np.int32).view(np.uint32), values
    bits = encode(rng.standard_normal(shape), fmt)
    return bits, decode(bits, fmt).astype(np.float64)


def a_place(lane, i, fmt):
    """Row and column of element i of a lane's A fragment; one sentence per type in the ISA."""
    group, thread = lane >> 2, lane % 4
    if fmt in ("f16", "bf16"):
        row = group if i in (0, 1, 4, 5) else group + 8
        return row, thread * 2 + (i & 1) + (8 if i >= 4 else 0)
    if fmt == "tf32":
        return (group if i in (0, 2) else group + 8), thread + (4 if i >= 2 else 0)
    if fmt == "f64":
        return (group if i % 2 == 0 else group + 8), (i * 2 if i % 2 == 0 else i * 2 - 2) + thread
    row = group if i < 4 or 8 <= i < 12 else group + 8
    return row, thread * 4 + (i & 3) + (16 if i >= 8 else 0)


def b_place(lane, i, fmt):
    group, thread = lane >> 2, lane % 4
    if fmt in ("f16", "bf16"):
        return thread * 2 + (i & 1) + (8 if i >= 2 else 0), group
    if fmt in ("tf32", "f64"):
        return thread + 4 * i, group
    return thread * 4 + (i & 3) + (16 if i >= 4 else 0), group


def c_place(lane, i):
    return (lane >> 2) + (8 if i >= 2 else 0), (lane % 4) * 2 + (i & 1)


def fragment(matrix, place, width, count):
    """Registers [warps, 32] of a matrix [warps, rows, columns] of bit patterns."""
    register_bits = max(width, 32)
    each = register_bits // width
    registers = []
    for r in range(count):
        words = np.zeros((WARPS, 32), np.uint64 if register_bits == 64 else np.uint32)
        for lane in range(32):
            for e in range(each):
                row, column = place(lane, r * each + e)
                words[:, lane] |= matrix[:, row, column].astype(words.dtype) << words.dtype.type(width * e)
        registers.append(words)
    return registers


def rounded(total, fmt):
    """Integers wrap around; floats are rounded once."""
    return (total & 0xFFFFFFFF).astype(np.uint32) if fmt == "s32" else encode(total, fmt)


@pytest.mark.parametrize("shape", SHAPES, ids=IDS)
def test_mma_is_a_matrix_product(shape):
    a_fmt, b_fmt, d_fmt, k, a_count, b_count, c_count = shape
    rng = np.random.default_rng(k)
    a_bits, a = numbers(rng, (WARPS, 16, k), a_fmt)
    b_bits, b = numbers(rng, (WARPS, k, 8), b_fmt)
    c_bits, c = numbers(rng, (WARPS, 16, 8), d_fmt)
    registers = (
        fragment(a_bits, lambda lane, i: a_place(lane, i, a_fmt), WIDTH[a_fmt], a_count),
        fragment(b_bits, lambda lane, i: b_place(lane, i, b_fmt), WIDTH[b_fmt], b_count),
        fragment(c_bits, c_place, WIDTH[d_fmt], c_count),
    )
    np.testing.assert_array_equal(operand(registers[0], a_fmt), a_bits)
    np.testing.assert_array_equal(operand(registers[1], b_fmt, is_b=True), b_bits.swapaxes(1, 2))
    got = mma_sync(*registers, a_fmt, b_fmt, d_fmt)
    want = fragment(rounded(a @ b + c, d_fmt), c_place, WIDTH[d_fmt], c_count)
    assert [(r.shape, r.dtype) for r in got] == [(r.shape, r.dtype) for r in want]
    if d_fmt == "f64":  # no rounding hides the order of the sum
        got, want = (np.stack(r).view(np.float64) for r in (got, want))
        np.testing.assert_allclose(got, want, rtol=1e-14, atol=1e-14)
    else:
        np.testing.assert_array_equal(got, want)


def test_mma_of_float64_on_ampere():
    rng = np.random.default_rng(0)
    a, b, c = rng.standard_normal((8, 4)), rng.standard_normal((4, 8)), rng.standard_normal((8, 8))
    lanes = np.arange(32)
    places = lanes >> 2, 2 * (lanes % 4)
    registers = [[a[lanes >> 2, lanes % 4]], [b[lanes % 4, lanes >> 2]], [c[places[0], places[1] + i] for i in (0, 1)]]
    got = mma_sync(*([x.view(np.uint64) for x in r] for r in registers), "f64", "f64", "f64", rows=8)
    want = a @ b + c
    for i in (0, 1):
        np.testing.assert_allclose(got[i].view(np.float64), want[places[0], places[1] + i], rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize(("byte_a", "thread_a", "byte_b", "thread_b"), [(0, 0, 0, 0), (3, 1, 2, 3)])
def test_block_scales_of_rows_and_columns(byte_a, thread_a, byte_b, thread_b):
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = numbers(rng, (WARPS, 16, 32), "e4m3"), numbers(rng, (WARPS, 32, 8), "e5m2")
    scale_a, scale_b = rng.integers(120, 134, (WARPS, 16)), rng.integers(120, 134, (WARPS, 8))
    # What is not selected would double everything a hundred times over.
    register_a, register_b = (np.full((WARPS, 32), 0xE0E0E0E0, np.uint32) for _ in "ab")
    for row in range(16):
        lane = 4 * (row % 8) + 2 * thread_a + row // 8
        register_a[:, lane] = register_a[:, lane] & ~np.uint32(0xFF << 8 * byte_a) | scale_a[:, row] << 8 * byte_a
    for column in range(8):
        lane = 4 * column + thread_b
        register_b[:, lane] = register_b[:, lane] & ~np.uint32(0xFF << 8 * byte_b) | scale_b[:, column] << 8 * byte_b
    scales = block_scales(register_a, byte_a, thread_a), block_scales(register_b, byte_b, thread_b, is_b=True)
    got = multiply(a_bits, b_bits.swapaxes(1, 2), None, "e4m3", "e5m2", scales=scales)
    want = (a @ b) * 2.0 ** (scale_a[:, :, None] - 127) * 2.0 ** (scale_b[:, None, :] - 127)
    np.testing.assert_array_equal(accumulator(got, "f32"), want.astype(np.float32))


def test_integers_wrap_or_saturate():
    ones = np.full((1, 32), 0x7F7F7F7F, np.uint32)
    c = [np.full((1, 32), 0x7FFFFFFF, np.uint32)] * 4
    arguments = ([ones] * 4, [ones] * 2, c, "s8", "s8", "s32")
    assert mma_sync(*arguments)[0][0, 0] == (0x7FFFFFFF + 32 * 127 * 127) & 0xFFFFFFFF
    assert mma_sync(*arguments, saturate=True)[0][0, 0] == 0x7FFFFFFF


def test_nan_and_infinity_reach_their_row_only():
    a = np.zeros((16, 8))
    a[3, 2], a[5, 1] = np.nan, np.inf
    b = np.ones((8, 8))
    a_bits, b_bits = encode(a, "bf16"), encode(b, "bf16")
    got = accumulator(multiply(a_bits, b_bits, None, "bf16", "bf16"), "f32")
    assert np.isnan(got[3]).all() and (got[5] == np.inf).all() and (np.delete(got, [3, 5], 0) == 0).all()


def test_signs_and_zero_accumulator_of_wgmma():
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = numbers(rng, (4, 16, 16), "f16"), numbers(rng, (24, 16), "f16")
    c = accumulator_registers(encode(rng.standard_normal((4, 16, 24)), "f32"), "f32")
    assert len(c) == 12 and c[0].shape == (4, 32)
    product, old = a @ b.T, accumulator(c, "f32")
    for negate_a, negate_b, sign in ((False, False, 1), (True, False, -1), (False, True, -1), (True, True, 1)):
        got = multiply(a_bits, b_bits, c, "f16", "f16", negate_a=negate_a, negate_b=negate_b)
        np.testing.assert_array_equal(accumulator(got, "f32"), (sign * product + old).astype(np.float32))
    np.testing.assert_array_equal(
        accumulator(multiply(a_bits, b_bits, None, "f16", "f16"), "f32"), product.astype(np.float32)
    )


@pytest.mark.parametrize("n", [8, 24, 256])
@pytest.mark.parametrize("fmt", ["f32", "f16", "s32"])
def test_wide_accumulators_follow_the_isa(fmt, n):
    """Value i of a lane: row (lane / 4) + 8 * (i / 2 % 2), column 8 * (i / 4) + (lane % 4) * 2 + (i & 1)."""
    matrix = np.arange(16 * n).reshape(16, n).astype(np.uint16 if fmt == "f16" else np.uint32)
    registers = accumulator_registers(matrix, fmt)
    per_register = 2 if fmt == "f16" else 1
    assert len(registers) == n // 2 // per_register
    for i in range(n // 2):
        value = registers[i // per_register] >> np.uint32(16 * (i % 2) if fmt == "f16" else 0)
        for lane in range(32):
            row, column = lane // 4 + 8 * (i // 2 % 2), 8 * (i // 4) + (lane % 4) * 2 + (i & 1)
            assert value[lane].astype(matrix.dtype) == matrix[row, column]
    want = decode(matrix, "f16") if fmt == "f16" else matrix if fmt == "s32" else matrix.view(np.float32)
    np.testing.assert_array_equal(accumulator(registers, fmt), want)


def test_hopper_fp8_loses_what_lies_14_bits_below_the_largest():
    """One large term and 31 small: fp32 keeps them, an accumulator of 14 bits drops each of them before the sum."""
    a = np.ones((16, 32))
    b = np.full((8, 32), 2.0**-6)
    b[:, 0] = 256.0  # terms of 2^-6 are 14 bits below
    a_bits, b_bits = encode(a, "e4m3"), encode(b, "e4m3")
    full = accumulator(multiply(a_bits, b_bits, None, "e4m3", "e4m3"), "f32")
    hopper = accumulator(multiply(a_bits, b_bits, None, "e4m3", "e4m3", hopper_fp8=True), "f32")
    assert (full == 256 + 31 * 2.0**-6).all() and (hopper == 256.0).all()
    # One bit higher they count; the accumulator takes part in the alignment.
    b_bits = encode(np.where(b == 256, b, 2.0**-5), "e4m3")
    kept = multiply(a_bits, b_bits, None, "e4m3", "e4m3", hopper_fp8=True)
    assert (accumulator(kept, "f32") == 256 + 31 * 2.0**-5).all()
    small = multiply(encode(a / 64, "e4m3"), encode(a[:8], "e4m3"), kept, "e4m3", "e4m3", hopper_fp8=True)
    assert (accumulator(small, "f32") == 256 + 31 * 2.0**-5).all()


def test_hopper_fp8_is_within_its_bits_and_keeps_infinity():
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = numbers(rng, (16, 32), "e4m3"), numbers(rng, (8, 32), "e4m3")
    got = accumulator(multiply(a_bits, b_bits, None, "e4m3", "e4m3", hopper_fp8=True), "f32")
    largest = np.abs(a[:, None] * b[None]).max(-1)
    error = np.abs(got - a @ b.T)
    assert (error <= 33 * largest * 2.0**-13).all() and error.max() > 0
    a_bits[0, 0] = 0x7C  # infinity of e5m2
    got = accumulator(multiply(a_bits, np.abs(b_bits), None, "e5m2", "e4m3", hopper_fp8=True), "f32")
    assert np.isinf(got[0]).all() or np.isnan(got[0]).any()


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("transposed", [False, True])
def test_ldmatrix_hands_out_rows_or_columns(count, transposed):
    rng = np.random.default_rng(0)
    memory = rng.integers(0, 1 << 16, 1024).astype(np.uint16)
    rows = rng.permutation(128)[:64].reshape(2, 32) * 16
    addresses = matrix_addresses(rows, count, transposed)
    assert addresses.shape == (2, count, 32, 2)
    got = memory[addresses // 2]
    for warp in range(2):
        for i in range(count):
            matrix = np.stack([memory[rows[warp, 8 * i + j] // 2 :][:8] for j in range(8)])
            matrix = matrix.T if transposed else matrix
            for lane in range(32):
                # "each thread receives a fragment of one row": thread 4 r + c holds columns 2 c and 2 c + 1 of row r.
                np.testing.assert_array_equal(got[warp, i, lane], matrix[lane // 4, 2 * (lane % 4) :][:2])


def test_ldmatrix_feeds_mma():
    """A row-major tile by ldmatrix.x4, and B, stored as [K, N], by ldmatrix.x2.trans, are the fragments mma wants."""
    rng = np.random.default_rng(0)
    (a_bits, a), (b_bits, b) = numbers(rng, (16, 16), "bf16"), numbers(rng, (16, 8), "bf16")
    memory = np.concatenate([a_bits.ravel(), b_bits.ravel()])
    lane = np.arange(32)
    a_rows = (lane % 16) * 32 + (lane // 16) * 16
    b_rows = a_bits.nbytes + (lane % 16) * 16
    a_registers, b_registers = (
        list(np.ascontiguousarray(memory[addresses // 2]).view(np.uint32)[..., 0])
        for addresses in (matrix_addresses(a_rows, 4), matrix_addresses(b_rows, 2, transposed=True))
    )
    got = mma_sync(a_registers, b_registers, [np.zeros(32, np.uint32)] * 4, "bf16", "bf16")
    np.testing.assert_array_equal(accumulator(got, "f32"), (a @ b).astype(np.float32))


def descriptor(start, leading, stride, swizzle=0, base_offset=0):
    mode = {0: 0, 128: 1, 64: 2, 32: 3}[swizzle]
    return start >> 4 | leading >> 4 << 16 | stride >> 4 << 32 | base_offset << 49 | mode << 62


def tile_address(row, column, pitch, start):
    """Where swizzled TMA puts byte `column` of a row of `pitch` bytes: chunks of 16 bytes XOR the line's number."""
    linear = start + row * pitch + column
    return linear ^ (linear // 128 % (pitch // 16)) * 16


@pytest.mark.parametrize("swizzle", [32, 64, 128])
@pytest.mark.parametrize("itemsize", [1, 2, 4])
def test_k_major_descriptor_reads_a_swizzled_tile(swizzle, itemsize):
    """Rows of `swizzle` bytes, as TMA or Triton write them; steps along K move the start address."""
    start, rows = 2048, 24
    for step in range(swizzle // 32):
        got = wgmma_addresses(descriptor(start + 32 * step, 16, 8 * swizzle, swizzle), rows, itemsize)
        columns = 32 * step + itemsize * np.arange(32 // itemsize)
        np.testing.assert_array_equal(got, tile_address(np.arange(rows)[:, None], columns, swizzle, start))


@pytest.mark.parametrize("swizzle", [32, 64, 128])
def test_mn_major_descriptor_reads_a_swizzled_tile(swizzle):
    """Rows along K of `swizzle` bytes of M or N; the next `swizzle` bytes of M or N lie in a tile of their own."""
    start, depth, n = 1024, 32, 96
    tile = depth * swizzle
    for step in range(depth // 16):
        got = wgmma_addresses(descriptor(start + 16 * step * swizzle, tile, 8 * swizzle, swizzle), n, 2, mn_major=True)
        for r in range(n):
            for k in range(16):
                block, byte = divmod(2 * r, swizzle)
                assert got[r, k] == tile_address(16 * step + k, byte, swizzle, start + block * tile)


@pytest.mark.parametrize("mn_major", [False, True])
def test_descriptor_without_swizzle(mn_major):
    """Core matrices of 8 rows of 16 bytes, here in the order K, then M or N: leading and stride say how far apart."""
    start, rows, k_cores, m_cores = 512, 32, 2, 4
    along_k, along_m = 128, 128 * k_cores
    leading, stride = along_k, along_m
    got = wgmma_addresses(descriptor(start, leading, stride), rows, 2, mn_major)
    for r in range(rows):
        for k in range(16):
            inside = (k % 8) * 16 + r % 8 * 2 if mn_major else (r % 8) * 16 + k % 8 * 2
            assert got[r, k] == start + (r // 8) * along_m + (k // 8) * along_k + inside
    assert len(np.unique(got)) == rows * 16 and got.max() < start + m_cores * k_cores * 128


def test_base_offset_moves_the_pattern():
    """A tile that starts at line 4 of the eight, its pattern with it: the same order as at an aligned address."""
    aligned = wgmma_addresses(descriptor(1024, 16, 1024, 128), 8, 2)
    moved = wgmma_addresses(descriptor(1024 + 512, 16, 1024, 128, base_offset=4), 8, 2)
    np.testing.assert_array_equal(moved, aligned + 512)


def test_rejects_what_the_hardware_does_not_have():
    with pytest.raises(ValueError, match="only f16 and bf16 can be MN-major"):
        wgmma_addresses(descriptor(0, 16, 1024, 128), 64, 1, mn_major=True)
    with pytest.raises(ValueError, match="rows: got address 0x8, expected a multiple of 16"):
        matrix_addresses(np.arange(32) * 8, 4)
    zero = [np.zeros((1, 32), np.uint32)]
    with pytest.raises(ValueError, match=r"b: got 1 registers, K = 8, expected K = 16"):
        mma_sync(zero * 4, zero, zero * 4, "f16", "f16")
