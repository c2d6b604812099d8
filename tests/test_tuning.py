"""`anyflow_kernels.tuning`: what is tried, and that only what is right here can win. A fake timer; the interpreter
plays the card, and a wrapped operation plays faulty candidates."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from anyflow_kernels import Ops, launch_configs, load_ops, triton_ops
from anyflow_kernels.launch_configs import GPUS, tuned
from anyflow_kernels.launch_configs.tuned import Choice, Key, launch_fields
from anyflow_kernels.testing.cases import SIZES
from anyflow_kernels.tuning import trial
from anyflow_kernels.tuning.subjects import ORACLE_FLOPS, Subject, model_sizes, subjects
from anyflow_kernels.tuning.timing import interleaved_medians
from anyflow_kernels.tuning.trial import DeviceLostError, try_candidates

from .triton_checks import DEVICE

ARCH = launch_configs.architecture(DEVICE)
KEY = Key("rms_norm", torch.bfloat16, 32)
DEVICE_HERE = torch.device(DEVICE)
MODELS = {name: model_sizes(name) for name in ("1.3B", "14B")}


def fake_timer(seconds: Mapping[int, float]) -> Callable[[Mapping[str, Any]], dict[str, float]]:
    """Seconds by the candidate's place; calls each once, as a timer would."""

    def timer(calls: Mapping[str, Any]) -> dict[str, float]:
        for call in calls.values():
            call()
        return {name: seconds[int(name)] for name in calls}

    return timer


def norm(rows: tuple[int, ...] = (8, 1, 2, 4, 16)) -> Subject:
    """RMSNorm, with candidates that differ in their rows; the first is the default."""
    (subject,) = (s for s in subjects(ARCH, {"tiny": SIZES["tiny"]}) if s.key == KEY)
    return replace(subject, candidates=tuple(Choice(fields={"rows": n, "num_warps": 1}, reason="a test") for n in rows))


def wrong_row(y: torch.Tensor) -> torch.Tensor:
    y[0, 3] = -y[0, 3]
    return y


def nan(y: torch.Tensor) -> torch.Tensor:
    y[0, -1, -1] = torch.nan
    return y


def raising(error: Exception) -> Callable[[torch.Tensor], torch.Tensor]:
    def fault(y: torch.Tensor) -> torch.Tensor:
        raise error

    return fault


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[int, Any]], None]:
    """Faults of RMSNorm by the rows of the candidate that a launch would take."""

    def plant(faults: dict[int, Any]) -> None:
        def rms_norm(*arguments: Any, **keywords: Any) -> torch.Tensor:
            rows = launch_configs.row_tile("rms_norm", ARCH, 32, torch.bfloat16).rows
            return faults.get(rows, lambda y: y)(triton_ops.rms_norm(*arguments, **keywords))

        module = ModuleType("faulty")
        module.rms_norm = rms_norm
        faulty_ops = Ops("triton", module)
        monkeypatch.setattr(trial, "load_ops", lambda name: faulty_ops if name == "triton" else load_ops(name))

    return plant


def test_the_fastest_that_passed_wins(faulty):
    faulty({})
    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({0: 2.0, 1: 3.0, 2: 1.6, 3: 1.0, 4: 4.0}))
    assert entry["winner"] == {"way": "triton", "fields": {"rows": 4, "num_warps": 1}}
    assert entry["reason"] == "2.00x over the default"
    assert [t["seconds"] for t in entry["trials"]] == [[2.0], [3.0], [1.6], [1.0], [4.0]]
    assert all(0 < t["error"] <= t["budget"] and not t["rejected"] for t in entry["trials"])
    assert tuned.key_of(entry) == KEY and tuned.choice_of(entry).fields["rows"] == 4


