"""Streaming schedulers against recorded numbers of another implementation, diffusers and exact solutions."""

from __future__ import annotations

import copy
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anyflow_runtime import schedulers as S
from anyflow_runtime.schedulers.base import wan_grid
from anyflow_runtime.streaming import derive_config

ORACLE = json.loads((Path(__file__).parent / "data" / "schedulers.json").read_text())
CONFIGS = {
    "flow_match": S.FlowMatchSchedulerConfig,
    "unipc": S.FlowMatchUniPCSchedulerConfig,
    "flow_match_euler_discrete": S.EulerDiscreteSchedulerConfig,
}
DEFAULTS = [*(config() for config in CONFIGS.values()), S.FlowMapEulerSchedulerConfig()]
INDEX = torch.arange(6, dtype=torch.float64).reshape(1, 2, 3)
# (atol, rtol) of the oracle's own note: float64 exact up to its ten printed digits, UniPC solves in float32 throughout.
BUDGET = {"float32": (2e-6, 2e-6), "float64": (1e-9, 0.0), "bfloat16": (2e-2, 0.0)}


def setting(case):
    return case.get("config", {key: case[key] for key in ("num_inference_steps", "shift") if key in case})


def cases(part):
    rows = [(kind, case, run) for kind in CONFIGS for case in ORACLE[kind] for run in case.get(part, [])]
    ids = [f"{kind}-{setting(case)}-{run['dtype']}-{run.get('t_requested', '')}" for kind, case, run in rows]
    return pytest.mark.parametrize(("kind", "case", "run"), rows, ids=ids)


def assert_close(kind, dtype, got, expected):
    atol, rtol = BUDGET["float32" if kind == "unipc" and dtype == "float64" else dtype]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(got.double().flatten(), expected, atol=atol, rtol=rtol)


def one_step(config):
    steps = {"num_inference_steps": 1}
    if isinstance(config, S.FlowMatchSchedulerConfig):
        steps["denoising_timesteps"] = [700]
    return derive_config(config, **steps).setup()


def first_sigma(scheduler):
    return (scheduler.denoising_sigmas if hasattr(scheduler, "denoising_sigmas") else scheduler.sigmas)[0]


@pytest.fixture
def draws(monkeypatch):
    """Replaces normal_ by the oracle's noise; returns the list of the dtypes drawn so far."""
    drawn = []

    def fill(self, *args, generator=None):
        eps = torch.cos(1.7 * INDEX + 0.9 * len(drawn) + 0.3)
        drawn.append(self.dtype)
        return self.copy_(eps)

    monkeypatch.setattr(torch.Tensor, "normal_", fill)
    return drawn


class Flow:
    """The oracle's networks; remembers what it was shown."""

    def __init__(self, name):
        self.name, self.times, self.inputs = name, [], []

    def __call__(self, x, t):
        assert t.ndim == 0 and t.dtype == x.dtype
        self.times.append(t.item())
        self.inputs.append(x)
        t = t / 1000.0
        return 0.7 * x + 0.1 * t if self.name == "A" else torch.sin(x) + 0.3 * t


@cases("runs")
def test_sample_matches_the_oracle(kind, case, run, draws):
    scheduler = CONFIGS[kind](**setting(case)).setup()
    flow, dtype = Flow(run["flow"]), getattr(torch, run["dtype"])
    noise = torch.sin(INDEX).to(dtype)
    clean = scheduler.sample(noise, flow)
    assert flow.times == run["timesteps_seen"]
    assert draws == [dtype] * run["eps_draws"]
    assert clean.dtype == dtype and clean.shape == noise.shape
    assert_close(kind, run["dtype"], clean, run["final"])
    for got, expected in zip(flow.inputs, run.get("network_inputs", []), strict=False):
        assert_close(kind, run["dtype"], got, expected)


