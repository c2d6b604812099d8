"""Any-step evidence: what a pixel model's videos show at 1, 2, 4, 8, 16 steps, measured from the pixels.

Videos are made by the streaming pipeline, as users make them, for captions that training has never seen.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import derive_config
from ...streaming.library import stream
from ...streaming.open_model import open_model
from ...streaming.pipeline import StreamInferencePipeline
from ...streaming.pixel_model import DEMO_MODEL
from .shapes import AMPLITUDE, ShapesBatch, ShapesDataset
from .shapes_measure import Measurement, continuation_error, energy_distance, measure

STEPS = (1, 2, 4, 8, 16)
HELD_OUT_SEED = 1_000  # of the captions and of the real videos they are compared with; training seeds are small
MEASURES = (
    "found", "shape_right", "colour_right", "colour_error", "direction_right", "direction_error", "speed_error",
    "wobble", "residual", "energy", "pixel_energy",
)  # fmt: skip
MORE_IS_BETTER = ("found", "shape_right", "colour_right", "direction_right")


@dataclass(frozen=True)
class HeldOut:
    """What models are measured on.

    Attributes:
        batch: captions, and a real video of each.
        others: twice as many other real videos, and what they measure, for the energy distances.
    """

    batch: ShapesBatch
    others: Tensor
    reference: Measurement

    @classmethod
    def draw(cls, videos: int, objects: int = 1, seed: int = HELD_OUT_SEED) -> HeldOut:
        """So many random held-out captions of one object, or of two."""
        dataset = ShapesDataset(split="held_out", seed=seed, two_objects=float(objects - 1))
        others = dataset.batch(1, 2 * videos)
        return cls(dataset.batch(0, videos), others.videos, measure(others.videos, others.scenes))

    def measures(self, videos: Tensor) -> dict[str, float]:
        """`MEASURES` of one video for each caption: means over videos and objects, and two energy distances to real
        videos, of start and velocity ("energy") and of the pixels as they are ("pixel_energy", RMS of RGB).
        """
        summary = measure(videos, self.batch.scenes).summary(self.reference)
        pixels = [x.flatten(1) / (AMPLITUDE * x[0].numel() ** 0.5) for x in (videos, self.others)]
        return {name: summary[name] for name in MEASURES[:-1]} | {"pixel_energy": energy_distance(*pixels)}

    def real(self) -> dict[str, float]:
        """The measures of real videos: what a perfect model would get."""
        return self.measures(self.batch.videos)


def load(path: str | os.PathLike[str] = DEMO_MODEL, mean_velocity: bool = True) -> StreamInferencePipeline:
    """The pipeline of a pixel model.

    Args:
        mean_velocity: False for a model of plain flow matching, which knows only r = t (Euler steps).
    """
    pipeline = open_model(path, device="cpu", dtype=torch.float32)
    if not mean_velocity:
        model = pipeline.diffusion_model
        model.config = derive_config(model.config, scheduler={"use_mean_velocity": False})
        model.scheduler = model.config.scheduler.setup()
    return pipeline


def sample(
    pipeline: StreamInferencePipeline, captions: Sequence[str], steps: int, seed: int = 0, given: Tensor | None = None
) -> Tensor:
    """Videos (B, F, 3, H, W), AMPLITUDE times RGB, as they are shown: clamped to what a screen can show.

    Args:
        steps: per chunk.
        seed: of the noise, one draw for the whole batch: the same noise at every step count.
        given: (B, n, 3, H, W) first frames, whole chunks of them.
    """
    transformer: Any = pipeline.diffusion_model.transformer
    frames, size = sum(transformer.default_partition), (transformer.config.height, transformer.config.width)
    noise = torch.randn((len(captions), 3, frames, *size), generator=torch.Generator().manual_seed(seed))
    chunks = stream(pipeline, list(captions), steps=steps, noise=noise, context_latents=given)
    return (torch.cat(list(chunks), dim=1).float().cpu() + 1) / 2 * AMPLITUDE


def evaluate(
    pipeline: StreamInferencePipeline, held_out: HeldOut, steps: Sequence[int] = STEPS, seed: int = 0
) -> dict[int, dict[str, float]]:
    """`HeldOut.measures` by number of steps."""
    captions = held_out.batch.captions
    return {count: held_out.measures(sample(pipeline, captions, count, seed)) for count in steps}


def spread(
    pipeline: StreamInferencePipeline, steps: int, captions: int = 8, noises: int = 32, seed: int = HELD_OUT_SEED
) -> float:
    """Variance of the first frame over the noise, as a share of that over real videos of the same caption.

    A caption leaves the start open. One step of a perfect velocity would give the mean of all starts, whatever the
    noise: 0. A flow map gives one of them: 1.
    """
    dataset = ShapesDataset(split="held_out", seed=seed, two_objects=0.0)
    wanted = dataset.batch(0, captions).captions
    real = dataset.of_captions([caption for caption in wanted for _ in range(8 * noises)]).videos
    made = sample(pipeline, [caption for caption in wanted for _ in range(noises)], steps)
    own, true = (videos[:, 0].unflatten(0, (captions, -1)).var(1).sum() for videos in (made, real))
    return (own / true).item()


def continuation(
    pipeline: StreamInferencePipeline, held_out: HeldOut, given_frames: int, steps: int, seed: int = 0
) -> dict[str, float]:
    """How videos go on from the first frames of real ones, one frame (I2V) or several (V2V), whole chunks.

    Returns: "error", RMS distance in pixels of the objects from where the real video has them, over the frames not
    given; "standing_still", that of objects which stay where they were last given; and the share with the right shape,
    colour and direction.
    """
    batch = held_out.batch
    given = batch.videos[:, :given_frames]
    videos = sample(pipeline, batch.captions, steps, seed, given)
    measured = measure(videos, batch.scenes)
    still = batch.centres.clone()
    still[:, :, given_frames:] = batch.centres[:, :, given_frames - 1 : given_frames]
    summary = measured.summary()
    return {
        "error": continuation_error(measured.centres, batch.centres, given_frames).nanmean().item(),
        "standing_still": continuation_error(still, batch.centres, given_frames).nanmean().item(),
        **{name: summary[name] for name in ("shape_right", "colour_right", "direction_right", "speed_error")},
    }
