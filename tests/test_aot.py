"""Compiling kernels for GPUs that are not here: what the rows say, and that bad kernels are rejected.

The compiler needs a Python without TRITON_INTERPRET, so these tests start one.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from anyflow_kernels import aot, launch_configs, load_ops
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.launch_configs import gpus

ROOT = Path(__file__).parent.parent
KEYS = {
    "kernel",
    "target",
    "shape",
    "registers",
    "spill_bytes",
    "shared_bytes",
    "tensor_core_instructions",
    "memory_instructions",
    "fma_dots",
    "blocks_per_multiprocessor",
    "occupancy_limit",
    "model",
    "problems",
}
# A spilling tile, a product in FMA units, more shared memory than the chip has, mma.sync where wgmma belongs, products
# that 8 warps compute 1.5 times, a row that claims more than its kernel can reach, and a load before the wait for the
# kernel in front.
BAD_KERNELS = """
import importlib, json
from dataclasses import replace
import triton, triton.language as tl
from anyflow_kernels import aot, launch_configs
from anyflow_kernels.aot_case import AotCase
from anyflow_kernels.triton_ops.dependent_launch import wait_for_predecessor
from anyflow_kernels.triton_ops.far_attention_cases import attention_case

@triton.jit
def early(a_ptr, b_ptr, PDL: tl.constexpr):
    x = tl.load(a_ptr)
    wait_for_predecessor(PDL)
    tl.store(b_ptr, x)

@triton.jit
def product(a, b, c, PRECISION: tl.constexpr):
    i = tl.arange(0, 32)
    offsets = i[:, None] * 32 + i[None, :]
    tl.store(c + offsets, tl.dot(tl.load(a + offsets), tl.load(b + offsets), input_precision=PRECISION))

kernel = importlib.import_module("anyflow_kernels.triton_ops.far_attention")._far_attention_forward_kernel
config = launch_configs.attention_row(launch_configs.ATTENTION_FORWARD, 90, 128, 2)
def attention(**changes):
    return attention_case(kernel, replace(config, **changes), "bad", 128)
backward = importlib.import_module("anyflow_kernels.triton_ops.far_attention_backward")._far_attention_dkdv_kernel
twice = attention_case(backward, replace(config, block_m=64, block_n=64, descriptors=False), "bad", 128)

fp32 = {name: "*fp32" for name in "abc"}
cases = {
    "spill": attention(num_warps=4),
    "shared": attention(block_n=64, num_stages=8),
    "twice": twice,
    "claim": replace(attention(block_n=64, descriptors=False), bound=100),
    "fma": AotCase(product, "bad", fp32, {"PRECISION": "ieee"}, tensor_cores=True),
    "mma": AotCase(product, "bad", {**fp32, "a": "*bf16", "b": "*bf16"}, {"PRECISION": "tf32"}, requires="HGMMA"),
    "early": AotCase(early, "bad", {"a_ptr": "*fp32", "b_ptr": "*fp32"}, {"PDL": True}),
}
print(json.dumps({name: aot.compile_case(case, 90)["problems"] for name, case in cases.items()}))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def attention_rows(tmp_path_factory) -> list[dict]:
    path = tmp_path_factory.mktemp("aot") / "rows.json"
    options = ["--target", "sm_90", "--kernel", "far_attention_forward", "--json", str(path), "--check"]
    result = python("-m", "anyflow_kernels.aot", *options, "--processes", "1")
    assert result.returncode == 0, result.stdout + result.stderr
    return json.loads(path.read_text())


def test_rows_hold_what_they_promise(attention_rows):
    for row in attention_rows:
        assert row.keys() >= KEYS
        assert (row["kernel"], row["target"]) == ("far_attention_forward_kernel", "sm_90")