@cases("add_noise")
def test_add_noise_matches_the_oracle(kind, case, run, draws):
    scheduler = CONFIGS[kind](**setting(case)).setup()
    dtype = getattr(torch, run["dtype"])
    noisy = scheduler.add_noise(torch.cos(INDEX).to(dtype), torch.tensor(run["t_requested"], dtype=dtype))
    assert noisy.dtype == dtype and draws == [dtype]
    assert_close(kind, run["dtype"], noisy, run["result"])


@pytest.mark.parametrize("case", ORACLE["flow_match"], ids=lambda c: c["name"])
def test_flow_match_tables_are_bitwise_those_of_the_oracle(case):
    scheduler = S.FlowMatchSchedulerConfig(**case["config"]).setup()
    # Ten printed digits identify a float32.
    expected = {key: torch.tensor(case[key], dtype=torch.float32) for key in ("step_list", "sigmas")}
    assert torch.equal(scheduler.denoising_step_list, expected["step_list"])
    assert torch.equal(scheduler.denoising_sigmas, expected["sigmas"])
    probe = {int(row): value for row, value in case["table_probe"].items()}
    assert torch.equal(scheduler.training_sigmas[list(probe)], torch.tensor(list(probe.values()), dtype=torch.float32))


@pytest.mark.parametrize("case", ORACLE["unipc"], ids=lambda c: f"{c['num_inference_steps']}-{c['shift']}")
def test_unipc_tables_match_the_oracle(case):
    scheduler = S.FlowMatchUniPCSchedulerConfig(**setting(case)).setup()
    assert scheduler.timesteps.tolist() == case["timesteps"] and scheduler.timesteps.dtype == torch.int64
    assert torch.equal(scheduler.sigmas, torch.tensor(case["sigmas_with_terminal_zero"], dtype=torch.float32))
    names = [["a_pred", "b_pred_m0", "b_pred_dprev"], ["a_corr", "b_corr_m0", "b_corr_dprev", "b_corr_dt"]]
    for table, columns in zip((scheduler.predictor, scheduler.corrector), names, strict=True):
        expected = torch.tensor([case["coefficients"][name] for name in columns]).T
        torch.testing.assert_close(table, expected, atol=0, rtol=2e-6)


def test_unipc_four_step_timesteps_truncate_float64():
    assert S.FlowMatchUniPCSchedulerConfig(num_inference_steps=4).setup().timesteps.tolist() == [999, 937, 833, 624]


@pytest.mark.parametrize("case", ORACLE["seeded_flow_match"], ids=lambda c: c["dtype"])
def test_flow_match_draws_from_the_given_generator_in_the_recorded_order(case):
    generator = torch.Generator().manual_seed(case["seed"])
    noise = torch.randn(case["shape"], generator=generator, dtype=getattr(torch, case["dtype"]))
    clean = S.FlowMatchSchedulerConfig().setup().sample(noise, Flow(case["flow"]), generator)
    assert_close("flow_match", case["dtype"], clean, case["final"])


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [2, 3, 4, 9])
def test_unipc_of_every_order_agrees_with_diffusers_on_the_same_grid(order, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = S.FlowMatchUniPCSchedulerConfig(num_inference_steps=steps, solver_order=order).setup()
    theirs = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, solver_order=order, lower_order_final=True
    )
    theirs.set_timesteps(steps)
    theirs.sigmas = scheduler.sigmas.double()
    x = noise = torch.sin(INDEX)
    for sigma, t in zip(scheduler.sigmas, theirs.timesteps, strict=False):
        x = theirs.step(torch.sin(x) + sigma, t, x).prev_sample
    sigmas = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas, strict=False))
    got = scheduler.sample(noise, lambda x, t: torch.sin(x) + sigmas[int(t)])
    torch.testing.assert_close(got, x, atol=2e-6, rtol=2e-6)  # float32 solver, see BUDGET


@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_converges_at_least_at_its_order(order):
    """On dx/dsigma = cos(3 sigma) x, whose solution is exp(sin(3 sigma) / 3), against the exact value."""
    errors = []
    for steps in (12, 24):
        scheduler = S.FlowMatchUniPCSchedulerConfig(num_inference_steps=steps, shift=1.0, solver_order=order).setup()
        sigmas = iter(scheduler.sigmas)  # the timesteps are truncated, the sigmas are not
        x = scheduler.sample(torch.ones(1), lambda x, t, sigmas=sigmas: torch.cos(3 * next(sigmas)) * x)
        errors.append(abs(x.item() - np.exp(-np.sin(3 * scheduler.sigmas[0].item()) / 3)))
    assert errors[1] < errors[0] / 2**order


