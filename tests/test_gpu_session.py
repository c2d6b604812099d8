"""`scripts/gpu_session.sh`, run whole with programs that stand in for a GPU's; each command read by its own parser."""

from __future__ import annotations

import argparse
import importlib.util
import json
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from anyflow_kernels import launch_configs
from bench import kernel_bench

ROOT = Path(__file__).resolve().parents[1]
# Plays every program. It writes down its call and, for a bench, a row; HANGS, FAILS and KILLS name a word of the
# command at which it does so, the last to the session itself, in the middle of a step.
STAND_IN = """#!/bin/sh
case "$1" in */gpu_session.py) exec {python} "$@" ;; esac
echo "$(basename "$0") $*" >> {calls}
echo "output of $*, tuning table at $ANYFLOW_TUNING"
last=""
for word in "$@"; do
    [ "$last" = --json ] && echo '{{"row": 1}}' >> "$word"
    last=$word
done
case " $* " in *" ${{HANGS:-nothing}} "*) sleep 60 ;; esac
case " $* " in *" ${{FAILS:-nothing}} "*) echo "it fails"; exit 7 ;; esac
case " $* " in *" ${{KILLS:-nothing}} "*) kill -9 $PPID ;; esac
[ "$1" = --query-gpu=compute_cap ] && echo 9.0
exit 0
"""


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_session", ROOT / "scripts" / "gpu_session.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for its dataclass
    spec.loader.exec_module(module)
    return module


SESSION = load()
PARTS = SESSION.session()
VALUES = {"PYTHON": "python", "OUT": "out", "SM": "sm_90"}
STEPS = [(part, step) for part, steps in PARTS.items() for step in steps]


class Machine:
    """A machine of stand-ins: runs the session and tells what was called."""

    def __init__(self, directory: Path) -> None:
        self.out, self.calls_file, self.programs = directory / "out", directory / "calls", directory / "bin"
        self.cache = directory / "anyflow_triton_cache"
        self.programs.mkdir()
        for name in ("python3", "nvidia-smi", "ncu", "compute-sanitizer"):
            program = self.programs / name
            program.write_text(STAND_IN.format(python=sys.executable, calls=self.calls_file))
            program.chmod(0o755)

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        env = {"PATH": f"{self.programs}:/usr/bin:/bin", "TMPDIR": str(self.cache.parent), **environment}
        command = [str(ROOT / "scripts" / "gpu_session.sh"), str(self.out), "python3", *arguments]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=200)

    def calls(self) -> list[str]:
        """Each command that was run, without those that ask what is there."""
        lines = self.calls_file.read_text().splitlines()
        return [line for line in lines if "--query-gpu" not in line and "-c import" not in line]

    def summary(self) -> dict[tuple[str, str], Any]:
        return {(row["part"], row["step"]): row for row in json.loads((self.out / "summary.json").read_text())}

    def rows(self) -> int:
        return len((self.out / "rows.jsonl").read_text().splitlines())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path)


def call(machine: Machine, step: Any) -> str:
    """The line that the stand-in writes for a step, its newlines apart."""
    words = step.words({**VALUES, "PYTHON": "python3", "OUT": str(machine.out)})
    return " ".join([Path(words[0]).name, *words[1:]])


def test_every_part_ends_within_nine_minutes() -> None:
    assert all(sum(step.seconds for step in steps) < 540 for steps in PARTS.values())
    names = [(part, step.name) for part, step in STEPS]
    assert len(set(names)) == len(names)
    assert all(steps[0].repeated or part == "first" for part, steps in PARTS.items())


def test_all_parts_run_in_order_and_leave_their_files(machine: Machine) -> None:
    kernel = machine.cache / "HASH" / "kernel.cubin"
    kernel.parent.mkdir(parents=True)
    for suffix in (".cubin", ".json", ".ptx"):
        kernel.with_suffix(suffix).write_text(suffix)
    done = machine.run()
    assert done.returncode == 0, done.stdout + done.stderr
    text = machine.calls_file.read_text()
    positions = [text.find(call(machine, step)) for _, step in STEPS if not step.repeated]
    assert -1 not in positions and positions == sorted(positions)
    assert text.count("setup.py build_ext") == len(PARTS)
    assert {row["status"] for row in machine.summary().values()} == {"ok"} and len(machine.summary()) == len(STEPS)
    assert machine.rows() == sum(step.command.startswith("bench ") for _, step in STEPS)
    expected = {*(f"{part}.log" for part in PARTS), "summary.json", "rows.jsonl", "verify.json", "triton_cache.tar.gz"}
    assert {path.name for path in machine.out.iterdir()} == expected
    assert "output of -m bench.linear " in (machine.out / "rows.log").read_text()
    with tarfile.open(machine.out / "triton_cache.tar.gz") as archive:
        assert sorted(archive.getnames()) == ["HASH/kernel.cubin", "HASH/kernel.json"]


def test_a_part_leaves_few_enough_files_to_bring_back(machine: Machine) -> None:
    assert machine.run("tests").returncode == 0
    assert len(list(machine.out.iterdir())) <= 8


