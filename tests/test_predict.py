"""Predictions: what a hand can compute, and that they say what they are."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from anyflow_kernels import AttentionPlan, FarLayout, launch_configs
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.pipe_model import CHIPS, Chip
from bench import model_bounds, predict

from .test_streaming_launches import AROUND, PER_BLOCK

ROOT = Path(__file__).parent.parent
ROUND = Chip(name="round", arch=80, multiprocessors=10, clock_ghz=1.0, dram_gb_s=1000, products=1000)
CHUNK_6 = FarLayout((1, 3, 3, 3, 3, 3, 3), 60, 104, mode="inference")


@pytest.fixture
def pipes(monkeypatch):
    """Without a compiler: an inner loop that takes 2,000 cycles of products and reaches half of the peak."""
    model = {"cycles": {"tensor": 2000}, "redundancy": 1.0, "bound": 1.0, "expected": 0.5}
    monkeypatch.setattr(model_bounds, "pipe_row", lambda kind, fields, chip, head_dim: (model, 1))


def before() -> predict.Rules:
    try:
        return predict.rules_of(predict.BEFORE)
    except SystemExit as error:
        pytest.skip(f"a clone without that commit: {error}")


class Uncut:
    """In the place of `launch_configs.attention`: for all calls the A100's row, which never splits keys here."""

    FORWARD_KERNELS = (launch_configs.ForwardKernel(arch=80, reason="a test"),)
    ATTENTION_FORWARD = launch_configs.ATTENTION_FORWARD

    @staticmethod
    def attention_row(*_):
        return replace(launch_configs.attention_row(launch_configs.ATTENTION_FORWARD, 80, 128, 2), split_cost=None)


UNCUT = predict.TODAY._replace(early=False, rows=Uncut)


def test_a_gemm_takes_whole_waves():
    one_wave = 128 * 128 * 1000 / (0.8 * 1000 * 1e9)  # a tile of 128 x 128 at 80 % of the peak
    assert predict.gemm(ROUND, 256, 1000, 512).gemm == pytest.approx(one_wave)  # 8 tiles on 10 multiprocessors
    # 11 tiles of 128 x 128 are two waves, 8 of 128 x 192 one.
    assert predict.gemm(ROUND, 128, 1000, 11 * 128).gemm == pytest.approx(1.5 * one_wave)
    few = predict.gemm(replace(ROUND, dram_gb_s=10), 1, 5000, 5000)
    assert few.gemm == pytest.approx(2 * (5000 * 5000 + 2 * 5000) / (0.85 * 10e9)), "the weights' bytes"
    assert few.gaps == predict.GAP


def test_a_forward_is_its_longest_program(pipes):
    """Fewer tiles than multiprocessors: one of them is the time, all is read once, nothing is merged."""
    plan, chip = AttentionPlan.dense(512, 256), CHIPS["A100"]
    blocks = 256 // Uncut.attention_row().block_n + 1
    work = predict.attention(chip, plan, 4, UNCUT)
    assert work.attention == pytest.approx(blocks * 2000 / (0.5 * predict.PIPE_SHARE) / 1.41e9)
    assert work.dram_bytes == 2 * 128 * 2 * 4 * (512 + 256)


def test_a_step_launches_what_the_model_launches(pipes, monkeypatch):
    monkeypatch.setattr(predict, "key_bytes", lambda *_: 0.0)
    work = predict.forward(CHIPS["A100"], "1.3B", CHUNK_6, UNCUT)
    assert work.gaps / predict.GAP == pytest.approx(30 * PER_BLOCK + sum(AROUND.values()))
    keys = predict.forward(CHIPS["A100"], "1.3B", CHUNK_6, UNCUT, keys_only=True)
    assert keys.gaps / predict.GAP == pytest.approx(29 * PER_BLOCK + 3 + 1), "the last block stops after its keys"


def test_before_and_after_differ_in_what_they_read(pipes):
    old, new = (predict.chunk_rows("H100", "1.3B", 6, 4, rules) for rules in (before(), predict.TODAY))
    assert old["attention_dram_gb_per_layer"] > 3 > 0.3 > new["attention_dram_gb_per_layer"]
    assert old["step_ms"] > new["step_ms"]
    assert new["chunk_s"] == pytest.approx((4 * new["step_ms"] + new["prefill_ms"]) / 1e3)


def test_of_an_unknown_commit():
    with pytest.raises(SystemExit, match="--before: got 'nowhere'"):
        predict.rules_of("nowhere")


def test_what_does_not_fit_is_said(pipes, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["predict", "--card", "RTX 4090", "--chunk", "0"])
    predict.main()
    out = capsys.readouterr().out
    assert out.startswith("model, not measurement")
    assert "**14B on RTX 4090** (model, not measurement; weights and cache take 43 GB, the card has 24)" in out
    rows = json.loads(out.splitlines()[-1])
    assert {row["model"] for row in rows} == set(MODELS) and all("not measurement" in row["kind"] for row in rows)


def test_the_command_compiles_and_predicts():
    """A chunk of the 1.3B on an H100 is some milliseconds a step."""
    arguments = ["--card", "H100", "--model", "1.3B", "--chunk", "0"]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    out = subprocess.run(
        [sys.executable, "-m", "bench.predict", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    (row,) = json.loads(out.splitlines()[-1])
    assert 2 < row["step_ms"] < 20