def exponential_flow(x, t, r):
    """Mean flow of dx/dt = 2x between t and r: an exact flow map, so any number of steps must be exact."""
    t, r = t.double() / 1000, r.double() / 1000
    return ((x - x * torch.exp(2 * (r - t))) / (t - r)).to(x.dtype)


@given(steps=st.integers(1, 40), shift=st.floats(0.5, 10))
@settings(max_examples=30, deadline=None)
def test_flow_map_is_exact_for_any_number_of_steps(steps, shift):
    scheduler = S.FlowMapEulerSchedulerConfig(num_inference_steps=steps, shift=shift).setup()
    noise = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    clean = scheduler.sample(noise, exponential_flow)
    # The network is told t and r in float32: half a unit in the last place of 1000 is 3e-5 of a timestep.
    torch.testing.assert_close(clean, noise * np.exp(-2.0), atol=0, rtol=2 * 2 * 3.1e-8 * steps)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "config", [{}, {"num_inference_steps": 1}, {"num_inference_steps": 3, "sigmas": [1, 0.6, 0.2]}]
)
def test_flow_map_agrees_with_the_discrete_scheduler(config, dtype):
    config = S.FlowMapEulerSchedulerConfig(**config)
    discrete = S.FlowMapEulerDiscreteScheduler(shift=config.shift)
    discrete.set_timesteps(config.num_inference_steps, sigmas=config.sigmas)
    noise = torch.sin(INDEX).to(dtype)
    x, seen = noise, []
    for t in discrete.timesteps:
        x = discrete.step(torch.cos(x), t, x).prev_sample
    got = config.setup().sample(noise, lambda x, t, r: (seen.append((t, r)), torch.cos(x))[1])
    torch.testing.assert_close(got, x, atol=0, rtol=1e-6 if dtype == torch.float32 else 2**-8)
    assert [t.item() for t, _ in seen] == pytest.approx(discrete.timesteps.tolist(), rel=6e-8)
    assert [r.item() for _, r in seen] == [t.item() for t, _ in seen[1:]] + [0.0]
    assert all(value.dtype == torch.float32 and value.ndim == 0 for pair in seen for value in pair)


def test_flow_map_steps_between_any_two_timesteps_both_ways():
    scheduler = S.FlowMapEulerSchedulerConfig().setup()
    x = torch.sin(INDEX)
    there = scheduler.step(x, exponential_flow, 873.25, 12.5)
    torch.testing.assert_close(there, x * np.exp(2 * (0.0125 - 0.87325)), atol=0, rtol=2e-7)
    torch.testing.assert_close(scheduler.step(there, exponential_flow, 12.5, 873.25), x, atol=0, rtol=4e-7)


def test_flow_map_without_mean_velocity_tells_the_network_r_equal_to_t():
    seen = []
    config = S.FlowMapEulerSchedulerConfig(use_mean_velocity=False, shift=1.0)
    clean = config.setup().sample(torch.ones(2), lambda x, t, r: (seen.append((t.item(), r.item())), x)[1])
    assert seen == [(t, t) for t in (1000.0, 750.0, 500.0, 250.0)]
    assert clean.tolist() == pytest.approx([0.75**4] * 2)


def test_flow_map_skips_steps_of_no_length():
    config = S.FlowMapEulerSchedulerConfig(num_inference_steps=3, timesteps=(1000, 1000, 500), shift=1.0)
    calls = []
    config.setup().sample(torch.ones(1), lambda x, t, r: (calls.append(t.item()), x)[1])
    assert calls == [1000.0, 500.0]


