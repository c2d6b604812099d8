"""diffusers' own AnyFlow tests with our code in place: `make diffusers-tests`.

Every AnyFlow transformer and pipeline that they build is accelerated, and their scheduler tests get our scheduler. The
tests come from the installed version's repository; offline, `--source` names a checkout or a git directory. What they
skip without an accelerator stands in tests/test_accelerate_extensions.py, with a CPU for one.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import os
import subprocess
import sys
import tarfile
import tempfile
import urllib.request
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from anyflow_runtime.threads import settle_threads

settle_threads()  # before torch is loaded

import pytest  # noqa: E402

REPOSITORY = "https://github.com/huggingface/diffusers"
TESTS = (
    "tests/models/transformers/test_models_transformer_anyflow.py",
    "tests/models/transformers/test_models_transformer_anyflow_far.py",
    "tests/pipelines/anyflow",
    "tests/schedulers/test_scheduler_flow_map_euler_discrete.py",
)


class OurCodeInPlace:
    """A pytest plugin. It counts what it has accelerated: none would mean that diffusers has tested itself."""

    def __init__(self, plain: bool, cpu_as_accelerator: bool) -> None:
        self.plain, self.cpu_as_accelerator = plain, cpu_as_accelerator
        self.accelerated = 0

    def pytest_configure(self, config: pytest.Config) -> None:
        import diffusers

        config.addinivalue_line("markers", "wants_accelerator: what is skipped on a CPU")
        if not self.plain:
            for kind in ("Transformer3DModel", "FARTransformer3DModel", "Pipeline", "FARPipeline"):
                self._accelerate_when_built(getattr(diffusers, f"AnyFlow{kind}"))
        _without_downloads()
        if self.cpu_as_accelerator:
            _cpu_as_accelerator()

    def _accelerate_when_built(self, kind: Any) -> None:
        from anyflow_runtime import accelerate

        original = kind.__init__

        @functools.wraps(original)
        def build(module: Any, *arguments: Any, **keywords: Any) -> None:
            original(module, *arguments, **keywords)
            # A class that is accelerated already must do without our help; a pipeline may come without a transformer.
            if type(module) is kind and getattr(module, "transformer", module) is not None:
                accelerate(module)
                self.accelerated += 1

        kind.__init__ = build

    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        if self.cpu_as_accelerator:
            items[:] = [item for item in items if item.get_closest_marker("wants_accelerator")]
        if self.plain:
            return
        from anyflow_runtime.schedulers import FlowMapEulerDiscreteScheduler

        for item in items:
            if hasattr(getattr(item, "cls", None), "scheduler_class"):
                item.cls.scheduler_class = FlowMapEulerDiscreteScheduler  # type: ignore[attr-defined]

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        terminalreporter.write_line(f"{self.accelerated} transformers and pipelines were accelerated")


def _without_downloads() -> None:
    """The random T5 of a few weights that their pipelines fetch from the hub is one of ours."""
    import transformers

    from bench.tiny_pipeline import tiny_tokenizer

    config = {"vocab_size": 320, "d_model": 32, "d_kv": 8, "d_ff": 37, "num_layers": 2, "num_heads": 4}

    def replace(kind: Any, made: Any) -> None:
        original = kind.from_pretrained

        def from_pretrained(name: Any, *arguments: Any, **keywords: Any) -> Any:
            here = not str(name).startswith("hf-internal-testing/")
            return original(name, *arguments, **keywords) if here else made()

        kind.from_pretrained = from_pretrained

    replace(transformers.AutoConfig, lambda: transformers.T5Config(**config))
    replace(transformers.AutoTokenizer, tiny_tokenizer)


def _cpu_as_accelerator() -> None:
    """What they run on accelerators alone may run here: weights move from the CPU to the CPU, without streams."""
    import diffusers

    from tests import testing_utils  # theirs

    testing_utils.require_accelerator = testing_utils.require_torch_accelerator = pytest.mark.wants_accelerator
    offload = diffusers.ModelMixin.enable_group_offload

    def without_streams(model: Any, *arguments: Any, **keywords: Any) -> Any:
        return offload(model, *arguments, **{**keywords, "use_stream": False, "record_stream": False})

    diffusers.ModelMixin.enable_group_offload = without_streams


def extract(source: str | None, into: Path) -> Path:
    """The directory that holds `tests/`, from a checkout, a git directory, or GitHub's archive of this version."""
    if source is not None and (Path(source) / "tests").is_dir():
        return Path(source)
    archive = into / "diffusers.tar"
    if source is None:
        version = importlib.metadata.version("diffusers")
        urllib.request.urlretrieve(f"{REPOSITORY}/archive/refs/tags/v{version}.tar.gz", archive)
    else:
        command = ["git", "-C", source, "archive", "--prefix=diffusers/", f"--output={archive}", "HEAD", "tests"]
        subprocess.run(command, check=True)
    with tarfile.open(archive) as tar:
        tar.extractall(into, filter="data")
    return next(path.parent for path in into.glob("*/tests"))


def main() -> int:
    """Run them; the exit status of pytest."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--source", help="a checkout or git directory of diffusers (default: fetched from GitHub)")
    parser.add_argument("--plain", action="store_true", help="without our code, to see what fails anyway")
    parser.add_argument("--cpu-as-accelerator", action="store_true", help="run what they skip on a CPU, and only that")
    options, arguments = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(extract(options.source and os.path.abspath(options.source), Path(directory)))
        sys.path.insert(0, "")  # their package `tests` before ours
        plugin = OurCodeInPlace(options.plain, options.cpu_as_accelerator)
        shared = ["-c", os.devnull, "--rootdir=.", "-p", "no:cacheprovider", "-q", "-rfEs"]
        status = pytest.main([*shared, *arguments, *TESTS], plugins=[plugin])
        return status or int(plugin.accelerated == 0 and not options.plain)


if __name__ == "__main__":
    sys.exit(main())
