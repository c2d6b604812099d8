"""Compile every Triton kernel for a GPU that is not here, and read what the compiler made of it.

    python -m anyflow_kernels.aot [--target sm_80|...|sm_120] [--json FILE] [--check] [--kernel SUBSTRING] [--sweep]

Kernels, arguments and shapes come from the `aot_cases` of the modules in `triton_ops`, launch parameters from
`launch_configs`: what is compiled is what a launch on that GPU would compile. Registers and stack are read from the
cubin with the cuobjdump in the triton wheel, instructions from its SASS, and `pipe_model` says what they amount to:
"bound" and "serial" are shares of the tensor cores' peak (of the memory's, without matrix products) if everything
overlaps and if products overlap with nothing, modelled, not measured. Results stay in Triton's own cache.
"""

from __future__ import annotations

import argparse
import importlib
import json
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from .aot_case import AotCase
from .launch_configs import ARCHITECTURES, GPUS
from .pipe_model import MATRIX, Chip, chip_of, model, parse

# What the check lets pass: registers kept in L1 (the model counts their traffic), products computed twice, and how far
# below what its row claims a kernel may be bound, in percent: compilers differ.
SPILL_BYTES = 128
REDUNDANCY = 1.01
BOUND_SLACK = 8
TENSOR_MEMORY = 512  # columns of sm_100
MEMORY = ("UTMALDG", "UTMASTG", "LDGSTS", "LDG", "STG", "LDL", "STL")


def collect(arch: int, kernel: str = "", sweep: bool = False) -> list[AotCase]:
    """The cases of all modules in `triton_ops` for one architecture whose kernel and shape contain `kernel`.

    `sweep`: candidates for rows instead of what the rows say.
    """
    function = "aot_candidates" if sweep else "aot_cases"
    package = importlib.import_module(".triton_ops", __package__)
    cases: list[AotCase] = []
    for info in pkgutil.iter_modules(package.__path__):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        if hasattr(module, function):
            cases += getattr(module, function)(arch)
    return [case for case in cases if kernel in f"{case.name} {case.shape}"]