def test_attention_on_sm_90_is_wgmma_and_tma_without_spills(attention_rows):
    """At the shapes of both models."""
    for model in MODELS:
        (row,) = [row for row in attention_rows if row["shape"].startswith(model + " ")]
        assert row["tensor_core_instructions"]["HGMMA"] > 0
        assert row["memory_instructions"]["UTMALDG"] > 0
        assert row["spill_bytes"] == row["fma_dots"] == 0
        assert 0 < row["registers"] <= 255 and row["shared_bytes"] <= launch_configs.GPUS[90].shared_bytes
        # 128 queries by 128 keys: two products of 128 channels, 16 exponentials a clock against 2,048 multiply-adds.
        pipes = row["model"]
        assert pipes["redundancy"] == 1.0 and pipes["cycles"]["tensor"] == 2 * 128 * 128 * 128 / 2048
        assert 128 * 128 / 16 <= pipes["cycles"]["mufu"] <= 1.1 * 128 * 128 / 16
        assert pipes["bound"] == 1.0 and pipes["busiest"] == "tensor" and 0.5 < pipes["serial"] < pipes["bound"]


def test_bad_kernels_are_rejected(tmp_path):
    script = tmp_path / "bad_kernels.py"  # Triton reads a kernel's source from its file
    script.write_text(BAD_KERNELS)
    result = python(str(script))
    assert result.returncode == 0, result.stderr
    problems = json.loads(result.stdout)
    assert any("spills" in p for p in problems["spill"])
    assert any("shared memory" in p for p in problems["shared"])
    assert any("FMA" in p for p in problems["fma"]) and any("no tensor-core" in p for p in problems["fma"])
    assert problems["mma"] == ["no HGMMA"]
    assert problems["twice"] == ["1.50 times the matrix products that the tile needs"]
    assert problems["claim"] == ["bound 90%, its row says 100 %"]
    assert problems["early"] == ["touches global memory before griddepcontrol.wait"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="about the interpreter")
def test_nothing_to_compile_under_the_interpreter():
    case, *_ = importlib.import_module("anyflow_kernels.triton_ops.far_attention_cases").aot_cases(90)
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET"):
        aot.compile_case(case, 90)


@pytest.fixture(autouse=True)
def fresh_architectures():
    """What a test says of a GPU that is not here ends with it."""
    yield
    gpus._cuda_architecture.cache_clear()


@pytest.mark.parametrize("arch", launch_configs.ARCHITECTURES)
def test_every_attention_row_is_compiled(arch):
    """A row that no check compiles could spill unseen."""
    cases = importlib.import_module("anyflow_kernels.triton_ops.far_attention_cases").aot_cases(arch)
    kernels = {"ATTENTION_FORWARD": "forward", "ATTENTION_DQ": "dq", "ATTENTION_DKDV": "dkdv"}
    for table, name in kernels.items():
        own = [case for case in cases if case.name == f"far_attention_{name}_kernel"]
        compiled = {(c.constexprs["BLOCK_M"], c.constexprs["BLOCK_N"], c.num_warps, c.num_stages) for c in own}
        for row in launch_configs.rows_for(getattr(launch_configs, table), arch):
            assert (row.block_m, row.block_n, row.num_warps, row.num_stages) in compiled, row


@pytest.mark.parametrize("arch", [launch_configs.INTERPRETER, *launch_configs.ARCHITECTURES])
@pytest.mark.parametrize("table", ["ATTENTION_FORWARD", "ATTENTION_DQ", "ATTENTION_DKDV"])
def test_every_head_dim_has_a_row(arch, table):
    for head_dim in (12, 16, 44, 64, 65, 128):
        for itemsize in (2, 4):
            for descriptors in (False, True):
                row = launch_configs.attention_row(
                    getattr(launch_configs, table), arch, head_dim, itemsize, descriptors
                )
                assert row.head_dim >= head_dim and (descriptors or not row.descriptors) and row.reason
    with pytest.raises(ValueError, match="129 channels"):
        launch_configs.attention_row(getattr(launch_configs, table), arch, 129, 2)


