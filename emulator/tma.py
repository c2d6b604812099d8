"""The tensor memory accelerator: which element of a tensor goes where in shared memory, for one tiled box.

Coordinates, sizes and strides are in PTX order, the innermost dimension first.

Source: PTX ISA 9.0, 5.5 "Tensors" (boxes, out-of-bound access, swizzling), 9.7.9.27 "cp.async.bulk.tensor"; CUDA
driver API, cuTensorMapEncodeTiled (limits of a descriptor).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np


def swizzle(address: np.ndarray, span: int, base_offset: int = 0) -> np.ndarray:
    """Shared byte addresses after swizzling: the 16-byte chunk's number is XORed with that of its 128-byte line.

    Args:
        address: integer byte addresses.
        span: 0 (none), 32, 64 or 128 bytes, over which chunks are permuted.
        base_offset: line at which the pattern starts, where it is not aligned to eight (four, two) lines.
    """
    if span not in (0, 32, 64, 128):
        raise ValueError(f"span: got {span}, expected 0, 32, 64 or 128")
    if not span:
        return address
    line = (address >> 7) - base_offset
    return address ^ ((line & (span // 16 - 1)) << 4)


@dataclass(frozen=True)
class TensorMap:
    """What cuTensorMapEncodeTiled packs into 128 bytes, checked as it checks.

    Args:
        base: global byte address of the tensor, a multiple of 16.
        sizes: elements of each dimension, 1 to 2^32.
        strides: bytes between neighbours of dimensions 1, 2, ..., multiples of 16 below 2^40; one fewer than sizes.
        box: elements of each dimension of a box, 1 to 256; the innermost a multiple of 16 bytes.
        element_size: bytes of an element.
        swizzle: 0, 32, 64 or 128 bytes; the box's innermost dimension then has exactly as many.
        element_strides: take each n-th element only, 1 to 8; default all ones.
        nan_fill: elements outside the tensor arrive as NaN instead of zero.

    Raises: ValueError for what the driver would refuse.
    """

    base: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element_size: int
    swizzle: int = 0
    element_strides: tuple[int, ...] = ()
    nan_fill: bool = False

    def __post_init__(self) -> None:
        rank = len(self.sizes)
        if not 1 <= rank <= 5:
            raise ValueError(f"sizes: got {rank} dimensions, expected 1 to 5")
        if len(self.strides) != rank - 1 or len(self.box) != rank:
            raise ValueError(
                f"strides, box: got {len(self.strides)} and {len(self.box)}, expected {rank - 1} and {rank}"
            )
        if not self.element_strides:
            object.__setattr__(self, "element_strides", (1,) * rank)
        if self.base % 16:
            raise ValueError(f"base: got {self.base:#x}, expected a multiple of 16")
        if any(not 1 <= n <= 1 << 32 for n in self.sizes):
            raise ValueError(f"sizes: got {self.sizes}, expected 1 to 2^32 each")
        if any(s % 16 or not 0 <= s < 1 << 40 for s in self.strides):
            raise ValueError(f"strides: got {self.strides} bytes, expected multiples of 16 below 2^40")
        if any(not 1 <= n <= 256 for n in self.box):
            raise ValueError(f"box: got {self.box}, expected 1 to 256 elements each")
        if len(self.element_strides) != rank or any(not 1 <= n <= 8 for n in self.element_strides):
            raise ValueError(f"element_strides: got {self.element_strides}, expected {rank} of 1 to 8")
        if self.pitch % 16:
            raise ValueError(f"box: got {self.pitch} bytes in the innermost dimension, expected a multiple of 16")
        if self.swizzle not in (0, 32, 64, 128):
            raise ValueError(f"swizzle: got {self.swizzle}, expected 0, 32, 64 or 128")
        # A shorter row is allowed by the driver, but the ISA does not say where its bytes lie.
        if self.swizzle and self.pitch != self.swizzle:
            raise ValueError(
                f"box: got {self.pitch} bytes in the innermost dimension, expected {self.swizzle} as swizzled"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        """Elements of each dimension of a box in shared memory."""
        return tuple(-(-n // s) for n, s in zip(self.box, self.element_strides, strict=True))

    @property
    def pitch(self) -> int:
        """Bytes of the box's innermost dimension in shared memory."""
        return self.shape[0] * self.element_size

    @property
    def bytes(self) -> int:
        """What a load adds to its mbarrier's transaction count; elements outside the tensor count too."""
        return prod(self.shape) * self.element_size


class Box(NamedTuple):
    """One box, an entry per element in the order of shared memory before swizzling."""

    offsets: np.ndarray  # int64 [n], bytes from the tensor's base; meaningful where valid
    valid: np.ndarray  # bool [n]: inside the tensor. A load fills the others, a store leaves them out
    shared: np.ndarray  # int64 [n], byte address in shared memory


def box(tensor_map: TensorMap, coordinates: Sequence[int], shared: int = 0) -> Box:
    """The elements of the box that starts at `coordinates`, for a load or a store.

    Args:
        tensor_map: the descriptor.
        coordinates: of the first element, innermost dimension first; may be negative or past the end.
        shared: byte address of the box in shared memory, a multiple of 128.

    Raises: ValueError on another number of coordinates, one that is no int32, or a misaligned address.
    """
    rank = len(tensor_map.sizes)
    if len(coordinates) != rank:
        raise ValueError(f"coordinates: got {len(coordinates)}, expected {rank}, as many as the tensor has dimensions")
    if any(not -(1 << 31) <= c < 1 << 31 for c in coordinates):
        raise ValueError(f"coordinates: got {tuple(coordinates)}, expected int32")
    if shared % 128:
        raise ValueError(f"shared: got address {shared:#x}, expected a multiple of 128")
    offsets, valid = np.zeros((), np.int64), np.ones((), bool)
    strides = (tensor_map.element_size, *tensor_map.strides)
    for dimension in range(rank):
        step = np.arange(tensor_map.shape[dimension], dtype=np.int64) * tensor_map.element_strides[dimension]
        index = coordinates[dimension] + step
        # The next dimension goes in front: the innermost stays the fastest.
        index = index.reshape(-1, *(1,) * dimension)
        offsets = offsets + index * strides[dimension]
        valid = valid & (index >= 0) & (index < tensor_map.sizes[dimension])
    address = shared + np.arange(offsets.size, dtype=np.int64) * tensor_map.element_size
    return Box(offsets.ravel(), valid.ravel(), swizzle(address, tensor_map.swizzle))
