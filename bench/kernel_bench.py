"""What the kernel benches share: real shapes, ceilings, contestants, parity, the table.

On CUDA every contestant is captured into a graph of several calls on rotating inputs, larger together than the L2, so
what is timed is the GPU and not Python, and no call finds its inputs in the cache. What cannot be captured, because it
synchronises, is timed with its launches, and its row says so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import FarLayout, available_backends, load_ops
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.testing.budget import check, leaves, map_tensors, widened

from . import diffusers_eager
from .common import add_json_argument, graphed, interleaved_medians, keep_row, machine_line, print_rows
from .diffusers_eager import EagerSequence
from .roofline import chip_here, draw_roofline, roof_seconds

PARTITION = (1, 3, 3, 3, 3, 3, 3, 2)  # 81 frames of video
ROTATED_BYTES = 256 * 2**20  # several times the L2 of any GPU here


HEIGHT, WIDTH = 60, 104  # latents at 480p
TINY = {"tiny": {"heads": 2, "head_dim": 16, "dim": 32, "ffn": 80, "layers": 2}}
TINY_HEIGHT, TINY_WIDTH = 8, 12
CPU_LAYOUTS = ("chunk 0",)
ROUNDINGS = 4  # of the compute dtype in diffusers' longest sequence, where ours has one


def layouts(tiny: bool) -> dict[str, FarLayout]:
    """Every kind of call. At 480p a frame has 1,560 full and 390 compressed tokens; tiny, 24 and 6."""
    height, width = (TINY_HEIGHT, TINY_WIDTH) if tiny else (HEIGHT, WIDTH)

    def layout(chunks: int, **options: Any) -> FarLayout:
        return FarLayout(PARTITION[:chunks], height, width, **options)

    return {
        "chunk 0": layout(1, mode="inference"),
        "chunk 1": layout(2, mode="inference"),
        "chunk 6": layout(7, mode="inference"),
        "chunk 7": layout(8, mode="inference"),
        "prefill after chunk 6": layout(7, mode="prefill", cached=4),
        "bidirectional": FarLayout((21,), height, width),
        "training, clean copy": layout(8, clean=True),
    }


@dataclass(frozen=True)
class Case:
    """One shape. `make(generator, device, dtype)` gives `(args, kwargs)`; `bytes_moved` and `flops` are of one call."""

    name: str
    make: Callable[[torch.Generator, str, torch.dtype], tuple[tuple, dict[str, Any]]]
    bytes_moved: int
    flops: int = 0  # of matrix products: the GEMM ceiling is the roof
    elementwise_flops: int = 0  # of everything else: the copy ceiling is the roof
    backward: bool = False
    writes: tuple[str, ...] = ()  # keyword arguments that a call writes: outputs too
    rival: EagerSequence | None = None  # diffusers' way, where it is not that of the operation's name


def models(tiny: bool) -> dict[str, dict[str, int]]:
    """Sizes by name: both released models on CUDA, the small one on a CPU."""
    if tiny:
        return TINY
    return MODELS if torch.cuda.is_available() else {"1.3B": MODELS["1.3B"]}


def model_cases(tiny: bool) -> Iterator[tuple[str, dict[str, int], FarLayout]]:
    """`(name, sizes of the model, layout)` of every real shape, or of every tiny one; a selection on a CPU."""
    for model, size in models(tiny).items():
        for name, layout in layouts(tiny).items():
            if tiny or torch.cuda.is_available() or name in CPU_LAYOUTS:
                yield f"{model} {name}", size, layout


def parse(doc: str | None, contestants: bool = False) -> argparse.Namespace:
    """The options of every kernel bench; `dtype` is the torch dtype. With `contestants`, they can be chosen."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = "bfloat16" if torch.cuda.is_available() else "float32"
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default=default)
    parser.add_argument("--shape", default="", metavar="SUBSTRING", help="only shapes whose name contains it")
    parser.add_argument("--tiny", action="store_true", help="the same layouts at 1/60 of the tokens: does it all run?")
    parser.add_argument("--repeats", type=int, default=20)
    if contestants:
        parser.add_argument("--contestants", nargs="+", default=(), metavar="NAME", help="only these; default: all")
    add_json_argument(parser)
    parser.add_argument("--plot", help="write a roofline picture to this file")
    options = parser.parse_args()
    options.dtype = getattr(torch, options.dtype)
    return options


