"""FLOPs of AnyFlow forwards, counted from their layouts (2 per multiply-add); elementwise work is not counted.

Per token and layer the linears cost 12 D^2 + 4 D ffn, self-attention 4 D per visible (query, key) pair,
cross-attention 4 D per text token, and the prompt's own keys and values 4 D^2 per text token, once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from anyflow_kernels import AttentionPlan, FarLayout


def forward_flops(
    layout: FarLayout, config: Any, batch: int = 1, text_tokens: int = 512, keys_only: bool = False
) -> int:
    """One forward over the queries of a layout; with `keys_only` the last block stops after its keys and values."""
    dim = config.num_attention_heads * config.attention_head_dim
    tokens, pairs = layout.num_query_tokens, AttentionPlan.from_layout(layout).num_pairs
    per_layer = tokens * (12 * dim**2 + 4 * dim * config.ffn_dim + 4 * dim * text_tokens) + 4 * dim * pairs
    total = config.num_layers * per_layer
    if keys_only:
        total += tokens * 6 * dim**2 - per_layer
    ends = 2 * dim * config.in_channels * math.prod(layout.patch_size) * (1 if keys_only else 2)
    return batch * (total + tokens * ends)


def rollout_flops(
    partition: Sequence[int], height: int, width: int, config: Any, steps: int, batch: int = 1, text_tokens: int = 512
) -> int:
    """A FAR rollout with the exact incremental cache: the least work that gives the reference's video."""

    def layout(mode: str, chunks: int, cached: int = 0) -> FarLayout:
        sizes = (tuple(config.patch_size), tuple(config.compressed_patch_size), config.full_chunk_limit)
        return FarLayout(tuple(partition[:chunks]), height, width, *sizes, mode, cached=cached)

    dim = config.num_attention_heads * config.attention_head_dim
    total = batch * config.num_layers * 4 * dim**2 * text_tokens
    compressed = 0
    for chunks in range(1, len(partition) + 1):
        total += steps * forward_flops(layout("inference", chunks), config, batch, text_tokens)
        if chunks < len(partition):
            demoted = layout("prefill", chunks).num_compressed_chunks
            cached = chunks - 1 if demoted == compressed else compressed
            total += forward_flops(layout("prefill", chunks, cached), config, batch, text_tokens, keys_only=True)
            compressed = demoted
    return total
