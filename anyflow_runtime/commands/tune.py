"""Find out on this GPU which kernels and launch parameters are right and fastest; later launches take them.

Every candidate runs at the shapes of the models: rows of the launch tables and their neighbours, and for attention
cuDNN, flash and, on sm_90, the Gluon kernel. What breaks the error law against float64 never counts. The winners stand
in the user's cache directory, or in the file that the environment variable ANYFLOW_TUNING names, with the card and the
versions they hold for. The file is written after every operation: the next run goes on where this one ended.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import write_json
from . import UsageError
from .arguments import model_directory, whole_number

if TYPE_CHECKING:
    import torch

    from anyflow_kernels.launch_configs.tuned import Choice, Key
    from anyflow_kernels.testing.cases import Sizes
    from anyflow_kernels.tuning.subjects import Subject


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", help="1.3B, 14B, or a model directory whose widths count; default: 1.3B and 14B")
    parser.add_argument("--operation", nargs="+", metavar="NAME", help="only these, as --dry-run names them")
    parser.add_argument("--dry-run", action="store_true", help="print what would be tried; needs no GPU")
    parser.add_argument("--arch", metavar="sm_NN", help="with --dry-run: of this GPU architecture, not the one here")
    parser.add_argument("--json", action="store_true", help="print the table, or what would be tried, as JSON")
    parser.add_argument("--output", metavar="FILE", help="the table to write; default: where launches look for it")
    parser.add_argument("--limit-seconds", type=whole_number(1), metavar="N", help="try no candidate after N seconds")
    parser.add_argument("--again", action="store_true", help="also what the table of this machine holds already")
    parser.add_argument("--clear", action="store_true", help="delete the table, and tune nothing")


def run(args: argparse.Namespace) -> int:
    import torch

    from anyflow_kernels.launch_configs import architecture

    if args.arch and not args.dry_run:
        raise UsageError("--arch: expected with --dry-run alone: a table is of the GPU that is here")
    if args.clear:
        return _clear(args)
    if args.dry_run:
        subjects = _chosen(args, _dry_arch(args.arch))
        print(json.dumps(list(map(_planned, subjects)), indent=1) if args.json else _plan_text(subjects))
        return 0
    if not torch.cuda.is_available():
        raise UsageError("this needs an NVIDIA GPU, and torch sees none; --dry-run --arch sm_90 prints what is tried")
    device = torch.device("cuda", torch.cuda.current_device())
    return _tune(args, device, _chosen(args, architecture(device)))


def _tune(args: argparse.Namespace, device: torch.device, subjects: list[Subject]) -> int:
    from anyflow_kernels.launch_configs import architecture
    from anyflow_kernels.launch_configs.tuned import forget_tables
    from anyflow_kernels.tuning import timing, trial
    from anyflow_kernels.tuning.report import describe

    progress = sys.stderr if args.json else sys.stdout
    table = TuningTable(_path(args, device), device)
    for line in table.notes:
        print(line, file=progress)
    wanted = [subject for subject in subjects if args.again or not table.holds(subject)]
    if len(wanted) < len(subjects):
        print(f"known: {len(subjects) - len(wanted)} of {len(subjects)} (--again measures them anew)", file=progress)
    end = time.monotonic() + args.limit_seconds if args.limit_seconds else math.inf

    def before(key: Key, choice: Choice) -> str:
        if time.monotonic() > end:
            raise TimeoutError
        return table.before_candidate(key, choice)

    for done, subject in enumerate(wanted):
        try:
            entry = trial.try_candidates(subject, architecture(device), device, timing.graphed_medians, before)
        except TimeoutError:
            left = len(wanted) - done
            print(f"stopped after {args.limit_seconds} s, {left} left: the next run goes on", file=progress)
            break
        except trial.DeviceLostError as error:
            table.lose_candidate()
            raise RuntimeError(
                f"{error}; it broke the CUDA context and is noted: the next run leaves it out"
            ) from error
        finally:
            table.end_candidate()
        table.add(entry)
        winner, trials = entry["winner"], entry["trials"]
        served = describe(**winner) if winner else "nothing"
        print(f"{subject.key!s:<52}{served}: {entry['reason']} ({len(trials)} tried)", file=progress, flush=True)
        for tried in trials:
            if tried["rejected"]:
                print(f"    rejected: {describe(tried['way'], tried['fields'])}: {tried['rejected']}", file=progress)
    forget_tables()
    print(f"table: {table.path}" + (" (launches read it by ANYFLOW_TUNING)" if args.output else ""), file=progress)
    if args.json:
        print(json.dumps(table.content, indent=1))
    return 0


class TuningTable:
    """The file of winners, complete at every moment.

    It names the candidate that is running: one that ends the process is left out by the next run.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        from anyflow_kernels.launch_configs.tuned import FORMAT, machine, read_table

        self.path, self.notes = path, []  # type: tuple[Path, list[str]]
        self.content: dict[str, Any] = {"format": FORMAT, "machine": machine(device), "lost": [], "choices": []}
        if path.is_file():
            try:
                known = read_table(path)
            except (OSError, ValueError) as error:
                self.notes.append(f"{path}: made anew, it is no tuning table ({error})")
                known = {}
            if known and known["machine"] != self.content["machine"]:
                self.notes.append(f"{path}: made anew, it was of another card or of other versions")
            elif known:
                self.content |= known
                self.lose_candidate()
        path.parent.mkdir(parents=True, exist_ok=True)

    def holds(self, subject: Subject) -> bool:
        """Whether this launch has an entry, from the same shapes."""
        from anyflow_kernels.launch_configs.tuned import key_of

        shapes = [shape.timed.shape for shape in subject.shapes]
        return any(key_of(e) == subject.key and e.get("shapes") == shapes for e in self.content["choices"])

    def before_candidate(self, key: Key, choice: Choice) -> str:
        """Notes that it runs now; why it shall not, if it ended an earlier process."""
        candidate = {"key": str(key), "way": choice.way, "fields": dict(choice.fields)}
        if candidate in self.content["lost"]:
            return "it ended the process, or the CUDA context, of an earlier run"
        self.content["trying"] = candidate
        self._write()
        return ""

    def lose_candidate(self) -> None:
        """The one that was running did not come back."""
        candidate = self.content.pop("trying", None)
        if candidate is not None:
            self.content["lost"].append(candidate)
            self.notes.append(f"left out, it ended an earlier run: {candidate}")

    def end_candidate(self) -> None:
        """None is running."""
        self.content.pop("trying", None)
        self._write()

    def add(self, entry: dict[str, Any]) -> None:
        """An entry in place of the one of the same key."""
        today = datetime.now(timezone.utc).date().isoformat()
        entry |= {"date": today, "reason": f"tuned on {self.content['machine']['card']}, {today}: {entry['reason']}"}
        key = ("operation", "dtype", "size", "shape")
        others = [old for old in self.content["choices"] if any(old[name] != entry[name] for name in key)]
        self.content["choices"] = [*others, entry]
        self._write()

    def _write(self) -> None:
        write_json(self.path, self.content, indent=1)


