"""The networks of a training run: loaded or made, adapted, sharded, and written back as model directories."""

from __future__ import annotations

import inspect
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from ...checkpoints import from_research, read_checkpoint
from ...encoders.words import WordEncoder
from ...models import MODELS, AnyFlowFARTransformer3DModel, AnyFlowModel, AnyFlowTransformer3DModel
from ...models.config import read_config
from .. import distributed
from ..config import ModelSettings, TrainConfig
from ..demo.demo_model import TEXT_FOLDER, TRANSFORMER, DemoModel, demo_text_encoder, save_pixel_parts
from ..distributed import barrier
from ..objectives.gan import DiscriminatorHeads
from .lora import add_lora
from .parallel import shard, whole_tensor

CLASS_OF: dict[str, type[AnyFlowModel]] = {
    "far": AnyFlowFARTransformer3DModel,
    "demo": AnyFlowFARTransformer3DModel,
    "bidirectional": AnyFlowTransformer3DModel,
}
BASE_CLASS = "WanTransformer3DModel"
NEW_PARTS = ("condition_embedder.delta_embedder.", "far_patch_embedding.")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Networks:
    """The networks of a run on their device.

    Attributes:
        student: the transformer in training.  text_encoder: of the demo, else None.
        real, fake: the scores of the on-policy stage, else None; `real` is frozen.
        heads: of the discriminator on `real`, fp32; None without an adversarial term.
    """

    def __init__(self, config: TrainConfig, device: torch.device, sharded: bool) -> None:
        self.config = config
        self.model_class = CLASS_OF[config.model.kind]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            student, text_encoder = load_network(config.model, config.model.path, DTYPES[config.precision])
            objectives = {phase.objective for phase in config.phases}
            if config.lora is not None:
                add_lora(student, config.lora.rank, config.lora.alpha, student=objectives != {"flow_matching"})
            real: nn.Module | None = None
            fake: nn.Module | None = None
            heads: DiscriminatorHeads | None = None
            if config.on_policy_stage:
                teacher = replace(config.model, config={})
                real, teacher_text = load_network(teacher, teacher.teacher, DTYPES[config.precision], any_class=True)
                fake, _ = load_network(teacher, teacher.teacher, DTYPES[config.precision], any_class=True)
                _require_same_text(text_encoder, teacher_text)
                if config.lora is not None:
                    add_lora(fake, config.lora.rank, config.lora.alpha, student=False)
                real.requires_grad_(False)
                if config.on_policy.gan is not None:
                    scored: Any = real.config
                    width = scored.num_attention_heads * scored.attention_head_dim
                    heads = DiscriminatorHeads(width, len(config.on_policy.gan.blocks))
        own: Any = student.config
        if config.far is not None and config.far.full_chunk_limit != own.full_chunk_limit:
            got = config.far.full_chunk_limit
            raise ValueError(f"far.full_chunk_limit: got {got}, expected the model's, {own.full_chunk_limit}")
        for model in (student, real, fake):
            if model is None:
                continue
            model.to(device)
            model.cuda_graphs = False  # type: ignore[assignment]  # a captured step would read memory that sharding frees
            if config.model.gradient_checkpointing and model is not real:
                model.enable_gradient_checkpointing()  # type: ignore[operator]
            if sharded:
                shard(model)
        self.student, self.real, self.fake = student, real, fake
        self.heads = None if heads is None else heads.to(device)
        self.text_encoder = None if text_encoder is None else text_encoder.to(device)

    def train_text_encoder(self, trained: bool) -> None:
        """The text encoder learns in the first phase of a demo and is frozen then, so that later networks share it."""
        if self.text_encoder is not None:
            self.text_encoder.requires_grad_(trained)

    def export(self, path: Path) -> None:
        """Write the student's present weights as a model directory, adapters merged; a collective.

        The adapters themselves are also written, to `lora.safetensors`: merging is one-way.
        """
        state = {name: whole_tensor(p.detach()).cpu() for name, p in self.student.state_dict().items()}
        if distributed.rank() == 0:
            partial, old = (path.with_name(f".{path.name}.{kind}") for kind in ("partial", "old"))
            for leftover in (partial, old):
                shutil.rmtree(leftover, ignore_errors=True)
            partial.mkdir(parents=True)
            self._write(state, partial)
            if path.exists():
                path.rename(old)
            partial.rename(path)
            shutil.rmtree(old, ignore_errors=True)
        barrier()

    def _write(self, state: dict[str, Any], directory: Path) -> None:
        if self.config.lora is not None:
            adapters = {name: tensor.contiguous() for name, tensor in state.items() if ".lora_" in name}
            settings = {"rank": str(self.config.lora.rank), "alpha": str(self.config.lora.alpha)}
            save_file(adapters, directory / "lora.safetensors", metadata=settings)
            merged, _ = from_research({"ema": state}, "ema", self.config.lora.alpha)
            state = dict(merged)
        model_config: Any = self.student.config
        with torch.device("meta"):
            model: Any = self.model_class.from_config(model_config)
        model.load_state_dict(state, strict=True, assign=True)
        model.save_pretrained(directory / "transformer")
        if self.text_encoder is not None:
            size = (self.config.data.height, self.config.data.width)
            save_pixel_parts(self.text_encoder, directory, size, self.config.pretrain.flow_map.shift)


