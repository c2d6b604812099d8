"""Runs a launch of the driver: lays out its parameters, opens its tensors, sends its thread blocks through a gang."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
from torch import Tensor

from .driver import Launch
from .machine import Gang, Statistics
from .memory import Memory
from .ptx import EmulationError, Kernel, parse
from .tma import TensorMap

GANG_WARPS = 128  # a numpy call then costs about as much as its elements
KEPT_GANGS = 24
_SWIZZLES = (0, 32, 64, 128)


@lru_cache(256)
def _parsed(ptx: str) -> Kernel:
    return parse(ptx)


class Emulator:
    """What a `Driver` launches into.

    Args:
        seed: None runs warps in one order with copies as late as possible; a number draws another interleaving for
            every launch.
        edit: changes the PTX of every kernel, for tests that plant faults.
    """

    def __init__(self, seed: int | None = None, edit: Callable[[str], str] = lambda ptx: ptx) -> None:
        self.seed, self.edit = seed, edit
        self.statistics = Statistics()
        self.launches = 0
        # By the kernel's identity: a gang holds its kernel, so that the number stays its own.
        self._gangs: OrderedDict[tuple[int, int], Gang] = OrderedDict()

    def __call__(self, launch: Launch) -> None:
        """Run it to its end.

        Raises:
            EmulationError: see `Gang.run`.
        """
        blocks = prod(launch.grid)
        self.launches += 1
        if blocks == 0:
            return
        metadata = launch.kernel.metadata
        if getattr(metadata, "num_ctas", 1) != 1:
            raise EmulationError(f"{launch.kernel.name}: got clusters of {metadata.num_ctas} blocks, expected 1")
        kernel = _parsed(self.edit(launch.kernel.ptx))
        views, descriptors, parameters = _unpack(launch, kernel)
        memory = Memory(views)
        gangs = -(-blocks // max(1, GANG_WARPS * 32 // kernel.threads))
        each = -(-blocks // gangs)
        for first in range(0, blocks, each):
            ctas = range(first, min(first + each, blocks))
            gang = self._gang(launch, kernel, len(ctas))
            gang.parameters[: len(parameters)] = parameters
            seed = None if self.seed is None else hash((self.seed, self.launches, first))
            gang.start(launch.grid, ctas, memory, descriptors, seed, getattr(metadata, "launch_pdl", False))
            found = gang.run()
            self.statistics.instructions += found.instructions
            self.statistics.notes += found.notes

    def _gang(self, launch: Launch, kernel: Kernel, ctas: int) -> Gang:
        """One that has run this kernel before keeps its bound instructions."""
        key = id(kernel), ctas
        gang = self._gangs.pop(key, None) or Gang(kernel, ctas, launch.kernel.metadata.shared, launch.kernel.gluon)
        self._gangs[key] = gang
        if len(self._gangs) > KEPT_GANGS:
            self._gangs.popitem(last=False)
        return gang


def _unpack(launch: Launch, kernel: Kernel) -> tuple[list[Tensor], dict[int, TensorMap], np.ndarray]:
    """(tensors, descriptors by the offset of their parameter, bytes of all parameters)"""
    views: list[Tensor] = []
    descriptors: dict[int, TensorMap] = {}
    parameters = np.zeros(max((p.offset + p.size for p in kernel.parameters), default=0), np.uint8)
    places = iter(kernel.parameters)
    formats = iter(getattr(launch.kernel.metadata, "tensordesc_meta", None) or [])

    def put(value: Any, floating: bool = False) -> None:
        place = next(places)
        if floating:
            raw = np.array([value], np.float32 if place.size == 4 else np.float64).view(np.uint8)
        else:
            raw = np.array([int(value) & (1 << 64) - 1], np.uint64).view(np.uint8)[: place.size]
        parameters[place.offset : place.offset + place.size] = raw

    for kind, value in launch.arguments:
        if kind.startswith("tensordesc"):
            metadata = next(formats, None)
            views.append(value.base)
            if metadata is None:  # before sm_90: pointer, shape, strides, flags, and shape and strides once more
                flags = [value.padding == "nan"]
                if hasattr(value, "round_f32_to_tf32"):  # of Triton 3.7
                    flags.append(value.round_f32_to_tf32)
                for number in (value.base.data_ptr(), *value.shape, *value.strides, *flags):
                    put(number)
            else:
                descriptors[next(places).offset] = _tensor_map(value, metadata)
            for number in (*value.shape, *value.strides):
                put(number)
        elif isinstance(value, Tensor):
            views.append(value)
            put(value.data_ptr())
        else:
            put(value, kind.startswith(("fp", "bf")))
    for scratch in places:  # Triton's global and profiling scratch; no kernel here uses them
        parameters[scratch.offset : scratch.offset + scratch.size] = 0
    return views, descriptors, parameters


def _tensor_map(descriptor: Any, metadata: dict[str, Any]) -> TensorMap:
    size = metadata["elem_size"]
    return TensorMap(
        base=descriptor.base.data_ptr(),
        sizes=tuple(descriptor.shape[::-1]),
        strides=tuple(s * size for s in descriptor.strides[-2::-1]),
        box=tuple(metadata["block_size"][::-1]),
        element_size=size,
        swizzle=_SWIZZLES[metadata["swizzle"]],
        nan_fill=descriptor.padding == "nan",
    )


def emulate(arch: int, seed: int | None = None) -> Emulator:
    """From now on kernels called with CPU tensors run as PTX of `sm_arch`.

    Call it before anything imports the kernels under TRITON_INTERPRET=1.
    """
    from anyflow_kernels import launch_configs

    from .driver import Driver

    emulator = Emulator(seed)
    Driver(arch, emulator).activate()
    launch_configs.emulate(arch)
    return emulator


def run_ptx(
    ptx: str,
    arguments: Sequence[Tensor | int | float],
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 0,
    seed: int | None = None,
    strict: bool = True,
) -> Statistics:
    """Run PTX that no compiler made: tensors as pointers and numbers, in the order of the parameters.

    Raises:
        EmulationError: see `Gang.run`.
    """
    kernel = parse(ptx)
    gang = Gang(kernel, prod(grid), shared, strict)
    for place, value in zip(kernel.parameters, arguments, strict=True):
        number = value.data_ptr() if isinstance(value, Tensor) else value
        dtype = f"f{place.size}" if isinstance(number, float) else f"i{place.size}"
        gang.parameters[place.offset : place.offset + place.size] = np.array([number], dtype).view(np.uint8)
    gang.start(grid, range(prod(grid)), Memory([x for x in arguments if isinstance(x, Tensor)]), {}, seed)
    return gang.run()


__all__ = ["Emulator", "emulate", "run_ptx"]
