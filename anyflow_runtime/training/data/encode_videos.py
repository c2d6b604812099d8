"""Encode the clips of a training config and print the directory of the shards, a data set of kind "safetensors".

python -m anyflow_runtime.training.data.encode_videos CONFIG [--set data.path=DIR ...]

`anyflow train` does the same before it starts; this is for encoding on another machine. CONFIG and --set are its.
"""

from __future__ import annotations

import argparse
from typing import cast

from ...parallel import process_group
from ..recipes import load_recipe, nested
from .files import SafetensorsSource
from .open import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a JSON file, or the name of a recipe")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change a value of the config")
    args = parser.parse_args()
    data = load_recipe(args.config, nested(args.set)).data
    if data.kind != "video":
        parser.error(f"data.kind: got {data.kind!r}, expected 'video'")
    with process_group() as device:
        source = cast("SafetensorsSource", open_source(data, 0, device))
    print(source.files[0].parent)


if __name__ == "__main__":
    main()
