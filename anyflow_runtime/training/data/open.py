"""The source that a config names, and the synthetic one."""

from __future__ import annotations

from typing import TextIO

import torch

from ..config import DataSettings
from ..demo.shapes import ShapesDataset
from ..objectives.timesteps import GlobalBatch
from .source import Samples, Shapes, Source


class ShapesSource:
    """The synthetic videos of `shapes`, with captions."""

    negative: torch.Tensor | None = None

    def __init__(self, settings: DataSettings, seed: int) -> None:
        self.dataset = ShapesDataset(
            settings.frames, settings.height, settings.width, seed=seed, two_objects=settings.two_objects
        )
        self.shapes: Shapes = (settings.frames, 3, settings.height, settings.width), None

    def samples(self, draw: int, position: GlobalBatch) -> Samples:
        """A slice of the rendered global batch."""
        batch = self.dataset.batch(draw, position.size)
        rows = position.indices
        captions = [batch.captions[i] for i in rows.tolist()]
        names = tuple(f"shapes[{draw}, {i}] {caption!r}" for i, caption in zip(rows.tolist(), captions, strict=True))
        return Samples(batch.videos[rows], names, captions=tuple(captions))


def open_source(
    settings: DataSettings, seed: int, device: torch.device | None = None, stream: TextIO | None = None
) -> Source:
    """The source that the settings name; a collective, as clips are encoded here.

    Args:
        device, stream: see `open_videos`.

    Raises:
        FileNotFoundError, ValueError: if its files are missing or do not fit together.
    """
    from .files import SafetensorsSource, TarSource

    if settings.kind == "shapes":
        return ShapesSource(settings, seed)
    if settings.path is None:
        files = "videos and captions" if settings.kind == "video" else f"{settings.kind} shards"
        raise ValueError(f"data.path: got None, expected the directory of the {files}")
    if settings.kind == "video":
        from .videos import open_videos

        return open_videos(settings, seed, device, stream)
    return (SafetensorsSource if settings.kind == "safetensors" else TarSource)(settings.path, seed)
