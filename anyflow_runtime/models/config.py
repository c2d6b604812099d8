"""Model configurations: what stands in a diffusers `config.json`."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..config import FrozenDict
from ..files import read_json

ModelConfig = FrozenDict  # the constructor keywords of a model


def constructor_arguments(local_names: Mapping[str, Any], excluded: tuple[str, ...]) -> dict[str, Any]:
    """What a constructor was called with, from its `locals()` on its first line, less what is no config."""
    return {name: value for name, value in local_names.items() if name not in ("self", "__class__", *excluded)}


def constructor_keywords(model_class: type, config: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The constructor keywords in a config, overrides applied.

    Args:
        model_class: the class whose constructor will take them.
        config: a `config.json`; entries that start with an underscore are bookkeeping.
        overrides: keywords that take precedence.

    Raises:
        ValueError: if the config was written for another class, or has an entry the constructor does not know.
    """
    written_for = config.get("_class_name", model_class.__name__)
    if written_for != model_class.__name__:
        raise ValueError(f"config: got one of class {written_for}, expected {model_class.__name__}")
    known = [name for name in inspect.signature(model_class).parameters if name != "self"]
    keywords = {name: value for name, value in config.items() if not name.startswith("_")} | dict(overrides)
    unknown = sorted(set(keywords) - set(known))
    if unknown:
        raise ValueError(f"config: got unknown entries {unknown}, expected some of {known}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in keywords.items()}


def read_config(directory: Path) -> dict[str, Any]:
    """The `config.json` of a model directory.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is not a JSON object.
    """
    return read_json("path", directory / "config.json", "a model directory in diffusers' format")
