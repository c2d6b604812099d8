"""Lays the kernels out as a kernel repository of the Hugging Face Hub, generated from `anyflow_kernels`.

    python scripts/hub_kernels.py OUT

OUT is a project for kernel-builder: `build.toml`, `CARD.md`, and the package under `torch-ext/`. It is Python and
Triton alone (torch-noarch: plain PyTorch moves the patches), so its variants are written too, under `build/`. They
differ from the package by what kernel-builder adds: metadata, and operations in a namespace that no other build has.
Source: https://huggingface.co/docs/kernels/builder/writing-kernels and .../kernels/kernel-requirements.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAME = "anyflow_kernels"
HUB_NAME = NAME.replace("_", "-")
VERSION = 0  # by convention: the interface may still change
BACKENDS = ("cpu", "cuda")
LITERAL = re.compile(r'f?"anyflow::([^"]*)"')
FUTURE = "from __future__ import annotations\n"
BUILD = f"""[general]
name = "{HUB_NAME}"
version = {VERSION}
edition = 6
license = "Apache-2.0"
backends = {json.dumps(BACKENDS)}
python-depends = ["einops"]

[torch-noarch]
"""
NAMESPACE = """import torch

ops = torch.ops.{0}


def add_op_namespace_prefix(name: str) -> str:
    return f"{0}::{{name}}"
"""


def sources() -> dict[str, str]:
    """Path inside the package to text, with operations named through `_ops`, which every build has of its own."""
    files = {"py.typed": ""}
    for path in sorted((ROOT / NAME).rglob("*.py")):
        inside, text = path.relative_to(ROOT / NAME), path.read_text()
        named = LITERAL.sub(r'add_op_namespace_prefix(f"\1")', text).replace("torch.ops.anyflow", "_registered")
        if named != text:
            dots = "." * len(inside.parts)
            names = f"from {dots}_ops import add_op_namespace_prefix, ops as _registered\n"
            assert FUTURE in named, inside
            named = named.replace(FUTURE, FUTURE + names, 1)
        files[inside.as_posix()] = named
    return files


def write(directory: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)


def sha256(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def main(out: Path) -> None:
    shutil.rmtree(out, ignore_errors=True)
    package = sources()
    write(out / "torch-ext" / NAME, package)
    write(out, {"build.toml": BUILD, "CARD.md": (ROOT / "README.md").read_text()})
    shutil.copy(ROOT / "LICENSE", out / "LICENSE")
    for backend in BACKENDS:
        unique = f"_{NAME}_{backend}_{sha256(json.dumps(package)).hex()[:8]}"
        files = {**package, "_ops.py": NAMESPACE.format(unique)}
        metadata = {
            "name": HUB_NAME,
            "id": unique,
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": ["einops"],
            "backend": {"type": backend},
            "digest": {
                "algorithm": "sha256",
                "files": {name: base64.b64encode(sha256(text)).decode() for name, text in files.items()},
            },
        }
        write(out / "build" / f"torch-{backend}", {**files, "metadata.json": json.dumps(metadata, indent=1)})


if __name__ == "__main__":
    main(Path(sys.argv[1]))
