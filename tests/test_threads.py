"""Threads on a busy machine and in a container. Each setting is read when torch is loaded: by a fresh interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyflow_runtime.threads import cpu_share, settle_threads, suit_threads

SHOW = "import os; print(os.environ.get('OMP_WAIT_POLICY'), os.environ.get('OMP_NUM_THREADS'))"


@pytest.mark.parametrize(
    ("given", "want"),
    [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE"), ({"GOMP_SPINCOUNT": "1000"}, "None")],
    ids=str,
)
def test_the_command_waits_passively_unless_told_otherwise(given: dict[str, str], want: str) -> None:
    program = f"from anyflow_runtime.cli import main; main(['--version']); {SHOW}"
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "KMP_"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env=clean | given, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[-2] == want


def test_once_torch_is_loaded_nothing_is_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    settle_threads()
    assert "OMP_WAIT_POLICY" not in os.environ


@pytest.mark.parametrize(
    ("files", "want"),
    [
        ({"cpu.max": "150000 100000"}, 2),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 1),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
    ids=str,
)
def test_a_share_of_the_cpu_is_read_from_the_cgroup(tmp_path: Path, files: dict[str, str], want: int | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert cpu_share(tmp_path) == want


def test_no_more_threads_than_the_share(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "torch")
    monkeypatch.setattr(os, "environ", {})
    monkeypatch.setattr("anyflow_runtime.threads.cpu_share", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    settle_threads()
    assert os.environ["OMP_NUM_THREADS"] == "1"


def test_one_thread_for_a_tiny_model_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    threads: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    suit_threads(tokens=390, channels=256)
    assert threads == []
    suit_threads(tokens=32, channels=128)  # the demo
    assert threads == [1]