def compile_case(case: AotCase, arch: int, chip: Chip | None = None) -> dict[str, Any]:
    """Compile one kernel for one architecture and describe the result; `chip` is the card of the model.

    Returns:
        A row with `kernel`, `target`, `shape`, `registers` (per thread), `spill_bytes` (local memory per thread),
        `shared_bytes` and `threads` (per block), `tensor_core_instructions` and `memory_instructions` (name -> count
        in the SASS), `fma_dots` (matrix products that the compiler gave to FMA units), `blocks_per_multiprocessor` and
        what limits them, `model` (a `PipeModel`), and `problems`: reasons to reject the kernel on this GPU.

    Raises:
        RuntimeError: if the kernels were imported under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    if not isinstance(case.kernel, triton.runtime.jit.JITFunction):
        raise RuntimeError("compile_case: the kernels were imported under TRITON_INTERPRET=1; start Python without it")
    pdl = case.constexprs.get("PDL", False)
    options = {"num_warps": case.num_warps, "num_stages": case.num_stages, "launch_pdl": pdl, **case.options}
    compiled = triton.compile(_source(case), target=GPUTarget("cuda", arch, 32), options=options)
    resources, sass = _disassemble(compiled.asm["cubin"])
    instructions = Counter(instruction.opcode.split(".")[0] for instruction in parse(sass))
    threads = int(re.search(r"\.(?:req|max)ntid\s+(\d+)", compiled.asm["ptx"]).group(1))  # type: ignore[union-attr]
    shared = compiled.metadata.shared
    tensor_memory = getattr(compiled.metadata, "tmem_size", 0)
    blocks, limit = _occupancy(arch, resources["REG"], threads, shared, tensor_memory)
    row = {
        "kernel": case.name,
        "target": f"sm_{arch}",
        "shape": case.shape,
        "registers": resources["REG"],
        "spill_bytes": resources["STACK"] + resources.get("LOCAL", 0),
        "shared_bytes": shared,
        "threads": threads,
        "tensor_core_instructions": {k: n for k, n in sorted(instructions.items()) if MATRIX.match(k)},
        "memory_instructions": {k: instructions[k] for k in MEMORY if instructions[k]},
        "instructions": sum(instructions.values()),
        "fma_dots": _fma_dots(compiled.asm["ttgir"]),
        "blocks_per_multiprocessor": blocks,
        "occupancy_limit": limit,
        "num_warps": case.num_warps,
        "num_stages": case.num_stages,
    }
    row["problems"] = _problems(case, arch, row)
    if options["launch_pdl"] and not _waits_first(compiled.asm["ptx"]):
        row["problems"].append("touches global memory before griddepcontrol.wait")
    try:
        pipes = model(
            sass,
            chip or chip_of(arch),
            warps=case.num_warps,
            blocks=min(blocks, case.per_multiprocessor or blocks),
            products=case.products,
            loaded=case.loaded,
        )
    except ValueError as error:
        row["problems"].append(f"pipe model: {error}")
        return row
    row["model"] = pipes.as_row()
    if pipes.redundancy > REDUNDANCY:
        row["problems"].append(f"{pipes.redundancy:.2f} times the matrix products that the tile needs")
    if 100 * pipes.bound < case.bound - BOUND_SLACK:
        row["problems"].append(f"bound {pipes.bound:.0%}, its row says {case.bound} %")
    return row


def _source(case: AotCase) -> Any:
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    names = case.kernel.arg_names
    signature = {name: "constexpr" if name in case.constexprs else case.arguments[name] for name in names}
    constexprs = {(names.index(name),): value for name, value in case.constexprs.items()}
    aligned = [
        i
        for i, n in enumerate(names)
        if n in case.divisible or (isinstance(signature[n], str) and signature[n][0] == "*")
    ]
    attributes = {(i,): [["tt.divisibility", 16]] for i in aligned}
    source = GluonASTSource if isinstance(case.kernel, GluonJITFunction) else ASTSource
    return source(case.kernel, signature=signature, constexprs=constexprs, attrs=attributes)


def _disassemble(cubin: bytes) -> tuple[dict[str, int], str]:
    """Resource usage (REG, STACK, LOCAL, ...) and SASS of a cubin with one kernel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def dump(flag: str) -> str:
            return subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout

        resources = {name: int(n) for name, n in re.findall(r"\b([A-Z]+):(\d+)", dump("--dump-resource-usage"))}
        return resources, dump("-sass")


def _fma_dots(ttgir: str) -> int:
    """Matrix products whose result is in a blocked layout: those run on FMA units."""
    dots = [line for line in ttgir.splitlines() if " tt.dot " in line]
    return sum("#blocked" in line.rsplit("->", 1)[-1] for line in dots)


def _waits_first(ptx: str) -> bool:
    """True if griddepcontrol.wait precedes every access to global memory."""
    before, wait, _ = ptx.partition("griddepcontrol.wait")
    return bool(wait) and not re.search(r"\b(ld|st|atom|red|cp\.async)\.\S*global", before)


def _occupancy(arch: int, registers: int, threads: int, shared: int, tensor_memory: int = 0) -> tuple[int, str]:
    """Blocks that fit a multiprocessor at once, and the resource that stops the next one."""
    gpu = GPUS[arch]
    warps = threads // 32
    limits = {
        "registers": gpu.registers // (-(-registers * 32 // 256) * 256 * warps),
        "shared memory": gpu.shared_per_multiprocessor // (shared + 1024),  # 1 KB is the system's
        "threads": gpu.threads // threads,
        "blocks": gpu.blocks,
        "tensor memory": TENSOR_MEMORY // tensor_memory if tensor_memory else gpu.blocks,
    }
    limit = min(limits, key=lambda name: limits[name])
    return limits[limit], limit


def _problems(case: AotCase, arch: int, row: dict[str, Any]) -> list[str]:
    problems = []
    if row["spill_bytes"] > SPILL_BYTES:
        problems.append(f"spills {row['spill_bytes']} bytes per thread")
    if case.tensor_cores and not row["tensor_core_instructions"]:
        problems.append("no tensor-core instruction")
    if case.requires and case.requires not in row["tensor_core_instructions"]:
        problems.append(f"no {case.requires}")
    if row["fma_dots"]:
        problems.append(f"{row['fma_dots']} matrix products on FMA units")
    if row["blocks_per_multiprocessor"] < (case.per_multiprocessor or 1):
        problems.append(
            f"{row['blocks_per_multiprocessor']} of {case.per_multiprocessor} blocks per multiprocessor fit"
        )
    if row["shared_bytes"] > GPUS[arch].shared_bytes:
        problems.append(f"{row['shared_bytes']} bytes of shared memory, {GPUS[arch].shared_bytes} on the chip")
    return problems