def load_network(
    settings: ModelSettings, path: str | None, dtype: torch.dtype, any_class: bool = False
) -> tuple[nn.Module, WordEncoder | None]:
    """A transformer on the CPU, and the demo's text encoder.

    Args:
        path: a model or pipeline directory, also of a Wan base, whose missing parts are made from it; None: fresh
            weights from torch's global generator.
        any_class: take either AnyFlow class that the directory names, for scores, which see the whole clip at once.

    Raises:
        FileNotFoundError, ValueError: if there is no such directory or its weights do not fit.
    """
    model_class: Any = CLASS_OF[settings.kind]
    text_encoder: WordEncoder | None = None
    if path is None:
        config = TRANSFORMER | settings.config if settings.kind == "demo" else settings.config
        if not config:
            raise ValueError("model.path: got None, expected a model directory (or model.config for fresh weights)")
        model = model_class.from_config(config)
        copy_time_embedder(model)
        if settings.kind == "demo":
            text_encoder = demo_text_encoder(model.config.text_dim)
        return to_dtype(model, dtype), text_encoder
    if settings.kind == "demo":
        demo = DemoModel.load(path)
        return to_dtype(demo.transformer.train(), dtype), demo.text_encoder
    directory = Path(path) / "transformer" if (Path(path) / "transformer").is_dir() else Path(path)
    stored = read_config(directory)
    if any_class:
        model_class = MODELS.get(stored.get("_class_name", ""), model_class)
    if stored.get("_class_name") == BASE_CLASS:
        return to_dtype(from_base(directory, stored, model_class, settings.config), dtype), None
    return model_class.from_pretrained(directory, dtype=dtype, **settings.config).train(), None


def from_base(directory: Path, stored: dict[str, Any], model_class: Any, changes: dict[str, Any]) -> nn.Module:
    """An AnyFlow model from a Wan base: the delta embedder starts as the time embedder, the compressed patch embedding
    as the resized full one.

    Raises:
        ValueError: if the weights differ by more than those two parts.
    """
    known = set(inspect.signature(model_class).parameters)
    shared = {key: value for key, value in stored.items() if key in known and value is not None}
    model = model_class.from_config(shared | changes)
    state = read_checkpoint(directory)
    own = set(model.state_dict())
    missing = sorted(key for key in own - set(state) if not key.startswith(NEW_PARTS))
    unknown = sorted(set(state) - own)
    if missing or unknown:
        raise ValueError(f"{directory}: does not fit {model_class.__name__}: missing {missing}, unknown {unknown}")
    model.load_state_dict(state, strict=False)
    copy_time_embedder(model)
    if hasattr(model, "far_patch_embedding"):
        model.warm_start_compressed()
    return model


@torch.no_grad()
def copy_time_embedder(model: Any) -> None:
    """Start the delta embedder as a copy of the time embedder."""
    embedder = model.condition_embedder
    embedder.delta_embedder.load_state_dict(embedder.time_embedder.state_dict())


def input_dtype(config: TrainConfig) -> torch.dtype | None:
    """What latents and text are cast to before a network; None: left as they are."""
    return None if config.precision == "fp32" else DTYPES[config.precision]


def to_dtype(model: Any, dtype: torch.dtype) -> nn.Module:
    """Cast all but what the model keeps in fp32, in place."""
    kept = set(model.keep_in_fp32)
    for name, parameter in model.named_parameters():
        target = dtype if kept.isdisjoint(name.split(".")) else torch.float32
        parameter.data = parameter.data.to(target)
    model.fuse_projections()
    return model


def _require_same_text(student: nn.Module | None, teacher: nn.Module | None) -> None:
    if student is None or teacher is None:
        return
    pairs: Iterable[tuple[torch.Tensor, torch.Tensor]] = zip(student.parameters(), teacher.parameters(), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        raise ValueError(f"model.teacher: its {TEXT_FOLDER} is not the student's, expected models of one run")
