"""`anyflow verify`: it passes here, and says so when an operation is wrong, writes where it must not, or raises."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch

from anyflow_kernels import OPERATIONS, portable
from anyflow_kernels.testing.cases import SIZES, Random, operation_cases
from anyflow_runtime.cli import main

TINY = ["verify", "--backend", "torch", "--device", "cpu", "--shapes", "tiny"]


def test_torch_is_within_budget_everywhere(capsys, tmp_path):
    """Every operation and both models, forward and backward, fp32 and bf16."""
    table = tmp_path / "table.json"
    assert main([*TINY, "--json", str(table)]) == 0
    assert "all within budget" in capsys.readouterr().out
    checks = json.loads(table.read_text())["checks"]
    assert all(check["ok"] and check["row_error"] <= check["row_budget"] for check in checks)
    subjects = {check["subject"].removesuffix(" backward") for check in checks}
    assert subjects == {*OPERATIONS, "AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"}
    assert {check["dtype"] for check in checks} == {"float32", "bfloat16"}


@pytest.mark.slow
def test_small_shapes_of_a_cpu_are_within_budget():
    assert main(["verify", "--backend", "torch", "--device", "cpu", "--dtype", "fp32"]) == 0


def scaled(result: Any) -> Any:
    return tuple(scaled(part) for part in result) if isinstance(result, tuple) else result * 1.001


def with_nan(result: Any) -> Any:
    result.flatten()[-1:].fill_(torch.nan)
    return result


def narrowed(result: Any) -> Any:
    return result.half()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_wrong_operation_fails(operation, monkeypatch, capsys):
    """A result that is wrong by 0.1 % in fp32 is outside the budget of every operation."""
    correct = getattr(portable, operation)

    def broken(*args: Any, **kwargs: Any) -> Any:
        return scaled(correct(*args, **kwargs))

    monkeypatch.setattr(portable, operation, broken)
    assert main([*TINY, "--dtype", "fp32", "--only", operation]) == 1
    assert "FAILED" in capsys.readouterr().out


def test_one_wrong_row_fails(monkeypatch, tmp_path):
    """One of 306 tokens, wrong by a tenth, in bf16: the whole stays within its budget."""
    correct = portable.gated_residual_layer_norm

    def broken(*args: Any) -> Any:
        x, y = correct(*args)
        y[0, 7] *= 1.1
        return x, y

    monkeypatch.setattr(portable, "gated_residual_layer_norm", broken)
    table = tmp_path / "table.json"
    arguments = ["verify", "--backend", "torch", "--device", "cpu", "--shapes", "small", "--dtype", "bf16"]
    assert main([*arguments, "--only", "gated_residual_layer_norm", "--json", str(table)]) == 1
    checks = [check for check in json.loads(table.read_text())["checks"] if not check["subject"].endswith("backward")]
    assert all(c["error"] <= c["budget"] and c["row_error"] > c["row_budget"] and not c["ok"] for c in checks)


@pytest.mark.parametrize(
    ("fault", "message"), [(with_nan, "NaN in other places"), (narrowed, "torch.float16, expected")]
)
def test_a_result_of_another_kind_fails(fault: Callable, message, monkeypatch, capsys):
    correct = portable.rms_norm
    monkeypatch.setattr(portable, "rms_norm", lambda *args: fault(correct(*args)))
    assert main([*TINY, "--dtype", "fp32", "--only", "rms_norm"]) == 1
    assert message in capsys.readouterr().out


@pytest.mark.parametrize("slot", [0, -1], ids=["before", "behind"])
def test_a_write_outside_its_slots_fails(slot, monkeypatch, capsys):
    """Slabs start as NaN; a kernel that fills one token too many changes where the NaNs are."""
    correct = portable.qk_norm_rope_append

    def broken(*args: Any) -> Any:
        out = correct(*args)
        if args[6] is not None:
            args[6][:, slot] = 0.0
        return out

    monkeypatch.setattr(portable, "qk_norm_rope_append", broken)
    assert main([*TINY, "--dtype", "fp32", "--only", "qk_norm_rope_append"]) == 1
    assert "k_cache: got NaN in other places" in capsys.readouterr().out


def test_an_operation_that_raises_fails_and_the_rest_is_still_checked(monkeypatch, capsys):
    def broken(*args: Any) -> Any:
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(portable, "rms_norm", broken)
    assert main([*TINY, "--dtype", "fp32", "--only", "rms_norm", "linear"]) == 1
    out = capsys.readouterr().out
    assert "RuntimeError: no such kernel" in out and "4 checks, 2 failed" in out


def test_a_model_whose_operation_is_wrong_fails(monkeypatch, capsys):
    """Also where only the model shows it: the operations themselves are not checked in this run."""
    correct = portable.far_attention
    monkeypatch.setattr(portable, "far_attention", lambda *args: scaled(correct(*args)))
    assert main([*TINY, "--dtype", "fp32", "--only", "AnyFlowFARTransformer3DModel"]) == 1
    assert "2 checks, 2 failed" in capsys.readouterr().out


def test_triton_runs_under_the_interpreter(capsys):
    """At tiny shapes without being told: the interpreter runs every program in Python."""
    pytest.importorskip("triton")
    names = ["rms_norm", "flow_map_step"]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    assert main(["verify", "--backend", "triton", "--device", device, "--dtype", "fp32", "--only", *names]) == 0
    assert "triton" in capsys.readouterr().out


@pytest.mark.slow
def test_triton_is_within_budget_everywhere():
    pytest.importorskip("triton")
    assert main(["verify", "--backend", "triton"]) == 0


def test_a_backend_that_cannot_run_is_skipped_with_its_reason(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["verify", "--shapes", "tiny", "--only", "rms_norm"]) == 0
    assert "skipped: triton: " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--backend", "triton"], "--backend: triton cannot run here: "),
        (["--backend", "cublas"], "argument --backend"),
        (["--device", "abacus"], "--device: got 'abacus'"),
        (["--dtype", "int8"], "argument --dtype"),
        (["--only", "softmax"], "--only: got softmax"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_exit_code_2(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["verify", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("anyflow verify: error: ") and message in error and error.count("\n") == 1


@pytest.mark.parametrize("scale", SIZES)
def test_cases_cover_every_operation(scale):
    assert {case.operation for case in operation_cases(SIZES[scale])} == set(OPERATIONS)


def test_inputs_are_the_same_at_every_call():
    """Backends, reference and float64 are compared on inputs that each of them makes anew."""
    for case in operation_cases(SIZES["tiny"]):
        first, second = (case.make(Random(0, torch.float32, torch.device("cpu"))) for _ in range(2))
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, second[name], rtol=0, atol=0, equal_nan=True)