def ceilings(device: str, dtype: torch.dtype) -> tuple[float, float]:
    """Prints the machine and its measured ceilings; returns them, bytes and FLOPs per second."""
    print(machine_line("triton", "anyflow-kernels", "diffusers"))
    copy, gemm = copy_bandwidth(device), gemm_rate(device, dtype)
    name = str(dtype).removeprefix("torch.")
    print(f"ceilings: copy {copy / 1e9:.0f} GB/s, {name} GEMM {gemm / 1e12:.2f} TFLOP/s", flush=True)
    return copy, gemm


def run(operation: str, doc: str | None, cases: Callable[[torch.dtype, bool], Sequence[Case]]) -> None:
    """The command line of a bench: check and time every contestant at every case, print a table and rows as JSON."""
    options = parse(doc)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen = [case for case in cases(options.dtype, options.tiny) if options.shape in case.name]
    if not chosen:
        raise SystemExit(f"--shape: got {options.shape!r}, expected part of a shape's name")
    copy, gemm = ceilings(device, options.dtype)
    print("; ".join(_skipped(device, options.tiny, [case.name for case in chosen])) or "nothing skipped")
    rows = []
    for case in chosen:
        for row in _bench_case(operation, case, device, options.dtype, options.repeats, copy, gemm):
            keep_row(row, options.json)
            rows.append(row)
    if options.plot:
        draw_roofline(rows, copy, gemm, options.plot)
    print_rows(rows)
    ours = "triton" if device == "cuda" else "torch"
    missing = {case.name for case in chosen} - {row["shape"] for row in rows if row["contestant"] == ours}
    if missing:
        raise SystemExit(f"{operation}: {ours} failed its parity check at {sorted(missing)}")


def copy_bandwidth(device: str) -> float:
    """Bytes per second of a large copy, read and write counted."""
    source = torch.empty(2**28 if device == "cuda" else 2**25, dtype=torch.float32, device=device).zero_()
    target = torch.empty_like(source)
    seconds = interleaved_medians({"copy": lambda: target.copy_(source)}, repeats=10)["copy"]
    return 2 * source.numel() * 4 / seconds


def gemm_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large square matrix product; of torch's own and ours, which may take another library, the faster."""
    n = 8192 if device == "cuda" else 1024
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    linear = load_ops("torch").linear
    seconds = interleaved_medians({"torch": lambda: a @ b, "ours": lambda: linear(a, b, None)}, repeats=10)
    return 2 * n**3 / min(seconds.values())


def _skipped(device: str, tiny: bool, names: Sequence[str]) -> list[str]:
    lines = [f"skipped: {name} ({reason})" for name, reason in available_backends().items() if reason]
    if device == "cpu":
        if not lines:
            lines.append("skipped: triton (TRITON_INTERPRET=1 runs its kernels in Python: no speed)")
        if tiny:
            lines.append("skipped: the real sizes (--tiny)")
        elif any(name.startswith("1.3B") for name in names):
            laid_out = any(layout in name for layout in CPU_LAYOUTS for name in names)
            others = f"all layouts but {', '.join(CPU_LAYOUTS)}, and " if laid_out else ""
            lines.append(f"skipped: {others}the 14B model (too slow on a CPU)")
    return lines


def contestants(operation: str, case: Case, device: str) -> dict[str, Callable]:
    """By name: the reference, eager and compiled, diffusers' sequence, and ours."""
    eager = getattr(load_ops("reference"), operation)
    functions = {
        "eager": eager,
        "compiled": torch.compile(eager, dynamic=False),
        diffusers_eager.NAME: case.rival or getattr(diffusers_eager, operation),
        "torch": getattr(load_ops("torch"), operation),
    }
    if device == "cuda":
        functions["triton"] = getattr(load_ops("triton"), operation)
    return functions


