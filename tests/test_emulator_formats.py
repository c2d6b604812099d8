"""The emulator's number formats against torch's, bit by bit."""

import numpy as np
import pytest
import torch

from emulator.formats import FORMATS, decode, encode

TORCH = {
    "f16": (torch.float16, torch.uint16),
    "bf16": (torch.bfloat16, torch.uint16),
    "e4m3": (torch.float8_e4m3fn, torch.uint8),
    "e5m2": (torch.float8_e5m2, torch.uint8),
}
SMALL = [*TORCH]


def all_bits(fmt):
    return np.arange(1 << (8 * np.dtype(FORMATS[fmt].storage).itemsize)).astype(FORMATS[fmt].storage)


def interesting(fmt):
    """float32: random bits, each representable number, halfway between neighbours, one step off halfway."""
    random = np.random.default_rng(0).integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    near = np.random.default_rng(1).standard_normal(100_000).astype(np.float32)
    exact = decode(all_bits(fmt), fmt)
    exact = np.sort(exact[np.isfinite(exact)])
    middle = ((exact[1:].astype(np.float64) + exact[:-1]) / 2).astype(np.float32)
    beyond = np.float32(
        [np.inf, -np.inf, np.nan, 464, 465, 479, 61440, 61441, 65519, 65520, 3.3961776e38, 3.4028235e38]
    )
    middles = [middle, np.nextafter(middle, np.float32(np.inf)), np.nextafter(middle, np.float32(-np.inf))]
    return np.concatenate([random, near, exact, *middles, beyond, -beyond])


@pytest.mark.parametrize("fmt", SMALL)
def test_every_bit_pattern_decodes_as_in_torch(fmt):
    dtype, storage = TORCH[fmt]
    bits = all_bits(fmt)
    want = torch.from_numpy(bits).view(storage).view(dtype).float().numpy()
    np.testing.assert_array_equal(decode(bits, fmt), want)


@pytest.mark.parametrize("fmt", [*SMALL, "tf32"])
@pytest.mark.parametrize("rounding", ["rn", "rz", "rna"])
def test_representable_numbers_survive(fmt, rounding):
    bits = all_bits(fmt) if fmt in SMALL else np.arange(1 << 19, dtype=np.uint32) << np.uint32(13)
    values = decode(bits, fmt)
    kept = ~np.isnan(values)
    np.testing.assert_array_equal(encode(values[kept], fmt, rounding), bits[kept])
    assert set(encode(values[~kept], fmt, rounding).tolist()) == {FORMATS[fmt].nan}


@pytest.mark.parametrize("fmt", SMALL)
def test_rounds_to_nearest_as_torch(fmt):
    dtype, storage = TORCH[fmt]
    x = interesting(fmt)
    if fmt == "e4m3":  # whether torch saturates what is too large, or makes it NaN, depends on its version
        x = x[np.abs(x) <= 448]
    number = ~np.isnan(x)
    got = encode(x, fmt)
    want = torch.from_numpy(x).to(dtype).view(storage).numpy()
    np.testing.assert_array_equal(got[number], want[number])
    assert (got[~number] == FORMATS[fmt].nan).all()


