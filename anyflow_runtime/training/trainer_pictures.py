"""Pictures of a training run: its loss curves, and sample videos of the demo's model."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch

from ..video_io import VideoWriter
from . import distributed
from .demo_model import generate
from .recipes_config import TrainConfig
from .shapes import AMPLITUDE, ShapesDataset
from .trainer_log import is_loss
from .trainer_models import Networks

STEPS = (1, 2, 4, 8)
ROWS, ZOOM, FPS = 6, 4, 4


class SampleVideos:
    """Writes a GIF: a row for each of a few held-out captions, a column each for 1, 2, 4 and 8 steps.

    Raises:
        ValueError: at construction, for a model without a text encoder of its own.
        ImportError: if Pillow is not installed.
    """

    def __init__(self, config: TrainConfig, directory: Path) -> None:
        if config.model.kind != "demo":
            raise ValueError(
                f"sample_every: got {config.sample_every}, expected None: only the demo's model can sample"
            )
        if importlib.util.find_spec("PIL") is None:
            raise ImportError("sample_every needs Pillow: pip install 'anyflow-kernels[video]'")
        assert config.far is not None
        data = config.data
        dataset = ShapesDataset(data.frames, data.height, data.width, config.seed, "held_out", data.two_objects)
        self.captions = dataset.batch(0, ROWS).captions
        self.partition, self.size = config.far.chunk_partition, (data.height, data.width)
        self.seed, self.shift, self.directory = config.seed, config.flow_map.shift, directory

    def write(self, networks: Networks, name: str) -> None:
        """Sample with the student as it is; the seed is always the same. A collective."""
        columns = []
        for steps in STEPS:
            videos = generate(
                networks.student,
                networks.text_encoder,
                self.captions,
                steps,
                self.partition,
                self.size,
                self.seed,
                self.shift,
            )
            columns.append((videos / AMPLITUDE).clamp(0, 1).cpu())
        if distributed.rank() != 0:
            return
        grid = torch.cat([torch.cat(list(column), dim=-2) for column in columns], dim=-1)  # (F, 3, rows H, columns W)
        self.directory.mkdir(parents=True, exist_ok=True)
        with VideoWriter(self.directory / f"{name}.gif", fps=FPS) as writer:
            writer.write(grid.repeat_interleave(ZOOM, -1).repeat_interleave(ZOOM, -2))
        (self.directory / "captions.txt").write_text("\n".join(self.captions) + "\n")


def plot_losses(metrics: Path, image: Path) -> None:
    """Draw every loss of a metrics file over the steps, logarithmically.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure_module: Any = importlib.import_module("matplotlib.figure")
    curves: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for line in metrics.read_text().splitlines():
        row = json.loads(line)
        for key in row:
            if is_loss(key):
                curves[key][0].append(row["step"])
                curves[key][1].append(row[key])
    figure = figure_module.Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for key, (steps, values) in sorted(curves.items()):
        axes.plot(steps, values, label=key.removesuffix("/loss"), linewidth=0.8)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.legend()
    partial = image.with_name(f".{image.stem}.partial{image.suffix}")
    figure.savefig(partial, dpi=120)
    partial.replace(image)
