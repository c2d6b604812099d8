"""`bench/rollout.py` times what users run; here at a small size on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anyflow_runtime import AnyFlowFARTransformer3DModel, open_model, stream
from bench import rollout as bench


def test_the_timed_video_is_that_of_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PARTITION", (1, 2, 1))
    monkeypatch.setattr(bench, "HEIGHT", 4)
    monkeypatch.setattr(bench, "WIDTH", 6)
    config: dict[str, Any] = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1, "text_dim": 8}
    model = AnyFlowFARTransformer3DModel(**config, freq_dim=16, ffn_dim=40).eval()
    text, noise = torch.randn(1, 5, 8), torch.randn(1, 16, 4, 4, 6)
    video, times = bench.rollout(model, text, noise, steps=2)
    expected = [*stream(open_model(model, steps=2), text, noise=noise, chunk_partition=(1, 2, 1), height=4, width=6)]
    assert torch.equal(video, torch.cat(expected, dim=1))
    assert len(times.denoise) == len(times.cache) == 3 and min(times.denoise) > 0
    assert times.cache[0] > 0 and times.cache[2] == 0  # nothing follows the last chunk
