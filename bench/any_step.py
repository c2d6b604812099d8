"""Any-step evidence: flow map against plain flow matching and on-policy, at 1, 2, 4, 8 and 16 steps.

    python -m bench.any_step measure --seed 0 --model flow-map=DIR --model flow-matching=DIR --json FILE
    python -m bench.any_step report FILE... [--plot FILE]

`measure` makes videos for captions that training has never seen and measures them from the pixels; `report` puts the
rows of several training seeds together. Plain flow matching, which knows no second time, takes Euler steps.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from anyflow_runtime.training.demo.any_step import (
    MEASURES,
    MORE_IS_BETTER,
    STEPS,
    HeldOut,
    continuation,
    evaluate,
    load,
    spread,
)

from .common import machine_line

METHODS = {"flow-map": "flow map", "flow-matching": "flow matching", "on-policy": "on-policy"}
REPORTED = (*MEASURES, "spread")
PLOTTED = ("shape_right", "direction_right", "colour_error", "residual", "wobble", "spread")
COLOURS = ("tab:red", "tab:blue", "tab:green")
GIVEN_FRAMES = (1, 3)  # image-to-video and video-to-video
Table = dict[tuple[str, int], dict[str, list[float]]]


def run_measure(args: argparse.Namespace) -> None:
    models = dict(item.split("=", 1) for item in args.model)
    unknown = sorted(set(models) - set(METHODS))
    if unknown:
        raise SystemExit(f"--model: got {unknown}, expected some of {sorted(METHODS)}")
    sets = {objects: HeldOut.draw(args.videos // objects, objects) for objects in (1, 2)}
    rows: list[dict[str, Any]] = [{"method": "real", "objects": n, **held_out.real()} for n, held_out in sets.items()]
    for method, path in models.items():
        start = time.perf_counter()
        pipeline = load(path, mean_velocity=method != "flow-matching")
        of_model = {"method": method, "seed": args.seed}
        for objects, held_out in sets.items():
            for steps, measured in evaluate(pipeline, held_out, args.steps, args.seed).items():
                start_open = {"spread": spread(pipeline, steps)} if objects == 1 else {}
                rows.append({**of_model, "objects": objects, "steps": steps, **measured, **start_open})
        for given, steps in product(GIVEN_FRAMES, (1, 4)):
            going_on = continuation(pipeline, sets[1], given, steps, args.seed)
            rows.append({**of_model, "objects": 1, "steps": steps, "given_frames": given, **going_on})
        print(f"{method}, seed {args.seed}: {time.perf_counter() - start:.0f} s", flush=True)
    content = {"machine": machine_line(), "videos": args.videos, "rows": rows}
    args.json.write_text(json.dumps(content, indent=1) + "\n")
    print(f"wrote {args.json}")


def run_report(args: argparse.Namespace) -> None:
    contents = [json.loads(path.read_text()) for path in args.files]
    rows = [row for content in contents for row in content["rows"]]
    seeds = sorted({row["seed"] for row in rows if "seed" in row})
    print(contents[0]["machine"])
    print(f"means over training seeds {seeds} and half their range; {contents[0]['videos']} held-out captions of one")
    print("object, half as many of two; none was seen in training")
    summary = {}
    for objects in (1, 2):
        table, real = tabulated(rows, objects)
        print(f"\n{objects} object{'s' * (objects > 1)}")
        print(f"{'method':<15}{'steps':>6}" + "".join(f"{name:>17}" for name in REPORTED))
        for (method, steps), measured in sorted(table.items()):
            cells = "".join(f"{_mean_and_range(measured[name]):>17}" for name in REPORTED)
            print(f"{METHODS[method]:<15}{steps:>6}{cells}")
            summary[f"{method}, {objects} objects, {steps} steps"] = {
                k: statistics.mean(v) for k, v in measured.items() if v
            }
        print(f"{'real videos':<21}" + "".join(f"{real[name]:>17.3f}" for name in REPORTED))
    print("\ngoing on from given frames, one object: RMS distance from the real video's, pixels")
    for row in sorted((row for row in rows if "given_frames" in row), key=lambda row: row["given_frames"]):
        print(
            f"{METHODS[row['method']]:<15} seed {row['seed']}, {row['given_frames']} given, {row['steps']} steps: "
            f"{row['error']:.2f} (standing still {row['standing_still']:.2f}), "
            f"direction right {row['direction_right']:.3f}, shape right {row['shape_right']:.3f}"
        )
    if args.plot:
        plot(*tabulated(rows, 1), args.plot)
        print(f"wrote {args.plot}")
    print(json.dumps(summary))


def tabulated(rows: Sequence[Mapping[str, Any]], objects: int) -> tuple[Table, dict[str, float]]:
    """Values of every seed by (method, steps) and measure, and those of real videos, for so many objects."""
    table: Table = defaultdict(lambda: defaultdict(list))
    real: dict[str, float] = {}
    for row in rows:
        if row["objects"] != objects or "given_frames" in row:
            continue
        if row["method"] == "real":
            real = {name: row.get(name, 1.0) for name in REPORTED}
            continue
        for name in REPORTED:
            table[row["method"], row["steps"]][name] += [row[name]] if name in row else []
    return table, real


def _mean_and_range(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.3f} ±{(max(values) - min(values)) / 2:.3f}" if values else "-"


def plot(table: Table, real: Mapping[str, float], path: Path) -> None:
    """A panel per measure over the number of steps: means, and the range over seeds as a band."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 5.6), layout="constrained")
    panels = figure.subplots(2, 3).flat
    for axes, name in zip(panels, PLOTTED, strict=True):
        for method, colour in zip(METHODS, COLOURS, strict=True):
            steps = sorted(count for known, count in table if known == method)
            if not steps:
                continue
            values = [table[method, count][name] for count in steps]
            axes.plot(steps, [statistics.mean(v) for v in values], "o-", color=colour, label=METHODS[method])
            axes.fill_between(steps, [min(v) for v in values], [max(v) for v in values], color=colour, alpha=0.2)
        axes.axhline(real[name], color="grey", linestyle=":", label="real videos")
        wish = "1 is right" if name == "spread" else "more is better" if name in MORE_IS_BETTER else "less is better"
        axes.set(title=f"{name.replace('_', ' ')} ({wish})")
        axes.set_xscale("log", base=2)
        axes.set_xticks(STEPS, [str(count) for count in STEPS])
        axes.set_ylim(bottom=0)
        axes.set_xlabel("steps per chunk")
    next(iter(figure.axes)).legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure", help="make and measure videos of one training seed's models")
    measuring.add_argument("--model", action="append", required=True, metavar="METHOD=DIR")
    measuring.add_argument("--seed", type=int, required=True, help="of the training, and of the noise")
    measuring.add_argument("--videos", type=int, default=256)
    measuring.add_argument("--steps", type=int, nargs="+", default=STEPS)
    measuring.add_argument("--json", type=Path, required=True)
    measuring.set_defaults(run=run_measure)
    reporting = commands.add_parser("report", help="table and plot of measured rows")
    reporting.add_argument("files", type=Path, nargs="+")
    reporting.add_argument("--plot", type=Path)
    reporting.set_defaults(run=run_report)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
