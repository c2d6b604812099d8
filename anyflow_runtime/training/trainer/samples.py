"""What a training run shows: samples of the student, and its loss curves."""

from __future__ import annotations

import importlib.util
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...files import whole_file
from ...video_io import VideoWriter
from .. import distributed
from ..config import TrainConfig
from ..data.source import Source
from ..demo.shapes import AMPLITUDE, ShapesDataset
from ..objectives.rollout import far_rollout, rollout
from ..objectives.timesteps import GlobalBatch, schedule
from ..objectives.velocity import BidirectionalVelocity
from ..progress import is_loss
from .networks import Networks, input_dtype

STEPS = (1, 2, 4, 8)
ROWS, ZOOM, FPS = 6, 4, 4
CLIPS, CLIP_FPS = 2, 16


class Samples(Protocol):
    """Writes samples of the student as it is."""

    def write(self, networks: Networks, name: str, objective: str) -> None:
        """Sample from noise that is always the same; `objective` is that of the phase. A collective."""
        ...


def open_samples(config: TrainConfig, source: Source, directory: Path) -> Samples | None:
    """What `config.sample_every` asks for; None for nothing.

    Raises:
        ImportError: if a package for images or videos is not installed.
        FileNotFoundError, ValueError: if the VAE is missing or not that of the latents.
    """
    if config.sample_every is None:
        return None
    return (SampleShapes if config.model.kind == "demo" else SampleClips)(config, source, directory)


class SampleShapes:
    """Writes a GIF of the demo: a row for each of a few held-out captions, a column each for 1, 2, 4 and 8 steps."""

    def __init__(self, config: TrainConfig, source: Source, directory: Path) -> None:
        if importlib.util.find_spec("PIL") is None:
            raise ImportError("sample_every needs Pillow: pip install 'anyflow-kernels[video]'")
        data = config.data
        dataset = ShapesDataset(data.frames, data.height, data.width, config.seed, "held_out", data.two_objects)
        self.captions = dataset.batch(0, ROWS).captions
        self.config, self.shape, self.directory = config, source.shapes[0], directory

    def write(self, networks: Networks, name: str, objective: str) -> None:
        """See `Samples`."""
        assert networks.text_encoder is not None
        with torch.no_grad():
            text = networks.text_encoder(self.captions)
        noise = _noise(self.config, ROWS, self.shape)
        columns = [
            (sample(networks, self.config, noise, text, steps, objective) / AMPLITUDE).clamp(0, 1).cpu()
            for steps in STEPS
        ]
        if distributed.rank() != 0:
            return
        grid = _grid(columns)
        self.directory.mkdir(parents=True, exist_ok=True)
        with VideoWriter(self.directory / f"{name}.gif", fps=FPS) as writer:
            writer.write(grid.repeat_interleave(ZOOM, -1).repeat_interleave(ZOOM, -2))
        (self.directory / "captions.txt").write_text("\n".join(self.captions) + "\n")


class SampleClips:
    """Samples for the prompts of the first batch, with 1, 2, 4 and 8 steps.

    With a VAE a video, a row for each prompt and a column for each number of steps; without one a safetensors file of
    normalised latents, `steps-N` (rows, F, C, H, W) fp32. `samples.txt` names the clips whose prompts they are.
    """

    def __init__(self, config: TrainConfig, source: Source, directory: Path) -> None:
        self.config, self.shape, self.directory = config, source.shapes[0], directory
        self.source = source
        self.vae = config.sample_vae or config.data.model
        if self.vae is None:
            return
        file = Path(self.vae) / "vae" / "config.json"
        if not file.is_file():
            raise FileNotFoundError(f"sample_vae: no {file}, expected a model directory in diffusers' format")
        channels = json.loads(file.read_text()).get("z_dim", self.shape[1])
        if channels != self.shape[1]:
            raise ValueError(f"sample_vae: {self.vae} has z_dim {channels}, expected {self.shape[1]} as the latents")
        for module, package in (("diffusers", "diffusers"), ("av", "video")):
            if importlib.util.find_spec(module) is None:
                raise ImportError(f"decoding samples needs {module}: pip install 'anyflow-kernels[{package}]'")

    def write(self, networks: Networks, name: str, objective: str) -> None:
        """See `Samples`."""
        # Every process samples the same: sharded networks work only together.
        first = self.source.samples(0, GlobalBatch(CLIPS))
        if first.text is None:
            raise ValueError(f"data: got captions alone ({first.names[0]}), expected prompt embeddings")
        noise = _noise(self.config, CLIPS, self.shape)
        latents = {steps: sample(networks, self.config, noise, first.text, steps, objective).float() for steps in STEPS}
        if distributed.rank() != 0:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        (self.directory / "samples.txt").write_text("\n".join(first.names) + "\n")
        if self.vae is None:
            with whole_file(self.directory / f"{name}.safetensors") as partial:
                save_file({f"steps-{steps}": value.cpu().contiguous() for steps, value in latents.items()}, partial)
            return
        fps = CLIP_FPS if self.config.data.fps is None else max(1, round(self.config.data.fps))
        with VideoWriter(self.directory / f"{name}.mp4", fps=fps, pixel_range="signed") as writer:
            writer.write(_grid(self._decoded(list(latents.values()))))

    def _decoded(self, latents: list[Tensor]) -> list[Tensor]:
        """(rows, T, 3, H, W) in [-1, 1] on the CPU; the VAE takes memory only for as long as it decodes."""
        from ...wan_vae.decoder import WanVAEStreamDecoderConfig

        decoder: Any = WanVAEStreamDecoderConfig(path=self.vae).setup().to(latents[0].device)
        return [torch.stack([decoder(row).float().cpu() for row in column]) for column in latents]


@torch.no_grad()
def sample(networks: Networks, config: TrainConfig, noise: Tensor, text: Tensor, steps: int, objective: str) -> Tensor:
    """Latents like `noise` (B, F, C, H, W) for `text` (B, S, D), by flow-map steps; plain Euler steps where the student
    learns flow matching, which tells nothing about r < t."""
    student: Any = networks.student
    device = next(student.parameters()).device
    noise, text = noise.to(device), text.to(device)
    segments, dtype = list(pairwise(schedule(steps, config.pretrain.flow_map.shift))), input_dtype(config)
    single_time = objective == "flow_matching"
    if config.far is not None:
        return far_rollout(student, noise, text, config.far.chunk_partition, segments, dtype, single_time)
    velocity = BidirectionalVelocity(student, input_dtype=dtype, single_time=single_time)
    return rollout(velocity, noise, text, segments)


def _noise(config: TrainConfig, rows: int, shape: tuple[int, ...]) -> Tensor:
    return torch.randn(rows, *shape, generator=torch.Generator().manual_seed(config.seed))


def _grid(columns: list[Tensor]) -> Tensor:
    """(F, 3, rows H, columns W) of columns (rows, F, 3, H, W)."""
    return torch.cat([torch.cat(list(column), dim=-2) for column in columns], dim=-1)


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
    with whole_file(image) as partial:
        figure.savefig(partial, dpi=120)