def parity(case: Case, functions: Mapping[str, Callable], inputs: Any, dtype: torch.dtype) -> dict[str, float]:
    """The relative error against float64 of every contestant that keeps the error law; others are printed.

    Gradients of weights are sums over tokens in any order: a rounding step per level of a pairwise sum. diffusers
    rounds more often. "eager" is the reference and must be among them.
    """
    steps = math.log2(inputs[0][0].shape[-2]) if case.backward else 1.0
    low = _outputs(functions["eager"], map_tensors(_fresh, inputs), case)
    exact = _outputs(functions["eager"], widened(inputs), case)
    errors = {}
    for name, function in functions.items():
        outputs, more = _outputs(function, map_tensors(_fresh, inputs), case), 0.0
        if isinstance(function, EagerSequence):  # its result may also have another dtype
            outputs = [out.to(near.dtype) for out, near in zip(outputs, low, strict=True)]
            more = ROUNDINGS * torch.finfo(dtype).eps
        try:
            errors[name] = max(
                check(f"{name}, {case.name}", out, near, ref, steps + more / torch.finfo(near.dtype).eps).whole
                for out, near, ref in zip(outputs, low, exact, strict=True)
            )
        except AssertionError as error:
            print(f"no speed: {error}")
    return errors


def _bench_case(
    operation: str, case: Case, device: str, dtype: torch.dtype, repeats: int, copy: float, gemm: float
) -> list[dict]:
    calls = max(1, min(16, ROTATED_BYTES // max(1, case.bytes_moved))) if device == "cuda" else 1
    inputs = [case.make(torch.Generator().manual_seed(i), device, dtype) for i in range(calls)]
    torch._dynamo.reset()  # else the limit on recompilations would turn "compiled" into eager
    entered = contestants(operation, case, device)
    errors = parity(case, entered, inputs[0], dtype)
    functions: dict[str, Callable] = {}
    captured: dict[str, bool] = {}
    for name in errors:
        functions[name], captured[name] = _timed(entered[name], inputs, case, device)
    seconds = {name: s / calls for name, s in interleaved_medians(functions, repeats).items()}
    roof = roof_seconds(chip_here(), case.bytes_moved, case.flops, dtype.itemsize)
    print(f"{case.name:<48}data sheet of {chip_here().name}: at least {roof * 1e6:.2f} us (model)")
    rows = []
    for name, s in seconds.items():
        bandwidth, rate = case.bytes_moved / s, case.flops / s
        ceiling = rate / gemm if case.flops else bandwidth / copy
        print(
            f"{case.name:<48}{name:<16}{s * 1e3:9.4f} ms {bandwidth / 1e9:8.1f} GB/s {rate / 1e12:8.2f} TFLOP/s "
            f"{ceiling:5.0%} of {'GEMM' if case.flops else 'copy'}   {seconds['eager'] / s:6.2f}x eager   "
            f"error {errors[name]:.1e}{'' if captured[name] else '   with its launches'}"
            f"{f'   {roof / s:4.0%} of the roof' if device == 'cuda' else ''}",
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
                "launches_timed": not captured[name],
                **({"of_roof": roof / s} if device == "cuda" else {}),
            }
        )
    return rows


def _timed(
    function: Callable, inputs: Sequence[tuple[tuple, dict]], case: Case, device: str
) -> tuple[Callable[[], Any], bool]:
    """All inputs once, and whether as a CUDA graph, so that launches cost the host nothing (a CPU has no launches)."""
    plain = replace(case, writes=())
    if isinstance(function, EagerSequence):
        prepared = [map_tensors(_leaf, function.prepare(*args, **kwargs)) for args, kwargs in inputs]
        function, inputs = function.call, [(args, {}) for args in prepared]

    def call() -> None:
        for args in inputs:
            _outputs(function, args, plain)

    return graphed(call, device, case.name)


def _outputs(function: Callable, inputs: tuple[tuple, dict[str, Any]], case: Case) -> list[Tensor]:
    """Outputs of a call, with what it wrote, or the gradients of its leaves for cotangents equal to the outputs."""
    args, kwargs = inputs
    with torch.set_grad_enabled(case.backward):
        out = function(*args, **kwargs)
    outputs = list(out) if isinstance(out, (tuple, list)) else [out]
    if not case.backward:
        # diffusers has no slabs: it returns what ours writes.
        written = () if isinstance(function, EagerSequence) else case.writes
        return outputs + [kwargs[name] for name in written]
    return list(torch.autograd.grad(outputs, leaves(inputs), [o.detach() for o in outputs]))


def _fresh(x: Tensor) -> Tensor:
    """A copy: nobody's result may come from what another wrote."""
    return x.detach().clone().requires_grad_(x.requires_grad)


def _leaf(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.requires_grad)
