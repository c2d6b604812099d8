"""`anyflow info` and `anyflow bench`: what this machine can do, and the benches of the checkout."""

from __future__ import annotations

import sys

import torch

from anyflow_kernels import available_backends
from anyflow_runtime.cli import main
from anyflow_runtime.commands import bench as bench_command


def test_info_tells_backends_versions_and_extension(capsys):
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    for backend in available_backends():
        assert f" {backend} " in out
    assert torch.__version__ in out and "C++ extension" in out and sys.version.split()[0] in out


def test_info_says_why_a_backend_cannot_run(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["info"]) == 0
    assert "cannot run: no CUDA device" in capsys.readouterr().out


def test_info_says_how_to_build_the_extension(capsys, monkeypatch):
    monkeypatch.setattr("anyflow_kernels.patch_embed._load_error", ImportError("no _C"))
    assert main(["info"]) == 0
    out = capsys.readouterr().out
    assert "not built" in out and "pip install -e . --no-build-isolation" in out and "plain PyTorch" in out


def test_info_prints_the_launch_configs_with_their_reasons(capsys):
    assert main(["info", "--launch-configs"]) == 0
    out = capsys.readouterr().out
    assert "operation=rms_norm" in out and "rows a program" in out


def test_bench_lists_the_benches_of_the_checkout(capsys):
    assert main(["bench"]) == 0
    assert "patch_embed " in capsys.readouterr().out


def test_bench_passes_arguments_and_exit_code_on(capsys):
    assert main(["bench", "patch_embed", "--help"]) == 0
    assert "--repeats" in capsys.readouterr().out
    assert main(["bench", "patch_embed", "--repeats", "many"]) == 2


def test_bench_of_unknown_name_lists_what_there_is(capsys):
    assert main(["bench", "common"]) == 2
    assert "name: got 'common', expected one of " in capsys.readouterr().err


def test_bench_outside_a_checkout_says_what_to_do(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_command, "__file__", str(tmp_path / "anyflow_runtime" / "commands" / "bench.py"))
    assert main(["bench", "patch_embed"]) == 2
    assert "clone the repository" in capsys.readouterr().err
