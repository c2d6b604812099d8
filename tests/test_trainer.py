"""The trainer: resuming to the bit, kills, several processes, data sources, configs. Models are tiny."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from PIL import Image
from safetensors.torch import load_file, save_file

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.cli import main
from anyflow_runtime.training import GlobalBatch
from anyflow_runtime.training import trainer_checkpoint as checkpoints
from anyflow_runtime.training.data import EpochOrder, ShapesSource, open_source
from anyflow_runtime.training.data_files import SafetensorsSource, TarSource
from anyflow_runtime.training.demo_model import DemoModel, DemoTextEncoder
from anyflow_runtime.training.recipes import RECIPES, load_recipe
from anyflow_runtime.training.recipes_config import (
    DataSettings,
    EmaSettings,
    ModelSettings,
    OptimiserSettings,
    Phase,
    config_from_dict,
    config_to_dict,
    merged,
)
from anyflow_runtime.training.trainer import train
from anyflow_runtime.training.trainer_log import MetricsFile, Progress, duration
from anyflow_runtime.training.trainer_models import Networks
from anyflow_runtime.training.trainer_network import TrainedNetwork
from anyflow_runtime.training.trainer_phase import NonFiniteLoss, TrainingPhase

TINY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 1,
    "full_chunk_limit": 2,
    "chunk_partition": [1, 1, 1],
}
DEMO = {
    "name": "tiny",
    "seed": 5,
    "model": {"kind": "demo", "config": TINY},
    "data": {"kind": "shapes", "frames": 3, "height": 8, "width": 8},
    "far": {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2, "bidirectional_probability": 0.5},
    "flow_map": {"guidance": None, "shift": 2.0},
    "phases": [
        {"objective": "flow_matching", "iterations": 4, "lr": 0.002, "warmup": 2},
        {"objective": "flow_map", "iterations": 4, "lr": 0.001},
    ],
    "ema": {"decay": 0.9, "warmup": 1},
    "batch_size": 4,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 2,
}
FAR = {
    "model": {"kind": "far", "config": TINY | {"patch_size": [1, 2, 2], "compressed_patch_size": [1, 4, 4]}},
    "far": {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2, "bidirectional_probability": 0.5},
    "phases": [{"objective": "flow_map", "iterations": 2, "lr": 0.001}],
    "ema": {"decay": 0.9, "warmup": 0},
    "batch_size": 2,
    "precision": "fp32",
    "log_every": 1,
}


class Killed(BaseException):
    """Stands for a death of the process: nothing catches it."""


def tiny(base: dict = DEMO, **changes):
    return config_from_dict(merged(base, changes))


def checkpoint(out: Path, step: int) -> dict:
    return torch.load(out / "checkpoints" / f"step-{step:08}" / "rank-00000.pt", weights_only=True)


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """An uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    train(tiny(), out, io.StringIO())
    return out


def write_shards(directory: Path, counts=(3, 2), frames: int = 3, dim: int = 8) -> None:
    generator = torch.Generator().manual_seed(1)
    for i, count in enumerate(counts):
        latents = torch.randn(count, frames, 3, 8, 8, generator=generator)
        text = torch.randn(count, 5, dim, generator=generator)
        save_file({"latents": latents, "prompt_embeds": text}, directory / f"{i:03}.safetensors")
    save_file({"prompt_embeds": torch.randn(5, dim, generator=generator)}, directory / "negative.safetensors")


def write_tar(directory: Path, shards: Path, drop: str | None = None) -> None:
    """The samples of shards as one tar."""
    index = 0
    with tarfile.open(directory / "000.tar", "w") as tar:
        for file in sorted(shards.glob("[0-9]*.safetensors")):
            tensors = load_file(file)
            for row in range(len(tensors["latents"])):
                for part in ("latents", "prompt_embeds"):
                    name = f"{index:04}.{part}.npy"
                    if name == drop:
                        continue
                    buffer = io.BytesIO()
                    np.save(buffer, tensors[part][row].numpy())
                    info = tarfile.TarInfo(name)
                    info.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(info, buffer)
                index += 1
    save_file(load_file(shards / "negative.safetensors"), directory / "negative.safetensors")