def test_flow_map_adds_noise_at_any_timestep(draws):
    noisy = S.FlowMapEulerSchedulerConfig().setup().add_noise(torch.cos(INDEX), torch.tensor(123.4))
    s, eps = 0.1234, torch.cos(1.7 * INDEX + 0.3)
    torch.testing.assert_close(noisy, (1 - s) * torch.cos(INDEX) + s * eps, atol=1e-8, rtol=1e-7)


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_one_step_works(config):
    scheduler = one_step(config)
    x0, eps = torch.cos(INDEX), torch.sin(INDEX)
    sigma = first_sigma(scheduler)
    clean = scheduler.sample((1 - sigma) * x0 + sigma * eps, lambda x, t: eps - x0)
    torch.testing.assert_close(clean, x0, atol=1e-6, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 10])
def test_karras_grid_runs_the_number_of_steps_asked_for(steps):
    scheduler = S.FlowMatchUniPCSchedulerConfig(num_inference_steps=steps, use_kerras_sigma=True).setup()
    flow = Flow("A")
    assert scheduler.sample(torch.sin(INDEX), flow).isfinite().all() and len(flow.times) == steps
    ends = [200 / 201, 0.01 / 1.01][: min(steps, 2)]
    assert [scheduler.sigmas[0].item(), scheduler.sigmas[steps - 1].item()][: len(ends)] == pytest.approx(ends)
    assert (scheduler.sigmas.diff() < 0).all()


MOVES = {
    "bf16": lambda m: m.to(torch.bfloat16),
    "half": lambda m: m.half(),
    "double": lambda m: m.double(),
    "device-and-dtype": lambda m: m.to("cpu", torch.bfloat16),
    "to_empty": lambda m: m.to_empty(device="cpu"),
    "meta-and-back": lambda m: m.to("meta").to_empty(device="cpu"),
    "deepcopy": lambda m: copy.deepcopy(m).half(),
}


