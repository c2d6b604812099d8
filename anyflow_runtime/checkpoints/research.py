"""The original research checkpoints (`.pt`): merged, or LoRA to be merged into its base.

A file is a dict with `ema` and `model_state_dict_g`. Merged weights have the diffusers names. LoRA ones carry
`base_model.model.`, `.base_layer.`, `.lora_A.real.` and `.lora_B.real.`; the average holds what was trained only, so
its base comes from `model_state_dict_g` or from the caller. Merging W + (alpha / rank) B A is one-way: keep A and B.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

import torch

from .renames import Report, State

WEIGHTS = {"ema": "ema", "student": "model_state_dict_g"}
_WRAPPER = "base_model.model."
_ADAPTER = re.compile(r"(?P<layer>.+)\.lora_(?P<side>[AB])\.(?P<adapter>[^.]+)\.weight")


def read_research(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The content of a `.pt` file, tensors on the CPU, nothing but tensors and plain containers allowed in it.

    Raises:
        ValueError: if it is not a dict with `ema` or `model_state_dict_g`.
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(content, dict) or not set(WEIGHTS.values()) & set(content):
        keys = sorted(content)[:5] if isinstance(content, dict) else type(content).__name__
        raise ValueError(f"{path}: got {keys}, expected a dict with {' or '.join(map(repr, WEIGHTS.values()))}")
    return content


def from_research(
    content: Mapping[str, Any], weights: str = "ema", alpha: float | None = None, base: State | None = None
) -> tuple[State, Report]:
    """A diffusers state dict from the content of a research checkpoint.

    Args:
        weights: "ema" | "student".
        alpha: of the LoRA, from its config; needed exactly if there are adapters (the rank is read off their shape).
        base: diffusers state dict under the adapters, if the file does not hold it.

    Returns: the *same object* as in the file if its weights are merged and named already.

    Raises:
        ValueError: on missing weights, adapters without alpha or base, or adapters that do not fit.
    """
    if weights not in WEIGHTS:
        raise ValueError(f"weights: got {weights!r}, expected one of {tuple(WEIGHTS)}")
    if WEIGHTS[weights] not in content:
        raise ValueError(f"weights: got {weights!r}, but the checkpoint holds only {sorted(content)}")
    state: State = content[WEIGHTS[weights]]
    if not any(_is_wrapped(key) for key in state):
        return state, Report()
    report = Report()
    under = content.get(WEIGHTS["student"]) if weights == "ema" else None
    plain: dict[str, Any] = {}
    for source in (base, under, state):
        plain.update({_plain(key): value for key, value in (source or {}).items() if not _ADAPTER.fullmatch(key)})
    report.renamed += [(key, _plain(key)) for key in state if not _ADAPTER.fullmatch(key) and _plain(key) != key]
    adapters = _collect(state)
    if adapters:
        if alpha is None:
            raise ValueError("alpha: got None, expected the LoRA alpha of the training config; weights do not tell it")
        _merge(plain, adapters, alpha, report)
    return plain, report


def has_adapters(state: State) -> bool:
    """True if the state dict holds LoRA factors."""
    return any(_ADAPTER.fullmatch(key) for key in state)


def _is_wrapped(key: str) -> bool:
    return key.startswith(_WRAPPER) or ".base_layer." in key or _ADAPTER.fullmatch(key) is not None


def _plain(key: str) -> str:
    return key.removeprefix(_WRAPPER).replace(".base_layer.", ".")


def _collect(state: State) -> dict[str, dict[str, torch.Tensor]]:
    """layer -> {"A": (rank, in), "B": (out, rank)}."""
    adapters: dict[str, dict[str, torch.Tensor]] = {}
    names: set[str] = set()
    for key, value in state.items():
        match = _ADAPTER.fullmatch(key)
        if match:
            names.add(match["adapter"])
            adapters.setdefault(_plain(match["layer"]), {})[match["side"]] = value
    if len(names) > 1:
        raise ValueError(f"state: got adapters named {sorted(names)}, expected one")
    return adapters


def _merge(
    plain: dict[str, Any], adapters: Mapping[str, dict[str, torch.Tensor]], alpha: float, report: Report
) -> None:
    for layer, pair in adapters.items():
        key = f"{layer}.weight"
        if set(pair) != {"A", "B"}:
            raise ValueError(f"state: {layer} has only lora_{next(iter(pair))}, expected lora_A and lora_B")
        if key not in plain:
            raise ValueError(f"base: no weight {key!r} under the adapter, expected it in the file or in base")
        weight, a, b = plain[key], pair["A"], pair["B"]
        if b.shape[1] != a.shape[0] or (b.shape[0], a.shape[1]) != tuple(weight.shape):
            raise ValueError(
                f"state: {layer} has lora_B {tuple(b.shape)} and lora_A {tuple(a.shape)}, "
                f"expected factors of its weight {tuple(weight.shape)}"
            )
        rank = a.shape[0]
        # In fp32 and rounded once: a sum in bf16 would lose small updates of large weights.
        wide = torch.promote_types(weight.dtype, torch.float32)
        plain[key] = (weight.to(wide) + (alpha / rank) * (b.to(wide) @ a.to(wide))).to(weight.dtype)
        report.notes.append(f"merged LoRA of rank {rank}, alpha {alpha:g} into {key} (one-way)")
