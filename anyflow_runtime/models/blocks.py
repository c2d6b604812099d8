"""The AnyFlow transformer block.

A block defers its last gated residual to the next one: it takes `(x, branch, gate)` and returns the same triple, so
that `x + gate * branch` and the following modulated LayerNorm are a single pass over the tokens.
Source: Wan2.1's DiT block; parameter names are those of diffusers' AnyFlow classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from anyflow_kernels import AttentionPlan, Ops
from anyflow_kernels.operations import FrameMap

from .layers import Attention, FeedForward
from .parameters import apply_linear, fuse_storage, in_place, is_plain, onloaded, project
from .prompt_keys import CrossAttentionKeys, KeysOfOneBlock
from .token_shards import HeldKeys, SharedAttention
from .workspaces import Slabs

Pending = tuple[Tensor, Tensor | None, Tensor | None]  # x, and the branch and gate still to be added to it


@dataclass
class BlockInputs:
    """What all blocks of one forward share.

    Attributes:
        ops: the kernels.
        frame_map: runs `(frames, tokens_per_frame)` of the query tokens.
        times: (B, F, 6, D) fp32, the modulation of each frame before a block adds its table.
        rope: (cos, sin) of the query tokens, each (L, d/2).
        plan: of self-attention.
        prompt: text (and image) tokens, and their keys and values per block.
        cache: per block a pair of slabs (B, T, H, d) that hold the context and take this forward's keys and values;
            None without a cache.
        offset: slab position of the first query.
        modulation: (layers, B, F, 6, D), all tables added at once, or None if a block must add its own.
        held: with context parallelism, the keys in the slabs of each process, if it holds those of its tokens.
        attention: self-attention over several processes; the queries, and all but the prompt, are then this process's
            tokens, and the cache is in its hands.
    """

    ops: Ops
    frame_map: FrameMap
    times: Tensor
    rope: tuple[Tensor, Tensor]
    plan: AttentionPlan
    prompt: CrossAttentionKeys
    cache: Slabs | None = None
    offset: int = 0
    modulation: Tensor | None = None
    held: HeldKeys | None = None
    attention: SharedAttention | None = None

    def of_block(self, layer: int, attn: Any) -> BlockInputs:
        """What a block reads of this, at index 0; `attn` is its cross-attention. The block adds its own table."""
        graded = torch.is_grad_enabled()  # then the block computes the prompt's keys, which a checkpoint may free
        prompt = self.prompt if graded else KeysOfOneBlock(self.prompt, layer, attn, self.ops)
        return replace(self, cache=self.cache and [self.cache[layer]], modulation=None, held=None, prompt=prompt)


class AnyFlowTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward, each behind a modulated or affine LayerNorm."""

    def __init__(self, dim: int, ffn_dim: int, num_heads: int, cross_attn_norm: bool, eps: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.attn1 = Attention(dim, num_heads, eps)
        self.attn2 = Attention(dim, num_heads, eps)
        self.norm2 = nn.LayerNorm(dim, eps) if cross_attn_norm else nn.Identity()
        self.ffn = FeedForward(dim, ffn_dim)
        self.norm3 = nn.LayerNorm(dim, eps, elementwise_affine=False)
        self.scale_shift_table = nn.Parameter(torch.randn(1, 6, dim) / dim**0.5)

    attn1: Any
    attn2: Any
    ffn: Any

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """As `nn.Module.compile`, for any length unless `dynamic` says otherwise: each chunk brings another one."""
        super().compile(*args, **{"dynamic": True, **kwargs})

    def call(self, pending: Pending, inputs: BlockInputs, layer: int, keys_only: bool) -> Pending:
        """The block by its index; see `forward`. A compiled one is the same graph for every layer, given as the only
        one, with something to add to x, and without the early end of `keys_only`.
        """
        if self._compiled_call_impl is None or not in_place(self) or inputs.attention is not None:
            return self(*pending, inputs, layer, keys_only)
        x, branch, gate = pending
        if branch is None:
            branch, gate = torch.zeros_like(x), torch.zeros_like(inputs.times).unbind(2)[-1]  # strided as others are
        assert gate is not None
        if not torch.is_grad_enabled():  # what a tensor is a view of would be another graph
            x, branch, gate = x.detach(), branch.detach(), gate.detach()
        return self(x, branch, gate, inputs.of_block(layer, self.attn2), 0)

    def fuse_projections(self) -> None:
        """Give q, k and v of the self-attention one storage."""
        fuse_storage([self.attn1.to_q, self.attn1.to_k, self.attn1.to_v])

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None,
        gate: Tensor | None,
        inputs: BlockInputs,
        layer: int,
        keys_only: bool = False,
    ) -> Pending:
        """One block on (B, L, D) tokens.

        Args:
            x, branch, gate: the residual stream and what the previous block still has to add to it.
            inputs: shared by all blocks of this forward.
            layer: index of this block.
            keys_only: stop once this block's keys and values are in the cache.
        """
        ops, frame_map = inputs.ops, inputs.frame_map
        modulation = inputs.times + self.scale_shift_table if inputs.modulation is None else inputs.modulation[layer]
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.unbind(2)  # each (B, F, D)

        x, y = ops.gated_residual_layer_norm(x, frame_map, branch, gate, shift1, scale1, eps=self.norm1.eps)
        q, k, v = self._queries_keys_values(y, inputs, layer)
        shared = inputs.attention
        if keys_only:
            if shared is not None:
                shared.store(k, v, layer)
            return x, None, None
        y = ops.far_attention(q, k, v, inputs.plan) if shared is None else shared.attend(q, k, v, layer)
        y = apply_linear(ops, self.attn1.to_out[0], y.flatten(2))

        if isinstance(self.norm2, nn.Identity):
            x, _ = ops.gated_residual_layer_norm(x, frame_map, y, gate1)
            y = x
        else:
            norm2 = self.norm2
            with onloaded(norm2):
                x, y = ops.gated_residual_layer_norm(
                    x, frame_map, y, gate1, weight=norm2.weight, bias=norm2.bias, eps=norm2.eps
                )
        y = self._attend_prompt(y, inputs, layer)

        x, y = ops.gated_residual_layer_norm(x, frame_map, y, None, shift2, scale2, eps=self.norm3.eps)
        up, down = self.ffn.net[0], self.ffn.net[2]
        y = ops.linear_gelu(y, up.proj.weight, up.proj.bias) if is_plain(up.proj) else up(y)
        return x, apply_linear(ops, down, y), gate2

    def _queries_keys_values(self, y: Tensor, inputs: BlockInputs, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated q (B, L, H, d), and all keys and values that the plan speaks of; on several processes those of
        this one's tokens.
        """
        attn = self.attn1
        qkv = project(inputs.ops, y, [attn.to_q, attn.to_k, attn.to_v])
        # A slab is overwritten by the next step; what a backward pass needs must not be.
        in_place = inputs.cache is not None and not (torch.is_grad_enabled() and qkv.requires_grad)
        slabs = (*inputs.cache[layer], inputs.offset) if inputs.cache and in_place else ()
        with onloaded(attn.norm_q, attn.norm_k):
            norms = (attn.norm_q.weight, attn.norm_k.weight, inputs.rope, attn.heads, attn.norm_q.eps)
            outputs = inputs.ops.qk_norm_rope_append(qkv, *norms, *slabs)
        if inputs.cache is None:
            return outputs
        k_slab, v_slab = inputs.cache[layer]
        if in_place:
            return outputs, k_slab[:, : inputs.plan.num_keys], v_slab[:, : inputs.plan.num_keys]
        q, k, v = outputs
        k_context, v_context = k_slab[:, : inputs.offset], v_slab[:, : inputs.offset]
        return q, torch.cat([k_context, k], dim=1), torch.cat([v_context, v], dim=1)

    def _attend_prompt(self, y: Tensor, inputs: BlockInputs, layer: int) -> Tensor:
        attn, ops = self.attn2, inputs.ops
        k, v = inputs.prompt.keys_values(layer, attn, ops)
        with onloaded(attn.norm_q):
            q = ops.rms_norm(apply_linear(ops, attn.to_q, y), attn.norm_q.weight, attn.norm_q.eps).unflatten(
                -1, (attn.heads, -1)
            )
        y = ops.far_attention(q, k, v, AttentionPlan.dense(q.shape[1], k.shape[1]))
        return apply_linear(ops, attn.to_out[0], y.flatten(2))
