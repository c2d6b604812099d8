"""Rollouts, distribution matching, the adversarial term and the objectives. Witness: data/training.json in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.training import (
    DiscriminatorHeads,
    FarConfig,
    FlowMapConfig,
    GanConfig,
    GlobalBatch,
    OnPolicy,
    OnPolicyConfig,
    PretrainConfig,
    Pretraining,
    RolloutDraw,
    ScoreConfig,
    TrainingBatch,
    UpdateCadence,
    approximate_r1,
    discriminator_gan_loss,
    dmd_gradient,
    dmd_loss,
    draw_rollout,
    fake_score_loss,
    generator_gan_loss,
    generator_score_loss,
    rollout,
)
from anyflow_runtime.training.objectives.dmd import guided_estimate
from anyflow_runtime.training.objectives.interpolant import clean_estimate

from .trainer_runs import ORACLE, SIZES, double

STUB = ORACLE["rollout"]["linear_stub"]["results"]
DMD = ORACLE["dmd"]


def parse(name: str) -> RolloutDraw:
    num_steps, index = (int(part.split("=")[1]) for part in name.split(","))
    return RolloutDraw(num_steps, index)


@pytest.mark.parametrize("name", ORACLE["rollout"]["segments"], ids=str)
def test_segments_match_oracle(name: str) -> None:
    got = parse(name).segments(5.0)
    assert got == [pytest.approx(tuple(pair), rel=1e-12) for pair in ORACLE["rollout"]["segments"][name]]


@pytest.mark.parametrize("name", STUB, ids=str)
def test_rollout_carries_gradient_through_all_segments(name: str) -> None:
    """Gradient on one step of N, as other implementations have it, gives another x and another derivative."""
    theta = double(0.7).requires_grad_()

    def velocity(x, p, q, _text):
        p, q = (s.view(*s.shape, 1, 1, 1) / 1000 for s in (p, q))
        return theta * x + 0.2 * p - 0.1 * q

    x = rollout(velocity, torch.full((1, 1, 1, 1, 1), 1.5).double(), torch.zeros(1, 1, 1), parse(name).segments(5.0))
    x.sum().backward()
    expected = STUB[name]["compressed_all_segments"]
    assert x.item() == pytest.approx(expected["x"], rel=1e-9)
    assert theta.grad.item() == pytest.approx(expected["dx_dtheta"], rel=1e-9)
    if parse(name).num_steps > 1:
        assert theta.grad.item() != pytest.approx(STUB[name]["full_N_steps_grad_on_one"]["dx_dtheta"], rel=1e-3)


def test_rollout_starts_from_pure_noise_and_is_exact_for_straight_paths() -> None:
    """u = noise - data, the same everywhere: any segments end in the data."""
    data, noise = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2)
    seen = []

    def velocity(x, t, r, _text):
        seen.append((x, t))
        return noise - data

    out = rollout(velocity, noise, torch.zeros(2, 1, 1), RolloutDraw(8, 5).segments())
    torch.testing.assert_close(out, data)
    assert torch.equal(seen[0][0], noise) and (seen[0][1] == 1000).all()


def test_steps_with_equal_times_leave_the_sample_unchanged() -> None:
    x = torch.randn(1, 2, 1, 2, 2)
    assert torch.equal(rollout(lambda *a: torch.ones_like(x), x, torch.zeros(1, 1, 1), [(0.5, 0.5)]), x)


def test_rollout_draws_cover_all_choices_and_indices() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = {(d.num_steps, d.index) for d in (draw_rollout((2, 4), generator) for _ in range(300))}
    assert draws == {(n, g) for n in (2, 4) for g in range(n)}


@pytest.mark.parametrize("scale", [0, 3])
def test_dmd_matches_oracle(scale: int) -> None:
    expected = DMD[f"real_guidance_scale={scale}"]
    pred, x_t = double(DMD["pred"]), double(DMD["x_t"])
    fake, cond, uncond = (double(DMD[name]) for name in ("x0_fake", "x0_cond", "x0_uncond"))
    real = guided_estimate(cond, uncond, scale)
    torch.testing.assert_close(real, double(expected["pred_real"]), rtol=1e-9, atol=1e-12)
    gradient = dmd_gradient(pred, fake, real)
    torch.testing.assert_close(gradient, double(expected["grad"]), rtol=1e-9, atol=1e-12)
    x = pred.clone().requires_grad_()
    loss = dmd_loss(x, gradient)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-9)
    torch.testing.assert_close(x.grad, double(expected["dloss_dpred"]), rtol=1e-9, atol=1e-12)
    t = double(DMD["T"])
    i = torch.arange(12).double().view(3, 2, 1, 1, 2)
    v_fake = 0.3 * torch.sin(1.7 * i + 0.2)
    torch.testing.assert_close(clean_estimate(x_t, t, v_fake)[:2], fake[:2], rtol=1e-9, atol=1e-12)


def test_dmd_gradient_stays_finite_where_real_equals_x() -> None:
    """fake != real = x: the reference divides by zero and passes on the largest float."""
    x = torch.zeros(1, 2, 1, 2, 2)
    gradient = dmd_gradient(x, torch.full_like(x, 1e-7), x)
    torch.testing.assert_close(gradient, torch.full_like(x, 0.1))


def test_dmd_loss_is_float64() -> None:
    """x - sg[x - grad] cancels in float32 for a small gradient beside a large x."""
    x = torch.full((1, 1, 1, 1, 1), 1e4, requires_grad=True)
    loss = dmd_loss(x, torch.full_like(x, 1e-5))
    loss.backward()
    assert loss.dtype == torch.float64 and x.grad.item() == pytest.approx(2e-5, rel=1e-4)


def test_generator_loss_moves_samples_to_the_real_distribution() -> None:
    """With exact scores of two point masses the gradient descends from the fake towards the real one."""
    real_point, fake_point = 1.0, -1.0

    def score(point):
        return lambda x, t, r, text: (x - point) / (t.view(*t.shape, 1, 1, 1) / 1000)

    x = torch.full((4, 1, 1, 2, 2), fake_point, requires_grad=True)
    config = ScoreConfig(real_guidance=None, min_timestep=20.0)
    generator_score_loss(x, torch.zeros(4, 1, 1), score(real_point), score(fake_point), config).loss.backward()
    assert (x.grad < 0).all()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2 * -1 / 16), rtol=1e-3, atol=0)


def test_scores_carry_no_graph_and_fake_update_reaches_only_the_fake() -> None:
    student, fake = nn.Parameter(torch.ones(())), nn.Parameter(torch.ones(()))
    x = student * torch.randn(2, 1, 1, 2, 2)
    text = torch.zeros(2, 1, 1)
    real_scale = nn.Parameter(torch.ones(()))
    config = ScoreConfig(real_guidance=None)
    generator_score_loss(
        x, text, lambda x, t, r, c: real_scale * x * 0.5, lambda x, t, r, c: fake * x, config
    ).loss.backward()
    assert student.grad is not None and fake.grad is None and real_scale.grad is None
    student.grad = None
    fake_score_loss(lambda x, t, r, c: fake * x, student * x.detach(), text, config).loss.backward()
    assert fake.grad is not None and student.grad is None


def test_gan_losses_match_oracle() -> None:
    fake, real = double(ORACLE["gan"]["fake"]), double(ORACLE["gan"]["real"])
    assert generator_gan_loss(fake).item() == pytest.approx(ORACLE["gan"]["gen_loss"], rel=1e-9)
    assert discriminator_gan_loss(real, fake).item() == pytest.approx(ORACLE["gan"]["disc_loss"], rel=1e-9)


def test_approximate_r1_vanishes_for_a_flat_discriminator() -> None:
    logits = torch.randn(3, 2)
    assert approximate_r1(logits, logits).item() == 0
    assert approximate_r1(logits, logits + 0.5).item() == pytest.approx(0.25)


def test_cadence() -> None:
    assert [UpdateCadence(1).updates_student(i) for i in range(3)] == [True] * 3
    assert [UpdateCadence(5).updates_student(i) for i in range(6)] == [True, False, False, False, False, True]


FAR = FarConfig(chunk_partition=(1, 2, 1), full_chunk_limit=2, bidirectional_probability=1.0)


def make_model(far: bool = False, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return AnyFlowFARTransformer3DModel(**SIZES, full_chunk_limit=2) if far else AnyFlowTransformer3DModel(**SIZES)


def make_batch(size: int = 4) -> TrainingBatch:
    generator = torch.Generator().manual_seed(3)
    latents = torch.randn(size, 4, 3, 4, 4, generator=generator)
    return TrainingBatch(latents, torch.randn(size, 5, 6, generator=generator), torch.zeros(5, 6))


def generators() -> dict[str, torch.Generator]:
    return {"shared": torch.Generator().manual_seed(0), "generator": torch.Generator().manual_seed(1)}


def pretraining(far: bool, model: nn.Module | None = None, **config) -> Pretraining:
    model = make_model(far) if model is None else model
    return Pretraining(model, PretrainConfig(far=FAR if far else None, **config), **generators())


def step(terms) -> dict[str, float]:
    """Backward each term as it comes; all logged numbers."""
    log: dict[str, float] = {}
    for name, result in terms:
        assert result.loss.isfinite(), name
        result.loss.backward()
        log |= {f"{name}/{key}": value for key, value in result.log.items()}
    return log


def assert_gradients(model: nn.Module) -> None:
    """Finite for every parameter; the compressed patches of a clip without context have none."""
    for name, parameter in model.named_parameters():
        if "far_patch_embedding" not in name:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name


@pytest.mark.parametrize("far", [False, True], ids=["bidirectional", "far"])
def test_pretraining_step_reports_its_parts(far: bool) -> None:
    objective = pretraining(far)
    log = step(objective.terms(make_batch()))
    assert {"flow_map/loss", "flow_map/correction_rms", "flow_map/diffusion", "flow_map/flow_map"} <= log.keys()
    assert ("bidirectional/loss" in log) == far
    assert log["flow_map/correction_rms"] > 0
    assert_gradients(objective.model)


@pytest.mark.parametrize("far", [False, True], ids=["bidirectional", "far"])
def test_pretraining_optimiser_steps_change_the_weights_and_clear(far: bool) -> None:
    objective = pretraining(far)
    optimiser = torch.optim.AdamW(objective.model.parameters(), lr=1e-3)
    before = [p.clone() for p in objective.model.parameters()]
    for _ in range(2):
        optimiser.zero_grad()
        step(objective.terms(make_batch()))
        optimiser.step()
    optimiser.zero_grad()
    assert all(p.grad is None for p in objective.model.parameters())
    assert any(not torch.equal(p, q) for p, q in zip(objective.model.parameters(), before, strict=True))


def test_cotraining_can_be_switched_off() -> None:
    model = make_model(True)
    config = PretrainConfig(far=FarConfig((1, 2, 1), 2, bidirectional_probability=0.0))
    names = [name for name, _ in Pretraining(model, config, **generators()).terms(make_batch())]
    assert names == ["flow_map"]


def test_same_generators_give_the_same_losses() -> None:
    """Resuming with restored generators must repeat every draw."""
    logs = [step(pretraining(True).terms(make_batch())) for _ in range(2)]
    assert logs[0] == logs[1]


def test_accumulated_micro_steps_equal_one_batch_in_buckets() -> None:
    """Two micro-steps: the first holds the diffusion samples, the second none."""
    objective, batch = pretraining(False), make_batch(2)
    logs = [step(objective.terms(batch, GlobalBatch(2, micro_step=i, micro_steps=2))) for i in range(2)]
    assert "flow_map/flow_map" not in logs[0] and "flow_map/diffusion" not in logs[1]


def test_flow_matching_objective_is_plain() -> None:
    """The teacher stage and the baseline of the demo: r = t everywhere, no probes, no guidance."""
    objective, calls = pretraining(True, objective="flow_matching"), []
    objective.model.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    names = [name for name, _ in objective.terms(make_batch())]
    assert names == ["flow_matching", "bidirectional"] and len(calls) == 2
    assert all(torch.equal(call["timestep"], call["r_timestep"]) for call in calls)


def on_policy(far: bool = False, gan: bool = False, cotrain: bool = True, guidance: float | None = 3.0) -> OnPolicy:
    student = make_model(far)
    config = OnPolicyConfig(
        score=ScoreConfig(real_guidance=guidance),
        batch_size=2,
        cotrain=cotrain,
        chunk_partition=FAR.chunk_partition if far else None,
        gan=GanConfig(blocks=(0, -1), r1_weight=1.0) if gan else None,
    )
    flow_map = FlowMapConfig()
    settings = PretrainConfig(flow_map=flow_map, far=FarConfig((1, 2, 1), 2, 0.5, 0.0) if far else None)
    return OnPolicy(
        student,
        make_model(seed=1).requires_grad_(False),
        make_model(seed=2),
        config,
        Pretraining(student, settings, **generators()) if cotrain else None,
        DiscriminatorHeads(32, 2, hidden=8) if gan else None,
        **generators(),
    )


@pytest.mark.parametrize("far", [False, True], ids=["bidirectional", "far"])
def test_student_step_reports_its_parts_and_trains_the_student_alone(far: bool) -> None:
    objective = on_policy(far)
    log = step(objective.student_terms(make_batch()))
    assert {f"distribution_matching/{k}" for k in ("vsd", "total", "rollout_steps", "rollout_index")} <= log.keys()
    assert "flow_map/loss" in log
    assert_gradients(objective.student)
    assert all(p.grad is None for p in objective.fake.model.parameters())


@pytest.mark.parametrize("gan", [False, True], ids=["plain", "gan"])
def test_fake_step_trains_the_fake_and_the_heads_alone(gan: bool) -> None:
    objective = on_policy(gan=gan)
    log = step(objective.fake_terms(make_batch()))
    assert "fake_score/fake_score" in log
    assert ("discriminator/gan_discriminator" in log) == ("discriminator/r1" in log) == gan
    assert all(p.grad is None for p in objective.student.parameters())
    if gan:
        assert all(p.grad is not None for p in objective.discriminator.parameters())


def test_adversarial_term_reaches_the_student_and_not_the_heads() -> None:
    objective = on_policy(gan=True, cotrain=False)
    log = step(objective.student_terms(make_batch()))
    assert log["distribution_matching/gan_generator"] > 0
    assert all(p.grad is None for p in objective.discriminator.parameters())
    with torch.no_grad():  # heads that ignore their input give the student no adversarial gradient
        for head in objective.discriminator.heads:
            head[2].weight.zero_()
    x = torch.randn(2, 4, 3, 4, 4, requires_grad=True)
    generator_gan_loss(objective._logits(x, make_batch(2).text, train_heads=False)).backward()
    assert x.grad.abs().max() == 0


def test_alternating_steps_run() -> None:
    objective, cadence = on_policy(), UpdateCadence(2)
    student = torch.optim.AdamW(objective.student.parameters(), lr=1e-3)
    fake = torch.optim.AdamW(objective.fake.model.parameters(), lr=1e-3)
    updated = []
    for iteration in range(3):
        before = objective.student.proj_out.weight.clone(), objective.fake.model.proj_out.weight.clone()
        if cadence.updates_student(iteration):
            student.zero_grad()
            step(objective.student_terms(make_batch()))
            student.step()
        fake.zero_grad()
        step(objective.fake_terms(make_batch()))
        fake.step()
        after = objective.student.proj_out.weight, objective.fake.model.proj_out.weight
        updated.append([not torch.equal(a, b) for a, b in zip(before, after, strict=True)])
    assert updated == [[True, True], [False, True], [True, True]]


def test_scores_are_called_with_one_time() -> None:
    """A student-like network as score must not see r: r = t is sent whatever the caller's r."""
    objective, calls = on_policy(cotrain=False), []
    objective.real.model.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append(kwargs), with_kwargs=True)
    step(objective.student_terms(make_batch()))
    assert len(calls) == 2  # conditional and unconditional
    assert all(torch.equal(call["timestep"], call["r_timestep"]) for call in calls)


def test_without_guidance_the_unconditional_score_is_not_computed() -> None:
    objective, calls = on_policy(cotrain=False, guidance=None), []
    objective.real.model.register_forward_pre_hook(lambda *_: calls.append(1))
    step(objective.student_terms(make_batch()))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: RolloutDraw(4, 4), "index: got 4"),
        (lambda: draw_rollout(()), "choices: got"),
        (lambda: UpdateCadence(0), "ratio: got 0"),
        (lambda: ScoreConfig(min_timestep=900, max_timestep=100), "min_timestep: got 900"),
        (lambda: PretrainConfig(objective="score"), "objective: got 'score'"),
        (lambda: Pretraining(make_model(True), PretrainConfig()), "config.far: got None"),
        (lambda: OnPolicy(make_model(), make_model(), make_model(), OnPolicyConfig()), "pretraining: got None"),
        (lambda: TrainingBatch(torch.zeros(2, 3), torch.zeros(2, 1, 1)), "latents: got shape"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
