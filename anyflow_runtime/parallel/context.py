"""Context parallelism: the tokens of one video shared out over processes that all hold the whole model.

    mesh = init_device_mesh("cuda", (dist.get_world_size(),))
    context_parallel(model, mesh)

Every process then calls the model with the same inputs and gets the whole result. Text, times and patch embedding are
computed everywhere; norms, projections, cross-attention and feed-forward on a process's own tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from anyflow_kernels.operations import FrameMap

from ..models.base import AnyFlowModel
from ..models.blocks import BlockInputs
from ..models.token_shards import HeldKeys, TokenShards, take
from .attention import RingAttention, UlyssesAttention

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

MODES = ("auto", "ulysses", "ring")
Model = TypeVar("Model")


@dataclass(frozen=True)
class ContextParallel:
    """How the processes of a mesh share the tokens of a model; made by `context_parallel`.

    Attributes:
        mesh: one dimension.
        mode: "ulysses": a process attends with its share of the heads to all tokens, and its cache holds these heads.
            "ring": with all heads of its tokens; the others' keys and values pass by, and its cache holds those of
            its own tokens.
        rank, world: this process among them, and their number.
    """

    mesh: DeviceMesh = field(repr=False)
    mode: str
    rank: int
    world: int

    def heads_held(self, heads: int) -> int:
        """Heads in the cache of a process."""
        return heads // self.world if self.mode == "ulysses" else heads

    def shards(self, frame_map: FrameMap) -> TokenShards:
        """The tokens of each process."""
        return TokenShards(tuple(frame_map), self.world, by_run=self.mode == "ring")

    def split(self, x: Tensor, inputs: BlockInputs) -> tuple[Tensor, BlockInputs]:
        """This process's tokens of x (B, L, D), and what its blocks take.

        Raises:
            ValueError: if there are not enough tokens for all processes.
        """
        shards = self.shards(inputs.frame_map)
        if min(shards.counts) == 0:
            raise ValueError(f"tokens: got {x.shape[1]} for {self.world} processes, expected one for each at least")
        spans = shards.spans(self.rank)
        rows, frame_map = shards.frames(self.rank)
        attention: UlyssesAttention | RingAttention
        if self.mode == "ulysses":
            attention = UlyssesAttention(self.mesh.get_group(), shards, inputs)
        else:
            attention = RingAttention(self.mesh.get_group(), shards, inputs, inputs.held or HeldKeys.none(self.world))
        cos, sin = (take(table, spans, dim=0) for table in inputs.rope)
        local = replace(
            inputs,
            frame_map=frame_map,
            times=take(inputs.times, rows, dim=1),
            rope=(cos, sin),
            cache=None,  # the attention has it
            attention=attention,
        )
        return take(x, spans, dim=1), local

    def gather(self, x: Tensor, shards: TokenShards) -> Tensor:
        """All tokens (B, L, D) from this process's (B, l, D)."""
        counts = shards.counts
        padded = x.new_zeros(x.shape[0], max(counts), x.shape[2])  # NCCL and gloo gather equal parts only
        padded[:, : x.shape[1]] = x
        gathered = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(gathered, padded, group=self.mesh.get_group())
        parts: dict[int, Tensor] = {}  # by first token
        for rank in range(self.world):
            spans = shards.spans(rank)
            local = gathered[rank][:, : counts[rank]].split([b - a for a, b in spans], dim=1)
            parts |= {start: part for (start, _), part in zip(spans, local, strict=True)}
        return torch.cat([parts[start] for start in sorted(parts)], dim=1)


def context_parallel(model: Model, mesh: DeviceMesh | None, mode: str = "auto") -> Model:
    """Run a model's inference on all processes of a mesh.

    From then on every process has to make the same calls with the same inputs, latents and noise included; each gets
    the whole velocity, equal to that of one process to fp32 rounding. A `FarCache` made afterwards holds this process's
    share of keys and values; one made before is refused. There are no CUDA graphs and no gradients.

    Args:
        model: an `AnyFlowTransformer3DModel` or `AnyFlowFARTransformer3DModel`, or one taken over by `accelerate`.
        mesh: of one dimension, such as `init_device_mesh("cuda", (n,))` or a named dimension of a larger one. A mesh
            of one process, or None, takes the model back to one process.
        mode: "ulysses" exchanges heads for tokens, which needs a number of heads that the processes divide; "ring"
            passes keys and values round; "auto" is the first where it can be, else the second.

    Returns:
        The same model.

    Raises:
        TypeError: for another model.
        ValueError: for another mode, a mesh of several dimensions or without this process, or heads that do not divide.
    """
    if not isinstance(model, AnyFlowModel):
        raise TypeError(f"model: got {type(model).__name__}, expected an AnyFlow transformer")
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, expected one of {MODES}")
    if mesh is not None and mesh.ndim != 1:
        raise ValueError(f"mesh: got shape {tuple(mesh.shape)}, expected one dimension, as of mesh['name']")
    if mesh is not None and mesh.get_coordinate() is None:
        raise ValueError(f"mesh: got {mesh}, expected one that this process is part of")
    world = 1 if mesh is None else mesh.size()
    heads = model.config.num_attention_heads
    if mode == "auto":
        mode = "ring" if heads % world else "ulysses"
    if mode == "ulysses" and heads % world:
        raise ValueError(f"mode: got 'ulysses' for {heads} heads on {world} processes, expected 'ring' or 'auto'")
    if mesh is None or world == 1:
        model.parallel = None
    else:  # the order of processes is that of the group, whatever the mesh says
        model.parallel = ContextParallel(mesh, mode, dist.get_rank(mesh.get_group()), world)
    return model
