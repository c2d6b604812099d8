"""README and docs say what is there: code parses, names, commands, targets and files exist. Witness: the repository."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from anyflow_runtime.cli import build_parser
from anyflow_runtime.commands import UsageError

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```([a-z]*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
# What a path begins with, in code, to be one of this repository.
PATH = re.compile(
    r"(?:^|[\s`(])((?:anyflow_kernels|anyflow_runtime|bench|csrc|docs|examples|scripts|tests)/[\w./*-]*\w)"
)

# A GPU, a download, several processes.
NEEDS_MORE = re.compile(r'nvidia/|"cuda"\)|device="cuda"|init_process_group')

every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def code_of(page: Path) -> Iterator[str]:
    """Lines of the shell blocks, and inline code."""
    text = page.read_text()
    for block in blocks(page, ""):
        yield from block.splitlines()
    yield from re.findall(r"`([^`\n]+)`", FENCE.sub("", text))


def commands(page: Path) -> Iterator[list[str]]:
    """Arguments of `anyflow` wherever a page calls it."""
    for line in code_of(page):
        match = re.match(r"(?:[A-Z_]+=\S+ )*(?:torchrun .*-m anyflow_runtime\.cli|anyflow) (.*)", line.strip())
        if match:
            yield shlex.split(match[1], comments=True)


def test_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 80


@every_page
def test_python_parses_and_its_names_exist(page: Path) -> None:
    for code in blocks(page, "python"):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("anyflow_"):
                module = importlib.import_module(str(node.module))
                missing = [alias.name for alias in node.names if not hasattr(module, alias.name)]
                assert not missing, f"{node.module} has no {missing}"


@every_page
def test_python_that_needs_neither_gpu_nor_download_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for code in blocks(page, "python"):
        if "import" in code and not NEEDS_MORE.search(code):
            exec(compile(code, str(page), "exec"), {})


@every_page
def test_commands_are_those_of_the_parser(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in commands(page):
        try:
            build_parser().parse_args(arguments)
        except UsageError as error:
            # A mention, not a call, may leave out what is required; its options exist all the same.
            with pytest.raises(SystemExit):
                build_parser().parse_args([arguments[0], "--help"])
            unknown = {a for a in arguments if a.startswith("--")} - set(capsys.readouterr().out.split())
            assert "are required" in str(error) and not unknown, f"anyflow {shlex.join(arguments)}: {error}"
        except SystemExit as stop:
            assert stop.code == 0, arguments


@every_page
def test_targets_are_in_the_makefile(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {match for line in code_of(page) for match in re.findall(r"^make ([a-z-]+)", line.strip())}
    assert named <= targets, named - targets


@every_page
def test_files_and_modules_named_exist(page: Path) -> None:
    for path in PATH.findall(page.read_text()):
        assert list(ROOT.glob(path.replace("NAME", "*"))), path
    for line in code_of(page):
        for module in re.findall(r"python -m ((?:bench|anyflow_\w+)\.[\w.]+)", line):
            assert importlib.util.find_spec(module), module


@every_page
def test_tests_named_exist(page: Path) -> None:
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    defined = set(re.findall(r"def (test_\w+)", tests))
    named = set(re.findall(r"`(test_\w+)`", page.read_text()))
    assert named <= defined, named - defined


@every_page
def test_relative_links_lead_to_files(page: Path) -> None:
    """Pages of docs/ that include others are checked where they are included; anchors are mkdocs' part."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", FENCE.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@every_page
def test_documented_objects_exist(page: Path) -> None:
    for name in re.findall(r"^::: ([\w.]+)$", page.read_text(), re.MULTILINE):
        parts = name.split(".")
        for length in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError:
                continue
            for part in parts[length:]:
                found = getattr(found, part)
            break
        else:
            pytest.fail(name)


def test_every_page_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs')}\n" in navigation, page


def test_readers_have_the_papers() -> None:
    """What is cited can be opened: no working papers of ours."""
    for page in PAGES:
        assert not re.search(r"\b(shared|spec)/|\bspec:|the issue\b", page.read_text()), page


def test_citation_names_the_papers() -> None:
    yaml = pytest.importorskip("yaml")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["title"]
    urls = [reference["url"] for reference in citation["references"]]
    assert urls == ["https://arxiv.org/abs/2605.13724", "https://arxiv.org/abs/2503.19325"]
