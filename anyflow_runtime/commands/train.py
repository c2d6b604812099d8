"""Train a model: a recipe's name or a JSON config; run again, it continues.

Alone (`anyflow train demo --out runs/demo`) or on several GPUs (`torchrun --nproc-per-node 8 -m anyflow_runtime.cli
train CONFIG --out DIR`). A config file may start from a recipe: {"recipe": "far-1.3b-pretrain", "seed": 1}.
"""

from __future__ import annotations

import argparse
import json

from . import UsageError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", nargs="?", help="a JSON file, or the name of a recipe")
    parser.add_argument("--out", help="directory of the run, made if absent")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="change a value of the config, such as data.path=latents or seed=1 (repeatable)",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the recipes and exit")
    parser.add_argument("--show", action="store_true", help="print the whole config as JSON and exit")


def run(args: argparse.Namespace) -> int:
    from ..training.config import config_to_dict
    from ..training.recipes import RECIPES, load_recipe, nested

    if args.list:
        print("\n".join(sorted(RECIPES)))
        return 0
    if args.config is None:
        raise UsageError(f"config: got none, expected a JSON file or one of {', '.join(sorted(RECIPES))}")
    config = load_recipe(args.config, nested(args.set))
    if args.show:
        print(json.dumps(config_to_dict(config), indent=2))
        return 0
    if args.out is None:
        raise UsageError("--out: got none, expected a directory for the run")

    from ..training.trainer.trainer import train

    train(config, args.out)
    return 0
