"""Launches take what a tuning table says won on this machine. Witness: float64. The interpreter plays the card."""

from __future__ import annotations

import importlib
import json
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from anyflow_kernels import launch_configs
from anyflow_kernels.launch_configs import tuned
from anyflow_kernels.launch_configs.tuned import Choice, Key
from anyflow_kernels.testing.cases import SIZES
from anyflow_kernels.testing.runs import judge_results, run_case
from anyflow_kernels.tuning.subjects import Subject, subjects

from .triton_checks import DEVICE, REFERENCE, TRITON

ARCH = launch_configs.architecture(DEVICE)
SMALL = replace(SIZES["tiny"], chunks=(1, 1), height=4, width=4, batch=1)
SUBJECTS = subjects(ARCH, {"small": SMALL})
BF16 = torch.bfloat16
Table = Callable[..., Path]
forward = importlib.import_module("anyflow_kernels.triton_ops.far_attention")


@pytest.fixture(autouse=True)
def no_tables() -> Iterator[None]:
    tuned.forget_tables()
    yield
    tuned.forget_tables()


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Table:
    """Writes a table of choices, made on this machine but for some changes, where launches look for it."""
    path = tmp_path / "tuning.json"
    monkeypatch.setenv("ANYFLOW_TUNING", str(path))

    def write(choices: dict[Key, Choice], **changes: Any) -> Path:
        entries = [
            {
                **key._asdict(),
                "dtype": str(key.dtype).removeprefix("torch."),
                "winner": {"way": choice.way, "fields": dict(choice.fields)},
                "reason": choice.reason,
            }
            for key, choice in choices.items()
        ]
        machine = tuned.machine(torch.device(DEVICE)) | changes
        path.write_text(json.dumps({"format": tuned.FORMAT, "machine": machine, "choices": entries}))
        return path

    return write


def of(operation: str, shape: str = "") -> Subject:
    return next(s for s in SUBJECTS if s.key.operation == operation and shape in s.key.shape)


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: str(s.key))
def test_launches_ask_for_the_key_that_is_tuned(subject, monkeypatch):
    """Else a winner would be stored that no launch reads."""
    asked: set[Key] = set()

    class Recorder(dict):
        def get(self, key: Key, default: Any = None) -> Any:
            asked.add(key)
            return super().get(key, default)

    monkeypatch.setitem(tuned._tables, ARCH, Recorder())
    with tuned.forced(ARCH, subject.beside):
        for shape in subject.shapes:
            asked.clear()
            run_case(shape.timed, TRITON, BF16, torch.device(DEVICE), subject.backward)
            assert subject.key in asked


@pytest.mark.parametrize("subject", SUBJECTS, ids=lambda s: str(s.key))
def test_what_won_is_launched_and_right(subject, table):
    """The last candidate of each subject, read from a file: still within the budget of the error law."""
    winner = next(c for c in reversed(subject.candidates) if c.way == "triton")
    table({subject.key: replace(winner, reason="a test"), **subject.beside})
    case, run = subject.shapes[0].timed, (BF16, torch.device(DEVICE), subject.backward)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run_case(case, TRITON, *run)
    low, exact = run_case(case, REFERENCE, *run), run_case(case, REFERENCE, *run, wide=True)
    assert all(found.ok for found in judge_results(got, low, exact, BF16).values())
    assert tuned.choice_for(ARCH, subject.key) == replace(winner, reason="a test")


def test_a_row_takes_the_parameters_that_won_for_its_dtype_and_width(table):
    default = launch_configs.row_tile("rms_norm", ARCH, 32)
    table({Key("rms_norm", BF16, 32): Choice(fields={"rows": 2, "num_warps": 1}, reason="tuned")})
    won = launch_configs.row_tile("rms_norm", ARCH, 32, BF16)
    assert won == replace(default, rows=2, num_warps=1, reason="tuned") != default
    assert launch_configs.row_tile("rms_norm", ARCH, 32) == default  # what no launch asks for
    assert launch_configs.row_tile("rms_norm", ARCH, 32, torch.float32) == default
    assert launch_configs.row_tile("rms_norm", ARCH, 64, BF16) == launch_configs.row_tile("rms_norm", ARCH, 64)