def _compile_by_index(job: tuple[int, int, str, bool]) -> dict[str, Any]:
    """A worker's job: cases hold functions, which do not travel between processes, so their index does."""
    arch, index, kernel, sweep = job
    case = collect(arch, kernel, sweep)[index]
    try:
        return compile_case(case, arch)
    except Exception as error:  # must not hide the other kernels; the row says so and fails the check
        last = (str(error).strip().splitlines() or [""])[-1]
        message = f"does not compile: {type(error).__name__}: {last}"
        return {"kernel": case.name, "target": f"sm_{arch}", "shape": case.shape, "problems": [message]}


def compile_all(
    archs: tuple[int, ...], kernel: str = "", processes: int = 2, sweep: bool = False
) -> list[dict[str, Any]]:
    """The rows of every case (or candidate) for every architecture, chosen as in `collect`."""
    jobs = [(arch, i, kernel, sweep) for arch in archs for i in range(len(collect(arch, kernel, sweep)))]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        rows = pool.map(_compile_by_index, jobs, chunksize=1)
    if sweep:  # the best last
        rows.sort(key=lambda row: (row["target"], row["kernel"], row.get("model", {}).get("expected", 0.0)))
    return rows


def format_row(row: dict[str, Any]) -> str:
    if "registers" not in row:
        return f"{row['kernel']:<44}{row['shape']:<26}{row['target']:<8}{'; '.join(row['problems'])}"
    counts = {**row["tensor_core_instructions"], **row["memory_instructions"]}
    modelled = " " * 36
    if pipes := row.get("model"):
        modelled = f"{pipes['redundancy']:>6.2f}{pipes['bound']:>7.0%}{pipes['serial']:>8.0%}{pipes['barriers']:>5}"
        modelled += f" {pipes['busiest']:<9}"
    return (
        f"{row['kernel']:<44}{row['shape']:<26}{row['target']:<8}{row['registers']:>5}{row['spill_bytes']:>7}"
        f"{row['shared_bytes']:>9}{row['threads']:>9}{row['blocks_per_multiprocessor']:>8} "
        f"{row['occupancy_limit']:<14}{modelled}"
        + " ".join(f"{name} {n}" for name, n in counts.items())
        + "".join(f"  PROBLEM: {p}" for p in row["problems"])
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m anyflow_kernels.aot", description=(__doc__ or "").split("\n")[0])
    names = [f"sm_{arch}" for arch in ARCHITECTURES]
    parser.add_argument("--target", choices=names, action="append", help="may be repeated; all of them if absent")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--kernel", default="", metavar="SUBSTRING", help="only where name and shape contain it")
    parser.add_argument("--sweep", action="store_true", help="compile candidates for rows instead, the best last")
    parser.add_argument("--check", action="store_true", help="exit with 1 if any kernel has a problem")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args(arguments)

    os.environ.pop("TRITON_INTERPRET", None)  # read when a kernel is defined: before triton_ops is imported
    import triton

    archs = tuple(int(name.removeprefix("sm_")) for name in options.target or names)
    print(f"triton {triton.__version__}")
    print(
        f"{'kernel':<44}{'shape':<26}{'target':<8}{'regs':>5}{'spills':>7}{'shared':>9}{'threads':>9}{'blocks':>8} "
        f"{'limited by':<14}{'excess':>6}{'bound':>7}{'serial':>8}{'bar':>5} {'busiest':<9}instructions"
    )
    rows = compile_all(archs, options.kernel, options.processes, options.sweep)
    for row in rows:
        print(format_row(row))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n")
    bad = [row for row in rows if row["problems"]]
    print(f"{len(rows)} kernels compiled, {len(bad)} with problems")
    return 1 if options.check and bad else 0


if __name__ == "__main__":
    sys.exit(main())
