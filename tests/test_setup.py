"""Building the package where the C++ extension cannot be built: it succeeds and says so, unless told to insist."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NO_TORCH = {"prelude": "sys.modules['torch'] = None"}
NO_COMPILER = {"CXX": "/nowhere/c++"}
BROKEN_COMPILER = {"CXX": "false", "CC": "false"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = tmp_path_factory.mktemp("checkout")
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy / name)
    shutil.copytree(ROOT / "csrc", copy / "csrc")
    for package in ("anyflow_kernels", "anyflow_runtime"):
        (copy / package).mkdir()
        (copy / package / "__init__.py").touch()
    return copy


def build_wheel(
    checkout: Path, *, prelude: str = "", **environment: str
) -> tuple[subprocess.CompletedProcess, list[str]]:
    shutil.rmtree(checkout / "build", ignore_errors=True)
    shutil.rmtree(checkout / "dist", ignore_errors=True)
    program = f"import sys, runpy; {prelude}\nsys.argv = ['setup.py', '-q', 'bdist_wheel']\nrunpy.run_path('setup.py')"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("ANYFLOW_")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=checkout, env=clean | environment, capture_output=True, text=True
    )
    return done, [wheel.name for wheel in checkout.glob("dist/*.whl")]


@pytest.mark.parametrize(
    ("machine", "reason"),
    [(NO_TORCH, "no torch"), (NO_COMPILER, "no C++ compiler"), (BROKEN_COMPILER, "rror")],
    ids=["no torch", "no compiler", "a compiler that fails"],
)
def test_a_wheel_is_built_without_the_extension(checkout: Path, machine: dict[str, str], reason: str) -> None:
    done, wheels = build_wheel(checkout, **machine)
    assert done.returncode == 0, done.stderr
    assert len(wheels) == 1
    assert "WITHOUT its C++ extension" in done.stderr and reason in done.stderr and "plain PyTorch" in done.stderr


@pytest.mark.parametrize("insist", ["ANYFLOW_EXT", "ANYFLOW_CUDA"])
def test_insisting_makes_it_an_error(checkout: Path, insist: str) -> None:
    done, wheels = build_wheel(checkout, **NO_TORCH, **{insist: "1"})
    assert done.returncode != 0 and not wheels
    assert "the C++ extension cannot be built" in done.stderr and "no torch" in done.stderr


def test_insisting_makes_a_compiler_that_fails_an_error(checkout: Path) -> None:
    done, wheels = build_wheel(checkout, **BROKEN_COMPILER, ANYFLOW_EXT="1")
    assert done.returncode != 0 and not wheels


def test_no_extension_asks_for_no_compiler_and_a_wheel_for_every_python(checkout: Path) -> None:
    done, wheels = build_wheel(checkout, **NO_COMPILER, ANYFLOW_NO_EXT="1")
    assert done.returncode == 0 and "WITHOUT" not in done.stderr
    assert [name.rpartition("-0.1.0-")[2] for name in wheels] == ["py3-none-any.whl"]