def test_linear_gelu_takes_the_way_that_won(table):
    """Also where it is traced: it is a constant there."""
    x, weight, bias = (torch.zeros(shape, dtype=BF16, device=DEVICE) for shape in ((3, 4), (5, 4), (5,)))
    counted = []
    module = importlib.import_module("anyflow_kernels.triton_ops.linear_gelu")
    original = torch.ops.aten._addmm_activation.default

    def spied(*arguments: Any, **keywords: Any) -> Any:
        counted.append(1)
        return original(*arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.ops.aten, "_addmm_activation", spied)
        module.linear_gelu(x, weight, bias)
        assert len(counted) == (launch_configs.linear_gelu_way(torch.device(DEVICE), BF16) == "cublaslt")
        counted.clear()
        tuned.forget_tables()
        table({Key("linear_gelu", BF16): Choice(way="cublaslt", fields={})})
        module.linear_gelu(x, weight, bias)
        assert counted
    compiled = torch.compile(module.linear_gelu, fullgraph=True, backend="aot_eager")
    assert compiled(x, weight, bias).shape == (3, 5)


def served(q: torch.Tensor, k: torch.Tensor, flat: tuple[int, ...], phantom_keys: int = 0) -> tuple[str, Any]:
    chosen = forward.choose(q, k, k, flat, phantom_keys)
    return chosen.func.__name__, chosen.keywords.get("config") or chosen.args[0]


QUERIES, KEYS = (
    torch.zeros(1, 9, 2, 16, dtype=BF16, device=DEVICE),
    torch.zeros(1, 21, 2, 16, dtype=BF16, device=DEVICE),
)
DENSE, RANGES = (9, 0, 21, 0, 0, 0, 0), (9, 3, 21, 0, 0, 0, 0)
FEW, SOME = Key("far_attention", BF16, 16, "dense, few keys"), Key("far_attention", BF16, 16, "ranges")


def test_the_forward_that_won_comes_before_the_preferred_one(table, monkeypatch):
    """A library that won here is not tried again; what it cannot take goes to the next."""
    table({FEW: Choice(way="flash", fields={}), SOME: Choice(fields={"block_m": 16}, reason="tuned")})
    monkeypatch.setattr(forward, "refused", lambda q, k, v: None if q.shape[1] == 9 else "too long")
    monkeypatch.setattr(forward, "unproven", lambda library, q: pytest.fail("tried again"))
    assert served(QUERIES, KEYS, DENSE) == ("library_forward", "flash")
    name, row = served(QUERIES[:, :8], KEYS, (8, *DENSE[1:]))
    assert name == "launch_forward" and row.reason != "tuned"
    name, row = served(QUERIES, KEYS, RANGES)
    assert name == "launch_forward" and (row.block_m, row.reason) == (16, "tuned")
    assert served(QUERIES, KEYS, DENSE, phantom_keys=2) == (name, row)


def test_a_winner_with_descriptors_serves_only_what_they_can_address(table):
    """Layouts are promised, whatever won: an unaligned tensor takes the default row of pointers."""
    table({SOME: Choice(fields={"block_m": 16, "descriptors": True})})
    assert served(QUERIES, KEYS, RANGES)[1].descriptors
    unaligned = torch.zeros(1, 9, 2, 17, dtype=BF16, device=DEVICE)[..., 1:]
    row = served(unaligned, KEYS, RANGES)[1]
    assert not row.descriptors and row.block_m != 16
    with (
        tuned.forced(ARCH, {SOME: Choice(fields={"descriptors": True})}),
        pytest.raises(ValueError, match="descriptor"),
    ):
        served(unaligned, KEYS, RANGES)


def test_a_trial_is_never_served_by_something_else():
    """It would time the default under another's name."""
    before = served(QUERIES, KEYS, DENSE)
    with tuned.forced(ARCH, {FEW: Choice(way="gluon", fields={})}):
        with pytest.raises(ValueError, match="far_attention bfloat16 16 dense, few keys: gluon cannot take"):
            served(QUERIES, KEYS, DENSE)
    assert served(QUERIES, KEYS, DENSE) == before


@pytest.mark.parametrize("name", ["card", "torch", "triton", "cudnn", "driver", "kernels"])
def test_a_table_of_another_machine_is_named_once_and_not_used(name, table):
    path = table({Key("rms_norm", BF16, 32): Choice(fields={"rows": 2})}, **{name: "other"})
    default = launch_configs.row_tile("rms_norm", ARCH, 32)
    with pytest.warns(
        UserWarning, match=rf"{path.name}: not used, it was made for {name} other, here .*`anyflow tune`"
    ):
        assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16) == default
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16) == default