@pytest.mark.parametrize("fmt", [*SMALL, "tf32"])
@pytest.mark.parametrize("rounding", ["rn", "rz", "rna"])
def test_rounding_by_its_definition(fmt, rounding):
    """The neighbours of every x in the format, found by search; then what the rounding's definition says of them."""
    x = np.random.default_rng(2).standard_normal(20_000) * 10.0 ** np.random.default_rng(3).uniform(-9, 2.5, 20_000)
    bits = all_bits(fmt) if fmt in SMALL else np.arange(1 << 19, dtype=np.uint32) << np.uint32(13)
    table = decode(bits[: len(bits) // 2], fmt)  # the positive half ascends, but for infinity and NaN
    table = table[np.isfinite(table)].astype(np.float64)
    middles = (table[1:] + table[:-1])[:: max(len(table) // 5_000, 1)] / 2
    x = np.concatenate([x, middles, -middles])
    magnitude = np.minimum(np.abs(x), table[-1])
    above = np.clip(np.searchsorted(table, magnitude), 1, None)
    low, high = table[above - 1], table[above]
    low = np.where(magnitude == high, high, low)
    to_low, to_high = magnitude - low, high - magnitude
    even = (above - 1) % 2 == 0  # the bits of a positive number are its place in the table
    tie = {"rn": even, "rna": np.zeros_like(even), "rz": np.ones_like(even)}[rounding]
    want = np.where((rounding == "rz") | (to_low < to_high) | ((to_low == to_high) & tie), low, high)
    got = decode(encode(np.copysign(magnitude, x), fmt, rounding), fmt)
    np.testing.assert_array_equal(got, np.copysign(want, x).astype(np.float32))


@pytest.mark.parametrize("fmt", [*SMALL, "tf32"])
@pytest.mark.parametrize("rounding", ["rn", "rz", "rna"])
def test_float32_and_float64_agree(fmt, rounding):
    x = interesting(fmt if fmt in SMALL else "bf16")
    x = x[~np.isnan(x)]
    np.testing.assert_array_equal(encode(x, fmt, rounding), encode(x.astype(np.float64), fmt, rounding))


@pytest.mark.parametrize("fmt", SMALL)
def test_satfinite_clamps_and_keeps_nan(fmt):
    largest = float(decode(np.uint32(FORMATS[fmt].largest), fmt))
    x = interesting(fmt)
    got = decode(encode(x, fmt, saturate=True), fmt)
    want = decode(encode(np.clip(x, -largest, largest), fmt), fmt)
    np.testing.assert_array_equal(got, want)
    assert np.abs(got[~np.isnan(x)]).max() == largest and np.isnan(got[np.isnan(x)]).all()


@pytest.mark.parametrize(
    ("fmt", "rounding", "saturate", "bits"),
    [
        ("e4m3", "rn", False, 0x7F),
        ("e4m3", "rz", False, 0x7E),
        ("e4m3", "rn", True, 0x7E),
        ("e5m2", "rn", False, 0x7C),
        ("e5m2", "rn", True, 0x7B),
        ("f16", "rn", False, 0x7C00),
        ("f16", "rz", False, 0x7BFF),
        ("bf16", "rz", False, 0x7F7F),
        ("tf32", "rna", False, 0x7F800000),
        ("tf32", "rna", True, 0x7F7FE000),
    ],
)
def test_overflow(fmt, rounding, saturate, bits):
    x = np.float32([3.4028235e38, -3.4028235e38])
    sign = 1 << (8 * np.dtype(FORMATS[fmt].storage).itemsize - 1)
    assert encode(x, fmt, rounding, saturate).tolist() == [bits, bits if bits == 0x7F else bits | sign]


@pytest.mark.parametrize("rounding", ["rn", "rz", "rna"])
def test_infinity_stays_unless_saturated(rounding):
    assert encode(np.float32([np.inf, -np.inf]), "f16", rounding).tolist() == [0x7C00, 0xFC00]
    assert encode(np.float32([np.inf, -np.inf]), "f16", rounding, saturate=True).tolist() == [0x7BFF, 0xFBFF]


def test_float64_rounds_once():
    # 1 + 2^-11 + 2^-40: by way of float32 this would be the tie 1 + 2^-11, which goes down to 1.
    x = np.float64([1 + 2.0**-11 + 2.0**-40, 1 + 2.0**-8 + 2.0**-40, 1 + 2.0**-24 + 2.0**-50, 1e-46])
    assert encode(x, "f16")[0] == 0x3C01
    assert encode(x, "bf16")[1] == 0x3F81
    np.testing.assert_array_equal(encode(x, "f32"), x.astype(np.float32).view(np.uint32))
    np.testing.assert_array_equal(encode(x, "f32", "rz")[:3], [0x3F801000, 0x3F808000, 0x3F800000])
    np.testing.assert_array_equal(decode(encode(x, "f64"), "f64"), x)


def test_tf32_operands_ignore_their_low_bits():
    assert decode(np.uint32([0x3F801FFF]), "tf32") == 1.0


def test_scales_of_blocks_are_powers_of_two():
    values = decode(np.arange(256, dtype=np.uint8), "ue8m0")
    np.testing.assert_array_equal(values[:255], 2.0 ** (np.arange(255) - 127.0))
    assert np.isnan(values[255])


def test_rejects_unknown_names():
    with pytest.raises(ValueError, match="fmt: got 'e3m4'"):
        encode(np.float32(1), "e3m4")
    with pytest.raises(ValueError, match="fmt: got 'e3m4'"):
        decode(np.uint8(1), "e3m4")
    with pytest.raises(ValueError, match="rounding: got 'up'"):
        encode(np.float32(1), "f16", "up")
