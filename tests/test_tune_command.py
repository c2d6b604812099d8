"""`anyflow tune` and what `anyflow info` says of it. A fake timer; the interpreter plays the card."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_kernels import launch_configs
from anyflow_kernels.launch_configs import tuned
from anyflow_kernels.launch_configs.tuned import Choice, Key
from anyflow_kernels.testing.cases import SIZES
from anyflow_kernels.tuning import timing, trial
from anyflow_kernels.tuning.report import current_choices
from anyflow_kernels.tuning.subjects import Subject, subjects
from anyflow_runtime.cli import build_parser, main
from anyflow_runtime.commands import tune

CPU = torch.device("cpu")
SMALL = replace(SIZES["tiny"], heads=96, chunks=(1, 1), height=4, width=4, batch=1)  # as wide as 1.3B: info names it
NORM, STEP = Key("rms_norm", torch.bfloat16, 1536), Key("flow_map_step", torch.bfloat16)
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter plays the card")


@pytest.fixture(autouse=True)
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where the table of the test lies. The later a candidate, the faster."""
    monkeypatch.setenv("ANYFLOW_TUNING", str(tmp_path / "cache" / "tuning.json"))
    monkeypatch.setattr(timing, "graphed_medians", lambda calls: {name: 1 / (1 + int(name)) for name in calls})
    tuned.forget_tables()
    yield tmp_path / "cache" / "tuning.json"
    tuned.forget_tables()


def chosen(*keys: Key) -> list[Subject]:
    found = {subject.key: subject for subject in subjects(launch_configs.INTERPRETER, {"small": SMALL})}
    return [replace(found[key], candidates=found[key].candidates[:3]) for key in keys]


def run(*keys: Key, options: str = "") -> int:
    arguments = build_parser().parse_args(["tune", *options.split()])
    return tune._tune(arguments, CPU, chosen(*keys))