def write_on_policy_inputs(directory: Path) -> None:
    """Shards, a FAR student, and a bidirectional teacher."""
    write_shards(directory)
    config = FAR["model"]["config"]
    far_only = ("full_chunk_limit", "chunk_partition", "compressed_patch_size")
    torch.manual_seed(0)
    AnyFlowFARTransformer3DModel.from_config(config).save_pretrained(directory / "student")
    plain = {key: value for key, value in config.items() if key not in far_only}
    AnyFlowTransformer3DModel.from_config(plain).save_pretrained(directory / "teacher")


def on_policy_config(directory: Path, **changes):
    config = tiny(
        FAR,
        data={"path": str(directory)},
        phases=[{"objective": "on_policy", "iterations": 3, "lr": 0.001}],
        on_policy={"step_choices": [2, 4], "student_every": 2},
        model={"path": str(directory / "student"), "teacher": str(directory / "teacher")},
        global_batch=4,
        checkpoint_every=1,
        keep_checkpoints=5,
        **changes,
    )
    return replace(config, model=replace(config.model, config={}))


# Resuming


def test_a_killed_run_continues_to_the_same_bits(whole, tmp_path) -> None:
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
    assert_same_bits(checkpoint(out, 8), checkpoint(whole, 8))
    assert metrics(out) == metrics(whole)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder.safetensors"):
        assert (out / "model" / name).read_bytes() == (whole / "model" / name).read_bytes()


@pytest.mark.parametrize("stop", [1, 3, 4, 7])
def test_a_run_stopped_at_any_step_continues_to_the_same_bits(stop, whole, monkeypatch, tmp_path) -> None:
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
    assert_same_bits(checkpoint(tmp_path, 8), checkpoint(whole, 8))
    assert metrics(tmp_path) == metrics(whole)


def test_a_model_that_a_killed_run_did_not_write_is_written_later(whole, monkeypatch, tmp_path) -> None:
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
        assert (tmp_path / file).read_bytes() == (whole / file).read_bytes()


@pytest.mark.parametrize("operation", ["mkdir", "save", "fsync", "sync_directory", "rename", "rmtree"])
def test_a_death_at_any_operation_of_a_save_keeps_a_whole_checkpoint(operation, monkeypatch, tmp_path) -> None:
    for step in (1, 2):
        checkpoints.save_checkpoint(tmp_path, step, {"step": step}, keep=1)

    def die(*args, **kwargs):
        raise Killed

    place = {
        "mkdir": (Path, "mkdir"),
        "save": (torch, "save"),
        "fsync": (os, "fsync"),
        "sync_directory": (checkpoints, "sync_directory"),
        "rename": (Path, "rename"),
        "rmtree": (checkpoints.shutil, "rmtree"),
    }[operation]
    with monkeypatch.context() as patch:
        patch.setattr(*place, die)
        with pytest.raises(Killed):
            checkpoints.save_checkpoint(tmp_path, 3, {"step": 3}, keep=1)
    loaded = checkpoints.load_checkpoint(tmp_path)
    assert loaded == {"step": 3 if operation == "rmtree" else 2}
    checkpoints.save_checkpoint(tmp_path, 4, {"step": 4}, keep=1)
    assert checkpoints.load_checkpoint(tmp_path) == {"step": 4}
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_finished_run_is_only_exported_again(whole, tmp_path) -> None:
    before = metrics(whole)
    stream = io.StringIO()
    train(tiny(), whole, stream)
    assert "continuing after step 8" in stream.getvalue() and metrics(whole) == before


def test_another_config_is_refused_by_name(whole) -> None:
    with pytest.raises(ValueError, match=r"another \['batch_size', 'seed'\]|another \['seed', 'batch_size'\]"):
        train(tiny(seed=6, batch_size=2), whole, io.StringIO())


def test_old_checkpoints_go_and_the_newest_stay(whole) -> None:
    assert [step for step, _ in checkpoints.step_directories(whole / "checkpoints")] == [6, 8]


