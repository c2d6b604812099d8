"""Streaming schedulers name settings, noise, predictors and timesteps that they cannot work with."""

from __future__ import annotations

import pytest
import torch

from anyflow_runtime import schedulers as S

DEFAULTS = [
    S.FlowMatchSchedulerConfig(),
    S.FlowMatchUniPCSchedulerConfig(),
    S.EulerDiscreteSchedulerConfig(),
    S.FlowMapEulerSchedulerConfig(),
]
BAD_CONFIGS = {
    "count": (S.FlowMatchSchedulerConfig, {"num_inference_steps": 3}, "denoising_timesteps: got 4 values, .* = 3"),
    "above-1000": (S.FlowMatchSchedulerConfig, {"denoising_timesteps": [1001, 5, 4, 3]}, r"got 1001, .*in \[0, 1000\]"),
    "below-0": (S.FlowMatchSchedulerConfig, {"denoising_timesteps": [1000, 5, 4, -3]}, "got -3"),
    "no-steps": (S.FlowMatchUniPCSchedulerConfig, {"num_inference_steps": 0}, "num_inference_steps: got 0"),
    "order": (S.FlowMatchUniPCSchedulerConfig, {"solver_order": 4}, "solver_order: got 4"),
    "shift": (S.FlowMatchUniPCSchedulerConfig, {"shift": -1.0}, "shift: "),
    "sigmas": (S.FlowMatchSchedulerConfig, {"sigma_max": 1.5}, "sigma_max"),
    "fixed-count": (S.EulerDiscreteSchedulerConfig, {"fixed_timesteps": [1000.0, 0.0]}, "got 2 values, .* = 5"),
    "fixed-range": (
        S.EulerDiscreteSchedulerConfig,
        {"num_inference_steps": 1, "fixed_timesteps": (1001, 0)},
        "got 1001",
    ),
    "both": (S.FlowMapEulerSchedulerConfig, {"sigmas": [1.0], "timesteps": [1.0]}, "at most one"),
    "map-count": (S.FlowMapEulerSchedulerConfig, {"sigmas": [1.0]}, "sigmas: got 1 values, .* = 4"),
    "map-range": (S.FlowMapEulerSchedulerConfig, {"num_inference_steps": 1, "timesteps": [1001]}, "got 1001"),
    "nan": (S.FlowMapEulerSchedulerConfig, {"num_inference_steps": 1, "sigmas": [float("nan")]}, "got nan"),
}


@pytest.mark.parametrize("kind", [ValueError, AssertionError])
@pytest.mark.parametrize("bad", BAD_CONFIGS.values(), ids=BAD_CONFIGS)
def test_bad_settings_are_named(bad, kind):
    """As ValueError, and as the AssertionError that programs written for other runtimes catch."""
    config, settings_, message = bad
    with pytest.raises(kind, match=message):
        config(**settings_)


@pytest.mark.parametrize("t", [750.0, 750.5, True])
def test_a_timestep_that_is_no_integer_raises_instead_of_indexing(t):
    with pytest.raises(TypeError, match=r"denoising_timesteps: got .*, expected integers"):
        S.FlowMatchSchedulerConfig(denoising_timesteps=[1000, t, 500, 250])


@pytest.mark.parametrize(
    "t", [torch.tensor([500.0]), torch.tensor(1001.0), torch.tensor(-1.0), torch.tensor(torch.nan), 5.0]
)
@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_add_noise_refuses_other_than_one_timestep_in_range(config, t):
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match=r"timestep: got .*, expected"):
            config.setup().add_noise(torch.ones(2), t)


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_bad_noise_and_predictors_are_named(config):
    scheduler = config.setup()
    with pytest.raises(TypeError, match=r"initial_noise: .*torch\.int64"):
        scheduler.sample(torch.ones(2, dtype=torch.int64), lambda x, t: x)
    with pytest.raises(ValueError, match=r"got \(1,\), expected a flow of shape \(2,\), like its input"):
        scheduler.sample(torch.ones(2), lambda x, t: x[:1])
    for predictor in (None, lambda x: x, lambda x, t, r, cache: x):
        with pytest.raises(TypeError, match=r"predict_flow: got .*, expected a callable"):
            scheduler.sample(torch.ones(2), predictor)


def test_flow_map_step_refuses_timesteps_out_of_range():
    with pytest.raises(S.ScheduleError, match="r_timestep: got -1"):
        S.FlowMapEulerSchedulerConfig().setup().step(torch.ones(1), lambda x, t: x, 500, -1)


def test_the_base_class_cannot_be_set_up():
    with pytest.raises(TypeError, match="abstract"):
        S.SchedulerConfig().setup()
