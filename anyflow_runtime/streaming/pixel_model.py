"""Models that work on pixels and bring a text encoder of their own vocabulary: the bundled demo, and what its recipes
train.

Their directory holds `model_index.json`, `transformer/` in diffusers' format and `text_encoder/` (`WordEncoder`).
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..decoders.pixels import PixelDecoderConfig
from ..encoders.pixels import PixelEncoderConfig
from ..encoders.words import WordEncoderConfig
from ..files import read_json, write_json
from ..schedulers.flow_map_stream import FlowMapEulerSchedulerConfig
from .diffusion_model import DiffusionModelConfig
from .far_stream import AnyFlowFARStreamConfig
from .pipeline import StreamInferencePipelineConfig

CLASS_NAME = "AnyFlowFARPixelPipeline"
INDEX_FILE = "model_index.json"
DEMO_MODEL = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True)
class PixelModelIndex:
    """What `model_index.json` says of a pixel model.

    Attributes:
        height, width: of its videos.
        shift: of the schedule it was trained with.
        latent_range: values of latents that are black and white.
        fps, zoom: frames per second, and side of the square per pixel, that suit a viewer.
    """

    height: int
    width: int
    shift: float
    latent_range: tuple[float, float]
    fps: int = 4
    zoom: int = 16

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `model_index.json`."""
        write_json(Path(directory) / INDEX_FILE, {"_class_name": CLASS_NAME, **asdict(self)}, indent=1)


def read_index(directory: str | os.PathLike[str]) -> PixelModelIndex:
    """The index of a pixel model's directory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is that of another kind of model, or lacks something.
    """
    path = Path(directory) / INDEX_FILE
    content = read_json("path", path, "the directory of a pixel model")
    name = content.pop("_class_name", None)
    if name != CLASS_NAME:
        raise ValueError(f"path: {path} names {name}, expected {CLASS_NAME}")
    try:
        return PixelModelIndex(**content | {"latent_range": tuple(content["latent_range"])})
    except (KeyError, TypeError) as error:
        raise ValueError(f"path: {path} does not fit: {error}") from error


def pixel_pipeline(
    path: str | os.PathLike[str] = DEMO_MODEL,
    *,
    name: str = "pixels",
    steps: int = 4,
    backend: str | None = None,
    dtype: torch.dtype | None = None,
) -> StreamInferencePipelineConfig:
    """The config of a pixel model's pipeline.

    Args:
        path: its directory; the bundled demo model by default.
        name: slug of the pipeline.
        steps: denoising steps per chunk.
        backend: see `anyflow_kernels.load_ops`; None is "auto".
        dtype: of the transformer; None as stored.
    Raises:
        FileNotFoundError, ValueError: as `read_index`.
    """
    index = read_index(path)
    return StreamInferencePipelineConfig(
        name=name,
        diffusion_model=DiffusionModelConfig(
            transformer=AnyFlowFARStreamConfig(
                path=str(path),
                dtype=dtype,
                backend=backend,
                context_encoder=WordEncoderConfig(path=str(Path(path) / "text_encoder")),
                height=index.height,
                width=index.width,
            ),
            scheduler=FlowMapEulerSchedulerConfig(num_inference_steps=steps, shift=index.shift),
        ),
        decoder=PixelDecoderConfig(latent_range=index.latent_range),
        video_encoder=PixelEncoderConfig(latent_range=index.latent_range, pixel_range="unit"),
    )
