"""What every bench shares: the machine line, interleaved medians, the parity check before timing, rows kept one by one.

Timings on a shared machine drift, so contestants take turns within one process and only ratios of medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.testing.budget import relative_error
from anyflow_kernels.tuning.timing import graphed, interleaved_medians

__all__ = [
    "MODEL_ARGUMENTS", "add_json_argument", "check_close", "graphed", "interleaved_medians", "keep_row", "machine_line",
    "print_rows",
]  # fmt: skip

# Constructor arguments of the released models.
MODEL_ARGUMENTS: dict[str, dict[str, Any]] = {
    name: {
        "num_attention_heads": size["heads"],
        "attention_head_dim": size["head_dim"],
        "num_layers": size["layers"],
        "ffn_dim": size["ffn"],
    }
    for name, size in MODELS.items()
}


def machine_line(*packages: str) -> str:
    """One line: device, cores and threads, system, Python, torch and the versions of `packages`."""
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    else:
        device = f"{_processor()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    versions = [f"Python {platform.python_version()}", f"torch {torch.__version__}"]
    for package in packages:
        try:
            versions.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            versions.append(f"{package} missing")
    return " | ".join([device, f"{platform.system()} {platform.machine()}", *versions])


def check_close(name: str, out: Tensor, ref: Tensor, tolerance: float) -> float:
    """The relative error of `out` against another implementation, within `tolerance`: a wrong kernel has no speed.

    Raises:
        AssertionError: naming the contestant, if shapes differ or the error is larger or NaN.
    """
    if out.shape != ref.shape:
        raise AssertionError(f"{name}: got shape {tuple(out.shape)}, expected {tuple(ref.shape)}")
    error = relative_error(out, ref)
    if not error <= tolerance:
        raise AssertionError(f"{name}: relative error {error:.3g} against the reference, expected <= {tolerance:.3g}")
    return error


def add_json_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="append each row to this file as it is measured, in JSON")


def keep_row(row: dict[str, Any], path: str | Path | None) -> None:
    """Append a row to a file, if any, with command and machine: a bench that is killed keeps what it measured."""
    if path is not None:
        source = {"command": shlex.join([Path(sys.argv[0]).stem, *sys.argv[1:]]), "machine": machine_line("triton")}
        with Path(path).open("a") as file:
            file.write(json.dumps({**row, **source}) + "\n")


def print_rows(rows: list[dict[str, Any]]) -> None:
    """The rows as the last line of a bench, in JSON."""
    print(json.dumps(rows), flush=True)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