@pytest.mark.parametrize("table", ["ATTENTION_FORWARD", "ATTENTION_DQ", "ATTENTION_DKDV"])
def test_rows_are_chosen_by_the_pipe_model(table):
    """`aot --check` recomputes the bounds; where all pipes overlap, mma.sync on its newer chips is the limit."""
    for arch in launch_configs.ARCHITECTURES:
        rows = [r for r in launch_configs.rows_for(getattr(launch_configs, table), arch) if r.itemsize == 2]
        assert all(row.bound and "model: " in row.reason for row in rows)
        assert arch not in (86, 89, 120) or {row.bound for row in rows} == {100}


def test_occupancy_counts_registers_in_blocks_of_eight():
    """170 registers are allocated as 176: one block of 256 threads; 128 registers let two in."""
    assert aot._occupancy(90, 170, 256, 1024) == (1, "registers")
    assert aot._occupancy(90, 128, 256, 1024) == (2, "registers")
    assert aot._occupancy(90, 32, 128, 100 * 1024) == (2, "shared memory")
    assert aot._occupancy(100, 32, 128, 1024, tensor_memory=256) == (2, "tensor memory")
    assert aot._occupancy(100, 32, 128, 1024, tensor_memory=576) == (0, "tensor memory")


@pytest.mark.parametrize(
    ("capability", "arch"),
    [
        ((8, 0), 80),
        ((8, 6), 86),
        ((8, 7), 80),
        ((8, 9), 89),
        ((9, 0), 90),
        ((10, 3), 100),
        ((11, 0), 100),
        ((12, 0), 120),
        ((12, 1), 120),
    ],
    ids=str,
)
def test_known_chips_have_rows(capability, arch, monkeypatch, recwarn):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    gpus._cuda_architecture.cache_clear()
    assert launch_configs.architecture("cuda:0") == arch and not recwarn


@pytest.mark.parametrize(("capability", "arch"), [((13, 0), 120), ((8, 2), 80), ((9, 5), 90)], ids=str)
def test_a_chip_without_rows_says_whose_it_takes(capability, arch, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    gpus._cuda_architecture.cache_clear()
    with pytest.warns(UserWarning, match=rf"got {capability[0]}\.{capability[1]}, expected .* rows of sm_{arch} "):
        assert launch_configs.architecture("cuda:0") == arch


@pytest.mark.parametrize("capability", [(9, 4), (9, 0), (11, 0)], ids=str)
def test_rocm_is_refused(capability, monkeypatch):
    """An AMD GPU says it has a capability: an MI300's is 9.4, which would be taken for an H100's kind."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", "6.4.1")
    gpus._cuda_architecture.cache_clear()
    with pytest.raises(RuntimeError, match=r"device: got an AMD GPU \(ROCm 6.4.1\), expected an NVIDIA GPU"):
        launch_configs.architecture("cuda:0")
    with pytest.raises(RuntimeError, match=r"backend 'triton' cannot run here: ROCm 6.4.1"):
        load_ops("triton")


def test_dependent_launches_start_with_hopper():
    assert [arch for arch in launch_configs.ARCHITECTURES if launch_configs.pdl(arch)] == [90, 100, 120]
    assert not launch_configs.pdl(launch_configs.INTERPRETER)


def test_a_chip_too_old_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    gpus._cuda_architecture.cache_clear()
    with pytest.raises(RuntimeError, match=r"compute capability: got 7.5, expected 8.0 or newer"):
        launch_configs.architecture("cuda:0")


@pytest.mark.parametrize("arch", [launch_configs.INTERPRETER, *launch_configs.ARCHITECTURES])
def test_every_chip_has_a_forward_with_a_reason(arch):
    (row,) = launch_configs.rows_for(launch_configs.FORWARD_KERNELS, arch)
    assert {row.dense, row.ranges} <= {"triton", "gluon", "cudnn", "flash"} and row.reason
