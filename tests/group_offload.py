"""Group offloading of diffusers on a CPU that stands for the accelerator: what is away is NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch


def poison_offloaded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Weights hold NaN from their offloading until they are onloaded; returns the groups that are, in order, by id."""
    from diffusers.hooks.group_offloading import ModuleGroup

    kept: dict[int, torch.Tensor] = {}
    onloaded: list[int] = []

    def tensors(group: Any) -> list[torch.Tensor]:
        return [*(p for module in group.modules for p in module.parameters()), *group.parameters]

    def offload(group: Any) -> None:
        for p in tensors(group):
            kept.setdefault(id(p), p.data.clone())
            p.data = torch.full_like(p.data, torch.nan)

    def onload(group: Any) -> None:
        onloaded.append(id(group))
        for p in tensors(group):
            p.data = kept[id(p)].clone()

    monkeypatch.setattr(ModuleGroup, "offload_", offload)
    monkeypatch.setattr(ModuleGroup, "onload_", onload)
    return onloaded
