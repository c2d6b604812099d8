"""What a FAR rollout leaves for the next one: slabs at addresses that stay, and the steps captured over them.

A CUDA graph reads the memory it was recorded with. So that a step is captured once and not in every rollout, a model
keeps the memory of its latest finished rollout and gives it to the next one of the same shape;
`AnyFlowFARTransformer3DModel.release_memory` lets go of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, field
from typing import Any

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
        graphs: captured denoising steps.
        prompt: what they read of the prompt; None before the first.
        made_for: what of model and shape must be the same for another rollout to take it; None if none may.
    """

    slabs: Slabs = field(default_factory=list)
    graphs: StepGraphs = field(default_factory=StepGraphs)
    prompt: PromptBuffers | None = None
    made_for: Hashable = None

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

    def take(self, made_for: Hashable) -> Workspace | None:
        """The idle workspace if it fits; one that does not is let go, for its memory may be needed."""
        try:
            idle = self._idle.pop()
        except IndexError:
            return None
        return idle if idle.made_for == made_for else None

    def use(self, workspace: Workspace) -> None:
        """Note that a rollout has begun with a workspace."""
        self._used.add(id(workspace))

    def give(self, workspace: Workspace) -> None:
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


def fingerprint(weights: Iterable[Tensor]) -> Hashable:
    """Where a model's weights lie: a captured step is as good as these addresses."""
    return hash(tuple(weight.data_ptr() for weight in weights))
