"""What a rollout leaves for the next one: slabs at addresses that stay, and the steps captured over them.

A CUDA graph reads the memory it was recorded with. So that a step is captured once and not in every rollout, a model
keeps the memory of its latest finished rollout and gives it to the next one of the same shape; its `release_memory`
lets go of it.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import Ops

from .cuda_graphs import StepGraphs
from .prompt_keys import PromptBuffers, PromptKeys

Slabs = list[tuple[Tensor, Tensor]]


@dataclass
class Workspace:
    """Memory of a rollout.

    Attributes:
        slabs: keys and values (B, T, H, d) of every block.
        graphs: captured denoising steps and prefills.
        prompt: what they read of the prompt; None before the first.
        made_for: what of model and shape must be the same for another rollout to take it; None if none may.
    """

    slabs: Slabs
    graphs: StepGraphs = field(default_factory=StepGraphs)
    prompt: PromptBuffers | None = None
    made_for: Hashable = None

    @classmethod
    def allocated(
        cls, layers: int, shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str
    ) -> Workspace:
        """With slabs of `shape` (B, T, H, d), uninitialised."""
        return cls([_pair(shape, dtype, device) for _ in range(layers)])

    def resize(self, tokens: int, keep: int = 0) -> None:
        """Take new slabs of `tokens` positions, of which the first `keep` are those of the old ones."""
        slabs: Slabs = []  # taken over only when complete: an allocation may fail
        for old in self.slabs:
            batch, _, heads, head_dim = old[0].shape
            new = _pair((batch, tokens, heads, head_dim), old[0].dtype, old[0].device)
            for slab, before in zip(new, old, strict=True):
                slab[:, :keep] = before[:, :keep]
            slabs.append(new)
        self.slabs, self.made_for = slabs, None
        self.graphs.clear()  # captured steps read the old slabs

    def hold_prompt(self, keys: PromptKeys, blocks: Any, ops: Ops) -> PromptBuffers:
        """Buffers that hold this prompt."""
        if self.prompt is None or not self.prompt.take(keys, blocks, ops):
            self.prompt = PromptBuffers(keys, blocks, ops)
        return self.prompt


class IdleWorkspaces:
    """The workspace of a model's latest rollout, once that has ended, for the next one.

    Nothing is kept while another rollout of the model is under way: that would be memory on top of what it needs. Safe
    with several threads and from a finalizer: the methods of deques and sets used here are atomic.
    """

    def __init__(self) -> None:
        self._idle: deque[Workspace] = deque(maxlen=1)
        self._used: set[int] = set()

    def lend(
        self,
        rollout: object,
        weights: Hashable,
        layers: int,
        shape: tuple[int, int, int, int],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> Workspace:
        """The idle workspace if it fits, else a new one, until `rollout` is gone.

        Args:
            weights: what stands for their addresses.
        """
        device = torch.device(device)
        # Another stream may still be at work on this memory, and what inference mode made cannot be written outside it.
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else None
        made_for = (shape, layers, dtype, device, stream, torch.is_inference_mode_enabled(), weights)
        workspace = self._take(made_for)
        if workspace is None:
            workspace = Workspace.allocated(layers, shape, dtype, device)
            workspace.made_for = made_for
        self._used.add(id(workspace))
        weakref.finalize(rollout, self._give, workspace).atexit = False
        return workspace

    def _take(self, made_for: Hashable) -> Workspace | None:
        """The idle workspace if it fits; one that does not is let go, for its memory may be needed."""
        try:
            idle = self._idle.pop()
        except IndexError:
            return None
        return idle if idle.made_for == made_for else None

    def _give(self, workspace: Workspace) -> None:
        """A rollout has ended: keep its workspace if it has run a step."""
        self._used.discard(id(workspace))
        if not self._used and workspace.made_for is not None and len(workspace.graphs):
            self._idle.append(workspace)

    def clear(self) -> None:
        """Keep nothing."""
        self._idle.clear()

    def __deepcopy__(self, memo: dict[int, Any]) -> IdleWorkspaces:
        return IdleWorkspaces()  # a copy of a model has other weights, and a graph cannot be copied

    def __reduce__(self) -> tuple[type[IdleWorkspaces], tuple[()]]:
        return IdleWorkspaces, ()


def _pair(shape: tuple[int, int, int, int], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Tensor]:
    k, v = torch.empty(2, *shape, device=device, dtype=dtype).unbind(0)
    return k, v
