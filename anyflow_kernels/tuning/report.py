"""What serves on a device now, and why: a line for each choice, for `anyflow info`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from ..aot_case import MODELS
from ..launch_configs import architecture
from ..launch_configs.tuned import Choice, choice_for, key_of, machine, read_table, table_path
from .subjects import Subject, model_sizes, subjects


def describe(way: str, fields: Mapping[str, Any]) -> str:
    """A candidate in a line; parameters that are off or absent are left out."""
    return " ".join([way, *(f"{name}={value}" for name, value in fields.items() if value not in (None, False))])


def current_choices(device: torch.device) -> Iterator[str]:
    """The tuning table of a device and, for every launch of the released models, what serves it with the reason."""
    arch, content = architecture(device), None
    here = machine(device)
    path = table_path(here["card"])
    try:
        content = read_table(path) if path else None
    except FileNotFoundError:
        yield f"tuning table: none at {path} (anyflow tune)"
    except (OSError, ValueError) as error:
        yield f"tuning table {path}: not used, it is no tuning table ({error})"
    else:
        same = content is not None and content["machine"] == here
        if content is None:
            yield "tuning table: none (ANYFLOW_TUNING is empty)"
        else:
            yield f"tuning table {path}: {len(content['choices'])} choices" + ("" if same else ", of another machine")
        content = content if same else None
    entries = {key_of(entry): entry for entry in content["choices"]} if content else {}
    for subject in subjects(arch, {name: model_sizes(name) for name in MODELS}):
        entry, won = entries.get(subject.key, {}), choice_for(arch, subject.key)
        chosen, reason = (won, won.reason) if won else _default(subject, device, entry)
        yield f"{subject.key!s:<52}{describe(chosen.way, chosen.fields)}"
        yield f"    {reason}"
        for tried in entry.get("trials", []):
            if tried["rejected"]:
                yield f"    rejected: {describe(tried['way'], tried['fields'])}: {tried['rejected']}"


def _default(subject: Subject, device: torch.device, entry: dict[str, Any]) -> tuple[Choice, str]:
    """What serves without a winner; a library only if it is right here."""
    default = subject.candidates[0]
    reason = entry.get("reason") or f"default: {default.reason}"
    if default.way not in ("cudnn", "flash"):
        return default, reason
    from ..triton_ops.far_attention_library import unproven

    example = torch.empty(1, 1, 1, subject.key.size, dtype=subject.key.dtype, device=device)
    why_not = unproven(default.way, example)
    if why_not is None:
        return default, f"{reason}; tried on this device: right"
    return next(
        c for c in subject.candidates if c.way == "triton"
    ), f"default, since {default.way} does not serve here: {why_not}"
