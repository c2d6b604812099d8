"""The config of a training run: frozen dataclasses, read from plain JSON data; unknown keys are refused by name."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from ..optional import optional
from ..plain_data import from_plain, to_plain
from .objectives.on_policy import OnPolicyConfig
from .objectives.pretraining import FarConfig, PretrainConfig

OBJECTIVES = ("flow_matching", "flow_map", "on_policy")
MODEL_KINDS = ("far", "bidirectional", "demo")
DATA_KINDS = ("safetensors", "tar", "video", "shapes")
PRECISIONS = ("fp32", "bf16")
SHARDINGS = ("auto", "fsdp", "none")
SCHEDULES = ("linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "constant_with_warmup")


@dataclass(frozen=True)
class ModelSettings:
    """The student and where networks come from.

    Attributes:
        kind: "far", "bidirectional", or "demo": the built-in FAR model with its text encoder.
        path: model directory of the starting weights (a Wan base, or a model of an earlier stage); None: fresh
            weights from `config` and the seed.
        teacher: model directory of the real and of the fake score's starting weights; for "on_policy" only.
        config: constructor keywords that differ from the class's defaults (from those of the directory with `path`).
        gradient_checkpointing: recompute blocks in backward.
    """

    kind: str = "far"
    path: str | None = None
    teacher: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        _one_of("model.kind", self.kind, MODEL_KINDS)


@dataclass(frozen=True)
class DataSettings:
    """Where samples come from.

    Attributes:
        kind: "safetensors" | "tar": latents with prompt embeddings under `path`; "video": clips with captions under
            `path`, encoded before training starts; "shapes": made on the fly.
        path: directory of the shards or clips.
        model: of "video": model directory in diffusers' format with `vae/`, `text_encoder/` and `tokenizer/`.
        cache: of "video": directory for the encoded clips; None: `.encoded` in `path`.
        frames, height, width: of a sample, in pixels; of a longer video the beginning, of a larger one the middle.
        fps: of "video": frames per second that are taken; None: every frame.
        negative_prompt: of "video"; None: that of the Wan models.
        text_length: of "video": tokens of a prompt embedding.
        two_objects: of "shapes"; see `ShapesDataset`.
    """

    kind: str = "safetensors"
    path: str | None = None
    model: str | None = None
    cache: str | None = None
    frames: int = 7
    height: int = 16
    width: int = 16
    fps: float | None = None
    negative_prompt: str | None = None
    text_length: int = 512
    two_objects: float = 0.25

    def __post_init__(self) -> None:
        _one_of("data.kind", self.kind, DATA_KINDS)
        for name in ("frames", "height", "width", "text_length"):
            if getattr(self, name) < 1:
                raise ValueError(f"data.{name}: got {getattr(self, name)}, expected >= 1")
        if self.fps is not None and not self.fps > 0:
            raise ValueError(f"data.fps: got {self.fps}, expected > 0, or None")
        if (self.kind == "video") != (self.model is not None):
            raise ValueError(
                f"data.model: got {self.model!r} for data.kind {self.kind!r}, expected it for 'video' only"
            )


@functools.cache
def _library_schedule(name: str, warmup: int, steps: int) -> Callable[[int], float]:
    """The factor of the learning rate by step; a function of the step alone, so that a run continues anywhere."""
    library = optional("diffusers.optimization", f"the schedule {name!r}", "diffusers")
    nothing = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    return library.get_scheduler(name, nothing, num_warmup_steps=warmup, num_training_steps=steps).lr_lambdas[0]


@dataclass(frozen=True)
class Phase:
    """A stretch of training. A later phase starts from the average of the one before, with a new optimiser.

    Attributes:
        objective: "flow_matching" (plain), "flow_map", or "on_policy".
        lr, warmup: learning rate, and the steps over which it rises linearly from 0; constant after them.
        decay: the last steps, over which it falls linearly towards 0.
        schedule: the name of a schedule of `diffusers.optimization` instead ("cosine", "linear", ...), after `warmup`.
    """

    objective: str
    iterations: int
    lr: float
    warmup: int = 0
    decay: int = 0
    schedule: str | None = None

    def __post_init__(self) -> None:
        _one_of("phases.objective", self.objective, OBJECTIVES)
        if self.schedule is not None:
            _one_of("phases.schedule", self.schedule, SCHEDULES)
            if self.decay:
                raise ValueError(f"phases.decay: got {self.decay} with the schedule {self.schedule!r}, expected 0")
        if self.iterations < 1 or min(self.warmup, self.decay) < 0 or not self.lr > 0:
            raise ValueError(f"phases: got {self}, expected iterations >= 1, lr > 0, warmup >= 0 and decay >= 0")

    def lr_at(self, index: int) -> float:
        """Learning rate of step `index`, 0-based in the phase."""
        if self.schedule is not None:
            return self.lr * _library_schedule(self.schedule, self.warmup, self.iterations)(index)
        rise = (index + 1) / max(1, self.warmup)
        fall = (self.iterations - index) / (self.decay + 1)
        return self.lr * min(1.0, rise, fall)


@dataclass(frozen=True)
class OptimiserSettings:
    """AdamW, and the bound of the gradient's norm (of each network; None: unbounded)."""

    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float | None = 1.0


@dataclass(frozen=True)
class EmaSettings:
    """See `EMA`; `warmup` counts steps of the phase."""

    decay: float = 0.999
    warmup: int = 1000


