"""Every example runs, at small settings, and shows what its docstring says."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drop_in_is_undone_and_agrees_where_padding_is_reproduced() -> None:
    pytest.importorskip("diffusers")
    differences = load("drop_in").main(["--steps", "1", "--height", "32", "--width", "48"])
    assert differences["restore(pipe)"] == 0
    assert differences["with diffusers' padding"] < 1e-4 < differences["accelerate(pipe)"]


def test_stream_prompt_change_writes_a_video(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("PIL")
    out = tmp_path / "change.gif"
    frames = load("stream_prompt_change").main(["--chunks", "1", "--steps", "1", "--out", str(out)])
    assert out.stat().st_size > 0 and frames == 5  # chunks of 1, 2 and 2
    assert "moves left" in capsys.readouterr().out


@pytest.mark.parametrize("operation", ["far_attention", "qk_norm_rope_append"])
def test_verify_kernel_finds_the_operation_right(operation: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert load("verify_kernel").main(["--operation", operation, "--shapes", "tiny"])
    assert "within budget" in capsys.readouterr().out


def test_verify_kernel_finds_a_wrong_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    from anyflow_kernels import portable

    right = portable.rms_norm
    monkeypatch.setattr(portable, "rms_norm", lambda *args: right(*args) * 1.1)
    arguments = ["--operation", "rms_norm", "--shapes", "tiny", "--backend", "torch"]
    assert not load("verify_kernel").main(arguments)


@pytest.mark.parametrize("steps", ["2", pytest.param("150", marks=pytest.mark.slow)])
def test_train_demo_minute_trains_and_samples(steps: str, tmp_path: Path) -> None:
    pytest.importorskip("PIL")
    batch = "2" if steps == "2" else "16"
    sheet = load("train_demo_minute").main(["--out", str(tmp_path), "--steps", steps, "--batch", batch])
    assert sheet.stat().st_size > 0 and (tmp_path / "model" / "model_index.json").is_file()
