"""Self-attention over tokens that lie on several processes.

Ulysses: one all-to-all turns (own tokens, all heads) into (all tokens, own heads), another turns the result back; the
attention between is that of one process. Ring: queries stay, keys and values go round; what each piece of them gives
is merged by its log-sum-exp in fp32.
Source: DeepSpeed-Ulysses (arXiv 2309.14509); ring attention (arXiv 2310.01889).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from ..models.blocks import BlockInputs
from ..models.token_shards import HeldKeys, TokenShards, pieces

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class UlyssesAttention:
    """Attention with this process's heads of all tokens.

    Args:
        group: the processes; they divide the heads.
        shards: their tokens: one span each, in their order.
        inputs: of the whole sequence; slabs hold this process's heads.
    """

    def __init__(self, group: ProcessGroup, shards: TokenShards, inputs: BlockInputs) -> None:
        self._group, self._counts = group, shards.counts
        self._rank, self._world = dist.get_rank(group), shards.world
        self._ops, self._plan, self._cache, self._offset = inputs.ops, inputs.plan, inputs.cache, inputs.offset

    @torch.compiler.disable
    def store(self, k: Tensor, v: Tensor, layer: int) -> None:
        """Put own tokens' keys and values, (B, l, H, d) each, into the cache."""
        self._append(layer, *self._to_heads(k, v))

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """Attention of own tokens to all that the plan lets them see, (B, l, H, d) each; the cache takes k and v."""
        q, k, v = self._to_heads(q, k, v)
        if self._cache is not None:
            k, v = self._append(layer, k, v)
        return self._to_tokens(self._ops.far_attention(q, k, v, self._plan))

    def _append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, the new ones behind the context."""
        assert self._cache is not None
        slabs = self._cache[layer]
        for slab, new in zip(slabs, (k, v), strict=True):
            slab[:, self._offset : self._offset + new.shape[1]] = new
        return slabs[0][:, : self._plan.num_keys], slabs[1][:, : self._plan.num_keys]

    def _to_heads(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Each (B, own tokens, all heads, d) to a view (B, all tokens, own heads, d), in one exchange."""
        batch, own, heads, d = tensors[0].shape
        size = (batch, len(tensors), heads // self._world, d)
        send = tensors[0].new_empty(self._world, own, *size)
        for i, x in enumerate(tensors):
            send[:, :, :, i] = x.unflatten(2, (self._world, -1)).permute(2, 1, 0, 3, 4)
        received = send.new_empty(sum(self._counts), *size)
        dist.all_to_all_single(received, send.flatten(0, 1), self._counts, [own] * self._world, group=self._group)
        return tuple(x.transpose(0, 1) for x in received.unbind(2))

    def _to_tokens(self, x: Tensor) -> Tensor:
        """(B, all tokens, own heads, d) to (B, own tokens, all heads, d)."""
        own = self._counts[self._rank]
        send = x.transpose(0, 1).contiguous()
        received = send.new_empty(self._world * own, *send.shape[1:])
        dist.all_to_all_single(received, send, [own] * self._world, self._counts, group=self._group)
        return received.unflatten(0, (self._world, own)).permute(2, 1, 0, 3, 4).flatten(2, 3)


class RingAttention:
    """Attention of this process's tokens with all heads, to keys and values that pass by, a piece per process.

    Args:
        group: the processes.
        shards: their tokens.
        inputs: of the whole sequence; slabs hold the keys of this process's tokens.
        held: the keys in the slabs of each process, context included.
    """

    def __init__(self, group: ProcessGroup, shards: TokenShards, inputs: BlockInputs, held: HeldKeys) -> None:
        self._group, self._rank, self._world = group, dist.get_rank(group), shards.world
        self._ops, self._cache = inputs.ops, inputs.cache
        self._offset = held.count(self._rank, before=inputs.offset)
        now = held.followed_by(shards, inputs.offset)
        self._counts = [now.count(rank) for rank in range(self._world)]
        # Phantom keys belong to no process: each counts them once, with its own keys, of which every query sees some.
        self._pieces = [
            pieces(inputs.plan, shards.spans(self._rank), now, rank, (rank == self._rank) * inputs.plan.phantom_keys)
            for rank in range(self._world)
        ]

    @torch.compiler.disable
    def store(self, k: Tensor, v: Tensor, layer: int) -> None:
        """As `UlyssesAttention.store`; nothing is exchanged."""
        assert self._cache is not None
        for slab, new in zip(self._cache[layer], (k, v), strict=True):
            slab[:, self._offset : self._offset + new.shape[1]] = new

    @torch.compiler.disable
    def attend(self, q: Tensor, k: Tensor, v: Tensor, layer: int) -> Tensor:
        """As `UlyssesAttention.attend`. The next piece travels while one is attended to."""
        if self._cache is not None:
            self.store(k, v, layer)
            k, v = (slab[:, : self._counts[self._rank]] for slab in self._cache[layer])
        out = torch.zeros(q.shape, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        lse = torch.full((q.shape[0], q.shape[2], q.shape[1]), -torch.inf, dtype=out.dtype, device=q.device)
        held = torch.stack([k, v])
        for step in range(self._world):
            owner = (self._rank - step) % self._world
            following, requests = held, []
            if step + 1 < self._world:
                count = self._counts[(owner - 1) % self._world]
                following = held.new_empty(2, held.shape[1], count, *held.shape[3:])
                requests = self._pass_on(held, following)
            for piece in self._pieces[owner]:
                rows = slice(piece.start, piece.start + piece.plan.num_queries)
                part, part_lse = self._ops.far_attention(q[:, rows], held[0], held[1], piece.plan, return_lse=True)
                merge(out[:, rows], lse[:, :, rows], part, part_lse)
            for request in requests:
                request.wait()
            held = following
        return out.to(q.dtype)

    def _pass_on(self, held: Tensor, following: Tensor) -> list[dist.Work]:
        """Send a piece to the next process while receiving that of the one before."""
        after, before = (self._rank + 1) % self._world, (self._rank - 1) % self._world
        transfers = [
            dist.P2POp(dist.isend, held, group=self._group, group_peer=after),
            dist.P2POp(dist.irecv, following, group=self._group, group_peer=before),
        ]
        return dist.batch_isend_irecv(transfers)


def merge(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add to an attention, in place, what further keys give.

    Args:
        out, lse: (B, L, H, d) and (B, H, L), fp32 or fp64; zeros and -inf before the first keys.
        part, part_lse: likewise, of the further keys alone, in any precision.
    """
    total = torch.logaddexp(lse, part_lse.to(lse.dtype))
    old, new = ((x - total).exp().transpose(1, 2).unsqueeze(-1) for x in (lse, part_lse))
    out.mul_(old).addcmul_(part.to(out.dtype), new)
    lse.copy_(total)
