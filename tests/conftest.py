"""Test-wide settings. All runs on a CPU; tests marked `gpu` need a CUDA device, tests marked `slow` need --run-slow.

Without a GPU Triton kernels run in its interpreter, or, with --emulate, as the PTX of a GPU (`emulator/README.md`).
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from anyflow_runtime.threads import settle_threads

settle_threads()  # before torch is loaded

import torch  # noqa: E402

from emulator import plugin  # noqa: E402

# A table that `anyflow tune` left on this machine must not decide what the tests launch.
os.environ["ANYFLOW_TUNING"] = ""

# Shapes are tiny: more threads cost more than they save, far more on a busy machine.
torch.set_num_threads(1)

# Inputs drawn while tests are collected must be the same in every worker of pytest-xdist.
torch.manual_seed(0)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--run-slow", action="store_true", help="also run the tests marked slow")
    plugin.add_options(parser)


def pytest_configure(config: pytest.Config) -> None:
    if not torch.cuda.is_available() and config.getoption("--emulate") is None:
        # Triton reads it when a kernel is defined, so it has to be set before any kernel module is imported.
        os.environ.setdefault("TRITON_INTERPRET", "1")
    plugin.configure(config)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    plugin.skip(config, items)
    skip_gpu = pytest.mark.skip(reason="needs a CUDA device")
    skip_slow = pytest.mark.skip(reason="slow: pass --run-slow to run it")
    for item in items:
        if "gpu" in item.keywords and not torch.cuda.is_available():
            item.add_marker(skip_gpu)
        if "slow" in item.keywords and not config.getoption("--run-slow"):
            item.add_marker(skip_slow)


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of an uninterrupted training run, `trainer_runs.tiny()`."""
    from anyflow_runtime.training import train

    from .trainer_runs import tiny

    return train(tiny(), tmp_path_factory.mktemp("whole_run"), io.StringIO()).parent
