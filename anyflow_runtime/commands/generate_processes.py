"""`anyflow generate` under torchrun: all processes denoise, the first one decodes, writes and reports."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..parallel import process_group
from . import UsageError

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True)
class Processes:
    """Those that make a video together.

    Attributes:
        mesh: None for one that is alone.
        mode: of `context_parallel`.
    """

    mesh: DeviceMesh | None
    mode: str

    @property
    def first(self) -> bool:
        """True in the one that decodes and writes."""
        return self.mesh is None or self.mesh.get_rank() == 0

    @property
    def count(self) -> int:
        return 1 if self.mesh is None else self.mesh.size()


@contextmanager
def processes(args: argparse.Namespace) -> Iterator[Processes]:
    """Those that torchrun has started, joined; `args.device` becomes that of this one.

    Raises:
        UsageError: for one GPU named to several processes.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes(None, args.context_parallel)
        return
    if args.device not in (None, "cpu", "cuda"):
        raise UsageError(f"--device: got {args.device!r} for {count} processes, expected cpu or cuda: a GPU each")
    from torch.distributed.device_mesh import init_device_mesh

    with process_group(args.device) as device:
        args.device = str(device)
        yield Processes(init_device_mesh(device.type, (count,)), args.context_parallel)
