"""A model directory, as far as it can be judged without loading a weight: a pipeline in diffusers' format, or a pixel
model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..streaming.pixel_model import CLASS_NAME, DEMO_MODEL, PixelModelIndex, read_index
from . import UsageError

PIPELINES = {"AnyFlowFARPipeline": True, "AnyFlowPipeline": False, CLASS_NAME: True}  # and whether each is causal
TEXT_COMPONENTS = ("text_encoder", "tokenizer")
BUNDLED = {"demo": DEMO_MODEL}
_COMPONENTS = ("transformer", "vae", "scheduler", *TEXT_COMPONENTS)


@dataclass(frozen=True)
class ModelDirectory:
    """A model directory.

    Attributes:
        path: of the directory.
        pipeline: the diffusers class, "AnyFlowFARPipeline" or "AnyFlowPipeline", or that of pixel models.
        transformer: the transformer's `config.json`.
        pixels: what a pixel model says of itself; None for a model with a VAE.
    """

    path: Path
    pipeline: str
    transformer: dict[str, Any]
    pixels: PixelModelIndex | None = None

    @property
    def causal(self) -> bool:
        """Whether it generates chunk by chunk (FAR)."""
        return PIPELINES[self.pipeline]

    @property
    def chunk_partition(self) -> tuple[int, ...]:
        """Latent frames per chunk of the video it was made for; empty if it is not causal or does not say."""
        return tuple(self.transformer.get("chunk_partition") or ()) if self.causal else ()

    @property
    def temporal_ratio(self) -> int:
        """Frames per latent frame, after the first."""
        return 4 if self.pixels is None else 1

    @property
    def size_multiple(self) -> int:
        """What height and width are multiples of: the VAE's 8 and a patch."""
        patch = max(self.transformer.get("patch_size", (1, 2, 2))[1:])
        return patch * (8 if self.pixels is None else 1)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width the model was made for."""
        return (480, 832) if self.pixels is None else (self.pixels.height, self.pixels.width)

    @property
    def default_fps(self) -> int:
        """Frames per second it was made for."""
        return 16 if self.pixels is None else self.pixels.fps

    @property
    def default_zoom(self) -> int:
        """Side of the square that a file shows for each pixel."""
        return 1 if self.pixels is None else self.pixels.zoom


def read_model_directory(path: str | Path, text: bool = True) -> ModelDirectory:
    """Look at a model directory.

    Args:
        path: of the directory, or the name of a bundled model ("demo").
        text: whether its text encoder will be needed.

    Raises:
        UsageError: if it is not there, is no AnyFlow pipeline, or lacks a component.
    """
    path = BUNDLED.get(str(path), Path(path))
    if not path.is_dir():
        raise UsageError(f"--model: no directory {path}; a model on the hub has to be downloaded first (hf download)")
    index = _read_json(path / "model_index.json", "a pipeline directory in diffusers' format")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UsageError(f"--model: {path} holds {pipeline}, expected one of {', '.join(PIPELINES)}")
    components = _COMPONENTS if pipeline != CLASS_NAME else ("transformer", "text_encoder")
    needed = [name for name in components if text or name not in TEXT_COMPONENTS]
    missing = [name for name in needed if not (path / name).is_dir()]
    if missing:
        raise UsageError(f"--model: {path} has no {', '.join(missing)}")
    config = _read_json(path / "transformer" / "config.json", "the config of the transformer")
    try:
        pixels = read_index(path) if pipeline == CLASS_NAME else None
    except ValueError as error:
        raise UsageError(f"--model: {error}") from error
    return ModelDirectory(path, pipeline, config, pixels)


def _read_json(path: Path, what: str) -> dict[str, Any]:
    if not path.is_file():
        raise UsageError(f"--model: no {path.name} in {path.parent}, expected {what}")
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise UsageError(f"--model: {path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UsageError(f"--model: {path} holds a JSON {type(content).__name__}, expected an object")
    return content
