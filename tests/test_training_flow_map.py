"""The flow-map target and loss. Witness: float64 oracle numbers and the closed-form flow map of a Gaussian."""

from __future__ import annotations

import math

import pytest
import torch

from anyflow_runtime.training import (
    DiffusionMean,
    FlowMapConfig,
    TimePairs,
    drop_text,
    flow_map_loss,
    flow_map_target,
    flow_matching_loss,
    rebalance,
    total_derivative,
)
from anyflow_runtime.training.objectives.guidance import fused_prediction, guidance_strengths
from anyflow_runtime.training.objectives.timesteps import DIFFUSION, FREE

from .trainer_runs import ORACLE, double

CD = ORACLE["central_difference"]
PLAIN = FlowMapConfig(guidance=None, text_dropout=0.0)


def stub(x, t, r, text):
    """The oracle's network; text (B, 1, 1) holds the scalar condition c."""
    tau, rho = (s.view(*s.shape, 1, 1, 1) / 1000 for s in (t, r))
    c = text.view(-1, 1, 1, 1, 1)
    return torch.sin(1.3 * x) * (0.5 + tau) + 0.7 * tau**2 - 0.4 * rho * tau + 0.1 * x + 0.25 * c


def case() -> dict:
    t, r = double(CD["T"]), double(CD["R"])
    labels = torch.where(torch.tensor(CD["is_diffusion"]), DIFFUSION, FREE)
    tensors = {name: double(CD[name]) for name in ("x0", "eps", "x_t", "v")}
    return {
        **tensors,
        "times": TimePairs(t, r, labels),
        "text": torch.ones(4, 1, 1).double(),
        "negative": -0.5 * torch.ones(1, 1).double(),
    }


def test_derivative_matches_the_analytic_one() -> None:
    c = case()
    t, r = c["times"].per_frame(2)
    got = total_derivative(stub, c["x_t"], c["v"], t, r, c["text"])
    error = (got - double(CD["analytic_dF_dT_g1"])).abs().max().item()
    assert error == pytest.approx(CD["max_abs_err_fd_vs_analytic_g1"], rel=1e-6)


