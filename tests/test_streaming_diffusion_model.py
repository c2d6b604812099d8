"""Seeds, order of draws, noise shapes and context noise of the diffusion model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime.schedulers import (
    FlowMapEulerSchedulerConfig,
    FlowMatchSchedulerConfig,
    FlowMatchUniPCSchedulerConfig,
)
from anyflow_runtime.schedulers.base import ScheduleError
from anyflow_runtime.streaming import DiffusionModel, DiffusionModelConfig

from .streaming_toys import CHANNELS, FRAMES, SIDE, ToyCache, ToyTransformer, ToyTransformerConfig

VIDEO = (1, FRAMES, CHANNELS, SIDE, SIDE)
FLOW_MATCH = FlowMatchSchedulerConfig(num_inference_steps=3, denoising_timesteps=(1000, 600, 300))


def toy_model(scheduler: Any = None, **config: Any) -> DiffusionModel:
    return DiffusionModelConfig(
        transformer=ToyTransformerConfig(), scheduler=scheduler or FlowMapEulerSchedulerConfig(), **config
    ).setup()


def chunks(model: DiffusionModel, count: int = 2) -> list[Tensor]:
    cache = model.transformer.initialize_autoregressive_cache()
    outputs = []
    for i in range(count):
        output, state = model.generate(i, cache)
        model.finalize(state)
        outputs.append(output)
    return outputs


def test_without_a_seed_the_global_generator_is_used():
    model = toy_model()
    assert model.rng is None
    torch.manual_seed(5)
    first = chunks(model)
    torch.manual_seed(5)
    torch.testing.assert_close(chunks(model), first, rtol=0, atol=0)


def test_seed_does_not_touch_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    chunks(toy_model(seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_second_rollout_continues_the_stream_and_reset_restarts_it():
    model = toy_model(seed=1)
    first, second = chunks(model), chunks(model)
    assert not torch.equal(first[0], second[0])
    model.reset_rng()
    torch.testing.assert_close(chunks(model), first, rtol=0, atol=0)
    model.reset_rng(seed=2)
    other = chunks(model)
    assert not torch.equal(other[0], first[0])
    model.reset_rng()
    torch.testing.assert_close(chunks(model), other, rtol=0, atol=0)


def test_generator_is_lazy_and_lives_on_the_device_of_the_parameters():
    model = toy_model(seed=1)
    assert model._rng is None and model.rng is model.rng and model.rng.device == model.transformer.device


@pytest.mark.gpu
def test_generator_is_rebuilt_when_the_device_changes():
    model = toy_model(seed=1)
    on_cpu = model.rng
    model.cuda()
    assert model.rng.device.type == "cuda" and model.rng is model.rng
    model.cpu()
    assert model.rng is not on_cpu and model.rng.initial_seed() == 1


def test_draws_are_initial_noise_then_one_per_later_step_then_one_at_finalize(monkeypatch):
    """Another implementation with the same generator and this order makes the same video."""
    model = toy_model(scheduler=FLOW_MATCH, seed=7, context_noise=200)
    rng = torch.Generator().manual_seed(7)
    shape = model.transformer.latent_shape
    draws = [torch.randn(shape, generator=rng)] + [torch.empty(shape).normal_(generator=rng) for _ in range(6)]
    seen: list[Tensor] = []
    sample, add_noise = model.scheduler.sample, model.scheduler.add_noise
    normal = Tensor.normal_

    def recorded(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = normal(self, *args, **kwargs)
        seen.append(result.clone())
        return result

    def first(noise: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(noise.clone())
        return sample(noise, *args, **kwargs)

    monkeypatch.setattr(Tensor, "normal_", recorded)
    monkeypatch.setattr(model.scheduler, "sample", first)
    kinds: list[str] = []
    monkeypatch.setattr(model.scheduler, "add_noise", lambda *a, **k: (kinds.append("context"), add_noise(*a, **k))[1])
    cache = model.transformer.initialize_autoregressive_cache()
    _, state = model.generate(0, cache)
    assert len(seen) == 3 and not kinds
    model.finalize(state)
    assert len(seen) == 4 and kinds == ["context"]
    model.generate(1, cache)
    torch.testing.assert_close(seen, draws, rtol=0, atol=0)


def test_clean_context_draws_nothing_and_sees_the_clean_latent_at_zero():
    model = toy_model(seed=1)
    cache = model.transformer.initialize_autoregressive_cache()
    _, state = model.generate(0, cache)
    before = model.rng.get_state()
    received: list[tuple[Tensor, Tensor]] = []
    model.transformer.finalize_kv_cache = lambda x, t, cache, input: received.append((x, t))  # type: ignore[method-assign]
    model.finalize(state)
    assert torch.equal(model.rng.get_state(), before)
    assert torch.equal(received[0][0], state.clean_latent) and received[0][1] == 0


@pytest.mark.parametrize("value", [750, 999])
def test_context_timestep_is_not_rounded_to_bf16(value):
    """bf16 would make 1000 of 999 and 752 of 750."""
    model = toy_model(context_noise=value).to(torch.bfloat16)
    cache = model.transformer.initialize_autoregressive_cache()
    _, state = model.generate(0, cache)
    model.finalize(state)
    assert model.transformer.timesteps[-1].dtype == torch.float32
    assert float(model.transformer.timesteps[-1]) == value


def test_context_noise_is_added_by_the_scheduler():
    model = toy_model(seed=3, context_noise=400)
    cache = model.transformer.initialize_autoregressive_cache()
    _, state = model.generate(0, cache)
    eps = torch.empty_like(state.clean_latent).normal_(generator=_copy(model.rng))
    received: list[Tensor] = []
    predict = model.transformer.predict_flow
    model.transformer.predict_flow = lambda x, t, cache, input: (received.append(x), predict(x, t, cache, input))[1]  # type: ignore[method-assign]
    model.finalize(state)
    torch.testing.assert_close(received[0], 0.6 * state.clean_latent + 0.4 * eps)


def test_noise_in_unpatchified_shape_is_drawn_and_scheduled_there():
    patchified, video = toy_model(seed=1), toy_model(seed=1, noise_in_unpatchified_shape=True)
    noise = torch.randn(VIDEO, generator=torch.Generator().manual_seed(1))
    cache = video.transformer.initialize_autoregressive_cache()
    output, state = video.generate(0, cache)
    assert state.clean_latent.shape == video.transformer.latent_shape and output.shape == VIDEO
    expected, _ = patchified.generate(0, patchified.transformer.initialize_autoregressive_cache(), noise=noise)
    torch.testing.assert_close(output, expected)


def test_unpatchified_context_noise_is_drawn_in_the_unpatchified_shape():
    model = toy_model(seed=1, noise_in_unpatchified_shape=True, context_noise=500)
    cache = model.transformer.initialize_autoregressive_cache()
    _, state = model.generate(0, cache)
    eps = torch.empty(VIDEO).normal_(generator=_copy(model.rng))
    received: list[Tensor] = []
    model.transformer.finalize_kv_cache = lambda x, t, cache, input: received.append(x)  # type: ignore[method-assign]
    model.finalize(state)
    expected = 0.5 * state.clean_latent + 0.5 * model.transformer.patchify_and_maybe_split_cp(eps)
    torch.testing.assert_close(received[0], expected)


@pytest.mark.parametrize("unpatchified", [False, True])
def test_injected_noise_replaces_the_draw(unpatchified):
    model = toy_model(seed=1, noise_in_unpatchified_shape=unpatchified)
    noise = torch.randn(VIDEO, generator=torch.Generator().manual_seed(9))
    outputs = [model.generate(0, _fresh(model), noise=noise)[0] for _ in range(2)]
    assert torch.equal(*outputs) and model.rng.get_state().equal(torch.Generator().manual_seed(1).get_state())
    assert not torch.equal(outputs[0], model.generate(0, _fresh(model), noise=-noise)[0])


@pytest.mark.parametrize("shape", [(1, FRAMES + 1, CHANNELS, SIDE, SIDE), (FRAMES, CHANNELS, SIDE, SIDE)])
def test_noise_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"noise: got shape \("):
        model = toy_model()
        model.generate(0, _fresh(model), noise=torch.zeros(shape))


def test_step_count_can_change_per_chunk():
    model, one = toy_model(seed=1), toy_model(FlowMapEulerSchedulerConfig(num_inference_steps=1), seed=1)
    output, _ = model.generate(0, _fresh(model), steps=1)
    torch.testing.assert_close(output, one.generate(0, _fresh(one))[0], rtol=0, atol=0)
    assert len(model.transformer.timesteps) == 1 and model.scheduler.config.num_inference_steps == 4


def test_step_count_that_contradicts_the_schedule_is_refused():
    model = toy_model(FLOW_MATCH)
    with pytest.raises(ScheduleError, match="denoising_timesteps"):
        model.generate(0, _fresh(model), steps=5)


@pytest.mark.parametrize(
    "scheduler", [FlowMapEulerSchedulerConfig(), FLOW_MATCH, FlowMatchUniPCSchedulerConfig(num_inference_steps=5)]
)
def test_every_scheduler_drives_a_transformer_without_r(scheduler):
    model = toy_model(scheduler, seed=0)
    assert all(torch.isfinite(chunk).all() for chunk in chunks(model))


def test_transformer_with_r_is_told_both_timesteps():
    calls: list[tuple[float, float]] = []

    class WithR(ToyTransformer):
        def predict_flow(  # type: ignore[override]
            self, noisy_latent: Tensor, timestep: Tensor, cache: ToyCache, input: Any = None, r_timestep: Any = None
        ) -> Tensor:
            if r_timestep is not None:
                calls.append((float(timestep), float(r_timestep)))
            return super().predict_flow(noisy_latent, timestep, cache, input)

    @dataclass(frozen=True, kw_only=True)
    class WithRConfig(ToyTransformerConfig):
        _target: type = field(default_factory=lambda: WithR)

    scheduler = FlowMapEulerSchedulerConfig(num_inference_steps=2, shift=1.0)
    model = DiffusionModelConfig(transformer=WithRConfig(), scheduler=scheduler).setup()
    model.generate(0, _fresh(model))
    assert calls == [(1000.0, 500.0), (500.0, 0.0)]


def test_negative_context_noise_is_refused():
    with pytest.raises(ValueError, match="context_noise: got -1"):
        toy_model(context_noise=-1)


def _fresh(model: DiffusionModel) -> ToyCache:
    return model.transformer.initialize_autoregressive_cache()  # type: ignore[return-value]


def _copy(rng: torch.Generator) -> torch.Generator:
    copy = torch.Generator()
    copy.set_state(rng.get_state())
    return copy
