"""The emulator's TMA boxes against slices of numpy arrays, and what a descriptor refuses."""

import numpy as np
import pytest

from emulator.tma import TensorMap, box, swizzle


@pytest.mark.parametrize("span", [0, 32, 64, 128])
def test_swizzle_is_an_involution_within_its_span(span):
    address = np.arange(8192)
    moved = swizzle(address, span)
    np.testing.assert_array_equal(swizzle(moved, span), address)
    np.testing.assert_array_equal(moved // max(span, 16), address // max(span, 16))
    np.testing.assert_array_equal(moved % 16, address % 16)
    if span:
        # Eight chunks of a column, `span` bytes apart, fall on all banks.
        assert len(np.unique(moved[: 8 * span : span] % 128)) == 8


def tensor(rng, shape):
    """A contiguous array, outermost dimension first, and its map's sizes and strides, innermost first."""
    array = rng.integers(1, 1 << 16, shape).astype(np.uint16)
    return array, array.shape[::-1], array.strides[-2::-1]


def load(tensor_map, array, coordinates, shared):
    """Shared memory after a load: zero fill, everything else 0xFFFF."""
    where = box(tensor_map, coordinates, shared)
    memory = np.full(1 << 15, 0xFFFF, np.uint16)
    flat = array.reshape(-1)
    values = np.zeros(len(where.offsets), np.uint16)
    values[where.valid] = flat[where.offsets[where.valid] // 2]
    memory[where.shared // 2] = values
    return memory


@pytest.mark.parametrize(
    "coordinates", [(0, 0, 0), (16, 8, 1), (-5, 3, 0), (40, 17, 2), (0, -20, 0), (1000, 0, 0), (3, 4, -1)], ids=str
)
@pytest.mark.parametrize(("width", "swizzled"), [(16, True), (32, True), (64, True), (64, False), (24, False)])
def test_a_load_is_a_slice_of_the_zero_padded_tensor(coordinates, width, swizzled):
    rng = np.random.default_rng(0)
    array, sizes, strides = tensor(rng, (3, 20, 48))
    span = 2 * width if swizzled else 0
    tensor_map = TensorMap(0x1000, sizes, strides, (width, 8, 2), 2, span)
    shared = 1024
    memory = load(tensor_map, array, coordinates, shared)
    pad = 1024
    padded = np.pad(array, [(4, 4), (64, 64), (pad, pad)])
    x, y, z = coordinates
    want = padded[z + 4 : z + 6, y + 64 : y + 72, x + pad : x + pad + width]
    linear = shared + np.arange(want.size) * 2
    np.testing.assert_array_equal(memory[swizzle(linear, span) // 2], want.ravel())
    assert (np.delete(memory, linear // 2) == 0xFFFF).all()
    assert tensor_map.bytes == want.size * 2


def test_a_store_leaves_out_what_lies_outside():
    array, sizes, strides = tensor(np.random.default_rng(0), (20, 48))
    tensor_map = TensorMap(0, sizes, strides, (64, 8), 2, 128)
    where = box(tensor_map, (-16, 15), 0)
    memory = np.arange(1, 513, dtype=np.uint16)
    before, flat = array.copy(), array.reshape(-1)
    flat[where.offsets[where.valid] // 2] = memory[where.shared[where.valid] // 2]
    written = memory[swizzle(np.arange(512) * 2, 128) // 2].reshape(8, 64)
    np.testing.assert_array_equal(array[15:20, :48], written[:5, 16:])
    np.testing.assert_array_equal(array[:15], before[:15])


def test_strides_need_not_ascend():
    """(B, L, H, d) read as (d, L, H, B): the heads' stride is below the tokens'."""
    array = np.arange(2 * 12 * 3 * 32, dtype=np.uint16).reshape(2, 12, 3, 32)
    b, length, h, _ = array.strides
    tensor_map = TensorMap(0, (32, 12, 3, 2), (length, h, b), (32, 8, 1, 1), 2, 64)
    where = box(tensor_map, (0, 8, 2, 1))
    values = np.where(where.valid, array.reshape(-1)[np.where(where.valid, where.offsets // 2, 0)], 0).reshape(8, 32)
    np.testing.assert_array_equal(values[:4], array[1, 8:, 2])
    assert not values[4:].any() and not where.valid.reshape(8, 32)[4:].any()


def test_element_strides_take_every_nth():
    array = np.arange(64 * 4, dtype=np.uint16).reshape(4, 64)
    tensor_map = TensorMap(0, (64, 4), (128,), (32, 4), 2, element_strides=(2, 1))
    where = box(tensor_map, (8, 0))
    np.testing.assert_array_equal(array.reshape(-1)[where.offsets // 2].reshape(4, 16), array[:, 8:40:2])
    assert tensor_map.bytes == 4 * 16 * 2


GOOD = {"base": 0, "sizes": (64, 8), "strides": (128,), "box": (64, 8), "element_size": 2, "swizzle": 128}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base": 8}, "base: got 0x8, expected a multiple of 16"),
        ({"sizes": (64,) * 6}, "sizes: got 6 dimensions"),
        ({"sizes": (64, 0)}, r"sizes: got \(64, 0\), expected 1 to 2\^32"),
        ({"strides": (120,)}, r"strides: got \(120,\) bytes, expected multiples of 16"),
        ({"strides": (1 << 40,)}, "expected multiples of 16 below 2\\^40"),
        ({"strides": ()}, "strides, box: got 0 and 2, expected 1 and 2"),
        ({"box": (64, 257)}, "expected 1 to 256 elements each"),
        ({"box": (60, 8), "swizzle": 0}, "box: got 120 bytes in the innermost dimension, expected a multiple of 16"),
        ({"box": (32, 8)}, "box: got 64 bytes in the innermost dimension, expected 128 as swizzled"),
        ({"swizzle": 96}, "swizzle: got 96"),
        ({"element_strides": (9, 1)}, "element_strides"),
    ],
)
def test_a_descriptor_refuses(change, message):
    TensorMap(**GOOD)
    with pytest.raises(ValueError, match=message):
        TensorMap(**{**GOOD, **change})


def test_a_box_refuses():
    good = TensorMap(**GOOD)
    with pytest.raises(ValueError, match="shared: got address 0x40, expected a multiple of 128"):
        box(good, (0, 0), 64)
    with pytest.raises(ValueError, match="coordinates: got 3, expected 2"):
        box(good, (0, 0, 0))
    with pytest.raises(ValueError, match="expected int32"):
        box(good, (0, 1 << 31))
    with pytest.raises(ValueError, match="span: got 16"):
        swizzle(np.arange(4), 16)