@pytest.mark.parametrize("move", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_tables_keep_their_values_through_every_move(config, move):
    before = dict(config.setup().named_buffers())
    parent = move(torch.nn.ModuleDict({"scheduler": config.setup(), "net": torch.nn.Linear(2, 2)}))
    after = dict(parent["scheduler"].named_buffers())
    assert before and before.keys() == after.keys()
    assert all(after[name].dtype == before[name].dtype and torch.equal(after[name], before[name]) for name in before)
    assert not parent["scheduler"].state_dict()


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_a_scheduler_built_under_the_meta_device_is_usable(config):
    with torch.device("meta"):
        scheduler = config.setup()
    scheduler.to_empty(device="cpu")
    x = torch.sin(INDEX)
    assert torch.equal(
        scheduler.sample(x, lambda x, t: x, torch.Generator().manual_seed(0)),
        config.setup().sample(x, lambda x, t: x, torch.Generator().manual_seed(0)),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_half_precision_results_are_computed_in_float32_and_rounded_once(config, dtype, draws):
    scheduler, (x, v) = one_step(config), (torch.sin(INDEX).to(dtype), torch.cos(INDEX).to(dtype))
    sigma = first_sigma(scheduler)
    assert torch.equal(scheduler.sample(x, lambda x, t: v), (x.float() - sigma * v.float()).to(dtype))
    assert not draws
    noisy = scheduler.add_noise(x, (sigma * 1000).floor() if "UniPC" in type(config).__name__ else sigma * 1000)
    if isinstance(config, S.FlowMapEulerSchedulerConfig):
        sigma = sigma * 1000 / 1000
    eps = torch.cos(1.7 * INDEX + 0.3).to(dtype)
    assert torch.equal(noisy, ((1 - sigma) * x.float() + sigma * eps.float()).to(dtype))


@pytest.mark.parametrize(
    ("make", "takes_r"),
    [
        (lambda see: lambda x, t: see(x, t, None), False),
        (lambda see: lambda x, t, r: see(x, t, r), True),
        (lambda see: lambda x, t, target: see(x, t, target), True),
        (lambda see: lambda x, t, r_timestep=None: see(x, t, r_timestep), True),
        (lambda see: lambda x, t, *, r: see(x, t, r), True),
        (lambda see: lambda x, t, cache=None: see(x, t, cache), False),
        (lambda see: functools.partial(lambda cache, x, t, r: see(x, t, r), object()), True),
    ],
    ids=["xt", "xtr", "third", "default-r", "keyword-r", "other-default", "partial"],
)
@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_predictors_with_and_without_r(config, make, takes_r):
    seen = []

    def see(x, t, r):
        seen.append((t.item(), r if r is None else r.item()))
        return 0.1 * x

    config = derive_config(config, num_inference_steps=4)
    scheduler = config.setup()
    scheduler.sample(torch.ones(2), make(see))
    times = [t for t, _ in seen]
    reach = {
        S.FlowMatchSchedulerConfig: [0.0] * 4,  # every flow is used to reach the clean latent
        S.FlowMatchUniPCSchedulerConfig: times,  # the solver needs the instantaneous flow
    }.get(type(config), [*times[1:], 0.0])
    assert [r for _, r in seen] == (reach if takes_r else [None] * 4)


def test_a_module_and_open_arguments_are_predictors():
    class Net(torch.nn.Module):
        def forward(self, x, t, r):
            return x * (t > r)

    scheduler = S.FlowMapEulerSchedulerConfig(shift=1.0).setup()
    assert scheduler.sample(torch.ones(1), Net()).item() == pytest.approx(0.75**4)
    counts = []
    for config in DEFAULTS[1], DEFAULTS[3]:
        config.setup().sample(torch.ones(1), lambda *a: (counts.append(len(a)), a[0])[1])
    assert set(counts[:50]) == {2} and set(counts[50:]) == {3}


def test_warped_timestep_zero_is_the_last_entry_of_the_table():
    """The network is told 0 while sigma stays at its smallest table value."""
    scheduler = S.FlowMatchSchedulerConfig(num_inference_steps=2, denoising_timesteps=(1000, 0)).setup()
    assert scheduler.denoising_step_list.tolist() == [1000.0, 0.0]
    assert scheduler.denoising_sigmas[1] == scheduler.training_sigmas[-1] > 0


def test_integer_timesteps_are_truncated():
    steps = S.FlowMatchSchedulerConfig(timestep_dtype=torch.int64).setup().denoising_step_list
    assert steps.tolist() == [1000, 960, 888, 727] and steps.dtype == torch.int64


def test_progress_bar_is_shown_on_request(capsys):
    S.EulerDiscreteSchedulerConfig(enable_tqdm=True).setup().sample(torch.ones(1), lambda x, t: x)
    assert "EulerDiscreteScheduler" in capsys.readouterr().err


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda c: type(c).__name__)
def test_configs_are_printable_hashable_and_have_a_plain_form(config):
    assert (
        hash(config) == hash(type(config)())
        and type(config).from_dict(json.loads(json.dumps(config.to_dict()))) == config
    )
    assert str(config).split("\n")[2].startswith("    num_inference_steps: ")


def test_wan_grid_starts_one_training_step_below_pure_noise():
    assert wan_grid(4, 1.0, 1000).tolist() == pytest.approx([0.999, 0.74925, 0.4995, 0.24975])


@pytest.mark.parametrize("config", DEFAULTS, ids=lambda config: type(config).__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_predictor_may_have_its_times_in_host_memory(config, dtype):
    """They are the values it would get on the device of the latent, here one that tells no host its values."""
    scheduler = config.setup()
    told = {}

    def flow(x, t, r):
        told[x.device.type].append((t, r))
        return x

    for device, host_times in (("cpu", False), ("meta", True), ("meta", False)):
        told[device], flow.host_times = [], host_times
        if device == "meta":
            scheduler.to(device)
        scheduler.sample(torch.ones(2, 3, dtype=dtype, device=device), flow)
        expected = "cpu" if host_times else device
        assert {time.device.type for times in told[device] for time in times} == {expected}
        if host_times:
            assert [torch.stack(times).tolist() for times in told["meta"]] == [
                torch.stack(times).tolist() for times in told["cpu"]
            ]
