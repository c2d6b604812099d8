"""What every bench shares: the machine line, interleaved medians, the parity check before timing, rows kept one by one.

Timings on a shared machine drift, so contestants take turns within one process and only ratios of medians are compared.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.testing.budget import relative_error

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


def interleaved_medians(fns: Mapping[str, Callable[[], Any]], repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each function. They take turns, so that a drift of the machine meets all of them alike.

    Args:
        fns: name to a function without arguments; on CUDA it is timed with events, to the end of its kernels.
        repeats: timed rounds.
        warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in fns}
    for round_ in range(warmup + repeats):
        for name, fn in fns.items():
            elapsed = _time_once(fn)
            if round_ >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


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


def graphed(call: Callable[[], Any], device: str, name: str = "") -> tuple[Callable[[], Any], bool]:
    """On CUDA a graph of the call, so that what is timed is the GPU and not Python, and whether there is one.

    What cannot be captured, because it synchronises, stays as it is, and is printed.
    """
    if device != "cuda":
        return call, True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"not captured: {name} ({str(error).strip().splitlines()[0]})")
        return call, False
    return graph.replay, True


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


def _time_once(fn: Callable[[], Any]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        fn()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start_event.record()
    fn()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
