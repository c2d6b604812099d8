"""Named training configs: the released models, every stage, and the demo.

Hyper-parameters: AnyFlow (arXiv 2605.13724) and the configs of NVlabs/AnyFlow. `MODEL-SIZE-STAGE`, where the stage is
"teacher" (plain flow matching, gives the scores of the last one), "pretrain" (flow map) or "on-policy".
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files import read_json
from .config import TrainConfig, config_from_dict, merged

_SIZES: dict[str, dict[str, Any]] = {
    "1.3b": {"iterations": 6000, "batch_size": 2, "global_batch": 32},
    "14b": {"iterations": 4000, "batch_size": 1, "global_batch": 16},
}
_DEMO: dict[str, Any] = {
    "model": {"kind": "demo"},
    "data": {"kind": "shapes"},
    "far": {"chunk_partition": [1, 2, 2, 2], "full_chunk_limit": 2, "bidirectional_probability": 0.1},
    "flow_map": {"guidance": None, "shift": 2.0},
    "ema": {"decay": 0.99, "warmup": 100},
    "batch_size": 48,
    "precision": "fp32",
    "checkpoint_every": 100,
    "sample_every": 200,
    "plot": True,
}
_DEMO_BASE = {"objective": "flow_matching", "iterations": 2800, "lr": 2e-3, "warmup": 50}
_DEMO_SECOND = {"iterations": 1000, "lr": 1e-3, "warmup": 20, "decay": 400}


def _released(kind: str, size: str, stage: str) -> dict[str, Any]:
    table = _SIZES[size]
    config: dict[str, Any] = {
        "model": {"kind": kind, "gradient_checkpointing": True},
        "data": {"kind": "safetensors"},
        "lora": {"rank": 256, "alpha": 256.0},
        "batch_size": table["batch_size"],
        "global_batch": table["global_batch"],
    }
    if kind == "far":
        config["far"] = {"bidirectional_probability": 0.0 if stage == "on-policy" else 0.1}
    if stage == "on-policy":
        config |= {
            "phases": [{"objective": "on_policy", "iterations": 1200, "lr": 2e-6}],
            "optimiser": {"betas": [0.0, 0.999]},
            "ema": {"decay": 0.99, "warmup": 200},
            "on_policy": {"batch_size": table["batch_size"]},
        }
        return config
    objective = "flow_matching" if stage == "teacher" else "flow_map"
    config["phases"] = [{"objective": objective, "iterations": table["iterations"], "lr": 5e-5, "warmup": 1000}]
    return config


RECIPES: dict[str, dict[str, Any]] = {
    f"{kind}-{size}-{stage}": _released(kind, size, stage)
    for kind in ("bidirectional", "far")
    for size in _SIZES
    for stage in ("teacher", "pretrain", "on-policy")
}
RECIPES["demo"] = _DEMO | {"phases": [_DEMO_BASE, {"objective": "flow_map", **_DEMO_SECOND}]}
# With model.path = the "demo" run's phase-0-flow_matching: what plain flow matching makes of the same budget.
RECIPES["demo-flow-matching"] = _DEMO | {"phases": [{"objective": "flow_matching", **_DEMO_SECOND}]}
# With model.path = the flow-map model, and model.teacher = the one of plain flow matching.
RECIPES["demo-on-policy"] = merged(
    _DEMO,
    {
        "phases": [{"objective": "on_policy", "iterations": 200, "lr": 1e-4, "decay": 60}],
        "optimiser": {"betas": [0.0, 0.999]},
        "far": {"bidirectional_probability": 0.0},
        "on_policy": {"score": {"real_guidance": None, "shift": 2.0}, "step_choices": [2, 4, 8], "batch_size": 24},
    },
)


def load_recipe(name_or_path: str, changes: Mapping[str, Any] | None = None) -> TrainConfig:
    """The config of a recipe's name, or of a JSON file, which may name one to start from: `{"recipe": "demo", ...}`.

    Args:
        changes: nested values that take precedence.

    Raises:
        ValueError: if there is neither such a recipe nor such a file, or for unknown keys, which are named.
    """
    if name_or_path in RECIPES:
        data: dict[str, Any] = {"recipe": name_or_path}
    else:
        path = Path(name_or_path)
        if not path.is_file():
            raise ValueError(f"config: got {name_or_path!r}, expected a JSON file or one of {sorted(RECIPES)}")
        data = read_json("config", path, "a config")
    recipe = data.pop("recipe", None)
    if recipe is not None:
        if recipe not in RECIPES:
            raise ValueError(f"recipe: got {recipe!r}, expected one of {sorted(RECIPES)}")
        data = merged({"name": recipe, **RECIPES[recipe]}, data)
    return config_from_dict(merged(data, changes or {}))


def nested(assignments: list[str]) -> dict[str, Any]:
    """`["a.b=1", "c=text"]` as `{"a": {"b": 1}, "c": "text"}`; values are JSON where they are valid JSON, else text."""
    result: dict[str, Any] = {}
    for assignment in assignments:
        key, separator, text = assignment.partition("=")
        if not separator or not all(key.split(".")):
            raise ValueError(f"--set: got {assignment!r}, expected KEY=VALUE")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        *parents, leaf = key.split(".")
        place = result
        for parent in parents:
            place = place.setdefault(parent, {})
            if not isinstance(place, dict):
                raise ValueError(f"--set: got {assignment!r} beside a value for {parent!r}")
        place[leaf] = value
    return result
