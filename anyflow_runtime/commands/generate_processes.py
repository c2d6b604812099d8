"""`anyflow generate` under torchrun: all processes denoise, the first one decodes, writes and reports."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..parallel import context_parallel, process_group
from . import UsageError, generate_stages
from .generate_request import GenerateRequest
from .generate_stream import ChunkedVideo

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

    def share(self, model: Any) -> None:
        """Let all of them run a model together."""
        context_parallel(model, self.mesh, self.mode)


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


def denoise_only(
    pipe: Any,
    request: GenerateRequest,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    context_latents: Tensor | None,
) -> None:
    """This process's part of the video, in step with the first process."""
    if request.chunks is None:
        pipe.set_progress_bar_config(disable=True)
        condition = (prompt_embeds, negative_prompt_embeds, context_latents)
        generate_stages.denoise(pipe, request, *condition, on_step=lambda: None)
        return
    for _ in ChunkedVideo(pipe, request).latents(prompt_embeds, negative_prompt_embeds, context_latents):
        pass
