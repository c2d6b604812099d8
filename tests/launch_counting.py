"""Count what a call would launch on a GPU, on a machine without one."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}


class LaunchCounter(TorchDispatchMode):
    """Kernel launches within the `with` block, by name, in order.

    Counts every launch of a Triton kernel, and every torch operator that computes or copies outside the `anyflow`
    operators (a GEMM, a cast, an addition: one launch each). Views and allocations are free. An operator of the C++
    extension counts as one; torch calls inside an `anyflow` operator are not seen. Where there is a GPU, what an
    operator makes in host memory is not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []
        self._patches: list[Any] = []

    def __enter__(self) -> LaunchCounter:
        for kind in (InterpretedFunction, JITFunction):
            self._patches.append(patch.object(kind, "run", self._counted(kind.run)))
            self._patches[-1].start()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        while self._patches:
            self._patches.pop().stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        before = len(self.launches)
        result = func(*args, **(kwargs or {}))
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        launched_triton = func.namespace == "anyflow" and len(self.launches) > before
        on_host = torch.cuda.is_available() and isinstance(result, torch.Tensor) and not result.is_cuda
        counted = not (is_view or launched_triton or on_host)
        if counted and func._schema.name.split("::")[1] not in ALLOCATIONS:
            self.launches.append(func._schema.name)
        return result

    def _counted(self, run: Any) -> Any:
        def counted(kernel: Any, *args: Any, **kwargs: Any) -> Any:
            self.launches.append(kernel.fn.__name__.strip("_"))
            return run(kernel, *args, **kwargs)

        return counted
