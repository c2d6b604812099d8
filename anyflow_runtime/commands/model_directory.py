"""A pipeline directory in diffusers' format, as far as it can be judged without loading a weight."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import UsageError

PIPELINES = {"AnyFlowFARPipeline": True, "AnyFlowPipeline": False}  # and whether each is causal
TEXT_COMPONENTS = ("text_encoder", "tokenizer")
_COMPONENTS = ("transformer", "vae", "scheduler", *TEXT_COMPONENTS)


@dataclass(frozen=True)
class ModelDirectory:
    """A pipeline directory.

    Attributes:
        path: of the directory.
        pipeline: the diffusers class, "AnyFlowFARPipeline" or "AnyFlowPipeline".
        transformer: the transformer's `config.json`.
    """

    path: Path
    pipeline: str
    transformer: dict[str, Any]

    @property
    def causal(self) -> bool:
        """Whether it generates chunk by chunk (FAR)."""
        return PIPELINES[self.pipeline]

    @property
    def chunk_partition(self) -> tuple[int, ...]:
        """Latent frames per chunk of the video it was made for; empty if it is not causal or does not say."""
        return tuple(self.transformer.get("chunk_partition") or ()) if self.causal else ()


def read_model_directory(path: str | Path, text: bool = True) -> ModelDirectory:
    """Look at a pipeline directory.

    Args:
        path: of the directory.
        text: whether its text encoder will be needed.

    Raises:
        UsageError: if it is not there, is no AnyFlow pipeline, or lacks a component.
    """
    path = Path(path)
    if not path.is_dir():
        raise UsageError(f"--model: no directory {path}; a model on the hub has to be downloaded first (hf download)")
    index = _read_json(path / "model_index.json", "a pipeline directory in diffusers' format")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise UsageError(f"--model: {path} holds {pipeline}, expected one of {', '.join(PIPELINES)}")
    needed = [name for name in _COMPONENTS if text or name not in TEXT_COMPONENTS]
    missing = [name for name in needed if not (path / name).is_dir()]
    if missing:
        raise UsageError(f"--model: {path} has no {', '.join(missing)}")
    config = _read_json(path / "transformer" / "config.json", "the config of the transformer")
    return ModelDirectory(path, pipeline, config)


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