@pytest.mark.parametrize("guidance", [1, 3])
def test_target_and_prediction_match_oracle(guidance: int) -> None:
    c, expected = case(), CD[f"g={guidance}"]
    t, r = c["times"].per_frame(2)
    strengths = guidance_strengths(guidance, c["x_t"])
    prediction = fused_prediction(stub, c["x_t"], t, r, c["text"], c["negative"], strengths)
    target, correction = flow_map_target(stub, c["x_t"], c["v"], t, r, c["text"], guidance=strengths)
    torch.testing.assert_close(prediction, double(expected["pred"]), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(target, double(expected["target"]), rtol=1e-9, atol=1e-12)
    moving = (t - r)[2:].view(2, 2, 1, 1, 1)
    torch.testing.assert_close(correction[2:] / moving, double(expected["dF_dT"])[2:], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("guidance", [1, 3])
def test_loss_matches_oracle(guidance: int) -> None:
    """Weighting, rebalancing and reduction, each sample's value."""
    c, expected = case(), CD[f"g={guidance}"]
    config = FlowMapConfig(guidance=guidance, text_dropout=0.0)
    result = flow_map_loss(stub, c["x0"], c["text"], c["times"], config, c["negative"], noise=c["eps"])
    torch.testing.assert_close(result.per_sample, double(expected["rebalanced"]), rtol=1e-9, atol=0)
    assert result.loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    assert result.log["diffusion"] == pytest.approx(expected["diffusion_mean"], rel=1e-9)
    unscaled = flow_map_loss(
        stub,
        c["x0"],
        c["text"],
        c["times"],
        FlowMapConfig(guidance=guidance, text_dropout=0.0, rebalanced=False),
        c["negative"],
        noise=c["eps"],
    )
    torch.testing.assert_close(unscaled.per_sample, double(expected["weighted"]), rtol=1e-9, atol=0)
    assert unscaled.log["unweighted"] == pytest.approx(sum(expected["per_sample_mse"]) / 4, rel=1e-9)


@pytest.mark.parametrize("per_sample", [False, True], ids=["reference", "per_sample"])
def test_dropped_prompts(per_sample: bool) -> None:
    """Reference: gradient and derivative of a dropped sample are divided by the guidance although u_c = u_n."""
    c, expected = case(), CD["dropped_prompt_sample_g=3"]
    t, r = c["times"].per_frame(2)
    text = c["negative"].expand(4, 1, 1).clone()
    strengths = guidance_strengths(3, c["x_t"], torch.ones(4, dtype=torch.bool) if per_sample else None)
    shift = torch.zeros((), dtype=torch.float64, requires_grad=True)
    prediction = fused_prediction(
        lambda *inputs: stub(*inputs) + shift, c["x_t"], t, r, text, c["negative"], strengths, always_forward=True
    )
    torch.testing.assert_close(prediction, double(expected["pred"]), rtol=1e-9, atol=1e-12)
    prediction.mean().backward()
    assert shift.grad.item() == pytest.approx(1.0 if per_sample else 1 / 3)
    _, correction = flow_map_target(stub, c["x_t"], c["v"], t, r, text, guidance=strengths)
    name = "dF_dT_gated(not divided)" if per_sample else "dF_dT_reference(divided by g)"
    moving = (t - r)[2:].view(2, 2, 1, 1, 1)
    torch.testing.assert_close(correction[2:] / moving, double(expected[name])[2:], rtol=1e-8, atol=1e-14)


@pytest.mark.parametrize("row", CD["one_sided_ends"]["cases"], ids=lambda row: f"T={row['T']:.0f}")
def test_probes_stay_inside(row: dict[str, float]) -> None:
    """One-sided at the ends: the network never sees T above 1000 or below 0."""
    seen = []

    def recorded(x, t, r, text):
        seen.append(t.item())
        return stub(x, t, r, text)

    x0, eps = CD["one_sided_ends"]["x0"], CD["one_sided_ends"]["eps"]
    t, r = double([[row["T"]]]), double([[row["R"]]])
    x_t = double((1 - row["T"] / 1000) * x0 + row["T"] / 1000 * eps).view(1, 1, 1, 1, 1)
    v = double(eps - x0).view(1, 1, 1, 1, 1)
    got = total_derivative(recorded, x_t, v, t, r, double([[[1.0]]]))
    assert seen == [row["probe_hi"], row["probe_lo"]]
    assert got.item() == pytest.approx(row["dF_dT"], rel=1e-9)


MEAN, STD = 0.6, 0.3


def gaussian_moments(t):
    return (1 - t) * MEAN, torch.sqrt((1 - t) ** 2 * STD**2 + t**2)


def gaussian_velocity(x, t):
    a, q = gaussian_moments(t)
    return (t - (1 - t) * STD**2) / q**2 * (x - a) - MEAN


def gaussian_flow_map(x, T, R, _text):
    """The exact average velocity of N(0.6, 0.3^2) data."""
    t, r = (s.view(*s.shape, 1, 1, 1) / 1000 for s in (T, R))
    (a_t, q_t), (a_r, q_r) = gaussian_moments(t), gaussian_moments(r)
    x_r = a_r + q_r / q_t * (x - a_t)
    return torch.where(t == r, gaussian_velocity(x, t), (x - x_r) / torch.where(t == r, torch.ones_like(t), t - r))


@pytest.mark.parametrize("row", ORACLE["exact_gaussian_flow_map"]["cases"], ids=lambda c: f"t={c['t']},r={c['r']}")
def test_target_of_the_exact_flow_map_is_the_flow_map(row: dict[str, float]) -> None:
    """With the marginal velocity as v the exact u is a fixed point: any slip of sign or unit breaks it."""
    t, r = double([[1000 * row["t"]]]), double([[1000 * row["r"]]])
    x = double(row["x"]).view(1, 1, 1, 1, 1)
    v = gaussian_velocity(x, double(row["t"]))
    assert v.item() == pytest.approx(row["v"], rel=1e-9)
    u = gaussian_flow_map(x, t, r, None)
    assert u.item() == pytest.approx(row["u"], rel=1e-9)
    assert (x - (row["t"] - row["r"]) * u).item() == pytest.approx(row["x_r"], rel=1e-9)
    target, _ = flow_map_target(gaussian_flow_map, x, v, t, r, torch.zeros(1, 1, 1))
    assert target.item() == pytest.approx(row["v_minus_dt_du"], rel=1e-9)
    assert abs(target.item() - u.item()) < 3e-5
    assert abs(target.item() - u.item()) == pytest.approx(row["abs_gap"], abs=1e-10)


def test_target_holds_in_float32_on_a_grid() -> None:
    """The same fixed point over all (t, r) in float32: rounding of u over a gap of 0.01 leaves less than 1e-4."""
    t = torch.linspace(50, 990, 40)[:, None].expand(40, 40).reshape(-1, 1)
    r = t * torch.linspace(0, 1, 40).repeat(40)[:, None]
    x = torch.linspace(-1.5, 1.5, 1600).view(-1, 1, 1, 1, 1)
    v = gaussian_velocity(x, t.view(-1, 1, 1, 1, 1) / 1000)
    target, _ = flow_map_target(gaussian_flow_map, x, v, t, r, torch.zeros(1600, 1, 1))
    exact = gaussian_flow_map(x.double(), t.double(), r.double(), None)
    assert (target - exact).norm() / exact.norm() < 1e-4


def test_flow_map_composes() -> None:
    """t -> m -> r lands where t -> r does: the closed form really is a flow map."""
    x = torch.linspace(-2, 2, 9).double().view(9, 1, 1, 1, 1)
    full = [torch.full((9, 1), value, dtype=torch.float64) for value in (900.0, 400.0, 50.0)]
    middle = x - 0.5 * gaussian_flow_map(x, full[0], full[1], None)
    two = middle - 0.35 * gaussian_flow_map(middle, full[1], full[2], None)
    torch.testing.assert_close(two, x - 0.85 * gaussian_flow_map(x, full[0], full[2], None), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("t", [0.0, 1000.0])
def test_target_is_finite_at_the_ends(t: float) -> None:
    time = torch.full((2, 3), t)
    x = torch.randn(2, 3, 1, 2, 2)
    target, _ = flow_map_target(stub, x, torch.randn_like(x), time, torch.zeros_like(time), torch.ones(2, 1, 1))
    assert target.isfinite().all()


def test_rebalance_matches_oracle() -> None:
    expected = ORACLE["rebalance"]
    losses = double(expected["losses"]).requires_grad_()
    scaled = rebalance(losses, torch.tensor(expected["is_diffusion"]))
    scaled.mean().backward()
    torch.testing.assert_close(scaled, double(expected["scaled"]), rtol=1e-12, atol=0)
    assert scaled.mean().item() == pytest.approx(expected["loss"], rel=1e-12)
    torch.testing.assert_close(losses.grad, double(expected["dloss_dl"]), rtol=1e-12, atol=0)


def test_rebalance_without_diffusion_samples_is_the_plain_mean() -> None:
    """The reference averages an empty set and returns NaN."""
    losses = torch.tensor([2.0, 5.0])
    assert torch.equal(rebalance(losses, torch.zeros(2, dtype=torch.bool)), losses)


def test_accumulated_rebalance_equals_one_batch() -> None:
    losses, kinds = torch.rand(8).double() + 0.1, torch.arange(8) < 4
    running = DiffusionMean()
    parts = [rebalance(losses[i : i + 2], kinds[i : i + 2], running) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.cat(parts), rebalance(losses, kinds), rtol=1e-12, atol=0)


def linear(weight):
    """A network with one parameter that remembers its calls."""
    calls = []

    def velocity(x, t, r, text):
        calls.append((x, t, r, text))
        return weight * x + (t - r).view(*t.shape, 1, 1, 1) / 1000 + text.mean()

    return velocity, calls


def pairs(t, r, labels) -> TimePairs:
    return TimePairs(torch.tensor(t), torch.tensor(r), torch.tensor(labels))


def test_diffusion_only_batches_need_no_probes() -> None:
    velocity, calls = linear(torch.tensor(0.5))
    x0, text = torch.randn(2, 3, 1, 2, 2), torch.zeros(2, 1, 1)
    times = pairs([500.0, 700.0], [500.0, 700.0], [DIFFUSION, DIFFUSION])
    flow_map_loss(velocity, x0, text, times, PLAIN)
    assert len(calls) == 1
    flow_map_loss(velocity, x0, text, times, FlowMapConfig(guidance=None, text_dropout=0.0, equal_forwards=True))
    assert len(calls) == 1 + 3


def test_probes_run_only_where_r_differs_from_t() -> None:
    velocity, calls = linear(torch.tensor(0.5))
    times = pairs([500.0, 700.0, 800.0], [500.0, 100.0, 0.0], [DIFFUSION, FREE, FREE])
    flow_map_loss(velocity, torch.randn(3, 2, 1, 2, 2), torch.zeros(3, 1, 1), times, PLAIN)
    assert [len(x) for x, *_ in calls] == [3, 2, 2]


def test_skipping_probes_changes_nothing() -> None:
    x0, noise, text = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2), torch.zeros(3, 1, 1)
    times = pairs([500.0, 700.0, 800.0], [500.0, 100.0, 0.0], [DIFFUSION, FREE, FREE])
    losses = []
    for equal in (False, True):
        velocity, _ = linear(torch.tensor(0.5))
        config = FlowMapConfig(guidance=None, text_dropout=0.0, equal_forwards=equal)
        negative = torch.zeros(1, 1)
        losses.append(flow_map_loss(velocity, x0, text, times, config, negative, noise).loss)
    assert torch.equal(*losses)


def test_target_carries_no_gradient() -> None:
    """d loss / d weight must be that of the prediction alone."""
    weight = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    velocity, calls = linear(weight)
    x0, noise = (torch.randn(1, 1, 1, 2, 2, dtype=torch.float64) for _ in range(2))
    times = TimePairs(double([600.0]), double([200.0]), torch.tensor([FREE]))
    config = FlowMapConfig(guidance=None, text_dropout=0.0, weighting="uniform", rebalanced=False)
    result = flow_map_loss(velocity, x0, torch.zeros(1, 1, 1).double(), times, config, noise=noise)
    result.loss.backward()
    x_t = calls[0][0]
    v = noise - x0
    derivative = (0.5 * v + 1) / 1000  # of 0.5 x + (t - r) along dx = v
    target = v - 400 * derivative
    expected = (2 * (0.5 * x_t + 0.4 - target) * x_t).mean()
    assert weight.grad.item() == pytest.approx(expected.item(), rel=1e-6)


def test_given_first_frame_is_clean_and_outside_the_loss() -> None:
    """Reference: its frame 0 has T = 0 but R > 0, and its unlearnable target stays in the loss."""
    velocity, calls = linear(torch.tensor(0.5))
    x0, noise = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2)
    times = pairs([600.0, 800.0], [200.0, 0.0], [FREE, FREE])
    one = flow_map_loss(velocity, x0, torch.zeros(2, 1, 1), times, PLAIN, noise=noise, first_frame_given=True)
    for x, t, r, _ in calls:
        assert torch.equal(x[:, 0], x0[:, 0]) and (t[:, 0] == 0).all() and (r[:, 0] == 0).all()
    other_noise = noise.clone()
    other_noise[:, 0] = 100.0
    two = flow_map_loss(velocity, x0, torch.zeros(2, 1, 1), times, PLAIN, noise=other_noise, first_frame_given=True)
    assert torch.equal(one.loss, two.loss)


def test_text_dropout_uses_the_negative_prompt_and_leaves_its_input() -> None:
    text, negative = torch.randn(4000, 2, 3), torch.randn(2, 3)
    before = text.clone()
    out, dropped = drop_text(text, negative, 0.1, torch.Generator().manual_seed(0))
    assert torch.equal(text, before)
    assert torch.equal(out[dropped], negative.expand_as(out[dropped])) and torch.equal(out[~dropped], text[~dropped])
    assert dropped.double().mean().item() == pytest.approx(0.1, abs=4 * math.sqrt(0.09 / 4000))


def test_flow_matching_regresses_the_velocity_unweighted() -> None:
    x0, noise = torch.randn(3, 2, 1, 2, 2), torch.randn(3, 2, 1, 2, 2)
    seen = []

    def zero(x, t, r, text):
        seen.append((x, t, r))
        return torch.zeros_like(x)

    t = torch.tensor([0.0, 500.0, 1000.0])
    result = flow_matching_loss(zero, x0, torch.zeros(3, 1, 1), t, noise=noise)
    torch.testing.assert_close(result.loss, (noise - x0).square().mean())
    x_t, seen_t, seen_r = seen[0]
    assert torch.equal(seen_t, seen_r)
    torch.testing.assert_close(x_t, torch.stack([x0[0], 0.5 * (x0[1] + noise[1]), noise[2]]))


def test_fused_guidance_is_learned_as_guided_velocity() -> None:
    """A network that outputs g cond - (g - 1) uncond has zero flow-matching loss against cond."""
    g = 3.0
    x0, noise = torch.zeros(2, 1, 1, 2, 2), torch.randn(2, 1, 1, 2, 2)
    cond, uncond = noise.clone(), noise * 0.3

    def velocity(x, t, r, text):
        return (g * cond - (g - 1) * uncond) if text.mean() > 0 else uncond

    result = flow_matching_loss(
        velocity, x0, torch.ones(2, 1, 1), torch.tensor([300.0, 900.0]), torch.zeros(1, 1), guidance=g, noise=noise
    )
    assert result.loss.item() < 1e-12


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x0": torch.zeros(4, 2, 2)}, r"x0: got shape \(4, 2, 2\)"),
        ({"text": torch.zeros(3, 1, 1)}, "text: got 3 samples"),
        ({"config": FlowMapConfig()}, "negative: got None"),
    ],
)
def test_bad_arguments_are_named(change: dict, message: str) -> None:
    c = case()
    arguments = {"x0": c["x0"], "text": c["text"], "times": c["times"], "config": PLAIN, **change}
    with pytest.raises(ValueError, match=message):
        flow_map_loss(stub, **arguments)
