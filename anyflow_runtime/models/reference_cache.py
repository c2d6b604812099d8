"""diffusers' cache protocol, dicts of tensors per block, understood."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from anyflow_kernels import FarLayout
from anyflow_kernels.formulas import rotate

from .cache import Context, FarCache, FarModel
from .prompt_keys import PromptKeys


def adopt_reference_cache(
    kv_cache: Any,
    model: FarModel,
    partition: Sequence[int],
    height: int,
    width: int,
    num_cached: int,
) -> FarCache:
    """The `FarCache` behind a cache in diffusers' protocol: per block a dict of `full_cache` and `compressed_cache`.

    A `FarCache` is its own.

    At first sight the cache is made, takes over any keys a diffusers model has written, and is put into the dict of
    block 0; the reference's tensors, (2, B, H, T, d) each and sized for more than is ever live, are let go.

    Raises:
        ValueError: if the dict is neither the reference's nor one of ours.
    """
    if isinstance(kv_cache, FarCache):
        return kv_cache
    first = kv_cache[0] if isinstance(kv_cache, (dict, list, tuple)) and len(kv_cache) else None
    if not isinstance(first, dict):
        raise ValueError(f"kv_cache: got {type(kv_cache).__name__}, expected a FarCache or a dict of tensors per block")
    if "far_cache" in first:
        return first["far_cache"]
    if not {"full_cache", "compressed_cache"} <= set(first):
        raise ValueError(f"kv_cache: got entries {sorted(first)}, expected 'full_cache' and 'compressed_cache'")
    full, compressed = first["full_cache"], first["compressed_cache"]
    limit = model.config.full_chunk_limit
    now = model.layout("inference", partition, height, width)
    frame_tokens = math.prod(now.full_grid), max(1, math.prod(now.compressed_grid))
    # The reference sizes its tensors by the largest chunk: the whole video's partition is at most this.
    largest = max(max(partition), full.shape[3] // (limit * frame_tokens[0]))
    num_chunks = max(len(partition), compressed.shape[3] // (largest * frame_tokens[1]) + limit - 1)
    layout = model.layout("inference", (largest,) * num_chunks, height, width)
    if num_cached and model.parallel is not None:
        raise ValueError("kv_cache: got keys of a diffusers model on several processes, expected an empty cache")
    size = (model.config.num_layers, model.config.num_attention_heads, model.config.attention_head_dim)
    cache = FarCache(layout, *size, full.shape[1], full.device, full.dtype, parallel=model.parallel, model=model)
    if num_cached:
        _take_keys(cache, kv_cache, model, now)
    for i in range(model.config.num_layers):
        kv_cache[i].pop("full_cache")
        kv_cache[i].pop("compressed_cache")
    first["far_cache"] = cache
    return cache


def _take_keys(cache: FarCache, kv_cache: Any, model: FarModel, layout: FarLayout) -> None:
    """Copy keys and values that a diffusers model cached (unrotated) for the chunks before the newest one."""
    segments = [s for s in layout.segments if s.cached]
    tokens = {kind: sum(s.tokens for s in segments if s.kind == kind) for kind in ("compressed", "full")}
    rope = model.rotary(segments, cache.slabs[0][0].device)
    for i, (k_slab, v_slab) in enumerate(cache.slabs):
        parts = [kv_cache[i][f"{kind}_cache"][:, :, :, :count] for kind, count in tokens.items()]
        k, v = torch.cat(parts, dim=3).transpose(2, 3).unbind(0)  # (B, T, H, d)
        k_slab[:, : layout.cache_offset] = rotate(k, rope)
        v_slab[:, : layout.cache_offset] = v
    nothing = k_slab.new_zeros(2, 0, 0)
    embedder = model.condition_embedder
    cache.context = Context(tuple(layout.chunk_partition[:-1]), None, nothing, PromptKeys(embedder, nothing))