FAULTS = {
    "a wrong row": (wrong_row, r"parity: result 0 .*, worst row 1\..*, over the budget of .*, worst row .*6 x 32\)"),
    "NaN": (nan, "parity: result 0: got NaN in other places than float64"),
    "another dtype": (torch.Tensor.float, "parity: result 0: got .*float32, expected .*bfloat16"),
    "an exception": (raising(ValueError("no such tile\nmore")), "ValueError: no such tile"),
    "out of memory": (raising(torch.OutOfMemoryError("2 GiB")), "out of memory: OutOfMemoryError: 2 GiB"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_faulty_candidate_never_wins_however_fast(fault, reason, faulty):
    """It is not even timed; why is kept, and the others go on."""
    faulty({4: fault})
    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({0: 2.0, 1: 3.0, 2: 1.5, 4: 4.0}))
    assert entry["winner"]["fields"]["rows"] == 2 and entry["reason"] == "1.33x over the default"
    rejected = {t["fields"]["rows"]: t["rejected"] for t in entry["trials"] if t["rejected"]}
    assert rejected.keys() == {4} and re.match(reason, rejected[4]), rejected
    assert entry["trials"][3]["seconds"] == []


def test_a_candidate_that_fails_only_where_it_is_timed_never_wins(faulty):
    """A larger shape than the one that was judged may not fit."""
    calls = []

    def second_call(y: torch.Tensor) -> torch.Tensor:
        calls.append(1)
        return y if len(calls) == 1 else raising(torch.OutOfMemoryError("full"))(y)

    faulty({4: second_call})
    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({0: 2.0, 1: 3.0, 2: 1.5, 4: 4.0}))
    assert entry["winner"]["fields"]["rows"] == 2
    assert entry["trials"][3]["rejected"] == "out of memory: OutOfMemoryError: full"


def test_a_gain_within_the_noise_leaves_the_default(faulty):
    faulty({})
    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({0: 1.0, 1: 0.99, 2: 1.5, 3: 1.5, 4: 1.5}))
    assert entry["winner"]["fields"]["rows"] == 8
    assert entry["reason"] == "no candidate is 2% faster than the default"


def test_a_wrong_default_loses_to_anything_right(faulty):
    faulty({8: wrong_row})
    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({1: 3.0, 2: 1.5, 3: 9.0, 4: 4.0}))
    assert entry["winner"]["fields"]["rows"] == 2 and entry["reason"].startswith("the default was rejected: parity")


def test_where_nothing_passes_nothing_wins(faulty):
    """The table then changes nothing, and says so."""
    faulty(dict.fromkeys((8, 1, 2, 4, 16), nan))
    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({}))
    assert entry["winner"] is None and entry["reason"].startswith("no candidate passed; the default serves, which was")
    assert tuned.choice_of(entry) is None


def test_every_shape_counts(faulty):
    """The geometric mean of the times; a fault at one shape is a fault."""
    subject = norm((8, 2, 4))
    subject = replace(subject, shapes=subject.shapes * 2)
    seconds = iter([{0: 1.0, 1: 0.5, 2: 0.9}, {0: 1.0, 1: 4.0, 2: 0.9}])

    def timer(calls: Mapping[str, Any]) -> dict[str, float]:
        now = next(seconds)
        return {name: now[int(name)] for name in calls}

    faulty({})
    entry = try_candidates(subject, ARCH, DEVICE_HERE, timer)
    assert entry["winner"]["fields"]["rows"] == 4 and entry["reason"] == "1.11x over the default"
    assert entry["trials"][1]["seconds"] == [0.5, 4.0]


def test_what_must_not_run_does_not(faulty):
    """Such as what ended an earlier process."""
    faulty({4: raising(AssertionError("ran"))})
    told: list[tuple[Key, Any]] = []

    def before(key: Key, choice: Choice) -> str:
        told.append((key, choice.fields["rows"]))
        return "ended a process" if choice.fields["rows"] == 4 else ""

    entry = try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({0: 2.0, 1: 3.0, 2: 3.0, 4: 4.0}), before)
    assert entry["trials"][3]["rejected"] == "ended a process"
    assert told == [(KEY, n) for n in (8, 1, 2, 4, 16, 8, 1, 2, 16)]  # judged, then timed


def test_a_lost_device_ends_the_trials(faulty, monkeypatch):
    """After an illegal access every later candidate would be rejected for it."""
    faulty({4: raising(RuntimeError("CUDA error: an illegal memory access was encountered"))})

    def check(device: torch.device, subject: Subject, own: Any) -> None:
        raise DeviceLostError(own.rejected)

    monkeypatch.setattr(trial, "_check_device", check)
    with pytest.raises(DeviceLostError, match="illegal memory access"):
        try_candidates(norm(), ARCH, DEVICE_HERE, fake_timer({}))


def test_the_timer_takes_turns():
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    medians = interleaved_medians(calls, repeats=2, warmup=1)
    assert order == list("ababab") and set(medians) == set("ab") and all(s >= 0 for s in medians.values())


