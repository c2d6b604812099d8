"""pytest --emulate sm_80|sm_89|sm_90 [--emulate-seed N]: Triton kernels of the tests run as PTX instead of interpreted.

`tests/conftest.py` loads it and asks `configure` before any kernel is defined. Tests marked `emulated` run only so.
"""

from __future__ import annotations

import os
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from .launch import Emulator

TARGETS = {"sm_80": 80, "sm_89": 89, "sm_90": 90}
active: Emulator | None = None


def add_options(parser: pytest.Parser) -> None:
    group = parser.getgroup("emulator")
    group.addoption("--emulate", choices=sorted(TARGETS), help="run Triton kernels as PTX of this GPU, without one")
    group.addoption(
        "--emulate-seed", type=int, help="another interleaving of warps and copies (default: one fixed order)"
    )


def configure(config: pytest.Config) -> None:
    """Emulate, if that was asked for."""
    global active
    target = config.getoption("--emulate")
    if target is None:
        return
    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined
    from .launch import emulate

    active = emulate(TARGETS[target], config.getoption("--emulate-seed"))
    config.pluginmanager.register(_Report(config))


def skip(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need the emulator where it is not on, and those marked for an architecture that is not emulated."""
    target = config.getoption("--emulate")
    for item in items:
        mark = item.get_closest_marker("emulated")
        if mark is not None and target not in (mark.args or TARGETS):
            wanted = " or ".join(mark.args or TARGETS)
            item.add_marker(pytest.mark.skip(reason=f"needs --emulate {wanted}"))


class _Report:
    """One line at the end of a run: what the emulator did, in this process and in the workers of pytest-xdist."""

    def __init__(self, config: pytest.Config) -> None:
        self._output = getattr(config, "workeroutput", None)
        self._totals: Counter[str] = Counter()
        self._notes: Counter[str] = Counter()

    def _own(self) -> tuple[dict[str, int], dict[str, int]]:
        assert active is not None
        totals = {"launches": active.launches, "warp instructions": active.statistics.instructions}
        return totals, dict(active.statistics.notes)

    def pytest_sessionfinish(self) -> None:
        if self._output is not None:
            self._output["emulated"] = self._own()

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        totals, notes = node.workeroutput.get("emulated", ({}, {})) if hasattr(node, "workeroutput") else ({}, {})
        self._totals.update(totals)
        self._notes.update(notes)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        totals, notes = self._own()
        self._totals.update(totals)
        self._notes.update(notes)
        line = ", ".join(f"{count:,} {what}" for what, count in self._totals.items())
        line += "".join(f"; {count} times: {what}" for what, count in sorted(self._notes.items()))
        terminalreporter.write_line(f"emulated {line}")
