"""LoRA adapters, and checkpoints that only diffusers can read, on models that stream.

Adapters are peft's, in the layouts that diffusers reads, original Wan's too: a model that is to take them is diffusers'
own class, accelerated. Source: `WanLoraLoaderMixin` and `PeftAdapterMixin` of diffusers.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..acceleration import accelerate
from ..optional import optional


def diffusers_transformer(path: str | os.PathLike[str], causal: bool, dtype: torch.dtype | None) -> Any:
    """The transformer of a pipeline directory as diffusers' class, quantised if its config says so, on our kernels.

    Raises:
        ImportError: without diffusers.
    """
    classes = optional("diffusers", "a model with adapters or quantised weights", "diffusers")
    kind = classes.AnyFlowFARTransformer3DModel if causal else classes.AnyFlowTransformer3DModel
    return accelerate(kind.from_pretrained(path, subfolder="transformer", torch_dtype=dtype).eval())


def load_lora(
    model: Any,
    files: Mapping[str, str | os.PathLike[str]],
    weights: Mapping[str, float] | None = None,
    fuse: bool = False,
) -> None:
    """Load adapters and switch them on.

    Args:
        model: an accelerated diffusers transformer.
        files: name to a file, a directory or a hub id.
        weights: of the adapters by name; None: 1 each.
        fuse: add them to the weights, once and for all: as fast as without, and steps are captured again.
    Raises:
        FileNotFoundError, ValueError: for a file that is not there, or is no LoRA of this model.
        ImportError: without peft.
    """
    optional("peft", "LoRA", "lora")
    from diffusers.loaders.lora_pipeline import WanLoraLoaderMixin

    for name, path in files.items():
        if os.path.splitext(path)[1] and not Path(path).is_file():
            raise FileNotFoundError(f"lora: no file {path}")
        try:
            state = WanLoraLoaderMixin.lora_state_dict(os.fspath(path))
            model.load_lora_adapter(state, prefix="transformer", adapter_name=name)
        except Exception as error:  # whatever diffusers, peft and the hub make of a file that is none
            raise ValueError(f"lora: {path}: not a LoRA of this model ({type(error).__name__}: {error})") from error
        if name not in getattr(model, "peft_config", {}):
            raise ValueError(f"lora: {path}: none of its weights is one of this model")
    set_lora(model, dict.fromkeys(files, 1.0) if weights is None else weights)
    if fuse:
        model.fuse_lora()
        model.unload_lora()


def check_lora(model: Any, weights: Mapping[str, float]) -> None:
    """Raise ValueError unless all names are those of adapters that the model has."""
    known = sorted(getattr(model, "peft_config", {}))
    unknown = sorted(set(weights) - set(known))
    if unknown:
        raise ValueError(
            f"lora: got {', '.join(unknown)}, expected some of {', '.join(known) or 'none: it has no LoRA'}"
        )


def set_lora(model: Any, weights: Mapping[str, float]) -> None:
    """Give adapters these weights; those that are not named are off.

    Raises:
        ValueError: as `check_lora`.
    """
    check_lora(model, weights)
    names = sorted(model.peft_config)
    model.set_adapters(names, [float(weights.get(name, 0.0)) for name in names])