@dataclass(frozen=True)
class LoraSettings:
    """See `add_lora`."""

    rank: int = 256
    alpha: float = 256.0


@dataclass(frozen=True)
class TrainConfig:
    """A training run.

    Attributes:
        batch_size: samples of one forward on one process.
        global_batch: samples of one optimiser step; made up by accumulating micro-steps. None: no accumulation.
        pretrain: its settings stand at the top of the JSON form, such as `flow_map.shift`; `far` is needed exactly for
            a FAR student. What it omits follows from phase and precision.
        on_policy: its rollouts take shift and chunks from `pretrain`.
        precision: of weights and activations in the forward; gradients are summed and weights updated in fp32.
        sharding: of several processes: "fsdp" (FSDP2), "none": whole copies, averaged gradients; "auto": FSDP on CUDA.
        log_every, checkpoint_every: in steps; a checkpoint is also written at the end of every phase.
        keep_checkpoints: how many of the newest stay.
        sample_every: steps between samples of the student's average; None: none.
        sample_vae: model directory whose `vae/` decodes them; None: `data.model`, else the samples stay latents. The
            demo's samples are pixels.
        plot: draw `loss.png` at the end of every phase; needs matplotlib.
        trackers: where the metrics also go, by accelerate's names: "tensorboard", "wandb", "trackio", ...
    """

    phases: tuple[Phase, ...]
    name: str = "custom"
    seed: int = 0
    model: ModelSettings = field(default_factory=ModelSettings)
    data: DataSettings = field(default_factory=DataSettings)
    optimiser: OptimiserSettings = field(default_factory=OptimiserSettings)
    ema: EmaSettings = field(default_factory=EmaSettings)
    lora: LoraSettings | None = None
    pretrain: PretrainConfig = field(
        default_factory=PretrainConfig, metadata={"inline": True, "omit": ("objective", "input_dtype")}
    )
    on_policy: OnPolicyConfig = field(
        default_factory=OnPolicyConfig, metadata={"omit": ("shift", "chunk_partition", "input_dtype")}
    )
    batch_size: int = 1
    global_batch: int | None = None
    precision: str = "bf16"
    sharding: str = "auto"
    log_every: int = 10
    checkpoint_every: int = 200
    keep_checkpoints: int = 2
    sample_every: int | None = None
    sample_vae: str | None = None
    plot: bool = False
    trackers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _one_of("precision", self.precision, PRECISIONS)
        _one_of("sharding", self.sharding, SHARDINGS)
        for name in ("batch_size", "log_every", "checkpoint_every", "keep_checkpoints"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.sample_every is not None and self.sample_every < 1:
            raise ValueError(f"sample_every: got {self.sample_every}, expected >= 1, or None")
        if not self.phases:
            raise ValueError("phases: got none, expected at least one")
        if (self.far is not None) != (self.model.kind != "bidirectional"):
            raise ValueError(f"far: got {self.far}, expected settings exactly for a FAR model, not {self.model.kind!r}")
        if self.on_policy_stage and len(self.phases) > 1:
            raise ValueError("phases: got on_policy among others, expected it alone: it needs a finished teacher")
        if self.on_policy_stage != (self.model.teacher is not None):
            raise ValueError(
                f"model.teacher: got {self.model.teacher!r}, expected a model directory for on_policy only"
            )
        if self.lora is not None and len(self.phases) > 1:
            raise ValueError(f"lora: got it with {len(self.phases)} phases, expected one: what is adapted differs")

    @property
    def far(self) -> FarConfig | None:
        """Settings of the causal variant; None for a bidirectional student."""
        return self.pretrain.far

    @property
    def on_policy_stage(self) -> bool:
        """Whether this is on-policy distillation."""
        return any(phase.objective == "on_policy" for phase in self.phases)

    @property
    def iterations(self) -> int:
        """Optimiser steps of all phases."""
        return sum(phase.iterations for phase in self.phases)

    def phase_at(self, step: int) -> tuple[int, int]:
        """Index of the phase that holds a 0-based step, and the step within it."""
        for index, phase in enumerate(self.phases):
            if step < phase.iterations:
                return index, step
            step -= phase.iterations
        raise ValueError(f"step: got {step} beyond the last, expected < {self.iterations}")

    def micro_steps(self, world_size: int) -> int:
        """Micro-steps of one optimiser step on that many processes."""
        per_step = self.batch_size * world_size
        if self.global_batch is None:
            return 1
        if self.global_batch % per_step:
            raise ValueError(
                f"global_batch: got {self.global_batch}, expected a multiple of batch_size * processes = {per_step}"
            )
        return self.global_batch // per_step


def config_from_dict(data: Mapping[str, Any]) -> TrainConfig:
    """A config from JSON data.

    Raises:
        ValueError, TypeError: see `from_plain`; also for a value that is not allowed.
    """
    return from_plain(TrainConfig, data)


def config_to_dict(config: TrainConfig) -> dict[str, Any]:
    """JSON data from which `config_from_dict` makes an equal config."""
    return to_plain(config)


def merged(base: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with the nested values of `changes` in their places; lists are replaced as a whole."""
    result = dict(base)
    for key, value in changes.items():
        old = result.get(key)
        result[key] = merged(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return result


def _one_of(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: got {value!r}, expected one of {allowed}")
