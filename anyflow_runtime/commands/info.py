"""Versions, devices, the C++ extension, which backends can run here and why not, and which kernels serve and why."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from dataclasses import asdict, is_dataclass
from importlib import metadata
from typing import Any

PACKAGES = (
    "anyflow-kernels",
    "torch",
    "triton",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "av",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--launch-configs",
        action="store_true",
        help="also print the launch parameters of the Triton kernels for this GPU",
    )


def run(args: argparse.Namespace) -> int:
    from anyflow_kernels import available_backends, load_ops
    from anyflow_kernels.patch_embed import extension_obstacle

    print(f"Python          {platform.python_version()} ({sys.executable})")
    print(f"system          {platform.platform()}, {os.cpu_count()} cores")
    for package in PACKAGES:
        print(f"{package:16}{_version(package)}")
    for line in _devices():
        print(f"device          {line}")
    print(f"C++ extension   {extension_obstacle() or 'built'}")
    for name, obstacle in available_backends().items():
        print(f"backend         {name:10} {'can run' if obstacle is None else f'cannot run: {obstacle}'}")
    print(f"auto            {load_ops('auto').backend}")
    print("\n".join(_choices()))
    if args.launch_configs:
        print("\n".join(_launch_configs()))
    return 0


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    import torch

    if not torch.cuda.is_available():
        built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU alone"
        return [f"cpu, {torch.get_num_threads()} threads; no GPU (this torch is built for {built_for})"]
    lines = []
    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        size = f"{gpu.total_memory / 2**30:.0f} GiB, {gpu.multi_processor_count} multiprocessors"
        lines.append(
            f"cuda:{index} {gpu.name}, compute capability {gpu.major}.{gpu.minor}, {size}, CUDA {torch.version.cuda}"
        )
    return lines


def _choices() -> list[str]:
    """What serves each launch of the released models on the first device, and why."""
    import torch

    from anyflow_kernels import available_backends
    from anyflow_kernels.tuning.report import current_choices

    if available_backends()["triton"]:
        return ["choices         none: backend triton cannot run here"]
    try:
        lines = list(current_choices(torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")))
    except RuntimeError as error:
        return [f"choices         none for this GPU: {error}"]
    return [f"choices         {lines[0]}", *(f"  {line}" for line in lines[1:])]


def _launch_configs() -> list[str]:
    """The rows of every table in `anyflow_kernels.launch_configs` that serve the first device."""
    import torch

    from anyflow_kernels import launch_configs

    try:
        arch = launch_configs.architecture("cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as error:
        return [f"launch configs: none for this GPU: {error}"]
    chip = f"sm_{arch}" if arch else "the interpreter"
    lines = [f"launch configs for {chip} (compiled: seen by the compiler; timed: measured):"]
    for name, table in vars(launch_configs).items():
        if name.startswith("_") or not isinstance(table, tuple):
            continue
        for row in (row for row in table if _serves(row, arch)):
            fields = {k: v for k, v in asdict(row).items() if k not in ("arch", "archs", "reason")}
            described = ", ".join(f"{k}={v}" for k, v in fields.items())
            lines += [f"  {name}: {described}", f"      {row.reason}"]
    return lines


def _serves(row: Any, arch: int) -> bool:
    return is_dataclass(row) and arch in getattr(row, "archs", (getattr(row, "arch", None),))
