"""Convert a checkpoint between diffusers, research, FastGen and FastVideo layouts, and list what was done.

The source's layout is read off its keys. What only a config knows (gate, delta type, chunking, LoRA alpha) is taken
from a config, never guessed.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import read_json, whole_file
from . import UsageError

if TYPE_CHECKING:
    from ..checkpoints import Report

MODELS = ("AnyFlowFARTransformer3DModel", "AnyFlowTransformer3DModel")
TARGETS = ("diffusers", "research", "fastgen", "fastgen_old", "fastvideo")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a model directory, a .safetensors file, or a .pt file")
    parser.add_argument("target", metavar="DST", help="a directory for diffusers, .pt for research, else .safetensors")
    parser.add_argument("--to", required=True, choices=TARGETS, help="layout to write; research is written merged")
    parser.add_argument("--from", dest="layout", choices=TARGETS, help="layout of SRC (default: by its keys)")
    parser.add_argument("--config", help="the model's config.json, where SRC does not bring one")
    parser.add_argument("--alpha", type=float, help="LoRA alpha of the training config, where SRC holds adapters")
    parser.add_argument("--base", help="checkpoint with the weights under the adapters, where SRC lacks them")
    parser.add_argument(
        "--weights", choices=("ema", "student"), default="ema", help="which weights of a research checkpoint (ema)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace DST if it exists")
    parser.add_argument("--quiet", action="store_true", help="print the counts alone")


def run(args: argparse.Namespace) -> int:
    source, target = Path(args.source), Path(args.target)
    if not source.exists():
        raise UsageError(f"SRC: no file or directory {source}")
    if target.exists() and (target.is_file() or any(target.iterdir())) and not args.overwrite:
        raise UsageError(f"DST: {target} exists; --overwrite replaces it")
    if target.resolve() == source.resolve():
        raise UsageError(f"DST: got the source {source} itself, expected another place")
    source = _transformer_of(source)
    for name, path in (("--config", args.config), ("--base", args.base)):
        if path is not None and not Path(path).exists():
            raise UsageError(f"{name}: no file {path}")
    target.parent.mkdir(parents=True, exist_ok=True)

    if args.to == "research":
        report = _to_research(args, source, target)
    else:
        from ..checkpoints import convert

        try:
            report = convert(source, target, args.to, args.layout, args.config, args.alpha, args.weights, args.base)
        except ValueError as error:
            options = ("config: ", "alpha: ", "base: ")
            raise UsageError(f"--{error}" if str(error).startswith(options) else str(error)) from error
    if not args.quiet:
        print(report)
    counts = f"{len(report.renamed)} renamed, {len(report.added)} added, {len(report.dropped)} dropped"
    print(f"{target}: {args.to}; {counts}, {len(report.notes)} notes")
    return 0


def _transformer_of(source: Path) -> Path:
    """The transformer's directory of a pipeline's, and of a model's directory itself; other models are refused."""
    if (source / "model_index.json").is_file():
        source = source / "transformer"
    config = source / "config.json"
    if config.is_file():
        kind = read_json("SRC", config, "the config of an AnyFlow transformer").get("_class_name")
        if kind not in MODELS:
            raise UsageError(f"SRC: got {source}, which holds {kind}, expected one of {', '.join(MODELS)}")
    return source


def _to_research(args: argparse.Namespace, source: Path, target: Path) -> Report:
    """Merged weights under `ema`; a file of the research code that already is one stays what it is."""
    import torch

    from ..checkpoints import convert_state_dict, read_checkpoint
    from ..checkpoints.research import WEIGHTS

    if target.suffix != ".pt":
        raise UsageError(f"DST: got {target}, expected a .pt file for research")
    base = None if args.base is None else convert_state_dict(read_checkpoint(args.base), "diffusers")[0]
    state, report = convert_state_dict(
        read_checkpoint(source), "diffusers", args.layout, args.alpha, args.weights, base
    )
    bare = {key.removeprefix("transformer."): value for key, value in state.items()}
    report.notes.append(f"written merged, under {WEIGHTS[args.weights]!r}; the config is not part of this layout")
    with whole_file(target) as partial:
        torch.save({WEIGHTS[args.weights]: bare}, partial)
    return report
