"""Times, buckets and loss weights. Witness: the float64 numbers in data/training.json."""

from __future__ import annotations

import warnings

import pytest
import torch

from anyflow_runtime.training import GlobalBatch, LossWeight, assign_buckets, pair_times, sample_time_pairs, schedule
from anyflow_runtime.training.objectives.flow_map_target import probe_times
from anyflow_runtime.training.objectives.timesteps import (
    CONSISTENCY,
    DIFFUSION,
    bucket_counts,
    sample_logit_normal,
    sample_uniform,
    shift_time,
)

from .trainer_runs import ORACLE

LETTERS = {"D": 0, "C": 1, "F": 2}


def labels_of(letters: str) -> torch.Tensor:
    return torch.tensor([LETTERS[letter] for letter in letters])


@pytest.mark.parametrize(("s", "expected"), ORACLE["shift"]["k=5"].items())
def test_shift_matches_oracle(s: str, expected: float) -> None:
    assert shift_time(float(s), 5.0) == pytest.approx(expected, rel=1e-12, abs=1e-15)


def test_shift_one_is_the_identity() -> None:
    s = torch.rand(100, dtype=torch.float64)
    assert torch.equal(torch.as_tensor(shift_time(s, 1.0)), s)


def test_shift_keeps_ends_and_order() -> None:
    s = torch.as_tensor(shift_time(torch.linspace(0, 1, 101, dtype=torch.float64), 5.0))
    assert s[0] == 0 and s[-1] == 1 and (s.diff() > 0).all()


@pytest.mark.parametrize(("shift", "steps"), [("k=5", "1"), ("k=5", "2"), ("k=5", "4"), ("k=5", "8"), ("k=1", "4")])
def test_schedule_matches_oracle(shift: str, steps: str) -> None:
    """The boundaries include the final 0: a schedule without it stops short of the data."""
    got = schedule(int(steps), float(shift[2:]))
    assert got == pytest.approx(ORACLE["schedules"][shift][steps], rel=1e-12, abs=0)


