"""Conversion between the layouts, for state dicts and for files.

Every conversion goes through the diffusers layout and says what it did. What only a config knows (gate value, delta
type, chunking, LoRA alpha) is never guessed: class defaults differ between the code bases. A directory's config travels
in the metadata of the file it is converted to, so that the way back needs no other source.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ..files import whole_file
from ..models import MODELS, AnyFlowFARTransformer3DModel
from .fastgen import from_fastgen, to_fastgen
from .fastvideo import FROM_FASTVIDEO, from_fastvideo, to_fastvideo
from .renames import Report, State, rename
from .research import WEIGHTS, from_research, has_adapters, read_research

LAYOUTS = ("diffusers", "fastgen", "fastgen_old", "fastvideo", "research")
CONFIG_ONLY = ("gate_value", "deltatime_type")
CONFIG_ONLY_FAR = ("chunk_partition", "full_chunk_limit")


def detect_layout(state: Mapping[str, Any]) -> str:
    """The layout of a state dict (or of a research checkpoint's content) by its keys.

    Raises:
        ValueError: if keys of several layouts are present.
    """
    if any(name in state for name in WEIGHTS.values()) or has_adapters(state):
        return "research"
    found = []
    bare = [key.removeprefix("transformer.") for key in state]
    if any(key.startswith("r_embedder.") for key in bare):
        found.append("fastgen_old" if any(key.startswith("r_embedder.time_proj.") for key in bare) else "fastgen")
    if any(rename(key, FROM_FASTVIDEO) != key for key in state):
        found.append("fastvideo")
    if any(key.startswith("condition_embedder.delta_embedder.linear_") for key in bare):
        found.append("diffusers")
    if len(found) > 1:
        raise ValueError(f"state: got keys of {found}, expected one layout")
    return found[0] if found else "diffusers"


def convert_state_dict(
    state: Mapping[str, Any],
    target: str,
    source: str | None = None,
    alpha: float | None = None,
    weights: str = "ema",
    base: State | None = None,
) -> tuple[State, Report]:
    """A state dict in another layout and what was done to it.

    Args:
        state: a state dict, or the content of a research checkpoint.
        source, target: of `LAYOUTS`; source None is detected. Nothing converts *to* "research": merging is one-way.
        alpha, weights, base: see `from_research`.

    Returns: the *same object* if there is nothing to do; the input is never changed.

    Raises:
        ValueError: on unknown or mixed layouts.
    """
    source = detect_layout(state) if source is None else source
    for name, layout in (("source", source), ("target", target)):
        if layout not in LAYOUTS:
            raise ValueError(f"{name}: got {layout!r}, expected one of {LAYOUTS}")
    if target == "research":
        raise ValueError("target: got 'research', expected another layout: LoRA factors cannot be recovered")
    if source == target:
        return state, Report()
    current, report = _to_diffusers(state, source, alpha, weights, base)
    if target in ("fastgen", "fastgen_old"):
        current, then = to_fastgen(current, old=target == "fastgen_old")
        report.extend(then)
    elif target == "fastvideo":
        current, then = to_fastvideo(current)
        report.extend(then)
    return current, report


def _to_diffusers(
    state: Mapping[str, Any], source: str, alpha: float | None, weights: str, base: State | None
) -> tuple[State, Report]:
    if source in ("fastgen", "fastgen_old"):
        return from_fastgen(state)
    if source == "fastvideo":
        return from_fastvideo(state)
    if source == "research":
        content = state if any(name in state for name in WEIGHTS.values()) else {WEIGHTS[weights]: state}
        return from_research(content, weights, alpha, base)
    return state, Report()


def check_config(config: Mapping[str, Any] | None) -> type:
    """The model class of a config that says all that weights cannot.

    Raises:
        ValueError: listing what is missing.
    """
    if config is None:
        raise ValueError(
            "config: got None, expected the model's config: weights do not tell gate, delta type or chunking"
        )
    name = config.get("_class_name")
    if name not in MODELS:
        raise ValueError(f"config: got _class_name {name!r}, expected one of {tuple(MODELS)}")
    needed = CONFIG_ONLY + (CONFIG_ONLY_FAR if MODELS[name] is AnyFlowFARTransformer3DModel else ())
    missing = [key for key in needed if key not in config]
    if missing:
        raise ValueError(f"config: lacks {missing}, which weights do not tell and defaults may get wrong")
    return MODELS[name]


def convert(
    source_path: str | os.PathLike[str],
    target_path: str | os.PathLike[str],
    target: str,
    source: str | None = None,
    config: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    alpha: float | None = None,
    weights: str = "ema",
    base_path: str | os.PathLike[str] | None = None,
) -> Report:
    """Convert a checkpoint on disk.

    Args:
        source_path: a model directory in diffusers' format, a `.safetensors` file, or a `.pt` file (read with
            `weights_only`, so that it can hold nothing but tensors).
        target_path: a directory for target "diffusers", else a `.safetensors` file.
        config: a dict or a JSON file; needed for target "diffusers" unless the source brings one (a directory, or a
            file that was converted from a directory).
        base_path: checkpoint with the weights under LoRA factors, in any layout.

    Returns: what was done.

    Raises:
        ValueError: before anything is written, if the config is missing or the weights do not fit it.
    """
    state = read_checkpoint(source_path)
    settings = _read_config(Path(source_path), config)
    base = None
    if base_path is not None:
        base, _ = convert_state_dict(read_checkpoint(base_path), "diffusers")
    converted, report = convert_state_dict(state, target, source, alpha, weights, base)
    if target != "diffusers":
        if Path(target_path).suffix != ".safetensors":
            raise ValueError(f"target_path: got {target_path}, expected a .safetensors file for target {target!r}")
        _save_file(converted, Path(target_path), settings)
        return report
    model_class: Any = check_config(settings)
    assert settings is not None
    bare = {key.removeprefix("transformer."): value for key, value in converted.items()}
    with torch.device("meta"):
        model = model_class.from_config(settings)
    expected = model.state_dict()
    problems = [f"missing {key}" for key in expected if key not in bare]
    problems += [f"unknown {key}" for key in bare if key not in expected]
    problems += [
        f"{key}: got {tuple(bare[key].shape)}, expected {tuple(value.shape)}"
        for key, value in expected.items()
        if key in bare and bare[key].shape != value.shape
    ]
    if problems:
        raise ValueError(f"{source_path}: weights do not fit {model_class.__name__}:\n  " + "\n  ".join(problems))
    model.load_state_dict(bare, strict=True, assign=True)
    model.save_pretrained(target_path)
    return report


def read_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Tensors by name of a model directory, a `.safetensors` file or a `.pt` file.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: on another suffix.
    """
    path = Path(path)
    if path.is_dir():
        files = sorted(path.glob("*.safetensors"))
        if not files:
            raise FileNotFoundError(f"no .safetensors in {path}")
        return {key: value for file in files for key, value in load_file(file).items()}
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return read_research(path)
    raise ValueError(f"path: got {path}, expected a directory, a .safetensors or a .pt file")


def _read_config(source: Path, config: Mapping[str, Any] | str | os.PathLike[str] | None) -> Mapping[str, Any] | None:
    if isinstance(config, Mapping):
        return config
    if config is not None:
        return json.loads(Path(config).read_text())
    if source.suffix == ".safetensors":
        with safe_open(source, framework="pt") as file:
            text = (file.metadata() or {}).get("config")
        return None if text is None else json.loads(text)
    beside = source / "config.json"
    return json.loads(beside.read_text()) if beside.is_file() else None


def _save_file(state: State, path: Path, config: Mapping[str, Any] | None) -> None:
    metadata = {"format": "pt"} | ({} if config is None else {"config": json.dumps(config, sort_keys=True)})
    with whole_file(path) as partial:
        save_file({key: value.contiguous() for key, value in state.items()}, partial, metadata=metadata)
