"""Small models on disk, and the videos of the pipelines that `open_model` makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_runtime import stream
from anyflow_runtime.streaming import video_noise
from bench.tiny_pipeline import tiny_pipeline

PARTITION, SIZE = (1, 2, 1), {"height": 32, "width": 48}


def save_models(root: Path) -> Path:
    """A folder with a causal and a bidirectional model in diffusers' format."""
    for name, causal in (("far", True), ("bidirectional", False)):
        tiny_pipeline(causal, heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4).save_pretrained(root / name)
    return root


def partition(name: str) -> tuple[int, ...]:
    return PARTITION if name == "far" else (sum(PARTITION),)


def video(pipeline: Any, name: str = "far", prompt: Any = "a cat", **settings: Any) -> Tensor:
    """(1, T, 3, H, W) of one video, or (1, F, C, h, w) without a decoder."""
    size = SIZE if pipeline.decoder is not None else {side: pixels // 8 for side, pixels in SIZE.items()}
    noise = video_noise(pipeline, sum(PARTITION), **size, seed=7)
    chunks = partition(name)
    return torch.cat([*stream(pipeline, prompt, noise=noise, chunk_partition=chunks, **size, **settings)], dim=1)


def loaded(models: Path, name: str) -> Any:
    import diffusers

    pipe = getattr(diffusers, "AnyFlowFARPipeline" if name == "far" else "AnyFlowPipeline").from_pretrained(
        models / name
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
