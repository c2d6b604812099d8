"""A Triton driver for a GPU that is not here: host code, JIT and descriptors run, launches go to a callable.

    Driver(90, launch).activate()

From then on kernels called with CPU tensors are compiled for sm_90 (to PTX: ptxas is not run) and every launch arrives
at `launch` as a `Launch`. It may run the PTX (`machine.run`), count, or do nothing.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import ty_to_cpp
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.cache import get_cache_manager
from triton.runtime.driver import driver as triton_driver

from anyflow_kernels.launch_configs import GPUS


@dataclass(frozen=True)
class Compiled:
    """A kernel as the JIT compiled it for one signature. `metadata` is Triton's, `signature` has a type per argument:
    "*bf16", "i32", "fp32", "constexpr", "tensordesc<...>". In a `gluon` kernel fences are the author's, not the
    compiler's.
    """

    name: str
    hash: str
    signature: dict[str, str]
    metadata: Any
    gluon: bool

    @property
    def ptx(self) -> str:
        """From Triton's cache.

        Raises:
            RuntimeError: if the cache holds none (TRITON_STORE_BINARY_ONLY=1).
        """
        path = get_cache_manager(self.hash).get_file(f"{self.name[:150]}.ptx")
        if path is None:
            raise RuntimeError(f"{self.name}: no PTX in Triton's cache; unset TRITON_STORE_BINARY_ONLY and clear it")
        return Path(path).read_text()


@dataclass(frozen=True)
class Launch:
    """`arguments`: (type, value) of every argument that is not a constant, as the caller passed it."""

    kernel: Compiled
    grid: tuple[int, int, int]
    arguments: list[tuple[str, Any]]


_DEVICES = itertools.count(1)


class Driver:
    """Stands in for `triton.backends.nvidia.driver.CudaDriver`.

    Args:
        arch: compute capability times ten.
        launch: called with every `Launch`.
    """

    def __init__(self, arch: int, launch: Callable[[Launch], None]) -> None:
        if arch not in GPUS:
            raise ValueError(f"arch: got {arch}, expected one of {sorted(GPUS)}")
        self.arch, self.launch = arch, launch
        self.compiled: list[Compiled] = []  # in the order of their first launch
        self.utils = _Utils(arch)
        self._device = next(_DEVICES)

    def activate(self) -> None:
        """Make it Triton's driver. The cubin stays empty: nothing here could run one."""
        knobs.runtime.add_stages_inspection_hook = _without_ptxas
        triton_driver.set_active(self)

    def launcher_cls(self, source: Any, metadata: Any) -> Callable[..., None]:
        """Called once per compiled kernel; what it returns, once per launch."""
        names = source.fn.arg_names
        signature = {names[k] if isinstance(k, int) else k: kind for k, kind in source.signature.items()}
        kernel = Compiled(metadata.name, metadata.hash, signature, metadata, isinstance(source, GluonASTSource))
        self.compiled.append(kernel)

        def run(grid_x: int, grid_y: int, grid_z: int, stream: int, function: int, *rest: Any) -> None:
            values = rest[4:]  # metadata, launch metadata and two hooks come first
            given = zip(signature.values(), values, strict=True)
            arguments = [(kind, value) for kind, value in given if kind != "constexpr"]
            self.launch(Launch(kernel, (grid_x, grid_y, grid_z), arguments))

        return run

    def get_current_device(self) -> int:
        """A number of its own: the JIT keeps what it has compiled, and who launches it, per device."""
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def map_python_to_cpp_type(self, kind: str) -> str:
        return ty_to_cpp(kind)

    @staticmethod
    def is_active() -> bool:
        return True


class _Utils:
    """What Triton asks the CUDA driver about a device and a loaded kernel."""

    def __init__(self, arch: int) -> None:
        self._gpu = GPUS[arch]
        self._handles = itertools.count(1)

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        """(module, function, registers, spills, most threads a block)"""
        handle = next(self._handles)
        return handle, handle, 32, 0, 1024

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._gpu.shared_bytes,
            "multiprocessor_count": self._gpu.multiprocessors,
            "warpSize": 32,
        }


def _without_ptxas(*arguments: Any) -> tuple[str, str] | None:
    """Triton's hook: without arguments it asks for a cache key, with them it hands over the stages."""
    if not arguments:
        return "-without-ptxas", "without-ptxas"
    _, stages, *_ = arguments
    stages["cubin"] = lambda source, metadata: b""
    return None
