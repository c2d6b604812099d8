"""A model directory, as far as it can be judged without loading a weight: a pipeline in diffusers' format, or a pixel
model."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..files import read_json
from ..hub import licence, model_files
from .pixel_model import CLASS_NAME, DEMO_MODEL, PixelModelIndex, read_index

PIPELINES = {"AnyFlowFARPipeline": True, "AnyFlowPipeline": False, CLASS_NAME: True}  # and whether each is causal
TEXT_COMPONENTS = ("text_encoder", "tokenizer")
RELEASED = {
    "anyflow-far-wan2.1-1.3b": "nvidia/AnyFlow-FAR-Wan2.1-1.3B-Diffusers",
    "anyflow-far-wan2.1-14b": "nvidia/AnyFlow-FAR-Wan2.1-14B-Diffusers",
    "anyflow-wan2.1-t2v-1.3b": "nvidia/AnyFlow-Wan2.1-T2V-1.3B-Diffusers",
    "anyflow-wan2.1-t2v-14b": "nvidia/AnyFlow-Wan2.1-T2V-14B-Diffusers",
}
BUNDLED = {"demo": DEMO_MODEL, "anyflow-demo": DEMO_MODEL}
SCHEDULE = {"shift": 1.0, "num_train_timesteps": 1000}  # the defaults of diffusers' FlowMapEulerDiscreteScheduler


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
    def licence(self) -> str | None:
        """What the model card says of it, if there is one."""
        return licence(self.path)

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
    def spatial_ratio(self) -> int:
        """Pixels per latent, along height and width."""
        return 8 if self.pixels is None else 1

    @property
    def size_multiple(self) -> int:
        """What height and width are multiples of: those of a latent and of a patch."""
        return self.spatial_ratio * max(self.transformer.get("patch_size", (1, 2, 2))[1:])

    @property
    def channels(self) -> int:
        """Channels of the transformer's tokens."""
        return self.transformer.get("num_attention_heads", 40) * self.transformer.get("attention_head_dim", 128)

    def chunk_tokens(self, size: tuple[int, int]) -> int:
        """Tokens of the longest chunk, at so many pixels of height and width."""
        rows, columns = (side // self.size_multiple for side in size)
        return max(self.chunk_partition or (1,)) * rows * columns

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

    @property
    def schedule(self) -> dict[str, Any]:
        """`shift` and `num_train_timesteps` of its sampler; those of diffusers' class where they are not said."""
        if self.pixels is not None:
            return {"shift": self.pixels.shift}
        config = read_json("model", self.path / "scheduler" / "scheduler_config.json", "the config of the scheduler")
        schedule = {name: config.get(name, default) for name, default in SCHEDULE.items()}
        for name, value in schedule.items():
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
                raise ValueError(f"model: scheduler_config.json: {name}: got {value!r}, expected a number above 0")
        return schedule


def read_model_directory(path: str | os.PathLike[str], *, text: bool = True, decode: bool = True) -> ModelDirectory:
    """Look at a model directory.

    Args:
        path: of the directory, the name of a bundled model ("demo") or a preset, or of a repository on the hub, of
            which the parts that are needed are downloaded.
        text, decode: whether its text encoder and its VAE will be needed.
    Raises:
        FileNotFoundError: if it is not there, or lacks a component.
        ValueError: if it is no AnyFlow pipeline.
    """
    parts = ["transformer", "scheduler", *(TEXT_COMPONENTS if text else ()), *(["vae"] if decode else ())]
    try:
        name = RELEASED.get(str(path), path)
        directory = BUNDLED.get(str(path)) or model_files(name, ["model_index.json", *(f"{part}/*" for part in parts)])
    except FileNotFoundError as error:
        raise FileNotFoundError(f"model: {error}") from error
    index = read_json("model", directory / "model_index.json", "a pipeline directory in diffusers' format")
    pipeline = index.get("_class_name")
    if pipeline not in PIPELINES:
        raise ValueError(f"model: got {directory}, which holds {pipeline}, expected one of {', '.join(PIPELINES)}")
    needed = ["transformer", *(TEXT_COMPONENTS[: 1 if pipeline == CLASS_NAME else 2] if text else ())]
    if pipeline != CLASS_NAME:
        needed += ["scheduler", *(["vae"] if decode else [])]
    missing = [name for name in needed if not (directory / name).is_dir()]
    if missing:
        raise FileNotFoundError(f"model: {directory} has no {', '.join(missing)}")
    config = read_json("model", directory / "transformer" / "config.json", "the config of the transformer")
    return ModelDirectory(directory, pipeline, config, read_index(directory) if pipeline == CLASS_NAME else None)
