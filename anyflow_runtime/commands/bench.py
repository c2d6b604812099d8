"""Run a benchmark of a checkout: `anyflow bench NAME ...` is `python -m bench.NAME ...`.

Without a name: list them. The arguments after the name are the benchmark's own; `anyflow bench NAME --help` shows them.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

from . import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", nargs="?", help="the benchmark; none lists them")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="its arguments")


def run(args: argparse.Namespace) -> int:
    checkout = Path(__file__).resolve().parents[2]
    benches = _benches(checkout / "bench")
    if args.name is None:
        width = max(map(len, benches))
        print("\n".join(f"{name:{width}}  {summary}" for name, summary in benches.items()))
        return 0
    if args.name not in benches:
        raise UsageError(f"name: got {args.name!r}, expected one of {', '.join(benches)}")
    path, argv = sys.path[:], sys.argv
    sys.path.insert(0, str(checkout))
    sys.argv = [f"anyflow bench {args.name}", *args.arguments]
    try:
        runpy.run_module(f"bench.{args.name}", run_name="__main__", alter_sys=True)
    except SystemExit as stop:
        if isinstance(stop.code, str):
            raise UsageError(stop.code) from stop
        return int(stop.code or 0)
    finally:
        sys.path[:], sys.argv = path, argv
    return 0


def _benches(directory: Path) -> dict[str, str]:
    """Name and first line of each module that can be run."""
    if not (directory / "common.py").is_file():
        raise UsageError(
            "the benchmarks are not part of the installed package: clone the repository and, there, "
            "pip install -e . --no-build-isolation"
        )
    found = {}
    for path in sorted(directory.glob("*.py")):
        source = path.read_text()
        if 'if __name__ == "__main__"' in source:
            found[path.stem] = source.lstrip('"').partition("\n")[0].rstrip('"')
    return found
