"""Training in several processes: copies with averaged gradients, and FSDP2."""

from __future__ import annotations

import io
import shutil
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from safetensors.torch import load_file

from anyflow_runtime.training.trainer.checkpoint import step_directories
from anyflow_runtime.training.trainer.trainer import train

from .trainer_runs import metrics, on_policy_config, tiny, write_on_policy_inputs

ON_POLICY = {"on_policy": {"gan": {"blocks": [0], "r1_weight": 1.0}}, "sample_every": 1}


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        for sharding in ("none", "fsdp"):
            train(tiny(global_batch=8, sharding=sharding), Path(directory, sharding), io.StringIO())
        config = on_policy_config(Path(directory), sharding="fsdp", **ON_POLICY)
        train(config, Path(directory, "on-policy-fsdp"), io.StringIO())
    finally:
        dist.destroy_process_group()


def resume(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=2)
    try:
        train(tiny(global_batch=8, sharding="fsdp"), Path(directory, "run"), io.StringIO())
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gloo")
    write_on_policy_inputs(directory)
    mp.spawn(worker, args=(str(directory),), nprocs=2)
    train(tiny(global_batch=8), directory / "one", io.StringIO())
    train(on_policy_config(directory, **ON_POLICY), directory / "on-policy-one", io.StringIO())
    return directory


@pytest.mark.parametrize("sharding", ["none", "fsdp"])
def test_two_processes_train_as_one_with_the_same_global_batch(sharding, two_processes) -> None:
    """Same losses and weights up to the order of fp32 sums: copies with averaged gradients, and FSDP2."""
    one, two = metrics(two_processes / "one"), metrics(two_processes / sharding)
    assert len(one) == len(two) == 8
    for a, b in zip(one, two, strict=True):
        for key in (k for k in a if k.endswith("/loss")):
            assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)
    for name in ("transformer/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        a, b = (load_file(two_processes / run / "model" / name) for run in ("one", sharding))
        for key in a:
            assert torch.allclose(a[key], b[key], rtol=2e-3, atol=2e-4), key


def test_on_policy_distillation_under_fsdp(two_processes) -> None:
    """Several forwards before each backward, forwards without gradient, discriminator heads on a sharded network, and
    samples of the average between the steps."""
    one, two = metrics(two_processes / "on-policy-one"), metrics(two_processes / "on-policy-fsdp")
    for a, b in zip(one, two, strict=True):
        for key in (k for k in a if k.endswith(("/loss", "/total", "/fake_score", "/gan_discriminator"))):
            assert b[key] == pytest.approx(a[key], rel=2e-3), (a["step"], key)
        for key in ("gradient_norm", "fake/gradient_norm"):
            assert b.get(key) == (None if key not in a else pytest.approx(a[key], rel=2e-3))
    file = Path("samples") / "step-00000003.safetensors"
    one_samples, two_samples = (load_file(two_processes / f"on-policy-{run}" / file) for run in ("one", "fsdp"))
    for key in one_samples:
        assert torch.allclose(one_samples[key], two_samples[key], rtol=2e-3, atol=2e-3), key


def test_fsdp_keeps_a_part_of_the_weights_per_process(two_processes) -> None:
    reader = dcp.FileSystemReader(two_processes / "fsdp" / "checkpoints" / "step-00000008")
    found = reader.read_metadata().state_dict_metadata
    sharded, whole = (
        f"student/weights/transformer.blocks.0.{name}" for name in ("ffn.net.2.weight", "scale_shift_table")
    )
    assert [chunk.sizes[0] for chunk in found[sharded].chunks] == [12, 12]
    assert len(found[whole].chunks) == 1


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_on_another_number_of_processes(processes, two_processes, tmp_path) -> None:
    """Stopped after four of eight steps on two sharded processes, or on one, and finished on the other number."""
    stopped = tmp_path / "run"
    if processes == 1:
        shutil.copytree(two_processes / "fsdp", stopped)
    else:
        train(tiny(global_batch=8, sharding="fsdp", keep_checkpoints=9), stopped, io.StringIO())
    for step, directory in step_directories(stopped / "checkpoints"):
        if step > 6:
            shutil.rmtree(directory)
    if processes == 1:
        train(tiny(global_batch=8, sharding="fsdp"), stopped, io.StringIO())
    else:
        mp.spawn(resume, args=(str(tmp_path),), nprocs=2)
    one, again = metrics(two_processes / "one"), metrics(stopped)
    assert [m["step"] for m in again] == list(range(8))
    for a, b in zip(one, again, strict=True):
        for key in (k for k in a if k.endswith("/loss")):
            assert b[key] == pytest.approx(a[key], rel=2e-4), (a["step"], key)
