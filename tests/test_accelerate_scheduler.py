"""The scheduler of an accelerated diffusers pipeline: its own class, config and results, its step in one kernel.

Witness: diffusers 0.42, to the bit.
"""

from __future__ import annotations

import copy
import gc
import pickle
from typing import Any

import pytest
import torch

from anyflow_kernels import Ops, available_backends
from anyflow_runtime import accelerate, restore
from bench.tiny_pipeline import tiny_pipeline

from .launch_counting import LaunchCounter

diffusers = pytest.importorskip("diffusers")
Theirs = diffusers.FlowMapEulerDiscreteScheduler


@pytest.fixture
def pipe() -> Any:
    return tiny_pipeline(heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4)


def pair(pipe: Any, **schedule: Any) -> tuple[Any, Any]:
    """The accelerated pipeline's scheduler and a new one of diffusers with the same config, both set."""
    both = accelerate(pipe).scheduler, Theirs.from_config(pipe.scheduler.config)
    for scheduler in both:
        scheduler.set_timesteps(**schedule)
    return both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("schedule", [{"num_inference_steps": 4}, {"sigmas": [1.0, 0.7, 0.2]}], ids=str)
def test_steps_are_bitwise_those_of_diffusers(schedule, dtype, pipe):
    ours, theirs = pair(pipe, **schedule)
    torch.manual_seed(0)
    x, u = torch.randn(2, 2, 3, 4, 6, 5).to(dtype)
    mine = reference = x
    for t in theirs.timesteps:
        mine, reference = ours.step(u, t, mine, return_dict=False)[0], theirs.step(u, t, reference).prev_sample
        assert mine.dtype == reference.dtype and torch.equal(mine, reference)
        assert ours.step_index == theirs.step_index
    result = ours.step(u, 500.0, x, 123.0)
    assert type(result) is type(theirs.step(u, 500.0, x, 123.0)) and torch.equal(
        result.prev_sample, theirs.step(u, 500.0, x, 123.0).prev_sample
    )


def test_mixed_precision_is_diffusers(pipe):
    ours, theirs = pair(pipe, num_inference_steps=2)
    torch.manual_seed(0)
    x, u = torch.randn(1, 2, 3, 4, 5), torch.randn(1, 2, 3, 4, 5).bfloat16()
    t = theirs.timesteps[0]
    assert torch.equal(ours.step(u, t, x).prev_sample, theirs.step(u, t, x).prev_sample)


def test_the_step_takes_no_passes_of_its_own(pipe, monkeypatch):
    """Everything over the latents is in `flow_map_step`, which is one kernel on a GPU."""
    ours, _ = pair(pipe, num_inference_steps=2)
    x, u = torch.randn(2, 1, 2, 3, 4, 5)
    monkeypatch.setattr(Ops, "flow_map_step", lambda self, x, *_: x)
    sizes: list[int] = []

    class Sizes(LaunchCounter):
        def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            result = super().__torch_dispatch__(func, types, args, kwargs)
            sizes.append(result.numel() if isinstance(result, torch.Tensor) else 0)
            return result

    with Sizes():
        ours.step(u, ours.timesteps[0], x)
    assert max(sizes) < x.numel()


@pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))
def test_latents_on_the_cpu_beside_a_model_on_a_gpu_take_a_step(pipe, monkeypatch):
    """There the model's Triton kernels cannot run. Without a GPU, those of the interpreter were asked for and do."""
    ours, theirs = pair(pipe, num_inference_steps=2)
    pipe.transformer.set_backend("triton")
    x, u = torch.randn(2, 1, 2, 3, 4, 5)
    t = theirs.timesteps[0]
    used: list[str] = []

    def spy(self: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        used.append(self.backend)
        return x

    monkeypatch.setattr(Ops, "flow_map_step", spy)
    for on_gpu in (False, True):
        monkeypatch.setattr(torch.cuda, "is_available", lambda on_gpu=on_gpu: on_gpu)
        ours.step(u, t, x)
    assert used == ["triton", "torch"]


def test_it_stays_the_same_object_and_class(pipe, tmp_path):
    scheduler = pipe.scheduler
    accelerate(accelerate(pipe))
    assert pipe.scheduler is scheduler and isinstance(scheduler, Theirs)
    pipe.save_pretrained(tmp_path)
    assert diffusers.DiffusionPipeline.load_config(tmp_path)["scheduler"] == ["diffusers", Theirs.__name__]
    for copied in (pickle.loads(pickle.dumps(scheduler)), copy.deepcopy(scheduler)):
        assert type(copied) is Theirs and dict(copied.config) == dict(scheduler.config)
    assert scheduler.kernels is pipe.transformer.ops
    accelerate(pipe, backend="reference")
    assert scheduler.kernels is pipe.transformer.ops and scheduler.kernels.backend == "reference"
    pipe.transformer.set_backend("torch")
    assert scheduler.kernels.backend == "torch"
    restore(pipe)
    assert pipe.scheduler is scheduler and type(scheduler) is Theirs and not hasattr(scheduler, "kernels")


def test_the_scheduler_does_not_keep_the_transformer(pipe):
    ours, _ = pair(pipe, num_inference_steps=2)
    pipe.transformer = None
    gc.collect()
    assert ours.kernels is None
    x = torch.ones(1, 1, 2, 3, 4)
    assert ours.step(x, ours.timesteps[0], x).prev_sample.shape == x.shape


def test_other_schedulers_are_left_alone(pipe):
    from anyflow_runtime.schedulers import FlowMapEulerDiscreteScheduler

    for scheduler in (FlowMapEulerDiscreteScheduler(shift=5.0), diffusers.FlowMatchEulerDiscreteScheduler()):
        kind = type(scheduler)
        pipe.scheduler = scheduler
        accelerate(pipe)
        assert type(pipe.scheduler) is kind
        restore(pipe)
        assert type(pipe.scheduler) is kind
