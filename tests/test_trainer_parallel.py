"""Training in several processes: copies with averaged gradients, and FSDP2."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file

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
    parts = [
        torch.load(two_processes / "fsdp" / "checkpoints" / "step-00000008" / f"rank-0000{rank}.pt", weights_only=True)
        for rank in range(2)
    ]
    weights = [part["networks"]["student"]["weights"] for part in parts]
    name = "transformer.blocks.0.ffn.net.2.weight"
    assert [w[name].shape[0] for w in weights] == [12, 12] and not torch.equal(weights[0][name], weights[1][name])
    assert torch.equal(*(w["transformer.blocks.0.scale_shift_table"] for w in weights))
