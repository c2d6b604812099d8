"""pytest --emulate sm_80|sm_89|sm_90 [--emulate-seed N]: Triton kernels of the tests run as PTX instead of interpreted.

`tests/conftest.py` loads it and asks `configure` before any kernel is defined. Tests marked `emulated` run only so.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

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


def skip(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests that need the emulator where it is not on, and those marked for an architecture that is not emulated."""
    target = config.getoption("--emulate")
    for item in items:
        mark = item.get_closest_marker("emulated")
        if mark is not None and target not in (mark.args or TARGETS):
            wanted = " or ".join(mark.args or TARGETS)
            item.add_marker(pytest.mark.skip(reason=f"needs --emulate {wanted}"))


def summary() -> str | None:
    """One line for the end of a run."""
    if active is None or not active.launches:
        return None
    notes = "".join(f"; {count} times: {what}" for what, count in sorted(active.statistics.notes.items()))
    return f"emulated {active.launches} launches, {active.statistics.instructions:,} warp instructions{notes}"
