"""The smallest AnyFlow models that tests run, every weight random."""

from __future__ import annotations

from typing import Any

import torch

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel

TINY: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 24, "num_layers": 2,
}  # fmt: skip


def tiny_model(causal: bool = True, seed: int = 0, backend: str = "torch", **config: Any) -> Any:
    """A `TINY` model, with other settings if given, for inference."""
    torch.manual_seed(seed)
    model_class = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    model = model_class(**{**TINY, **config}, backend=backend).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model