def test_a_checkpoint_of_other_processes_is_refused(tmp_path) -> None:
    checkpoints.save_checkpoint(tmp_path, 1, {}, keep=1)
    (tmp_path / "step-00000001" / "rank-00001.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="written by 2 processes"):
        checkpoints.load_checkpoint(tmp_path)


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


# What a run does


def test_the_text_encoder_learns_in_the_first_phase_only(whole) -> None:
    first, last = (load_file(whole / name / "text_encoder.safetensors") for name in ("phase-0-flow_matching", "model"))
    torch.manual_seed(5)
    AnyFlowFARTransformer3DModel(**TINY)
    fresh = DemoTextEncoder(8).state_dict()
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


def test_the_exported_model_is_the_average_and_generates(whole) -> None:
    state = checkpoint(whole, 8)["networks"]["student"]
    model = DemoModel.load(whole / "model")
    own = dict(model.named_parameters())
    for name, value in state["average"].items():
        assert torch.equal(own[name], value)
    assert not torch.equal(
        state["average"]["transformer.proj_out.weight"], state["weights"]["transformer.proj_out.weight"]
    )
    videos = model.generate(["a red circle moves left over black"] * 2, steps=2, size=8)
    assert videos.shape == (2, 3, 3, 8, 8) and videos.isfinite().all()


def test_samples_and_loss_curves_are_drawn(tmp_path) -> None:
    phases = [{"objective": "flow_matching", "iterations": 2, "lr": 0.002}]
    train(tiny(phases=phases, sample_every=2, plot=True), tmp_path, io.StringIO())
    with Image.open(tmp_path / "samples" / "step-00000002.gif") as video:
        assert video.n_frames == 3 and video.size == (4 * 8 * 4, 6 * 8 * 4)
    with Image.open(tmp_path / "loss.png") as plot:
        assert plot.size == (960, 540)


def test_a_second_phase_starts_from_the_average(tmp_path, whole) -> None:
    """A rate too small to move anything leaves the average of phase 0 in the weights of phase 1."""
    phases = [DEMO["phases"][0], {"objective": "flow_map", "iterations": 1, "lr": 1e-30}]
    train(tiny(phases=phases), tmp_path, io.StringIO())
    average = checkpoint(tmp_path, 4)["networks"]["student"]["average"]
    weights = checkpoint(tmp_path, 5)["networks"]["student"]["weights"]
    assert all(torch.equal(weights[name], average[name]) for name in weights)


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
        return replace(samples, latents=samples.latents * float("nan")) if draw == 3 else samples

    monkeypatch.setattr(ShapesSource, "samples", poisoned)
    with pytest.raises(NonFiniteLoss, match=r"step 3, batch 3: loss 'flow_matching' is nan.*moves.*step-00000002"):
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


# Several processes


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        for sharding in ("none", "fsdp"):
            train(tiny(global_batch=8, sharding=sharding), Path(directory, sharding), io.StringIO())
        train(on_policy_config(Path(directory), sharding="fsdp"), Path(directory, "on-policy-fsdp"), io.StringIO())
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gloo")
    write_on_policy_inputs(directory)
    mp.spawn(worker, args=(str(directory),), nprocs=2)
    train(tiny(global_batch=8), directory / "one", io.StringIO())
    train(on_policy_config(directory), directory / "on-policy-one", io.StringIO())
    return directory


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_as_one_with_the_same_global_batch(sharding, two_processes) -> None:
    """Same losses and weights up to the order of fp32 sums: copies with averaged gradients, and FSDP2."""
    one, two = metrics(two_processes / "one"), metrics(two_processes / sharding)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for key in (k for k in a if k.endswith("/loss")):
            assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder.safetensors"):
        a, b = (load_file(two_processes / run / "model" / name) for run in ("one", sharding))
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=2e-3, atol=2e-4), key


def test_on_policy_distillation_under_fsdp(two_processes) -> None:
    """Several forwards before each backward, and forwards without gradient, through sharded networks."""
    one, two = metrics(two_processes / "on-policy-one"), metrics(two_processes / "on-policy-fsdp")
    for a, b in zip(one, two, strict=True):
        for key in (k for k in a if k.endswith(("/loss", "/total", "/fake_score"))):
            assert b[key] == pytest.approx(a[key], rel=2e-3), (a["step"], key)
        for key in ("gradient_norm", "fake/gradient_norm"):
            assert b.get(key) == (None if key not in a else pytest.approx(a[key], rel=2e-3))


def test_fsdp_keeps_a_part_of_the_weights_per_process(two_processes) -> None:
    parts = [
        torch.load(two_processes / "fsdp" / "checkpoints" / "step-00000008" / f"rank-0000{rank}.pt", weights_only=True)
        for rank in range(2)
    ]
    weights = [part["networks"]["student"]["weights"] for part in parts]
    name = "transformer.blocks.0.ffn.net.2.weight"
    assert [w[name].shape[0] for w in weights] == [12, 12] and not torch.equal(weights[0][name], weights[1][name])
    assert torch.equal(*(w["transformer.blocks.0.scale_shift_table"] for w in weights))


