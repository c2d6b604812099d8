"""Models by their name on the hub. A stand-in for `huggingface_hub` serves a folder: no network is touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("huggingface_hub")

import huggingface_hub.errors

from anyflow_runtime import AnyFlowFARTransformer3DModel, hub, open_model
from anyflow_runtime.cli import main
from anyflow_runtime.streaming.model_directory import RELEASED, read_model_directory
from anyflow_runtime.streaming.pixel_model import DEMO_MODEL

NAME = "someone/pixels"
CARD = "---\nlicense: other\nlicense_name: nvidia-nsclv1\nlicense_link: LICENSE\n---\n# A model\n"


class Hub:
    """The parts of `huggingface_hub` that are used, over a folder; `downloads` are the patterns asked for."""

    def __init__(self, root: Path, cache: Path) -> None:
        self.root, self.downloads, self.online, self.cached = root, [], True, False
        self.constants = SimpleNamespace(HF_HUB_OFFLINE=False, HF_HUB_CACHE=str(cache))
        self.errors = huggingface_hub.errors
        self.size = 1000

    def HfApi(self) -> Any:
        def model_info(name: str, files_metadata: bool) -> Any:
            if not self.online:
                raise ConnectionError("no network")
            if name != NAME and name not in RELEASED.values():
                response = SimpleNamespace(headers={}, request=None, status_code=404)
                raise huggingface_hub.errors.RepositoryNotFoundError("404: no such repository", response=response)
            names = [str(path.relative_to(self.root)) for path in self.root.rglob("*") if path.is_file()]
            files = [SimpleNamespace(rfilename=name, size=self.size) for name in names]
            return SimpleNamespace(sha="abc", siblings=files, card_data={"license": "nvidia-nsclv1"})

        return SimpleNamespace(model_info=model_info)

    def try_to_load_from_cache(self, name: str, file: str, revision: str) -> str | None:
        return "there" if self.cached else None

    def snapshot_download(self, name: str, allow_patterns: Any = None, local_files_only: bool = False, **_: Any) -> str:
        if local_files_only and not self.cached:
            raise huggingface_hub.errors.LocalEntryNotFoundError("not in the cache")
        self.downloads.append(allow_patterns)
        return str(self.root)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    shutil.copytree(DEMO_MODEL, tmp_path / "repository")
    (tmp_path / "repository" / "README.md").write_text(CARD)
    fake = Hub(tmp_path / "repository", tmp_path / "cache")
    monkeypatch.setattr(hub, "optional", lambda *arguments: fake)
    return fake


def test_a_hub_id_is_a_model_name_everywhere(fake: Hub, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    command = ["generate", "a red circle moves up over grey", "--model", NAME, "--steps", "1"]
    assert main([*command, "--out", str(tmp_path / "o.gif")]) == 0
    captured = capfd.readouterr()
    assert "someone/pixels: downloading" in captured.err and "licence: nvidia-nsclv1" in captured.err
    assert "licence: nvidia-nsclv1 (LICENSE)" in captured.out
    assert open_model(NAME, device="cpu").decoder is not None
    assert AnyFlowFARTransformer3DModel.from_pretrained(NAME, subfolder="transformer").config.in_channels == 3
    assert fake.downloads[-1] == ["transformer/*", "README.md"]


def test_a_preset_is_a_model_name_and_only_what_is_needed_is_fetched(fake: Hub) -> None:
    model = read_model_directory("anyflow-far-wan2.1-1.3b", text=False, decode=False)
    assert model.path == fake.root
    assert fake.downloads == [["model_index.json", "transformer/*", "scheduler/*", "README.md"]]


def test_what_is_cached_is_neither_announced_nor_counted(fake: Hub, capfd: pytest.CaptureFixture[str]) -> None:
    fake.cached, fake.size = True, 10**18
    assert hub.model_files(NAME) == fake.root
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("offline", ["no network", "HF_HUB_OFFLINE"])
def test_offline_the_cache_serves(fake: Hub, offline: str) -> None:
    fake.online = offline != "no network"
    fake.constants.HF_HUB_OFFLINE = offline == "HF_HUB_OFFLINE"
    with pytest.raises(FileNotFoundError, match=f"{NAME} is no directory here, and cannot be had from the hub"):
        hub.model_files(NAME)
    fake.cached = True
    assert hub.model_files(NAME) == fake.root


def test_a_download_that_does_not_fit_is_refused_with_the_numbers(fake: Hub) -> None:
    fake.size = 10**15
    with pytest.raises(OSError, match=r"someone/pixels takes [\d.]+ GB, and .*cache has [\d.]+ GB free"):
        hub.model_files(NAME)
    assert fake.downloads == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "no directory nowhere, and 'nowhere' is no name on the hub"),
        ("./a/b", "no directory a/b"),
        ("no/such-model", "no/such-model is no directory here, and the hub refuses it: .*404"),
    ],
)
def test_other_names_are_refused(fake: Hub, name: str, message: str) -> None:
    with pytest.raises(FileNotFoundError, match=message):
        hub.model_files(name)


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install 'anyflow-kernels\[hub\]'"):
        hub.model_files("someone/else")


def test_a_card_without_terms_says_nothing(tmp_path: Path) -> None:
    assert hub.licence(tmp_path) is None
    (tmp_path / "README.md").write_text("# A model\nlicense: not in a header\n")
    assert hub.licence(tmp_path) is None


def test_in_a_process_that_imports_nothing_else(tmp_path: Path) -> None:
    """The package's submodules are its attributes only once somebody has imported them, as diffusers does."""
    program = "from anyflow_runtime.hub import model_files; model_files('someone/pixels')"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True)
    assert "FileNotFoundError: someone/pixels is no directory here, and cannot be had from the hub" in done.stderr
