"""A training run continues to the same bits, whatever stopped it."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from anyflow_runtime.cli import main
from anyflow_runtime.training.config import config_to_dict
from anyflow_runtime.training.progress import MetricsFile, Progress, duration
from anyflow_runtime.training.trainer import checkpoint as checkpoints
from anyflow_runtime.training.trainer.networks import Networks
from anyflow_runtime.training.trainer.phase import TrainingPhase
from anyflow_runtime.training.trainer.trainer import train

from .trainer_runs import (
    DEMO,
    Killed,
    assert_same_bits,
    checkpoint,
    metrics,
    on_policy_config,
    tiny,
    write_on_policy_inputs,
)


def test_a_killed_run_continues_to_the_same_bits(whole_run, tmp_path) -> None:
    """SIGKILL in another process after its first checkpoint; weights, average, optimiser and metrics end up equal."""
    config = tmp_path / "config.json"
    config.write_text(json.dumps(config_to_dict(tiny())))
    out = tmp_path / "run"
    command = [sys.executable, "-m", "anyflow_runtime.cli", "train", str(config), "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 60
    while not (out / "checkpoints" / "step-00000002").is_dir() and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (out / "model").exists()
    train(tiny(), out, io.StringIO())
    assert_same_bits(checkpoint(out, 8), checkpoint(whole_run, 8))
    assert metrics(out) == metrics(whole_run)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (out / "model" / name).read_bytes() == (whole_run / "model" / name).read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["SIGTERM", "Ctrl-C"])
def test_a_stopped_run_keeps_every_step(number, code, whole_run, monkeypatch, tmp_path, capsys) -> None:
    """The step under way is finished and saved, between two checkpoints too, and the run goes on to the same bits."""
    original = TrainingPhase.step

    def signalled(self, step, local):
        if step == 2:
            os.kill(os.getpid(), number)
        return original(self, step, local)

    config, out = tmp_path / "config.json", tmp_path / "run"
    config.write_text(json.dumps(config_to_dict(tiny())))
    with monkeypatch.context() as patch:
        patch.setattr(TrainingPhase, "step", signalled)
        assert main(["train", str(config), "--out", str(out)]) == code
    told = capsys.readouterr().err
    assert "stopped after step 3; the same command goes on from there" in told
    assert (out / "checkpoints" / "step-00000003").is_dir() and not (out / "model").exists()
    train(tiny(), out, io.StringIO())
    assert_same_bits(checkpoint(out, 8), checkpoint(whole_run, 8))
    assert metrics(out) == metrics(whole_run)


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_run_stopped_at_any_step_continues_to_the_same_bits(stop, whole_run, monkeypatch, tmp_path) -> None:
    """Before the first checkpoint, within a phase, between the phases, and at the last step."""
    original = TrainingPhase.step

    def stopped(self, step, local):
        if step == stop:
            raise Killed
        return original(self, step, local)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingPhase, "step", stopped)
        with pytest.raises(Killed):
            train(tiny(), tmp_path, io.StringIO())
    train(tiny(), tmp_path, io.StringIO())
    assert_same_bits(checkpoint(tmp_path, 8), checkpoint(whole_run, 8))
    assert metrics(tmp_path) == metrics(whole_run)


def test_on_policy_training_continues_to_the_same_bits(monkeypatch, tmp_path) -> None:
    """Student, fake score and discriminator heads, with their optimisers; stopped after the first step."""
    write_on_policy_inputs(tmp_path)
    config = on_policy_config(tmp_path, on_policy={"gan": {"blocks": [0]}})
    train(config, tmp_path / "whole", io.StringIO())
    original = TrainingPhase.step

    def stopped(self, step, local):
        if step == 1:
            raise Killed
        return original(self, step, local)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingPhase, "step", stopped)
        with pytest.raises(Killed):
            train(config, tmp_path / "run", io.StringIO())
    train(config, tmp_path / "run", io.StringIO())
    state = checkpoint(tmp_path / "run", 3)
    assert any(name.startswith("heads.") for name in state["networks"]["fake"]["optimiser"])
    assert_same_bits(state, checkpoint(tmp_path / "whole", 3))
    assert metrics(tmp_path / "run") == metrics(tmp_path / "whole")


def test_a_model_that_a_killed_run_did_not_write_is_written_later(whole_run, monkeypatch, tmp_path) -> None:
    """Death between the last checkpoint of a phase and its model directory."""

    def die(self, path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Networks, "export", die)
        with pytest.raises(Killed):
            train(tiny(), tmp_path, io.StringIO())
    train(tiny(), tmp_path, io.StringIO())
    for name in ("phase-0-flow_matching", "phase-1-flow_map"):
        file = f"{name}/transformer/diffusion_pytorch_model.safetensors"
        assert (tmp_path / file).read_bytes() == (whole_run / file).read_bytes()


@pytest.mark.parametrize("operation", ["mkdir", "save", "write_json", "sync_directory", "rename", "rmtree"])
def test_a_death_at_any_operation_of_a_save_keeps_a_whole_checkpoint(operation, monkeypatch, tmp_path) -> None:
    def save(step: int) -> None:
        checkpoints.save_checkpoint(tmp_path, step, {"step": step}, {"x": torch.full((3,), float(step))}, keep=1)

    def loaded() -> tuple[int, list[float]]:
        directory, run = checkpoints.latest_checkpoint(tmp_path)
        tensors = {"x": torch.zeros(3)}
        checkpoints.load_tensors(directory, tensors)
        return run["step"], tensors["x"].tolist()

    for step in (1, 2):
        save(step)

    def die(*args, **kwargs):
        raise Killed

    place = {
        "mkdir": (Path, "mkdir"),
        "save": (checkpoints.dcp, "save"),
        "write_json": (checkpoints, "write_json"),
        "sync_directory": (checkpoints, "sync_directory"),
        "rename": (Path, "rename"),
        "rmtree": (checkpoints.shutil, "rmtree"),
    }[operation]
    with monkeypatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises((Killed, CheckpointException)):  # PyTorch wraps what happens in its own renaming
            save(3)
    kept = 3 if operation == "rmtree" else 2
    assert loaded() == (kept, [kept] * 3)
    save(4)
    assert loaded() == (4, [4] * 3)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_finished_run_is_only_exported_again(whole_run, tmp_path) -> None:
    before = metrics(whole_run)
    stream = io.StringIO()
    train(tiny(), whole_run, stream)
    assert "continuing after step 8" in stream.getvalue() and metrics(whole_run) == before


def test_another_config_is_refused_by_name(whole_run) -> None:
    with pytest.raises(ValueError, match=r"another \['batch_size', 'seed'\]|another \['seed', 'batch_size'\]"):
        train(tiny(seed=6, batch_size=2), whole_run, io.StringIO())


def test_a_run_from_before_a_setting_existed_is_continued(tmp_path) -> None:
    """Its config lacks the key; the default stands for it, another value is another config."""
    train(tiny(), tmp_path, io.StringIO())
    path = tmp_path / "checkpoints" / "step-00000008" / checkpoints.RUN
    content = json.loads(path.read_text())
    for phase in content["config"]["phases"]:
        del phase["decay"]
    path.write_text(json.dumps(content))
    train(tiny(), tmp_path, io.StringIO())
    with pytest.raises(ValueError, match=r"another \['phases'\]"):
        train(tiny(phases=[DEMO["phases"][0], DEMO["phases"][1] | {"decay": 2}]), tmp_path, io.StringIO())


def test_old_checkpoints_go_and_the_newest_stay(whole_run) -> None:
    assert [step for step, _ in checkpoints.step_directories(whole_run / "checkpoints")] == [6, 8]


def test_a_checkpoint_of_another_form_is_refused_by_name(tmp_path) -> None:
    (tmp_path / "step-00000001").mkdir()
    with pytest.raises(FileNotFoundError, match=r"checkpoint: no run\.json in .*step-00000001"):
        checkpoints.latest_checkpoint(tmp_path)


def test_a_checkpoint_of_another_network_is_refused(whole_run, tmp_path) -> None:
    """Nothing has been read then."""
    shutil.copytree(whole_run, tmp_path / "run")
    networks = Networks(tiny(), torch.device("cpu"), False)
    phase = TrainingPhase(tiny(), 1, networks, None, torch.device("cpu"), False)
    names = {
        name.removeprefix("student/") for name in checkpoints.tensor_names(tmp_path / "run/checkpoints/step-00000008")
    }
    with pytest.raises(ValueError, match=r"checkpoint: its state differs: \['weights/else'\] \(1 in all\)"):
        phase.trained["student"].expect_state(names | {"weights/else"})


def test_metrics_lose_repeated_steps_and_a_half_line(tmp_path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 0}\n{"step": 1}\n{"step": 2}\n{"st')
    MetricsFile(path, 2).write({"step": 2, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 0},
        {"step": 1},
        {"step": 2, "loss": 0.5},
    ]


def test_progress_tells_the_time_left(monkeypatch) -> None:
    """4 steps in 8 s since the start at step 2: 14 more take 28 s."""
    clock = iter((100.0, 108.0))
    monkeypatch.setattr(time, "perf_counter", lambda: next(clock))
    stream = io.StringIO()
    Progress(2, 20, stream).show(6, {"loss": 0.25})
    assert stream.getvalue() == "step 6/20  loss 0.25  2 s/step  28 s left\n"
    assert (duration(75), duration(7500)) == ("1 min 15 s", "2 h 05 min")