# Data


def test_an_epoch_holds_every_sample_once_in_a_new_order() -> None:
    order = EpochOrder(7, seed=1)
    epochs = [[order[7 * e + i] for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["safetensors", "tar", "shapes"])
def test_processes_share_out_the_samples_of_one(kind, tmp_path) -> None:
    """Micro-steps of one process and ranks of several take the same samples in the same places."""
    write_shards(tmp_path)
    write_tar(tmp_path, tmp_path)
    source = open_source(DataSettings(kind=kind, path=str(tmp_path), frames=3, height=8, width=8), seed=2)
    alone = source.samples(4, GlobalBatch(4))
    parts = [source.samples(4, GlobalBatch(2, rank, 2)) for rank in range(2)]
    parts_accumulated = [source.samples(4, GlobalBatch(2, 0, 1, micro, 2)) for micro in range(2)]
    for split in (parts, parts_accumulated):
        assert sum((p.names for p in split), ()) == alone.names
        assert torch.equal(torch.cat([p.latents for p in split]), alone.latents)


def test_tars_and_shards_give_the_same_samples(tmp_path) -> None:
    write_shards(tmp_path)
    write_tar(tmp_path, tmp_path)
    a, b = (kind(tmp_path, seed=0).samples(0, GlobalBatch(5)) for kind in (SafetensorsSource, TarSource))
    assert a.text is not None and b.text is not None
    assert torch.equal(a.latents, b.latents) and torch.equal(a.text, b.text)


def test_a_tar_sample_without_caption_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    write_tar(tmp_path, tmp_path, drop="0002.prompt_embeds.npy")
    with pytest.raises(
        ValueError, match=r"000.tar: sample '0002' lacks \['0002.prompt_embeds.npy'\] \(missing caption\)"
    ):
        TarSource(tmp_path, 0)


def test_a_shard_without_captions_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    save_file({"latents": torch.zeros(1, 3, 3, 8, 8)}, tmp_path / "002.safetensors")
    with pytest.raises(ValueError, match=r"002.safetensors: has \['latents'\], lacks.*missing captions"):
        SafetensorsSource(tmp_path, 0)


@pytest.mark.parametrize(
    ("latents", "text", "message"),
    [
        ((1, 4, 3, 8, 8), (1, 5, 8), r"001.*got latents \(4, 3, 8, 8\), expected \(3, 3, 8, 8\)"),
        ((1, 3, 3, 8, 8), (1, 5, 9), r"001.*got prompt_embeds \(5, 9\), expected \(5, 8\)"),
        ((2, 3, 3, 8, 8), (1, 5, 8), r"001.*got \[2\] latents with \[1\] prompt_embeds"),
        ((1, 3, 8, 8), (1, 5, 8), r"001.*expected \(F, C, H, W\) and \(S, D\)"),
    ],
)
def test_mismatched_shards_are_named(latents, text, message, tmp_path) -> None:
    write_shards(tmp_path, counts=(2,))
    save_file({"latents": torch.zeros(latents), "prompt_embeds": torch.zeros(text)}, tmp_path / "001.safetensors")
    with pytest.raises(ValueError, match=message):
        SafetensorsSource(tmp_path, 0)


def test_a_missing_negative_prompt_or_directory_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    (tmp_path / "negative.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"negative\.safetensors"):
        SafetensorsSource(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="no directory"):
        TarSource(tmp_path / "absent", 0)
    with pytest.raises(ValueError, match=r"data.path: got None"):
        open_source(DataSettings(kind="tar"), 0)


# Configs


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_every_recipe_is_a_config(name) -> None:
    changes = {"model": {"teacher": "a directory"}} if "on-policy" in name else {}
    config = load_recipe(name, changes)
    assert config_from_dict(json.loads(json.dumps(config_to_dict(config)))) == config


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
        ({"precision": "fp8"}, r"precision: got 'fp8'"),
        ({"far": None}, r"far: got None"),
        ({"phases": []}, r"phases: got none"),
        ({"sample_every": 0}, r"sample_every: got 0"),
        ({"phases": [{"objective": "on_policy", "iterations": 1, "lr": 1.0}]}, r"model.teacher: got None"),
    ],
)
def test_bad_configs_name_the_key(changes, message) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        tiny(**changes)


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