def _chosen(args: argparse.Namespace, arch: int) -> list[Subject]:
    from anyflow_kernels.tuning.subjects import subjects

    found = subjects(arch, _models(args.model))
    known = dict.fromkeys(subject.key.operation for subject in found)
    unknown = sorted(set(args.operation or ()) - set(known))
    if unknown:
        raise UsageError(f"--operation: got {', '.join(unknown)}, expected some of {', '.join(known)}")
    return [subject for subject in found if subject.key.operation in (args.operation or known)]


def _models(model: str | None) -> Mapping[str, Sizes]:
    from anyflow_kernels.aot_case import MODELS
    from anyflow_kernels.testing.cases import Sizes
    from anyflow_kernels.tuning.subjects import model_sizes

    if model is None or model in MODELS:
        return {name: model_sizes(name) for name in ([model] if model else MODELS)}
    found = model_directory(model, text=False)
    config, ratio = found.transformer, found.spatial_ratio
    height, width = (side // ratio for side in found.default_size)
    heads, head_dim = config["num_attention_heads"], config["attention_head_dim"]
    chunks = (found.chunk_partition or (1, 3, 3, 3))[:4]
    widths = (heads, head_dim, config["ffn_dim"], config["freq_dim"], config["text_dim"])
    return {found.path.name: Sizes(*widths, text_tokens=512, height=height, width=width, chunks=chunks)}


def _dry_arch(name: str | None) -> int:
    import torch

    from anyflow_kernels.launch_configs import ARCHITECTURES, architecture

    names = {f"sm_{arch}": arch for arch in ARCHITECTURES}
    if name is None and torch.cuda.is_available():
        return architecture("cuda")
    if name not in names:
        raise UsageError(f"--arch: got {name or 'none, and no GPU is here'}, expected one of {', '.join(names)}")
    return names[name]


def _planned(subject: Subject) -> dict[str, Any]:
    key = {**subject.key._asdict(), "dtype": str(subject.key.dtype).removeprefix("torch.")}
    candidates = [{"way": c.way, "fields": dict(c.fields), "from": c.reason} for c in subject.candidates]
    return {**key, "shapes": [shape.timed.shape for shape in subject.shapes], "candidates": candidates}


def _plan_text(subjects: list[Subject]) -> str:
    from anyflow_kernels.tuning.report import describe

    lines = [f"{sum(len(s.candidates) for s in subjects)} candidates of {len(subjects)} launches; the first serves now"]
    for subject in subjects:
        lines += ["", str(subject.key), f"  at {'; '.join(shape.timed.shape for shape in subject.shapes)}"]
        smaller = [shape.judged.shape for shape in subject.shapes if shape.judged is not shape.timed]
        lines += [f"  judged against float64 at {'; '.join(smaller)}"] if smaller else []
        lines += [f"  {describe(c.way, c.fields)}   ({c.reason})" for c in subject.candidates]
    return "\n".join(lines)


def _path(args: argparse.Namespace, device: torch.device) -> Path:
    from anyflow_kernels.launch_configs.tuned import machine, table_path

    path = Path(args.output) if args.output else table_path(machine(device)["card"])
    if path is None:
        raise UsageError("--output: expected a file: the environment variable ANYFLOW_TUNING is empty")
    return path


def _clear(args: argparse.Namespace) -> int:
    import torch

    path = _path(args, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    if path.is_file():
        path.unlink()
        print(f"deleted: {path}")
    else:
        print(f"no table at {path}")
    return 0
