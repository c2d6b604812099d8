"""Pairs of models, diffusers' and ours, with the same random weights, and the error measure of all parity tests."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow_kernels.testing.budget import relative_error
from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel

__all__ = ["FP32_TOLERANCE", "model_pair", "prompt_inputs", "random_config", "reference_cache", "relative_error"]

FP32_TOLERANCE = 2e-5  # of every path, relative, against diffusers' model with the same weights


def random_config(seed: int, causal: bool) -> dict[str, Any]:
    """A small valid configuration: head_dim 16 to 48, both delta types, with and without image branch and norm2."""
    rng = random.Random(seed)
    config: dict[str, Any] = {
        "num_attention_heads": rng.choice([1, 2, 3]),
        "attention_head_dim": rng.choice([16, 24, 32, 44, 48]),
        "in_channels": rng.choice([4, 16]),
        "out_channels": rng.choice([4, 16]),
        "text_dim": rng.choice([8, 24]),
        "freq_dim": rng.choice([16, 64]),
        "ffn_dim": rng.choice([40, 96]),
        "num_layers": rng.choice([2, 3]),
        "cross_attn_norm": rng.random() < 0.7,
        "image_dim": rng.choice([None, None, 12]),
        "gate_value": rng.choice([0.25, 0.5]),
        "deltatime_type": rng.choice(["r", "t-r"]),
        "eps": rng.choice([1e-6, 1e-5]),
    }
    if causal:
        config["full_chunk_limit"] = rng.choice([2, 3, 4])
    return config


def model_pair(config: dict[str, Any], causal: bool, seed: int = 0, **ours: Any) -> tuple[nn.Module, Any]:
    """(diffusers' model, ours) with equal weights, every one of them random."""
    diffusers = pytest.importorskip("diffusers")
    name = "AnyFlowFARTransformer3DModel" if causal else "AnyFlowTransformer3DModel"
    torch.manual_seed(seed)
    theirs = getattr(diffusers, name)(**config).eval().requires_grad_(False)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    model_class = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    mine = model_class(**config, **ours).eval().requires_grad_(False)
    mine.load_state_dict(theirs.state_dict(), strict=True)
    return theirs, mine


def prompt_inputs(config: dict[str, Any], batch: int, tokens: int = 7) -> dict[str, Tensor | None]:
    """Random text and, for models with an image branch, image embeddings."""
    image_dim = config.get("image_dim")
    return {
        "encoder_hidden_states": torch.randn(batch, tokens, config["text_dim"]),
        "encoder_hidden_states_image": None if image_dim is None else torch.randn(batch, 3, image_dim),
    }


def reference_cache(
    config: Any, partition: list[int], batch: int, height: int, width: int
) -> dict[int, dict[str, Tensor]]:
    """An empty cache in the layout the diffusers pipeline allocates."""
    full, compressed = (height // 2) * (width // 2), (height // 4) * (width // 4)
    limit, largest = config.full_chunk_limit, max(partition)
    shape = (2, batch, config.num_attention_heads)
    slots = max(0, len(partition) - limit + 1)
    return {
        layer: {
            "full_cache": torch.zeros(*shape, limit * largest * full, config.attention_head_dim),
            "compressed_cache": torch.zeros(*shape, slots * largest * compressed, config.attention_head_dim),
        }
        for layer in range(config.num_layers)
    }
