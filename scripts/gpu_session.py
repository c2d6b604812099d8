"""What only a GPU can say, step by step; started by gpu_session.sh, whose first two arguments are OUT and the python.

A part is a list of steps whose limits add up to less than nine minutes. OUT takes: `summary.json`, written before and
after each step; `PART.log`; `rows.jsonl`, a line for each row of a bench as soon as it is measured; `verify.json`;
`tuning.json`, what won on this card; `triton_cache.tar.gz`, the compiled kernels. Whatever is killed, a step, a part or
the machine, that stays: `--resume FOLDER` goes on after the last step that FOLDER's summary names, with what FOLDER
holds of the last two (compiled kernels serve the same Triton wheel alone). The python needs torch >= 2.11 with CUDA,
triton, pytest, pytest-xdist, hypothesis and setuptools >= 77; diffusers adds its rivals.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PART_SECONDS = 540
# One path on every machine: Triton's cache names its files by absolute paths.
TRITON_CACHE = Path(tempfile.gettempdir()) / "anyflow_triton_cache"
KEPT_OF_CACHE = (".cubin", ".json")  # all that a launch reads
SETUPTOOLS = """
import setuptools, sys
print("setuptools", setuptools.__version__)
if int(setuptools.__version__.split(".")[0]) < 77:
    sys.exit("setuptools: got an older one, expected >= 77 (the licence of pyproject.toml): bring a wheel of it")
