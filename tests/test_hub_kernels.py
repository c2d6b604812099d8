"""The kernels as a hub kernel repository: the generated package runs by its own name, beside this one."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import runpy
import sys
from base64 import b64decode
from pathlib import Path

import pytest
import tomllib
import torch

import anyflow_kernels

SCRIPT = runpy.run_path(str(Path(__file__).resolve().parents[1] / "scripts" / "hub_kernels.py"))


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "kernels"
    SCRIPT["main"](out)
    return out


@pytest.mark.filterwarnings("ignore:the C.. extension")
def test_a_variant_runs_beside_the_installed_package(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant = repository / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    latents, weight = torch.randn(2, 3, 4, 9, 11), torch.randn(24, 4, 1, 2, 2)
    tokens = module.load_ops("torch").patch_embed(latents, weight, None, (1, 2, 2))
    torch.testing.assert_close(tokens, anyflow_kernels.load_ops("torch").patch_embed(latents, weight, None, (1, 2, 2)))
    assert hasattr(getattr(torch.ops, name), "patch_embed")
    if module.available_backends()["triton"] is None and not torch.cuda.is_available():
        x = torch.randn(2, 5, 64)
        torch.testing.assert_close(
            module.load_ops("triton").rms_norm(x, torch.ones(64), 1e-6),
            anyflow_kernels.load_ops("torch").rms_norm(x, torch.ones(64), 1e-6),
        )
        assert hasattr(getattr(torch.ops, name), "rms_norm")


def test_sources_name_themselves_relatively_and_no_namespace_of_ours(repository: Path) -> None:
    """A loader gives the module a name of its own, and several versions may be loaded at once."""
    for path in (repository / "torch-ext").rglob("*.py"):
        text = path.read_text()
        assert "anyflow::" not in text and "torch.ops.anyflow" not in text, path
        assert "\nfrom anyflow_kernels" not in text and "\nimport anyflow_kernels" not in text, path


def test_metadata_is_that_of_the_files(repository: Path) -> None:
    general = tomllib.loads((repository / "build.toml").read_text())["general"]
    for backend in general["backends"]:
        variant = repository / "build" / f"torch-{backend}"
        metadata = json.loads((variant / "metadata.json").read_text())
        assert (metadata["name"], metadata["backend"]["type"]) == (general["name"], backend)
        written = {path.relative_to(variant).as_posix(): path for path in variant.rglob("*") if path.is_file()}
        assert set(metadata["digest"]["files"]) == set(written) - {"metadata.json"}
        for name, digest in metadata["digest"]["files"].items():
            assert hashlib.sha256(written[name].read_bytes()).digest() == b64decode(digest)
