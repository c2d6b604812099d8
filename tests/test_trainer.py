"""What a training run does, and the stages of the large recipes. Models are tiny."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.training.config import EmaSettings, ModelSettings, OptimiserSettings, Phase
from anyflow_runtime.training.data.open import ShapesSource
from anyflow_runtime.training.demo.demo_model import DemoModel, demo_text_encoder
from anyflow_runtime.training.trainer.phase import NonFiniteLoss
from anyflow_runtime.training.trainer.trained_network import TrainedNetwork
from anyflow_runtime.training.trainer.trainer import train

from .trainer_runs import (
    DEMO,
    FAR,
    TINY,
    checkpoint,
    metrics,
    on_policy_config,
    tiny,
    write_on_policy_inputs,
    write_shards,
)


def test_the_text_encoder_learns_in_the_first_phase_only(whole_run) -> None:
    first, last = (
        load_file(whole_run / name / "text_encoder/model.safetensors") for name in ("phase-0-flow_matching", "model")
    )
    torch.manual_seed(5)
    AnyFlowFARTransformer3DModel(**TINY)
    fresh = demo_text_encoder(8).state_dict()
    assert not torch.equal(first["words.weight"], fresh["words.weight"])
    assert all(torch.equal(first[key], last[key]) for key in first)


def test_the_text_encoder_gets_the_gradient_of_every_loss(tmp_path) -> None:
    """With and without the second loss of a step the encoder moves differently, so both losses reach it."""
    moved = []
    for probability in (0.0, 1.0):
        phases = [{"objective": "flow_matching", "iterations": 2, "lr": 0.002}]
        config = tiny(phases=phases, far={"bidirectional_probability": probability})
        train(config, tmp_path / str(probability), io.StringIO())
        moved.append(checkpoint(tmp_path / str(probability), 2)["networks"]["student"]["optimiser"])
    gradients = [m["text_encoder.words.weight"]["exp_avg"] for m in moved]
    assert gradients[0].norm() > 0 and gradients[1].norm() > 0
    assert not torch.allclose(gradients[0], gradients[1], rtol=1e-3)


def test_the_exported_model_is_the_average_and_generates(whole_run) -> None:
    state = checkpoint(whole_run, 8)["networks"]["student"]
    model = DemoModel.load(whole_run / "model")
    own = dict(model.named_parameters())
    for name, value in state["average"].items():
        assert torch.equal(own[name], value)
    assert not torch.equal(
        state["average"]["transformer.proj_out.weight"], state["weights"]["transformer.proj_out.weight"]
    )
    videos = model.generate(["a red circle moves left over black"] * 2, steps=2, size=8)
    assert videos.shape == (2, 3, 3, 8, 8) and videos.isfinite().all()


def test_a_second_phase_starts_from_the_average(tmp_path, whole_run) -> None:
    """A rate too small to move anything leaves the average of phase 0 in the weights of phase 1."""
    phases = [DEMO["phases"][0], {"objective": "flow_map", "iterations": 1, "lr": 1e-30}]
    train(tiny(phases=phases), tmp_path, io.StringIO())
    average = checkpoint(tmp_path, 4)["networks"]["student"]["average"]
    weights = checkpoint(tmp_path, 5)["networks"]["student"]["weights"]
    assert all(torch.equal(weights[name], average[name]) for name in weights)


def test_metrics_go_to_the_trackers_by_name(monkeypatch, tmp_path) -> None:
    """A stand-in for a tracker of accelerate: what it is told is what the metrics file holds."""
    tracking = pytest.importorskip("accelerate.tracking")
    told: list = []

    class Told:
        requires_logging_directory = True

        def __init__(self, run, directory):
            told.append((run, directory))

        def start(self):
            told.append("start")

        def store_init_configuration(self, values):
            told.append(values)

        def log(self, values, step):
            told.append((step, values))

        def finish(self):
            told.append("finish")

    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "told", Told)
    train(tiny(trackers=["told"]), tmp_path, io.StringIO())
    run, start, config, *logged, finish = told
    assert run == ("tiny", tmp_path / "trackers") and (start, finish) == ("start", "finish")
    assert config["model.kind"] == "demo" and config["batch_size"] == 4
    written = [{key: value for key, value in m.items() if key not in ("step", "phase")} for m in metrics(tmp_path)]
    assert logged == list(enumerate(written))
    with pytest.raises(ValueError, match=r"trackers: got 'nobody', expected some of .*tensorboard.*wandb"):
        train(tiny(trackers=["nobody"]), tmp_path / "other", io.StringIO())


def test_the_loss_falls(tmp_path) -> None:
    phases = [{"objective": "flow_matching", "iterations": 80, "lr": 0.01}]
    far = {"bidirectional_probability": 0.0, "long_context_ratio": 0.0}
    train(tiny(phases=phases, far=far, batch_size=16, checkpoint_every=1000), tmp_path, io.StringIO())
    losses = [row["flow_matching/loss"] for row in metrics(tmp_path)]
    assert sum(losses[-20:]) < 0.75 * sum(losses[:20])


def test_a_nan_stops_the_run_and_keeps_the_last_checkpoint(monkeypatch, tmp_path) -> None:
    original = ShapesSource.samples

    def poisoned(self, draw, position):
        samples = original(self, draw, position)
        if draw == 3:
            samples.latents[1] = float("nan")
        return samples

    monkeypatch.setattr(ShapesSource, "samples", poisoned)
    message = r"step 3, batch 3: loss 'flow_matching' is nan; samples that are not finite: shapes\[3, 1\] '[^']*moves"
    message += r"[^']*'; the last checkpoint is .*step-00000002"
    with pytest.raises(NonFiniteLoss, match=message):
        train(tiny(), tmp_path, io.StringIO())
    assert checkpoint(tmp_path, 2)["step"] == 2


def test_an_infinite_gradient_changes_no_weight() -> None:
    module = torch.nn.Linear(2, 1)
    before = module.weight.clone()
    network = TrainedNetwork({"m": module}, OptimiserSettings(), Phase("flow_map", 1, 0.1), EmaSettings())
    module.weight.grad = torch.full_like(before, float("inf"))
    with pytest.raises(FloatingPointError, match="norm is inf"):
        network.step(0)
    assert torch.equal(module.weight, before)


def test_bf16_weights_collect_updates_too_small_for_them() -> None:
    """100 updates of 1e-5 at 1.0, where bf16 steps by 4e-3 downwards: only an fp32 master adds them up."""
    module = torch.nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    torch.nn.init.ones_(module.weight)
    settings = OptimiserSettings(betas=(0.0, 0.999), clip=None)
    network = TrainedNetwork({"m": module}, settings, Phase("flow_map", 100, 1e-5), EmaSettings(0.5, 0))
    for i in range(100):
        network.backward(module.weight.float().sum())
        network.step(i)
    assert network.masters["m.weight"].item() == pytest.approx(1 - 1e-3, abs=1e-5)
    assert network.average is not None and network.average.shadow["m.weight"].dtype == torch.float32


def test_clipping_scales_all_gradients_together() -> None:
    module = torch.nn.Linear(1, 1)
    network = TrainedNetwork({"m": module}, OptimiserSettings(clip=1.0), Phase("flow_map", 1, 0.1), None)
    module.weight.grad, module.bias.grad = torch.tensor([[30.0]]), torch.tensor([40.0])
    seen = {}
    network.optimiser.register_step_pre_hook(
        lambda *_: seen.update(w=module.weight.grad.item(), b=module.bias.grad.item())
    )
    assert network.step(0)["gradient_norm"] == pytest.approx(50.0)
    assert seen == pytest.approx({"w": 0.6, "b": 0.8})


# The large recipes, small


def test_lora_training_from_a_base_model(tmp_path) -> None:
    """A Wan directory lacks the delta embedder and the compressed patch embedding; bf16; the export is merged."""
    write_shards(tmp_path)
    config = {k: v for k, v in FAR["model"]["config"].items() if k not in ("full_chunk_limit", "chunk_partition")}
    config.pop("compressed_patch_size")
    base = AnyFlowTransformer3DModel(**config)
    state = {k: v for k, v in base.state_dict().items() if "delta_embedder" not in k}
    directory = tmp_path / "base" / "transformer"
    directory.mkdir(parents=True)
    save_file(state, directory / "diffusion_pytorch_model.safetensors")
    (directory / "config.json").write_text(json.dumps({"_class_name": "WanTransformer3DModel", **config}))
    run = tiny(
        FAR,
        data={"path": str(tmp_path)},
        lora={"rank": 2, "alpha": 2.0},
        precision="bf16",
        phases=[{"objective": "flow_map", "iterations": 2, "lr": 0.01}],
    )
    model = ModelSettings("far", str(tmp_path / "base"), None, {"full_chunk_limit": 2}, gradient_checkpointing=True)
    run = replace(run, model=model)
    train(run, tmp_path / "run", io.StringIO())
    merged_model = AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / "run" / "model" / "transformer")
    adapters = load_file(tmp_path / "run" / "model" / "lora.safetensors")
    assert any("to_q.lora_B" in name for name in adapters) and any("delta_embedder" in name for name in adapters)
    assert torch.equal(merged_model.proj_out.weight, base.proj_out.weight.bfloat16())
    assert not torch.equal(merged_model.blocks[0].attn1.to_q.weight, base.blocks[0].attn1.to_q.weight.bfloat16())
    trained = checkpoint(tmp_path / "run", 2)["networks"]["student"]
    assert {value.dtype for value in trained["weights"].values()} == {torch.float32} and not trained["frozen"]


def test_on_policy_stage(tmp_path) -> None:
    """Student and fake score move, each with its own optimiser; the teacher is a bidirectional model."""
    write_on_policy_inputs(tmp_path)
    train(on_policy_config(tmp_path), tmp_path / "run", io.StringIO())
    rows = metrics(tmp_path / "run")
    assert ["distribution_matching/total" in row for row in rows] == [True, False, True]
    assert all("fake/fake_score/fake_score" in row for row in rows) and "flow_map/loss" in rows[0]
    networks = [checkpoint(tmp_path / "run", step)["networks"] for step in (1, 2)]
    student, fake = ([n[name]["weights"] for n in networks] for name in ("student", "fake"))
    assert all(torch.equal(student[0][k], student[1][k]) for k in student[0])
    assert any(not torch.equal(fake[0][k], fake[1][k]) for k in fake[0])


def test_discriminator_heads_learn_with_the_fake_score(tmp_path) -> None:
    """The term is off unless asked for; with it the heads move, and the student's loss holds its share."""
    write_on_policy_inputs(tmp_path)
    runs = {"off": None, "on": {"blocks": [0, -1], "weight": 0.5, "r1_weight": 1.0}}
    for name, gan in runs.items():
        train(on_policy_config(tmp_path, on_policy={"gan": gan}), tmp_path / name, io.StringIO())
    off, on = (metrics(tmp_path / name) for name in runs)
    assert not any("gan" in key for row in off for key in row)
    assert all({"fake/discriminator/gan_discriminator", "fake/discriminator/r1"} <= row.keys() for row in on)
    first = {key.removeprefix("distribution_matching/"): value for key, value in on[0].items()}
    assert first["total"] == pytest.approx(first["vsd"] + 0.5 * first["gan_generator"])
    assert first["vsd"] == pytest.approx(off[0]["distribution_matching/vsd"])
    before, after = (checkpoint(tmp_path / "on", step)["networks"]["fake"]["weights"] for step in (1, 3))
    heads = [name for name in before if name.startswith("heads.")]
    assert len(heads) == 12 and not any(torch.equal(before[name], after[name]) for name in heads)
    assert not any(name.startswith("heads.") for name in checkpoint(tmp_path / "off", 3)["networks"]["fake"]["weights"])


def test_discriminator_blocks_that_are_not_there_are_refused(tmp_path) -> None:
    write_on_policy_inputs(tmp_path)
    with pytest.raises(ValueError, match=r"blocks: got \(3,\), expected indices of the 1 blocks"):
        train(on_policy_config(tmp_path, on_policy={"gan": {"blocks": [3]}}), tmp_path / "run", io.StringIO())


def test_base_weights_that_do_not_fit_are_named(tmp_path) -> None:
    model = AnyFlowTransformer3DModel(num_attention_heads=1, attention_head_dim=12, num_layers=1, ffn_dim=8, text_dim=4)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("proj_out")}
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    (tmp_path / "config.json").write_text(
        json.dumps({"_class_name": "WanTransformer3DModel", **model.config}, default=list)
    )
    (tmp_path / "data").mkdir()
    write_shards(tmp_path / "data")
    run = tiny(FAR, data={"path": str(tmp_path / "data")})
    run = replace(run, model=replace(run.model, path=str(tmp_path), config={"full_chunk_limit": 2}))
    with pytest.raises(ValueError, match=r"missing \['proj_out.bias', 'proj_out.weight'\]"):
        train(run, tmp_path / "run", io.StringIO())