"""


METRICS = ("dram__bytes_read.sum", "dram__bytes_write.sum", "gpu__time_duration.sum")


@dataclass(frozen=True)
class Step:
    """A command with its limit in seconds; `SHORT` says what words of it stand for.

    It is skipped if it `needs` a program, or a module of the python, that is not there. The build is repeated: a
    resumed part may run on another machine.
    """

    name: str
    seconds: int
    command: str
    needs: str = ""
    env: dict[str, str] = field(default_factory=dict)

    @property
    def repeated(self) -> bool:
        return self.name == "build"

    def words(self, values: dict[str, str]) -> list[str]:
        """The command as it is run: `values` for PYTHON, OUT and SM."""
        words = shlex.split(self.command)
        if words[0] == "bench":
            words = ["PYTHON", "-m", f"bench.{words[1]}", *words[2:], "--json", "OUT/rows.jsonl"]
        words = [part for word in words for part in SHORT.get(word, (word,))]
        return [re.sub("^(PYTHON|OUT|SM)(?=$|/)", lambda found: values[found[0]], word) for word in words]


SHORT = {
    "anyflow": ("PYTHON", "-m", "anyflow_runtime.cli"),
    "pytest": ("PYTHON", "-m", "pytest", "-q"),
    "SETUPTOOLS": (SETUPTOOLS,),
    "CHECKED": ("--error-exitcode", "1"),
    "PROFILED": ("--clock-control", "none", "-k", "regex:far_attention", "-c", "4", "--metrics", ",".join(METRICS)),
}
# compute-sanitizer sees nothing inside the blocks of torch's caching allocator.
SANITIZED: dict[str, Any] = {
    "needs": "compute-sanitizer",
    "env": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"},
}


def session() -> dict[str, list[Step]]:
    """The parts, in the order of what a first run must tell: it builds and runs at all, is right, is fast."""
    gluon = "tests/test_far_attention_gluon.py"
    sources = {f"tests/{path.name}": path.read_text() for path in sorted((ROOT / "tests").glob("test_*.py"))}
    kernels = " ".join([name for name in sources if name.endswith("_triton.py")])
    on_gpu = " ".join([name for name, source in sources.items() if "mark.gpu" in source])
    build = Step("build", 100, "PYTHON setup.py build_ext --inplace")
    compiled = "PYTHON -m anyflow_kernels.aot --target SM --check --processes 16"
    traffic = "--shape '1.3B chunk 6' --contestants portable gluon --repeats 1"
    tiny = "anyflow verify --device cuda --backend triton --shapes tiny"
    hopper = f"pytest -n 0 -m gpu -k d64 {gluon}"

    def attention(seconds: int, shape: str) -> Step:
        return Step(f"attention, {shape}", seconds, f"bench far_attention --shape '{shape}'")

    return {
        "first": [
            Step("gpu", 15, "nvidia-smi"),
            Step("setuptools", 15, "PYTHON -c SETUPTOOLS"),
            build,
            Step("info", 40, "anyflow info --launch-configs"),
            # All kernels of this card at the released shapes, in parallel; launches with the same key find them.
            Step("compile", 90, compiled, env={"TRITON_ALWAYS_COMPILE": "1"}),
            Step("gluon", 70, f"pytest -n 4 -m gpu {gluon}"),
            attention(120, "1.3B chunk 6"),
            Step("dram", 80, f"ncu PROFILED PYTHON -m bench.far_attention {traffic}", needs="ncu"),
        ],
        "tests": [
            build,
            Step("kernels", 225, f"pytest -n 8 {kernels} {gluon} tests/test_streaming_launches.py"),
            Step("gpu", 60, f"pytest -n 4 -m gpu {on_gpu}"),
            Step("verify", 150, "anyflow verify --device cuda --backend triton --json OUT/verify.json"),
        ],
        "tune": [build, Step("1.3B", 430, "anyflow tune --model 1.3B --limit-seconds 400")],
        "tune_14B": [build, Step("14B", 430, "anyflow tune --model 14B --limit-seconds 400")],
        "rollouts": [
            build,
            Step("1.3B, 1 step", 70, "bench rollout --model 1.3B --steps 1"),
            Step("1.3B, 4 steps", 70, "bench rollout --model 1.3B --steps 4"),
            Step("14B, 1 step", 120, "bench rollout --model 14B --steps 1"),
            Step("14B, 4 steps", 120, "bench rollout --model 14B --steps 4"),
        ],
        "attention": [
            build,
            *(attention(60, f"1.3B {shape}") for shape in ("chunk 0", "chunk 1", "chunk 7", "prefill")),
            attention(75, "1.3B bidirectional"),
            attention(120, "1.3B training"),
        ],
        "attention_14B": [
            build,
            attention(60, "14B chunk 0"),
            attention(70, "14B chunk 6"),
            attention(110, "14B bidirectional"),
            attention(180, "14B training"),
        ],
        "rows": [
            build,
            Step("gated_residual_layer_norm", 90, "bench gated_residual_layer_norm --shape 'B chunk 6'"),
            Step("qk_norm_rope_append", 50, "bench qk_norm_rope_append --shape 'B chunk 6'"),
            Step("rms_norm", 45, "bench rms_norm --shape 'B chunk 6'"),
            Step("linear_gelu", 45, "bench linear_gelu --shape 'B chunk 6'"),
            Step("linear", 60, "bench linear --shape 'B chunk 6'"),
            Step("dual_timestep_embedding", 40, "bench dual_timestep_embedding"),
            Step("flow_map_step", 35, "bench flow_map_step"),
            Step("patch_embed", 40, "bench patch_embed"),
            Step("unpatchify", 30, "bench unpatchify"),
        ],
        "rows_training": [
            build,
            Step("gated_residual_layer_norm", 130, "bench gated_residual_layer_norm --shape training"),
            Step("qk_norm_rope_append", 100, "bench qk_norm_rope_append --shape training"),
            Step("rms_norm", 70, "bench rms_norm --shape training"),
            Step("linear_gelu", 100, "bench linear_gelu --shape training"),
        ],
        "training": [
            build,
            Step("small", 70, "bench training_step --config small"),
            Step("wide", 80, "bench training_step --config wide"),
            Step("1.3B attention", 110, "bench training_step --config '1.3B attention'"),
            Step("14B attention", 160, "bench training_step --config '14B attention'"),
        ],
        "sanitizer": [
            build,
            Step("memcheck", 200, f"compute-sanitizer --tool memcheck CHECKED {tiny}", **SANITIZED),
            Step("racecheck", 110, f"compute-sanitizer --tool racecheck CHECKED {hopper}", **SANITIZED),
            Step("synccheck", 110, f"compute-sanitizer --tool synccheck CHECKED {hopper}", **SANITIZED),
        ],
        "rivals": [
            build,
            Step("rollout", 330, "bench rollout --model 1.3B --steps 4 --rivals", needs="diffusers"),
            Step("vae_decode", 100, "bench vae_decode --height 480 --width 832 --dtype bfloat16", needs="diffusers"),
        ],
    }


class Session:
    """Runs steps one after another; what it knows is in `OUT/summary.json` before it goes on."""

    def __init__(self, out: Path, python: str, patience: float, earlier: Path | None) -> None:
        self.out, self.python, self.patience = out, python, patience
        self.architecture = _architecture()
        self.environment = {
            "PYTHONUNBUFFERED": "1",
            "ANYFLOW_TUNING": str(out / "tuning.json"),
            "TRITON_CACHE_DIR": str(TRITON_CACHE),
            "TORCHINDUCTOR_COMPILE_THREADS": "4",  # of each of several test processes
        }
        out.mkdir(parents=True, exist_ok=True)
        self.summary: list[dict[str, Any]] = []
        if earlier is not None:
            self.summary = [row for row in json.loads((earlier / "summary.json").read_text()) if row["step"] != "build"]
            if (earlier / "tuning.json").is_file() and earlier.resolve() != out:
                shutil.copy(earlier / "tuning.json", out)
            if (earlier / "triton_cache.tar.gz").is_file():
                with tarfile.open(earlier / "triton_cache.tar.gz") as archive:
                    archive.extractall(TRITON_CACHE, filter="data")
        self.done = {(row["part"], row["step"]) for row in self.summary}

    def run(self, part: str, step: Step) -> bool:
        """Whether the step passed, or could not run here. Its output is in the part's log while it runs."""
        command = step.words({"PYTHON": self.python, "OUT": str(self.out), "SM": self.architecture})
        row = {"part": part, "step": step.name, "status": "interrupted", "limit": step.seconds, "command": command}
        self.summary.append(row)
        if step.needs and not self._has(step.needs, command):
            return self._finish(row, f"skipped: no {step.needs}")
        self._write()
        limit, start = step.seconds * self.patience, time.monotonic()
        print(f"== {part}: {step.name} (at most {limit:.0f} s)", flush=True)
        with (self.out / f"{part}.log").open("a+b") as log:
            log.write(f"\n== {step.name}: {' '.join(command)}\n".encode())
            log.flush()
            before = log.tell()
            code = _run_limited(command, limit, {**os.environ, **self.environment, **step.env}, log)
            log.seek(before)
            print("\n".join(log.read().decode(errors="replace").splitlines()[-4:]), flush=True)
        row["seconds"] = round(time.monotonic() - start, 1)
        return self._finish(row, {0: "ok", None: "over its limit"}.get(code, f"failed ({code})"))

    def pack_cache(self) -> None:
        """The compiled kernels, for the next machine of this kind."""
        files = [path for path in TRITON_CACHE.rglob("*") if path.suffix in KEPT_OF_CACHE]
        with tarfile.open(self.out / "triton_cache.tar.gz", "w:gz") as archive:
            for path in files:
                archive.add(path, path.relative_to(TRITON_CACHE))

    def _has(self, name: str, command: list[str]) -> bool:
        if command[0] == name:
            return shutil.which(name) is not None
        return not subprocess.run([self.python, "-c", f"import {name}"], cwd=ROOT, capture_output=True).returncode

    def _finish(self, row: dict[str, Any], status: str) -> bool:
        row["status"] = status
        self._write()
        print(f"{row['part']}: {row['step']}: {status}", flush=True)
        return status == "ok" or status.startswith("skipped")

    def _write(self) -> None:
        partial = self.out / "summary.json.partial"
        partial.write_text(json.dumps(self.summary, indent=1) + "\n")
        partial.replace(self.out / "summary.json")