ENTRY = {"operation": "x", "dtype": "bfloat16", "size": 1, "shape": ""}


def table_of(*entries: dict[str, Any]) -> str:
    return json.dumps({"format": tuned.FORMAT, "machine": {}, "choices": entries})


DAMAGED = {
    "cut off": '{"format": 1, "mach',
    "not an object": "[]",
    "another format": '{"format": 2}',
    "no choices": '{"format": 1, "machine": {}}',
    "no key": table_of({"operation": "x"}),
    "no such dtype": table_of(ENTRY | {"dtype": "nn"}),
    "no fields": table_of(ENTRY | {"winner": {"way": "triton"}}),
    "fields that are no parameters": table_of(ENTRY | {"winner": {"way": "triton", "fields": {"rows": [1]}}}),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_table_is_named_and_not_used(content, table):
    path = table({})
    path.write_text(content)
    with pytest.warns(UserWarning, match=rf"{path.name}: not used, it is no tuning table .*anyflow tune --clear"):
        assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16) == launch_configs.row_tile("rms_norm", ARCH, 32)


def test_unknown_parameters_are_named_and_not_used(table):
    table({Key("rms_norm", BF16, 32): Choice(fields={"columns": 2})})
    with pytest.warns(UserWarning, match=r"rms_norm bfloat16 32: not used, it has unknown parameters"):
        assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16) == launch_configs.row_tile("rms_norm", ARCH, 32)


def test_no_file_is_read_after_the_first_launch(table, monkeypatch):
    path = table({Key("rms_norm", BF16, 32): Choice(fields={"rows": 2})})
    assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16).rows == 2
    path.unlink()
    monkeypatch.setattr(tuned, "read_table", lambda path: pytest.fail("read again"))
    assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16).rows == 2


def test_without_a_home_or_access_defaults_serve(monkeypatch):
    """No launch may fail for want of a table."""

    def fail(error: Exception) -> Callable[..., Any]:
        def raising(*arguments: Any) -> Any:
            raise error

        return raising

    monkeypatch.delenv("ANYFLOW_TUNING")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    for name, error in (("expanduser", RuntimeError("no home")), ("is_file", PermissionError("not yours"))):
        tuned.forget_tables()
        with monkeypatch.context() as patch:
            patch.setattr(Path, name, fail(error))
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                row = launch_configs.row_tile("rms_norm", ARCH, 32, BF16)
            assert row == launch_configs.row_tile("rms_norm", ARCH, 32)
            assert [str(w.message).partition(": ")[2][:24] for w in told] == ["not used, it cannot be r"] * (
                name == "is_file"
            )


def test_two_kinds_of_card_with_the_same_rows_take_the_defaults(table, monkeypatch):
    """Launches know the architecture alone: what won on an L40S is not known to win on the RTX 4090 beside it."""
    table({Key("rms_norm", BF16, 32): Choice(fields={"rows": 2})})
    monkeypatch.setattr(tuned, "_devices", lambda arch: [torch.device("cuda", i) for i in range(2)])
    monkeypatch.setattr(tuned, "_card", lambda device: ("L40S", "RTX 4090")[device.index])
    with pytest.warns(UserWarning, match="not used, L40S and RTX 4090 share launch parameters here"):
        assert launch_configs.row_tile("rms_norm", ARCH, 32, BF16) == launch_configs.row_tile("rms_norm", ARCH, 32)


def test_where_tables_lie(monkeypatch, tmp_path):
    monkeypatch.setenv("ANYFLOW_TUNING", "")
    assert tuned.table_path("NVIDIA H100 80GB HBM3") is None
    monkeypatch.setenv("ANYFLOW_TUNING", str(tmp_path / "mine.json"))
    assert tuned.table_path("NVIDIA H100 80GB HBM3") == tmp_path / "mine.json"
    monkeypatch.delenv("ANYFLOW_TUNING")
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.table_path("NVIDIA H100 80GB HBM3") == tmp_path / "anyflow" / "tuning_nvidia_h100_80gb_hbm3.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.table_path("H100") == Path("~/.cache/anyflow/tuning_h100.json").expanduser()
