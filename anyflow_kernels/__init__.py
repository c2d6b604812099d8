"""Kernels for AnyFlow video models: tensors in, tensors out.

`load_ops(backend)` returns every operation on one backend; the functions of this module are those of "auto".

    triton     hand-written kernels: NVIDIA GPUs, or a CPU under TRITON_INTERPRET=1
    torch      the fast portable path, the default on a CPU
    reference  flex_attention and plain PyTorch, for verification
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from functools import cache
from typing import Any

import torch

from .far_layout import AttentionPlan, FarLayout, Segment
from .launch_configs import INTERPRETER, architecture
from .operations import OPERATIONS, Ops, TimestepMLP

__all__ = ["AttentionPlan", "FarLayout", "Ops", "Segment", "TimestepMLP", "available_backends", "load_ops", *OPERATIONS]

_MODULES = {"triton": "triton_ops", "torch": "portable", "reference": "reference"}


def available_backends() -> dict[str, str | None]:
    """Every backend and why it cannot run here, or None if it can."""
    return {name: _obstacle(name) for name in _MODULES}


def load_ops(backend: str = "auto") -> Ops:
    """The operations of a backend.

    Args:
        backend: "triton", "torch", "reference", or "auto": the environment variable ANYFLOW_BACKEND if set, else
            "triton" on CUDA and "torch" elsewhere.

    Raises:
        ValueError: on an unknown name.
        RuntimeError: if the backend cannot run here; the message says what is missing. There is no fallback.
    """
    if backend == "auto":
        backend = os.environ.get("ANYFLOW_BACKEND", "auto")
    if backend == "auto":
        backend = "triton" if torch.cuda.is_available() else "torch"
    if backend not in _MODULES:
        raise ValueError(f"backend: got {backend!r}, expected 'auto' or one of {sorted(_MODULES)}")
    obstacle = _obstacle(backend)
    if obstacle is not None:
        raise RuntimeError(f"backend {backend!r} cannot run here: {obstacle}")
    return _load(backend)


@cache
def _load(backend: str) -> Ops:
    return Ops(backend, importlib.import_module(f".{_MODULES[backend]}", __name__))


def _obstacle(backend: str) -> str | None:
    if backend != "triton":
        return None
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (pip install triton)"
    emulated = architecture("cpu") != INTERPRETER
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1" and not emulated:
        return "no CUDA device (TRITON_INTERPRET=1, set before Python starts, runs them on a CPU, slowly, for tests)"
    if torch.cuda.is_available() and torch.version.hip:
        return f"ROCm {torch.version.hip}: the kernels are for NVIDIA GPUs ('torch' runs here)"
    return None


def __getattr__(name: str) -> Any:
    if name in OPERATIONS:
        return getattr(load_ops(), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
