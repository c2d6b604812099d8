"""Training configs: recipes, wrong keys and values, and the command line."""

from __future__ import annotations

import json

import pytest
import torch

from anyflow_runtime import training
from anyflow_runtime.cli import main
from anyflow_runtime.training.config import (
    EmaSettings,
    OptimiserSettings,
    Phase,
    TrainConfig,
    config_from_dict,
    config_to_dict,
)
from anyflow_runtime.training.demo.demo_model import DemoModel
from anyflow_runtime.training.recipes import RECIPES, load_recipe
from anyflow_runtime.training.trainer.trained_network import TrainedNetwork
from anyflow_runtime.training.trainer.trainer import train

from .trainer_runs import tiny


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_a_config(name) -> None:
    changes = {"model": {"teacher": "a directory"}} if "on-policy" in name else {}
    config = load_recipe(name, changes)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


def test_settings_of_the_objectives_keep_their_keys() -> None:
    """Those of pretraining stand at the top; what a phase decides itself has no key."""
    config = tiny(flow_map={"shift": 3.0}, diffusion_ratio=0.25, on_policy={"student_every": 2})
    assert (config.pretrain.flow_map.shift, config.pretrain.diffusion_ratio) == (3.0, 0.25)
    plain = config_to_dict(config)
    assert plain["flow_map"]["shift"] == 3.0 and plain["far"]["chunk_partition"] == [1, 1, 1]
    assert plain["on_policy"].keys() == {"score", "step_choices", "batch_size", "cotrain", "gan", "student_every"}
    assert plain.keys().isdisjoint({"pretrain", "objective", "input_dtype"})


@pytest.mark.parametrize("kind", ["far", "bidirectional"])
@pytest.mark.parametrize(("size", "iterations", "batch"), [("1.3b", 6000, 32), ("14b", 4000, 16)])
def test_released_hyper_parameters(kind, size, iterations, batch) -> None:
    """Section 5 of the published recipe, on 16 GPUs without accumulation."""
    config = load_recipe(f"{kind}-{size}-pretrain")
    assert config.phases == (Phase("flow_map", iterations, 5e-5, 1000),) and config.global_batch == batch
    assert config.micro_steps(16) == 1 and config.optimiser == OptimiserSettings((0.9, 0.95), 0.0, 1.0)
    assert config.ema == EmaSettings(0.999, 1000) and config.lora is not None and config.lora.rank == 256
    last = load_recipe(f"{kind}-{size}-on-policy", {"model": {"teacher": "a directory"}})
    assert last.phases == (Phase("on_policy", 1200, 2e-6, 0),) and last.optimiser.betas == (0.0, 0.999)
    assert last.ema == EmaSettings(0.99, 200)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": {}}, r"unknown keys \['optimizer'\]"),
        ({"flow_map": {"epsilon_": 1}}, r"unknown keys \['flow_map.epsilon_'\]"),
        ({"phases": [{"objective": "flow_map", "iterations": 1}]}, r"lacks \['phases\[0\].lr'\]"),
        ({"batch_size": "4"}, r"batch_size: got '4', expected int"),
        ({"batch_size": True}, r"batch_size: got True, expected int"),
        ({"optimiser": {"betas": [0.9]}}, r"optimiser.betas: got 1 values, expected 2"),
        ({"pretrain": {}}, r"unknown keys \['pretrain'\]"),
        ({"input_dtype": None}, r"unknown keys \['input_dtype'\]"),
        ({"on_policy": {"shift": 1.0}}, r"unknown keys \['on_policy.shift'\]"),
        ({"precision": "fp8"}, r"precision: got 'fp8'"),
        ({"far": None}, r"far: got None"),
        ({"phases": []}, r"phases: got none"),
        ({"sample_every": 0}, r"sample_every: got 0"),
        ({"phases": [{"objective": "flow_map", "iterations": 1, "lr": 1.0, "decay": -1}]}, r"decay >= 0"),
        ({"data": {"kind": "video"}}, r"data.model: got None for data.kind 'video'"),
        ({"data": {"model": "a directory"}}, r"data.model: got 'a directory' for data.kind 'shapes'"),
        ({"data": {"frames": 0}}, r"data.frames: got 0, expected >= 1"),
        ({"data": {"fps": 0.0}}, r"data.fps: got 0.0, expected > 0"),
        ({"on_policy": {"gan": {"weight": 1.0}}}, r"lacks \['on_policy.gan.blocks'\]"),
        ({"phases": [{"objective": "on_policy", "iterations": 1, "lr": 1.0}]}, r"model.teacher: got None"),
    ],
)
def test_bad_configs_name_the_key(changes, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**changes)


def test_the_learning_rate_rises_stays_and_falls() -> None:
    """Over the first `warmup` steps from 0, over the last `decay` ones towards 0, by equal amounts each."""
    phase = Phase("flow_map", 8, 0.6, warmup=2, decay=2)
    assert [phase.lr_at(i) for i in range(8)] == pytest.approx([0.3, 0.6, 0.6, 0.6, 0.6, 0.6, 0.4, 0.2])
    constant = Phase("flow_map", 3, 0.6)
    assert [constant.lr_at(i) for i in range(3)] == [0.6] * 3


@pytest.mark.parametrize("name", ["cosine", "linear"])
def test_schedules_of_the_library_by_name(name) -> None:
    """The witness is torch's own walk through the schedule; ours asks for any step alone."""
    optimization = pytest.importorskip("diffusers.optimization")
    optimiser = torch.optim.SGD([torch.zeros(1)], lr=0.6)
    schedule = optimization.get_scheduler(name, optimiser, num_warmup_steps=2, num_training_steps=8)
    phase = Phase("flow_map", 8, 0.6, warmup=2, schedule=name)
    for i in range(8):
        assert phase.lr_at(i) == pytest.approx(optimiser.param_groups[0]["lr"])
        optimiser.step()
        schedule.step()


def test_the_optimiser_takes_the_rate_of_the_step() -> None:
    module = torch.nn.Linear(1, 1)
    network = TrainedNetwork({"m": module}, OptimiserSettings(), Phase("flow_map", 4, 0.1, decay=1), None)
    rates = []
    for i in range(4):
        network.backward(module.weight.sum())
        rates.append(network.step(i)["lr"])
        assert network.optimiser.param_groups[0]["lr"] == rates[-1]
    assert rates == pytest.approx([0.1, 0.1, 0.1, 0.05])


def test_the_package_exports_the_trainer() -> None:
    names = {"DemoModel": DemoModel, "TrainConfig": TrainConfig, "load_recipe": load_recipe, "train": train}
    assert {name: getattr(training, name) for name in names} == names and names.keys() <= set(training.__all__)


def test_a_global_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"global_batch: got 10, expected a multiple of batch_size \* processes = 8"):
        tiny(global_batch=10).micro_steps(2)


def test_the_command_shows_configs_and_names_mistakes(tmp_path, capsys) -> None:
    assert main(["train", "demo", "--show", "--set", "seed=3", "--set", "data.frames=5"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["seed"], shown["data"]["frames"], shown["name"]) == (3, 5, "demo")
    (tmp_path / "c.json").write_text('{"recipe": "demo", "ema": {"rate": 1}}')
    assert main(["train", str(tmp_path / "c.json"), "--out", str(tmp_path / "run")]) == 2
    assert "ema.rate" in capsys.readouterr().err
    assert main(["train", "no-such-recipe", "--out", str(tmp_path / "run")]) == 2
    assert "far-14b-on-policy" in capsys.readouterr().err
    assert main(["train", "demo"]) == 2 and "--out" in capsys.readouterr().err
