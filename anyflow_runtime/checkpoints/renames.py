"""Renaming of state-dict keys by ordered rules, both ways, with a report of what was done."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

State = Mapping[str, Any]


@dataclass
class Report:
    """What a conversion did: pairs of renamed keys, keys dropped and added, and plain sentences for the rest."""

    renamed: list[tuple[str, str]] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    added: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        """False if the state dict came out as it went in."""
        return bool(self.renamed or self.dropped or self.added or self.notes)

    def extend(self, other: Report) -> None:
        """Append what a later step did."""
        self.renamed += other.renamed
        self.dropped += other.dropped
        self.added += other.added
        self.notes += other.notes

    def __str__(self) -> str:
        if not self.changed:
            return "nothing to do"
        lines = [f"renamed {old} -> {new}" for old, new in self.renamed]
        lines += [f"dropped {key}" for key in self.dropped] + [f"added {key}" for key in self.added]
        return "\n".join(lines + self.notes)


@dataclass(frozen=True)
class Rule:
    """A key that fully matches `pattern` becomes `replacement` (as in `re.sub`)."""

    pattern: str
    replacement: str


def rename(key: str, rules: Sequence[Rule]) -> str:
    """The key under the first rule that matches all of it; unchanged if none does."""
    for rule in rules:
        match = re.fullmatch(rule.pattern, key)
        if match:
            return match.expand(rule.replacement)
    return key


def rename_all(state: State, rules: Sequence[Rule]) -> tuple[dict[str, Any], Report]:
    """A new dict in the order of the old one; the values are the same objects.

    Raises:
        ValueError: if two keys would become one.
    """
    renamed: dict[str, Any] = {}
    report = Report()
    for key, value in state.items():
        new = rename(key, rules)
        if new in renamed:
            raise ValueError(f"state: two keys would become {new!r}, one of them {key!r}: the layouts are mixed")
        renamed[new] = value
        if new != key:
            report.renamed.append((key, new))
    return renamed, report