def content(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def test_what_wins_is_stored_and_launched(path, capsys):
    default = launch_configs.row_tile("rms_norm", 0, 1536, torch.bfloat16)
    assert run(NORM, STEP) == 0
    out = capsys.readouterr().out
    assert "rms_norm bfloat16 1536" in out and "3.00x over the default (3 tried)" in out and str(path) in out
    table = content(path)
    assert table["machine"] == tuned.machine(CPU) and "trying" not in table
    assert [entry["operation"] for entry in table["choices"]] == ["rms_norm", "flow_map_step"]
    entry = table["choices"][0]
    assert entry["winner"]["fields"] == entry["trials"][2]["fields"] and len(entry["trials"]) == 3
    assert all(tried["seconds"] and 0 < tried["error"] <= tried["budget"] for tried in entry["trials"])
    won = launch_configs.row_tile("rms_norm", 0, 1536, torch.bfloat16)
    assert won != default and {"rows": won.rows, "num_warps": won.num_warps} == entry["winner"]["fields"]
    assert won.reason == f"tuned on {table['machine']['card']}, {entry['date']}: 3.00x over the default"


def test_a_later_run_replaces_what_it_measures_and_keeps_the_rest(path, monkeypatch):
    run(NORM, STEP)
    monkeypatch.setattr(timing, "graphed_medians", lambda calls: dict.fromkeys(calls, 1.0))
    run(NORM, STEP)
    assert all("3.00x" in entry["reason"] for entry in content(path)["choices"])  # both are known
    run(NORM, options="--again")
    entries = {entry["operation"]: entry for entry in content(path)["choices"]}
    assert "3.00x" in entries["flow_map_step"]["reason"] and "no candidate is 2%" in entries["rms_norm"]["reason"]


def test_an_interruption_loses_nothing(path, monkeypatch):
    def interrupted(calls: Mapping[str, Any]) -> dict[str, float]:
        if content(path)["choices"]:
            raise KeyboardInterrupt
        return dict.fromkeys(calls, 1.0)

    monkeypatch.setattr(timing, "graphed_medians", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(NORM, STEP)
    assert [entry["operation"] for entry in content(path)["choices"]] == ["rms_norm"]
    assert "trying" not in content(path)


def test_a_candidate_that_ended_the_process_is_left_out(path, capsys, monkeypatch):
    """A kernel that never returns: what was running stands in the file, and the next run goes round it."""
    seen = []
    before = tune.TuningTable.before_candidate

    class Killed(BaseException):
        pass

    def kill(self: tune.TuningTable, key: Key, choice: Choice) -> str:
        found = before(self, key, choice)
        if len(seen) == 1:
            seen.append(path.read_text())
            raise Killed
        seen.append(choice)
        return found

    with monkeypatch.context() as patch:
        patch.setattr(tune.TuningTable, "before_candidate", kill)
        with pytest.raises(Killed):
            run(NORM)
    path.write_text(seen[1])  # as the process left it, with no time to tidy
    second = chosen(NORM)[0].candidates[1]
    assert json.loads(seen[1])["trying"] == {"key": str(NORM), "way": "triton", "fields": dict(second.fields)}
    capsys.readouterr()
    for options in ("", "--again"):  # it stays left out
        run(NORM, options=options)
        out = capsys.readouterr().out
        assert "rejected: triton" in out and "it ended the process, or the CUDA context, of an earlier run" in out
        assert content(path)["choices"][0]["trials"][1]["seconds"] == []


def test_a_lost_device_is_said_and_noted(path, monkeypatch):
    def lose(subject: Subject, arch: int, device: torch.device, timer: Any, before: Callable[..., str]) -> dict:
        before(subject.key, subject.candidates[1])
        raise trial.DeviceLostError("an illegal memory access")

    monkeypatch.setattr(trial, "try_candidates", lose)
    with pytest.raises(RuntimeError, match=r"illegal memory access; it broke the CUDA context and is noted"):
        run(NORM)
    assert content(path)["lost"] == [
        {"key": str(NORM), "way": "triton", "fields": dict(chosen(NORM)[0].candidates[1].fields)}
    ]


def test_no_candidate_runs_after_the_limit(path, capsys, monkeypatch):
    """What is half done is not stored, nobody is blamed, and the next run goes on."""
    clock = iter([0.0] * 8 + [11.0] * 99)  # the start, six calls of the first subject, one of the second
    monkeypatch.setattr(tune.time, "monotonic", lambda: next(clock))
    assert run(NORM, STEP, options="--limit-seconds 10") == 0
    assert "stopped after 10 s, 1 left: the next run goes on" in capsys.readouterr().out
    assert [entry["operation"] for entry in content(path)["choices"]] == ["rms_norm"]
    assert "trying" not in content(path) and not content(path)["lost"]
    assert run(NORM, STEP) == 0
    out = capsys.readouterr().out
    assert "known: 1 of 2 (--again measures them anew)" in out and "rms_norm" not in out and "flow_map_step" in out


@pytest.mark.parametrize(
    ("there", "said"),
    [('{"format": 1', "it is no tuning table"), (None, "it was of another card or of other versions")],
)
def test_another_table_in_its_place_is_made_anew(there, said, path, capsys):
    path.parent.mkdir()
    machine = tuned.machine(CPU) | {"torch": "1.0"}
    old = json.dumps({"format": 1, "machine": machine, "choices": []})
    path.write_text(there or old)
    run(NORM)
    assert f"{path}: made anew, {said}" in capsys.readouterr().out
    assert content(path)["machine"] == tuned.machine(CPU)


def test_json_and_output(path, tmp_path, capsys):
    assert run(STEP, options=f"--json --output {tmp_path / 'mine.json'}") == 0
    out, err = capsys.readouterr()
    assert json.loads(out) == content(tmp_path / "mine.json") and not path.exists()
    assert "launches read it by ANYFLOW_TUNING" in err


def test_clear(path, capsys):
    run(STEP)
    for said in (f"deleted: {path}", f"no table at {path}"):
        assert main(["tune", "--clear"]) == 0
        assert said in capsys.readouterr().out
    assert not path.exists()


def test_info_says_what_serves_and_why(path, capsys):
    """The choice, its reason, and what was rejected and why."""
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"tuning table: none at {path} (anyflow tune)" in out
    assert "rms_norm bfloat16 1536" in out and "default: several rows a program" in out
    run(NORM)
    table = content(path)
    table["choices"][0]["trials"][1] |= {"rejected": "parity: result 0 3.0e-02, over the budget"}
    path.write_text(json.dumps(table))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert f"tuning table {path}: 1 choices" in out
    assert f"tuned on {table['machine']['card']}, " in out and ": 3.00x over the default" in out
    assert "rejected: triton rows=" in out and ": parity: result 0 3.0e-02, over the budget" in out


@pytest.mark.parametrize(
    ("there", "told", "warned"),
    [
        ({}, "not used, it is no tuning table (format: expected 1)", "it is no tuning table"),
        (
            {"format": 1, "machine": {"card": "A100"}, "choices": []},
            "0 choices, of another machine",
            "made for card A100",
        ),
    ],
)
def test_info_says_what_is_wrong_with_a_table(there, told, warned, path):
    path.parent.mkdir()
    path.write_text(json.dumps(there))
    with pytest.warns(UserWarning, match=warned):
        first, *others = current_choices(CPU)
    assert first.startswith(f"tuning table {path}: ") and first.endswith(told)
    assert any("default: " in line for line in others)


def test_info_says_why_a_library_does_not_serve(monkeypatch):
    """The default of sm_90, on a machine where cuDNN is missing."""
    row = launch_configs.ForwardKernel(arch=launch_configs.INTERPRETER, dense="cudnn", reason="published")
    monkeypatch.setattr(launch_configs, "FORWARD_KERNELS", (row,))
    lines = list(current_choices(CPU))
    place = next(i for i, line in enumerate(lines) if line.startswith("far_attention bfloat16 128 dense "))
    assert lines[place].split()[4] == "triton"
    assert "default, since cudnn does not serve here: cuDNN: got version 0, expected newer than" in lines[place + 1]


def test_without_a_gpu_it_says_so_in_one_sentence(capsys):
    assert main(["tune"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "this needs an NVIDIA GPU" in err and "--dry-run --arch sm_90" in err


def test_a_dry_run_prints_what_would_be_tried(capsys, path):
    assert main(["tune", "--dry-run", "--arch", "sm_90", "--operation", "far_attention", "far_attention_dq"]) == 0
    out = capsys.readouterr().out
    assert "\nfar_attention bfloat16 128 dense\n  at 1.3B newest chunk: 4680 x 6240, 12 x 128; " in out
    assert "\n  cudnn   (published on an H100" in out and "\n  gluon block_m=128 " in out and "\n  flash " in out
    assert "judged against float64 at 1.3B train, clean copy: 7111 x 7111, 12 x 128" in out
    assert "rms_norm" not in out and not path.exists()


def test_a_dry_run_as_json_for_one_model(capsys):
    assert main(["tune", "--dry-run", "--arch", "sm_80", "--model", "14B", "--json"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert {entry["size"] for entry in planned if entry["operation"] == "rms_norm"} == {5120}
    assert all(entry["shapes"] and len(entry["candidates"]) >= 2 for entry in planned)


def test_a_model_directory_gives_its_widths(capsys):
    assert main(["tune", "--dry-run", "--arch", "sm_90", "--model", "demo", "--operation", "rms_norm"]) == 0
    assert "rms_norm bfloat16 128\n  at demo " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--dry-run", "--arch: got none, and no GPU is here, expected one of sm_80"),
        ("--dry-run --arch sm_75", "--arch: got sm_75, expected one of sm_80"),
        ("--arch sm_90", "--arch: expected with --dry-run alone"),
        ("--dry-run --arch sm_90 --operation norm", "--operation: got norm, expected some of far_attention, "),
        ("--dry-run --arch sm_90 --model 2B", "--model: no directory 2B"),
        ("--limit-seconds 0", "--limit-seconds: got '0', expected a whole number >= 1"),
    ],
)
def test_bad_options(options, message, capsys):
    assert main(["tune", *options.split()]) == 2
    assert message in capsys.readouterr().err.replace("argument --limit-seconds", "--limit-seconds")


def test_an_empty_variable_needs_an_output(monkeypatch):
    monkeypatch.setenv("ANYFLOW_TUNING", "")
    with pytest.raises(tune.UsageError, match=r"--output: expected a file: .* ANYFLOW_TUNING is empty"):
        tune._tune(argparse.Namespace(output=None, json=False, again=False), CPU, [])