def _run_limited(command: list[str], limit: float, env: dict[str, str], log: Any) -> int | None:
    """The exit code, or None if the command was stopped at its limit, with all that it started."""
    try:
        process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, process_group=0
        )
    except OSError as error:
        log.write(f"{error}\n".encode())
        return 127
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:  # also where this script is stopped: the GPU must be free for what comes next
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        process.wait()


def _architecture() -> str:
    """sm_90 for compute capability 9.0; of the first GPU."""
    query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.TimeoutExpired):
        answer = ""
    found = re.search(r"(\d+)\.(\d+)", answer)
    return f"sm_{found[1]}{found[2]}" if found else "sm_90"


def planned(parts: dict[str, list[Step]], done: set[tuple[str, str]]) -> Iterator[tuple[str, Step]]:
    """The steps that are left, by part; nothing is built for a part that has none."""
    for part, steps in parts.items():
        left = [step for step in steps if step.repeated or (part, step.name) not in done]
        if any(not step.repeated for step in left):
            yield from ((part, step) for step in left)


def main(arguments: list[str] | None = None) -> int:
    parts = session()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="a folder for the files")
    parser.add_argument("part", nargs="*", metavar="PART", help=f"of {', '.join(parts)}; default: all")
    parser.add_argument("--python", default=sys.executable, help="runs the steps; default: this one")
    parser.add_argument("--resume", type=Path, metavar="FOLDER", help="OUT of an earlier call, to go on with")
    parser.add_argument("--within", type=float, metavar="SECONDS", help="start no step that could end later than this")
    parser.add_argument("--patience", type=float, default=1.0, metavar="FACTOR", help="of all limits; default: 1")
    args = parser.parse_intermixed_args(arguments)
    unknown = [name for name in args.part if name not in parts]
    if unknown:
        parser.error(f"PART: got {', '.join(unknown)}, expected some of {', '.join(parts)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    begin, run, good = time.monotonic(), Session(args.out.resolve(), args.python, args.patience, args.resume), True
    chosen = {name: steps for name, steps in parts.items() if name in (args.part or parts)}
    try:
        for part, step in planned(chosen, run.done):
            if args.within and time.monotonic() - begin + step.seconds * args.patience > args.within:
                print(f"stopped before {part}: {step.name}; go on with --resume {args.out}")
                return 3
            good &= run.run(part, step)
    finally:
        run.pack_cache()
    failed = [f"{row['part']}: {row['step']}" for row in run.summary if not re.match("ok|skipped", row["status"])]
    print(f"failed: {'; '.join(failed)} (logs in {args.out})" if failed else "all passed")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
