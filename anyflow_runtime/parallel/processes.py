"""The processes that torchrun starts: one per GPU, or several on the CPU."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist


@contextmanager
def process_group(device_type: str | None = None) -> Iterator[torch.device]:
    """The process group that torchrun has prepared, if it has, and this process's device: a GPU each, or the CPU.

    Args:
        device_type: "cuda" or "cpu"; None is a GPU if there is one.
    """
    use_gpu = torch.cuda.is_available() if device_type is None else device_type == "cuda"
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if use_gpu else torch.device("cpu")
    if use_gpu:
        torch.cuda.set_device(device)
    initialized = dist.is_available() and dist.is_initialized()
    owned = int(os.environ.get("WORLD_SIZE", "1")) > 1 and not initialized
    if owned:
        dist.init_process_group("nccl" if use_gpu else "gloo")
    try:
        yield device
    finally:
        if owned:
            dist.destroy_process_group()