@pytest.mark.parametrize("arch", launch_configs.ARCHITECTURES)
def test_candidates_are_the_rows_of_the_chip_and_their_neighbours(arch):
    """The default first, every row of the table that can serve, each candidate once, none beyond the chip."""
    tables = {
        "far_attention": "ATTENTION_FORWARD",
        "far_attention_dq": "ATTENTION_DQ",
        "far_attention_dkdv": "ATTENTION_DKDV",
    }
    for subject in subjects(arch, MODELS):
        parameters = [(c.way, *sorted(c.fields.items(), key=str)) for c in subject.candidates]
        assert len(parameters) == len(set(parameters)) >= 2, subject.key
        assert all(c.reason for c in subject.candidates) and subject.shapes, subject.key
        if subject.key.operation in tables:
            table = getattr(launch_configs, tables[subject.key.operation])
            own = [dict(c.fields) for c in subject.candidates if c.way == "triton"]
            served = launch_configs.attention_row(table, arch, 128, 2)
            assert own[0] == launch_fields(served)
            rows = [r for r in launch_configs.rows_for(table, arch) if r.itemsize == 2 and r.head_dim >= 128]
            assert all(launch_fields(row) in own for row in rows) and len(own) > len(rows)
            threads = [32 * f["num_warps"] * f["per_multiprocessor"] for f in own]
            assert max(threads) <= GPUS[arch].threads


def test_rivals_are_tried_where_they_can_run():
    ways = {
        (arch, s.key.shape): [c.way for c in s.candidates]
        for arch in (80, 90)
        for s in subjects(arch, MODELS)
        if s.key.operation == "far_attention"
    }
    assert ways[90, "dense"][0] == "cudnn" and {"flash", "gluon", "triton"} < set(ways[90, "dense"])
    assert ways[90, "ranges"][0] == "triton" and set(ways[90, "ranges"]) == {"gluon", "triton"}
    assert ways[80, "dense"][0] == "triton" and set(ways[80, "dense"]) == {"cudnn", "flash", "triton"}


def test_a_rival_that_cannot_run_here_is_rejected_with_its_reason():
    """The interpreter has no cuDNN: nothing else may be timed under its name."""
    small = replace(SIZES["tiny"], chunks=(1, 1), height=4, width=4, batch=1)
    (subject,) = (s for s in subjects(0, {"small": small}) if s.key.shape == "dense, few keys")
    subject = replace(subject, candidates=tuple(c for c in subject.candidates if c.way != "triton"))
    if DEVICE == "cuda":
        pytest.skip("a rival can run")
    entry = try_candidates(subject, 0, DEVICE_HERE, fake_timer({}))
    reasons = [t["rejected"] for t in entry["trials"]]
    assert [t["way"] for t in entry["trials"]] == ["cudnn", "flash"] and entry["winner"] is None
    assert all(
        f"{way} cannot take these arguments" in why for way, why in zip(("cudnn", "flash"), reasons, strict=True)
    )


def test_no_oracle_is_too_large_for_a_consumer_card():
    """float64 judges a smaller video of the same kind then: as many heads and channels, the same chunks."""
    (training,) = (s for s in subjects(90, {"14B": MODELS["14B"]}) if s.key.operation == "far_attention_dq")
    (shape,) = training.shapes
    assert shape.timed.shape == "14B train, clean copy: 28470 x 28470, 40 x 128"
    assert shape.judged.shape == "14B train, clean copy: 7111 x 7111, 40 x 128"
    assert 16 * 28470**2 * 5120 > ORACLE_FLOPS >= 16 * 7111**2 * 5120
    forwards = [s for s in subjects(90, MODELS) if s.key.operation == "far_attention"]
    assert all(shape.timed is shape.judged for s in forwards for shape in s.shapes)


def test_two_models_share_what_they_share():
    """One forward for both, at the shapes of both; a row tile for each width."""
    found = {s.key: s for s in subjects(90, MODELS)}
    dense = found[Key("far_attention", torch.bfloat16, 128, "dense")]
    assert {shape.timed.shape.split()[0] for shape in dense.shapes} == {"1.3B", "14B"}
    assert {key.size for key in found if key.operation == "rms_norm"} == {1536, 5120}


def test_an_unknown_model_is_refused():
    with pytest.raises(ValueError, match=r"model: got '2B', expected one of 1\.3B, 14B"):
        model_sizes("2B")
