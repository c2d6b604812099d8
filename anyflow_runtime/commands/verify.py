"""Check every operation and both models on this machine's backends.

Each backend is compared with float64 and with the reference backend. Errors are relative, of the whole and of the worst
row; against float64 each may be twice the reference's own in the same dtype plus one rounding step of it (two for a
row; twice as many for gradients). Exit code 1 if anything is outside its budget. With TRITON_INTERPRET=1 the triton
backend is checked on a CPU at tiny shapes.
"""

from __future__ import annotations

import argparse
import os
import platform
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING

from ..files import write_json
from . import UsageError
from .arguments import BACKENDS, dtype_name, resolve_device

if TYPE_CHECKING:
    import torch

    from anyflow_kernels import Ops

    from ..verification.verdicts import Verdict

_HEADER = (
    f"{'operation':35}{'shape':59}{'dtype':10}{'backend':10}{'error':>9}{'budget':>9}{'worst row':>11}{'budget':>9}"
    f"{'reference':>11}{'between':>9}"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    names = [name for name in BACKENDS if name != "auto"]
    parser.add_argument("--backend", choices=names, help="only this one; default: every one that can run here")
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: the GPU if there is one")
    parser.add_argument("--dtype", type=dtype_name, help="fp32, bf16 or fp16; default: fp32 and bf16")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="only these operations and models")
    parser.add_argument(
        "--shapes",
        choices=["tiny", "small", "real"],
        help="default: real on a GPU (AnyFlow 1.3B at 480p), small on a CPU, tiny under the Triton interpreter",
    )
    parser.add_argument("--json", metavar="FILE", help="also write the table there")


def run(args: argparse.Namespace) -> int:
    import torch

    from anyflow_kernels.operations import OPERATIONS

    from ..models import MODELS

    known = (*OPERATIONS, *MODELS)
    unknown = sorted(set(args.only or ()) - set(known))
    if unknown:
        raise UsageError(f"--only: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    device = resolve_device(args.device)
    dtypes = [getattr(torch, args.dtype)] if args.dtype else [torch.float32, torch.bfloat16]
    groups = _backends_by_shapes(args, device)
    print(f"torch {torch.__version__}, Python {platform.python_version()}, {_device_name(device)}\n")
    print(_HEADER)
    verdicts = []
    for shapes, backends in groups.items():
        for verdict in _verify(shapes, args.only or known, backends, dtypes, device):
            print(_row(verdict), flush=True)
            verdicts.append(verdict)
    failures = sum(not verdict.ok for verdict in verdicts)
    print(
        f"\n{len(verdicts)} checks, {failures} failed" if failures else f"\n{len(verdicts)} checks, all within budget"
    )
    if args.json:
        rows = [{**asdict(verdict), "ok": verdict.ok} for verdict in verdicts]
        write_json(args.json, {"torch": torch.__version__, "device": _device_name(device), "checks": rows}, indent=1)
    return 1 if failures else 0


def _backends_by_shapes(args: argparse.Namespace, device: torch.device) -> dict[str, dict[str, Ops]]:
    """The backends to check, by the shapes they are checked at. Those that cannot run are printed with the reason."""
    from anyflow_kernels import available_backends, load_ops

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    groups: dict[str, dict[str, Ops]] = {}
    for name, obstacle in available_backends().items():
        wanted = name == args.backend if args.backend else name != "reference"  # it is in every row as it is
        if not wanted:
            continue
        if obstacle is None and name == "triton" and device.type != "cuda" and not interpreted:
            obstacle = f"--device is {device}"
        if obstacle is not None:
            if args.backend:
                raise UsageError(f"--backend: {name} cannot run here: {obstacle}")
            print(f"skipped: {name}: {obstacle}")
            continue
        default = "real" if device.type == "cuda" else "small"
        if name == "triton" and interpreted:
            default = "tiny"
        groups.setdefault(args.shapes or default, {})[name] = load_ops(name)
    return groups


def _verify(
    shapes: str, names: Sequence[str], backends: dict[str, Ops], dtypes: list[torch.dtype], device: torch.device
) -> Iterator[Verdict]:
    from anyflow_kernels.testing.cases import SIZES, operation_cases

    from ..verification.model_cases import model_cases
    from ..verification.verdicts import verify_model, verify_operation

    # The reference runs flex_attention uncompiled on a CPU on purpose.
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    for case in operation_cases(SIZES[shapes]):
        for dtype in dtypes if case.operation in names else []:
            yield from verify_operation(case, backends, dtype, device)
    for model in model_cases(SIZES[shapes]):
        for dtype in dtypes if model.model.__name__ in names else []:
            yield from verify_model(model, backends, dtype, device)


def _row(v: Verdict) -> str:
    text = f"{v.subject:35}{v.shape:59}{v.dtype:10}{v.backend:10}"
    if v.problem:
        return f"{text}  FAILED: {v.problem}"
    judged = f"{v.error:9.1e}{v.budget:9.1e}{v.row_error:11.1e}{v.row_budget:9.1e}"
    return f"{text}{judged}{v.reference_error:11.1e}{v.difference:9.1e}  {'ok' if v.ok else 'FAILED'}"


def _device_name(device: torch.device) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({platform.machine()})"
