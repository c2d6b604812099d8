"""What the benches of the memory-bound kernels share: real shapes, ceilings, contestants, parity, the table.

On CUDA every contestant is captured into a graph of several calls on rotating inputs, larger together than the L2, so
what is timed is the GPU and not Python, and no call finds its inputs in the cache.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import FarLayout, available_backends, load_ops
from anyflow_kernels.aot_case import MODELS

from .common import check_close, interleaved_medians, machine_line, relative_error, write_rows
from .roofline import draw_roofline

PARTITION = (1, 3, 3, 3, 3, 3, 3, 2)  # 81 frames of video
ROTATED_BYTES = 256 * 2**20  # several times the L2 of any GPU here


def _layouts() -> dict[str, FarLayout]:
    def layout(chunks: int, **options: Any) -> FarLayout:
        return FarLayout(PARTITION[:chunks], 60, 104, **options)

    return {
        "chunk 0": layout(1, mode="inference"),
        "chunk 1": layout(2, mode="inference"),
        "chunk 6": layout(7, mode="inference"),
        "chunk 7": layout(8, mode="inference"),
        "prefill after chunk 6": layout(7, mode="prefill", cached=4),
        "bidirectional": FarLayout((21,), 60, 104),
        "training, clean copy": layout(8, clean=True),
    }


LAYOUTS = _layouts()  # 480p: 1,560 full and 390 compressed tokens a frame
CPU_LAYOUTS = ("chunk 0",)


@dataclass(frozen=True)
class Case:
    """One shape. `make(generator, device, dtype)` gives `(args, kwargs)`; `bytes_moved` and `flops` are of one call."""

    name: str
    make: Callable[[torch.Generator, str, torch.dtype], tuple[tuple, dict[str, Any]]]
    bytes_moved: int
    flops: int = 0  # of matrix products: the GEMM ceiling is the roof
    elementwise_flops: int = 0  # of everything else: the copy ceiling is the roof
    backward: bool = False


def model_cases() -> Iterator[tuple[str, dict[str, int], FarLayout]]:
    """`(name, sizes of the model, layout)` of every real shape: both models on CUDA, a small selection on a CPU."""
    on_cuda = torch.cuda.is_available()
    for model, size in MODELS.items():
        for name, layout in LAYOUTS.items():
            if on_cuda or (model == "1.3B" and name in CPU_LAYOUTS):
                yield f"{model} {name}", size, layout


def run(operation: str, doc: str | None, cases: Callable[[torch.dtype], Sequence[Case]]) -> None:
    """The command line of a bench: check and time every contestant at every case, print a table and rows as JSON."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"], default="bfloat16" if device == "cuda" else "float32"
    )
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", help="also write the rows to this file")
    parser.add_argument("--plot", help="write a roofline picture to this file")
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    print(machine_line("triton", "anyflow-kernels"))
    copy, gemm = copy_bandwidth(device), gemm_rate(device, dtype)
    print(f"ceilings: copy {copy / 1e9:.0f} GB/s, {options.dtype} GEMM {gemm / 1e12:.2f} TFLOP/s")
    print("; ".join(_skipped(device)) or "nothing skipped")
    rows = []
    for case in cases(dtype):
        rows += _bench_case(operation, case, device, dtype, options.repeats, copy, gemm)
    if options.plot:
        draw_roofline(rows, copy, gemm, options.plot)
    write_rows(rows, options.json)
    ours = "triton" if device == "cuda" else "torch"
    missing = {case.name for case in cases(dtype)} - {row["shape"] for row in rows if row["contestant"] == ours}
    if missing:
        raise SystemExit(f"{operation}: {ours} failed its parity check at {sorted(missing)}")


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and write counted."""
    source = torch.empty(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device).zero_()
    target = torch.empty_like(source)
    seconds = interleaved_medians({"copy": lambda: target.copy_(source)}, repeats=10)["copy"]
    return 2 * source.numel() * 4 / seconds


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / interleaved_medians({"gemm": lambda: a @ b}, repeats=10)["gemm"]


def _skipped(device: str) -> list[str]:
    lines = [f"skipped: {name} ({reason})" for name, reason in available_backends().items() if reason]
    if device == "cpu":
        if not lines:
            lines.append("skipped: triton (TRITON_INTERPRET=1 runs its kernels in Python: no speed)")
        lines.append(f"skipped: all layouts but {', '.join(CPU_LAYOUTS)}, and the 14B model (too slow on a CPU)")
    return lines


def _contestants(operation: str, device: str) -> dict[str, Callable]:
    eager = getattr(load_ops("reference"), operation)
    functions = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        "torch": getattr(load_ops("torch"), operation),
    }
    if device == "cuda":
        functions["triton"] = getattr(load_ops("triton"), operation)
    return functions


def _bench_case(
    operation: str, case: Case, device: str, dtype: torch.dtype, repeats: int, copy: float, gemm: float
) -> list[dict]:
    calls = max(1, min(16, ROTATED_BYTES // max(1, case.bytes_moved))) if device == "cuda" else 1
    inputs = [case.make(torch.Generator().manual_seed(i), device, dtype) for i in range(calls)]
    exact = _outputs(getattr(load_ops("reference"), operation), _map(_double, inputs[0]), case.backward)
    torch._dynamo.reset()  # else the limit on recompilations would turn "compiled" into eager
    contestants = _contestants(operation, device)
    functions: dict[str, Callable] = {}
    errors: dict[str, float] = {}
    budgets: list[float] = []
    # The budget: twice the eager reference's error and a rounding step. Gradients of weights are sums over
    # tokens in any order: a step per level of a pairwise sum.
    steps = math.log2(inputs[0][0][0].shape[-2]) if case.backward else 1.0
    for name, function in contestants.items():
        outputs = _outputs(function, inputs[0], case.backward)
        own = [relative_error(out, ref) for out, ref in zip(outputs, exact, strict=True)]
        budgets = budgets or [2 * e + steps * torch.finfo(out.dtype).eps for e, out in zip(own, outputs, strict=True)]
        try:
            for out, ref, budget in zip(outputs, exact, budgets, strict=True):
                check_close(f"{name}, {case.name}", out, ref, budget)
        except AssertionError as error:
            print(f"no speed: {error}")
            continue
        errors[name] = max(own)
        functions[name] = _timed(function, inputs, case.backward, device)
    seconds = {name: s / calls for name, s in interleaved_medians(functions, repeats).items()}
    rows = []
    for name, s in seconds.items():
        bandwidth, rate = case.bytes_moved / s, case.flops / s
        ceiling = rate / gemm if case.flops else bandwidth / copy
        print(
            f"{case.name:<34}{name:<10}{s * 1e3:9.4f} ms {bandwidth / 1e9:8.1f} GB/s {rate / 1e12:8.2f} TFLOP/s "
            f"{ceiling:5.0%} of {'GEMM' if case.flops else 'copy'}   {seconds['eager'] / s:6.2f}x eager   "
            f"error {errors[name]:.1e}",
            flush=True,
        )
        rows.append(
            {
                "operation": operation,
                "shape": case.name,
                "contestant": name,
                "dtype": str(dtype).removeprefix("torch."),
                "ms": s * 1e3,
                "flops": case.flops or case.elementwise_flops,
                "bytes": case.bytes_moved,
                "gb_per_s": bandwidth / 1e9,
                "tflop_per_s": rate / 1e12,
                "of_ceiling": ceiling,
                "relative_error": errors[name],
            }
        )
    return rows


def _timed(function: Callable, inputs: Sequence[tuple[tuple, dict]], backward: bool, device: str) -> Callable[[], None]:
    """All inputs once; on CUDA as a graph, so that launches cost the host nothing."""

    def call() -> None:
        for args in inputs:
            _outputs(function, args, backward)

    if device != "cuda":
        return call
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def _outputs(function: Callable, inputs: tuple[tuple, dict[str, Any]], backward: bool) -> list[Tensor]:
    """Outputs of a call, or the gradients of its leaves for output gradients equal to the outputs."""
    args, kwargs = inputs
    if not backward:
        with torch.no_grad():
            out = function(*args, **kwargs)
        return list(out) if isinstance(out, tuple) else [out]
    out = function(*args, **kwargs)
    outputs = list(out) if isinstance(out, tuple) else [out]
    leaves: list[Tensor] = []
    _map(lambda t: leaves.append(t) if t.requires_grad else None, inputs)
    return list(torch.autograd.grad(outputs, leaves, [o.detach() for o in outputs]))


def _double(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_(x.requires_grad)


def _map(function: Callable[[Tensor], Any], value: Any) -> Any:
    """Apply a function to every tensor within tuples, lists and dicts."""
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {k: _map(function, v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        parts = [_map(function, v) for v in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    return value
