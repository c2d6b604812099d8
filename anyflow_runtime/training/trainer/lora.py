"""LoRA as the released models use it: rank and alpha 256, no dropout, no bias, on chosen linear layers.

Targets are self-attention and feed-forward; students add the two timestep embedders. Trained beside the adapters: the
compressed patch embedding, at full rank. Cross-attention, `time_proj`, norms and the output head stay frozen.
Needs peft (`pip install anyflow-kernels[lora]`), imported on use.
"""

from __future__ import annotations

import torch
from torch import nn

from ...optional import optional

BLOCK_TARGETS = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2")
STUDENT_TARGETS = ("delta_embedder", "time_embedder")
FULL_RANK = ("far_patch_embedding",)


def lora_targets(model: nn.Module, student: bool = True) -> list[str]:
    """Full names of the linear layers that get an adapter."""
    patterns = BLOCK_TARGETS + (STUDENT_TARGETS if student else ())
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and any(p in n for p in patterns)]
    if not names:
        raise ValueError(f"model: {type(model).__name__} has no linear layer named like {patterns}")
    return names


def add_lora(model: nn.Module, rank: int = 256, alpha: float = 256.0, student: bool = True) -> list[str]:
    """Put adapters into `model` in place and freeze all else but the full-rank parts; returns the trainable names.

    Args:
        rank: at least 1.  alpha: the update is scaled by alpha / rank.
        student: also adapt the timestep embedders; score networks leave them.
    """
    if rank < 1:
        raise ValueError(f"rank: got {rank}, expected >= 1")
    if alpha <= 0:
        raise ValueError(f"alpha: got {alpha}, expected > 0")
    targets = lora_targets(model, student)
    peft = optional("peft", "LoRA", "lora")
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", target_modules=targets)
    peft.inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(_is_adapter(name) or any(part in name for part in FULL_RANK))
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def lora_state_dict(model: nn.Module) -> dict[str, torch.Tensor]:
    """Adapters and full-rank parts: all that LoRA training changes."""
    return {k: v for k, v in model.state_dict().items() if _is_adapter(k) or any(part in k for part in FULL_RANK)}


@torch.no_grad()
def merge_lora(model: nn.Module) -> nn.Module:
    """Fold the adapters into the weights, W + alpha / rank * B A, and take them out, in place. There is no way back."""
    layer_class = optional("peft", "LoRA", "lora").tuners.lora.LoraLayer
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, layer_class)]
    if not layers:
        raise ValueError(f"model: {type(model).__name__} has no adapter to merge")
    for name, module in layers:
        module.merge()
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, module.get_base_layer())
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return model


def _is_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