@pytest.mark.parametrize("case", ORACLE["buckets"]["cases"], ids=str)
def test_buckets_follow_the_global_index(case: str) -> None:
    """A bucket rule by local index would give every rank the same mixture, or none at one sample per rank."""
    expected = ORACLE["buckets"]["cases"][case]
    world, local = (int(part.split("=")[1]) for part in case.split(","))
    counts = bucket_counts(world * local)
    assert counts == (expected["n_diffusion"], expected["n_consistency"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = [assign_buckets(GlobalBatch(local, rank, world)) for rank in range(world)]
    assert [g.tolist() for g in got] == [labels_of(letters).tolist() for letters in expected["per_rank"]]


def test_global_batch_of_one_warns() -> None:
    with pytest.warns(UserWarning, match="no diffusion sample"):
        assign_buckets(GlobalBatch(1))


def test_accumulation_gives_the_buckets_of_one_large_batch() -> None:
    """Micro-steps of 1 would otherwise hold no diffusion sample, ever."""
    parts = [assign_buckets(GlobalBatch(1, rank, 2, step, 4)).item() for step in range(4) for rank in range(2)]
    assert parts == assign_buckets(GlobalBatch(8)).tolist()


def test_drawn_bucket_sizes_have_the_exact_expectation() -> None:
    """With a global batch of one, rounding gives 0 and 0; drawing gives diffusion half the time, the rest its share."""
    draws = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    counts = torch.tensor([bucket_counts(1, draw=float(u)) for u in draws], dtype=torch.float64)
    assert counts.mean(0).tolist() == [0.5, 0.25]
    assert (counts.sum(1) <= 1).all()


def test_pairs_match_oracle() -> None:
    """The bucket rule comes before the shift; r = 0 stays exactly 0 and r = t exactly t."""
    case = ORACLE["pair_sampling"]
    u1, u2 = (torch.tensor(case[name], dtype=torch.float64) for name in ("u1", "u2"))
    pairs = pair_times(u1, u2, labels_of(case["labels"]))
    torch.testing.assert_close(pairs.t, torch.tensor(case["T_shift5"], dtype=torch.float64), rtol=1e-12, atol=0)
    torch.testing.assert_close(pairs.r, torch.tensor(case["R_shift5"], dtype=torch.float64), rtol=1e-12, atol=0)
    plain = pair_times(u1, u2, labels_of(case["labels"]), shift=1.0)
    torch.testing.assert_close(plain.t / 1000, torch.tensor(case["t_unshifted"], dtype=torch.float64))
    torch.testing.assert_close(plain.r / 1000, torch.tensor(case["r_unshifted"], dtype=torch.float64))


def test_sampled_pairs_obey_their_labels() -> None:
    labels = assign_buckets(GlobalBatch(64))
    pairs = sample_time_pairs(labels, generator=torch.Generator().manual_seed(0))
    assert (pairs.r <= pairs.t).all() and pairs.t.max() <= 1000
    assert torch.equal(pairs.r[labels == DIFFUSION], pairs.t[labels == DIFFUSION])
    assert (pairs.r[labels == CONSISTENCY] == 0).all()


def test_times_refuse_half_types() -> None:
    with pytest.raises(TypeError, match=r"bfloat16.*expected float32 or float64"):
        pair_times(torch.rand(2, dtype=torch.bfloat16), torch.rand(2, dtype=torch.bfloat16), torch.zeros(2))


@pytest.mark.parametrize("row", ORACLE["bf16_timestep_trap"]["rows"], ids=lambda row: f"T={row['T']:.0f}")
def test_probes_have_the_nominal_gap_that_bfloat16_loses(row: dict[str, float]) -> None:
    """In bfloat16 the probes of the reference are 8 apart instead of 10 above 256; ours never are."""
    half = torch.tensor(row["T"], dtype=torch.bfloat16)
    assert float(half + 5 - (half - 5)) == pytest.approx(row["actual_gap"])
    upper, lower = probe_times(torch.tensor([[min(row["T"], 995.0)]]))
    assert float(upper - lower) == row["nominal_gap"]


@pytest.mark.parametrize("weighting", ["beta08", "gaussian", "uniform"])
@pytest.mark.parametrize("shift", [5, 1])
def test_weights_match_oracle(weighting: str, shift: int) -> None:
    expected = ORACLE["train_weight"][f"shift={shift},{weighting}"]
    weight = LossWeight(weighting, shift)
    t = torch.tensor(ORACLE["train_weight"]["probe_T"], dtype=torch.float64)
    looked_up, continuous = weight(t), weight.continuous(t)
    torch.testing.assert_close(
        looked_up, torch.tensor(expected["grid_lookup"], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        continuous, torch.tensor(expected["continuous"], dtype=torch.float64), rtol=1e-9, atol=1e-12
    )
    assert weight.constant == pytest.approx(expected["norm_constant"], rel=1e-12)
    assert weight.table.sum().item() == pytest.approx(expected["sum_over_grid"], rel=1e-12)
    assert weight.table.max().item() == pytest.approx(expected["max"], rel=1e-12)
    assert weight.grid[weight.table.argmax()].item() == pytest.approx(expected["argmax_T"], rel=1e-12)


@pytest.mark.parametrize("weighting", ["beta08", "gaussian", "uniform"])
def test_weights_are_finite_and_not_negative(weighting: str) -> None:
    weight = LossWeight(weighting)
    t = torch.linspace(0, 1000, 4001)
    for values in (weight(t), weight.continuous(t)):
        assert values.isfinite().all() and (values >= 0).all()


def test_weights_do_not_depend_on_the_rest_of_the_batch() -> None:
    """A weight normalised per call would change with the company it is in."""
    weight = LossWeight()
    t = torch.tensor([100.0, 500.0, 900.0])
    assert torch.equal(weight(t)[1:2], weight(t[1:2]))


def test_logit_normal_and_uniform_times_have_the_shifted_median() -> None:
    """Both distributions are symmetric before the shift, so shift(1/2) = 5/6 is the median of both."""
    for sample in (sample_logit_normal, sample_uniform):
        t = sample(20000, 5.0, torch.Generator().manual_seed(1))
        assert t.median().item() == pytest.approx(1000 * 5 / 6, rel=0.01)
        assert 0 <= t.min() and t.max() <= 1000


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: shift_time(0.5, 0), "shift: got 0"),
        (lambda: schedule(0), "num_steps: got 0"),
        (lambda: GlobalBatch(2, rank=3, world_size=2), "rank: got 3"),
        (lambda: bucket_counts(4, 0.8, 0.4), "consistency_ratio: got 0.4"),
        (lambda: LossWeight("cosine"), "weighting: got 'cosine'"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