def test_a_step_that_hangs_or_fails_does_not_stop_the_others(machine: Machine) -> None:
    """The one is stopped at its limit, with its row kept; the end says which they were."""
    done = machine.run("rows", "--patience", "0.05", HANGS="bench.unpatchify", FAILS="bench.linear")
    assert done.returncode == 1
    status = {step: row["status"] for (_, step), row in machine.summary().items()}
    assert status.pop("unpatchify") == "over its limit" and status.pop("linear") == "failed (7)"
    assert set(status.values()) == {"ok"}
    assert machine.rows() == len(PARTS["rows"]) - 1
    assert machine.summary()["rows", "unpatchify"]["seconds"] < 10
    assert "failed: rows: linear; rows: unpatchify" in done.stdout and "it fails" in done.stdout


def test_a_session_that_is_killed_goes_on_after_that_step(machine: Machine) -> None:
    done = machine.run("rows", KILLS="bench.linear_gelu")
    assert done.returncode == -signal.SIGKILL
    before, kept = machine.calls(), machine.rows()
    assert kept == 4  # that of the step that ran when the kill came is there too
    assert [row["status"] for row in machine.summary().values()] == ["ok"] * 4 + ["interrupted"]
    first_out, machine.out = machine.out, machine.out.with_name("second")
    assert machine.run("rows", "--resume", str(first_out)).returncode == 0
    after = [line for line in machine.calls()[len(before) :] if "build_ext" not in line]
    assert after == [call(machine, step) for step in PARTS["rows"][5:]]
    assert len(machine.summary()) == len(PARTS["rows"])
    done = machine.run("rows", "--resume", str(machine.out))
    assert "failed: rows: linear_gelu" in done.stdout and len(machine.calls()) == len(before) + len(after) + 1


def test_compiled_kernels_and_winners_travel(machine: Machine) -> None:
    kernel = machine.cache / "HASH" / "kernel.cubin"
    kernel.parent.mkdir(parents=True)
    kernel.write_text("compiled")
    machine.run("rivals")
    shutil.rmtree(machine.cache)
    (machine.out / "tuning.json").write_text("won")
    first_out, machine.out = machine.out, machine.out.with_name("second")
    machine.run("sanitizer", "--resume", str(first_out))
    assert kernel.read_text() == "compiled" and (machine.out / "tuning.json").read_text() == "won"
    assert f"tuning table at {machine.out / 'tuning.json'}" in (machine.out / "sanitizer.log").read_text()


def test_no_step_starts_that_could_end_too_late(machine: Machine) -> None:
    done = machine.run("--within", "110")
    assert done.returncode == 3 and "stopped before first: attention, 1.3B chunk 6" in done.stdout
    assert [step for _, step in machine.summary()] == [step.name for step in PARTS["first"][:6]]


def test_what_a_machine_lacks_is_skipped(machine: Machine) -> None:
    (machine.programs / "compute-sanitizer").unlink()
    assert machine.run("sanitizer").returncode == 0
    status = {row["status"] for (_, step), row in machine.summary().items() if step != "build"}
    assert status == {"skipped: no compute-sanitizer"}


def test_an_unknown_part_is_an_error(machine: Machine) -> None:
    done = machine.run("kernel")
    assert done.returncode == 2 and "PART: got kernel, expected some of first, tests" in done.stderr


# --- each command against what will parse it


class Parsed(BaseException):
    """Not an Exception: no command may catch it."""


@pytest.mark.parametrize(("part", "step"), STEPS, ids=lambda value: getattr(value, "name", value))
def test_the_command_is_understood(part: str, step: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """By its own parser: no option may be unknown, no file missing, no choice gone."""
    words = step.words({**VALUES, "OUT": str(tmp_path)})
    if "PYTHON" in step.command.split() or {"bench", "anyflow", "pytest"} & set(step.command.split()):
        words = words[words.index("python") + 1 :]
    if words[0] != "-m":
        assert words[0] in ("nvidia-smi", "-c") or (ROOT / words[0]).is_file()
        return
    if words[1] == "pytest":
        options = pytest.Config.fromdictargs({}, words[2:]).option  # raises for an unknown option
        assert options.file_or_dir and all((ROOT / name).is_file() for name in options.file_or_dir)
        return
    parse, seen = argparse.ArgumentParser.parse_args, []

    def parse_args(parser: argparse.ArgumentParser, arguments: Any = None, *others: Any) -> None:
        seen.append(parse(parser, arguments, *others))
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.setattr(sys, "argv", words[1:])
    monkeypatch.delitem(sys.modules, words[1], raising=False)
    with pytest.raises(Parsed):
        runpy.run_module(words[1], run_name="__main__")
    monkeypatch.undo()
    if getattr(seen[0], "shape", ""):
        assert any(seen[0].shape in name for name in shapes(words[1], monkeypatch)), seen[0].shape


def shapes(module: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of a bench's shapes on a GPU."""
    if module == "bench.far_attention":
        return [f"{model} {layout}" for model in kernel_bench.MODELS for layout in kernel_bench.layouts(False)]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    return [case.name for case in importlib.import_module(module).cases(torch.bfloat16, False)]


def test_the_sanitizer_has_a_gluon_row_to_check() -> None:
    assert 64 in {row.head_dim for row in launch_configs.ATTENTION_GLUON}
