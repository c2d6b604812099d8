"""The rotary tables that a model keeps: all of a rollout's, and no more than their bound."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anyflow_runtime import AnyFlowFARTransformer3DModel
from anyflow_runtime.models.rotary import RotaryTables

RELEASED = (1, 3, 3, 3, 3, 3, 3, 2)


def rollout(model: Any, partition: tuple[int, ...], device: str = "meta", size: tuple[int, int] = (60, 104)) -> None:
    """Ask for the tables of a rollout's steps and prefills, in order."""
    cached = 0
    for i in range(len(partition)):
        model.rotary(model.layout("inference", partition[: i + 1], *size).query_segments, torch.device(device))
        layout = model.layout("prefill", partition[: i + 1], *size, cached=cached)
        model.rotary(layout.query_segments, torch.device(device))
        cached = layout.num_compressed_chunks


@pytest.fixture
def model() -> Any:
    with torch.device("meta"):
        return AnyFlowFARTransformer3DModel(num_attention_heads=2, num_layers=1, backend="torch")


def test_a_second_rollout_of_the_released_shape_makes_none(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    segment = RotaryTables._segment
    monkeypatch.setattr(RotaryTables, "_segment", lambda self, s, device: (made.append(s), segment(self, s, device))[1])
    rollout(model, RELEASED)
    first = len(made)
    rollout(model, RELEASED)
    assert first > len(RELEASED) and len(made) == first
    assert model._rotary.nbytes == sum(t.nbytes for tables in model._rotary._kept.values() for t in tables) < 100e6


def test_an_endless_video_keeps_a_bounded_number(model: Any) -> None:
    rollout(model, (3,) * 40)
    assert RotaryTables.KEPT_BYTES / 2 < model._rotary.nbytes <= RotaryTables.KEPT_BYTES
    assert model._rotary.nbytes == sum(t.nbytes for tables in model._rotary._kept.values() for t in tables)


@pytest.mark.gpu
def test_tables_made_on_cuda_are_those_of_the_cpu() -> None:
    model = AnyFlowFARTransformer3DModel(num_attention_heads=2, num_layers=1, backend="torch")
    segments = model.layout("prefill", RELEASED, 60, 104).query_segments
    for there, here in zip(*(model.rotary(segments, torch.device(d)) for d in ("cuda", "cpu")), strict=True):
        torch.testing.assert_close(there.cpu(), here, atol=1e-7, rtol=0)
