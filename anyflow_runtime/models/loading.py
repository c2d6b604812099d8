"""Model directories in diffusers' format: `config.json` and safetensors, single or sharded with an index."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..files import whole_file, write_json
from ..hub import model_files
from .config import constructor_keywords, read_config

Model = TypeVar("Model", bound="CheckpointMixin")
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
FORMAT_VERSION = "0.42.0"  # the diffusers release whose directories these are


class CheckpointMixin(nn.Module):
    """Reading and writing of model directories for a model with `config` and `keep_in_fp32`."""

    keep_in_fp32: tuple[str, ...] = ()
    config: Any

    @classmethod
    def from_config(cls: type[Model], config: Mapping[str, Any], **overrides: Any) -> Model:
        """A model with fresh weights.

        Args:
            config: the content of a `config.json`, or another model's `config`.
            overrides: constructor keywords that take precedence.

        Raises:
            ValueError: on entries the constructor does not know, or a config of another class.
        """
        return cls(**constructor_keywords(cls, config, overrides))

    @classmethod
    def from_pretrained(
        cls: type[Model],
        path: str | os.PathLike[str],
        subfolder: str | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        **overrides: Any,
    ) -> Model:
        """A model from a directory, each weight read straight to its device and dtype, without a second copy.

        Args:
            path: a model or pipeline directory, or the name of a repository on the hub, see `hub.model_files`.
            subfolder: such as "transformer" in a pipeline directory.
            dtype: of the weights; as stored if None. Weights under `keep_in_fp32` stay fp32 whatever it says.
            device: where to put them, the CPU if None.
            overrides: constructor keywords such as `backend`.

        Raises:
            FileNotFoundError: if the directory has no config or no weights.
            ValueError: listing all unknown, missing and mis-shaped weights, or naming an unreadable file.
        """
        directory = model_files(path, [f"{subfolder}/*"] if subfolder else None) / (subfolder or "")
        if not directory.is_dir():
            raise FileNotFoundError(f"no model directory {directory}")
        with torch.device("meta"):
            model = cls(**constructor_keywords(cls, read_config(directory), overrides))
        files = _weight_files(directory)
        _check_names(model, files, directory)
        parameters = dict(model.named_parameters())
        for name, tensor in _read(files, torch.device(device or "cpu")):
            target = dtype or tensor.dtype
            if dtype is not None and not set(name.split(".")).isdisjoint(cls.keep_in_fp32):
                target = torch.float32
            parent, _, leaf = name.rpartition(".")
            requires_grad = parameters[name].requires_grad
            parameter = nn.Parameter(tensor.to(target, copy=True), requires_grad=requires_grad)
            setattr(model.get_submodule(parent), leaf, parameter)
        model.fuse_projections()  # type: ignore[operator]
        return model.eval()

    def save_pretrained(self, path: str | os.PathLike[str], max_shard_bytes: int = 10 * 1000**3) -> None:
        """Write a directory that this class and diffusers read back.

        Files appear under their names only when complete; weights of an earlier save are removed at the end.

        Args:
            path: the directory, made if absent.
            max_shard_bytes: size above which the weights are split over several files.
        """
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        entries = {"_class_name": type(self).__name__, "_diffusers_version": FORMAT_VERSION, **self.config}
        shards = _shards(self.state_dict(), max_shard_bytes)
        count = len(shards)
        names = [
            WEIGHTS if count == 1 else WEIGHTS.replace(".", f"-{i + 1:05}-of-{count:05}.", 1) for i in range(count)
        ]
        with ExitStack() as whole:  # names are taken when all shards are complete: old and new ones may be the same
            files = [whole.enter_context(whole_file(directory / name)) for name in names]
            for file, shard in zip(files, shards, strict=True):
                save_file(shard, file, metadata={"format": "pt"})
        if count > 1:
            total = sum(t.nbytes for shard in shards for t in shard.values())
            weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
            write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}, sort_keys=True)
        write_json(directory / "config.json", entries, sort_keys=True)
        stale = [INDEX] if count == 1 else []
        pattern = re.compile(re.escape(WEIGHTS).replace(r"\.", r"(-\d+-of-\d+)?\.", 1))
        stale += [f.name for f in directory.iterdir() if pattern.fullmatch(f.name) and f.name not in names]
        for name in stale:
            (directory / name).unlink(missing_ok=True)


def _shards(state: Mapping[str, Tensor], max_bytes: int) -> list[dict[str, Tensor]]:
    """The weights in order, split where a shard would grow beyond max_bytes; fused views become own tensors."""
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in state.items():
        if size and size + tensor.nbytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().contiguous()
        size += tensor.nbytes
    return shards


def _weight_files(directory: Path) -> dict[str, Path]:
    """The file of each weight."""
    index = directory / INDEX
    if index.is_file():
        try:
            weight_map: dict[str, str] = dict(json.loads(index.read_text())["weight_map"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{index}: not an index of safetensors shards ({error!r})") from error
        files = {name: directory / file for name, file in weight_map.items()}
        absent = sorted({str(file) for file in files.values() if not file.is_file()})
        if absent:
            raise FileNotFoundError(f"{index} names files that do not exist: {absent}")
        return files
    single = directory / WEIGHTS
    if not single.is_file():
        raise FileNotFoundError(f"no weights in {directory}: expected {WEIGHTS} or {INDEX}")
    with _open(single) as file:
        return dict.fromkeys(file.keys(), single)


def _open(path: Path, device: str = "cpu") -> Any:
    try:
        return safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a readable safetensors file ({error})") from error


def _by_file(files: Mapping[str, Path]) -> dict[Path, list[str]]:
    grouped: dict[Path, list[str]] = {}
    for name, path in files.items():
        grouped.setdefault(path, []).append(name)
    return grouped


def _check_names(model: nn.Module, files: Mapping[str, Path], directory: Path) -> None:
    """Compare names and shapes before any tensor is read."""
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    problems = [f"missing: {name} {expected[name]}" for name in sorted(set(expected) - set(files))]
    problems += [f"unknown: {name}" for name in sorted(set(files) - set(expected))]
    for path, names in _by_file(files).items():
        with _open(path) as file:
            stored = set(file.keys())
            problems += [
                f"missing: {name} is not in {path.name}, where the index puts it"
                for name in sorted(set(names) - stored)
            ]
            for name in sorted(set(names) & stored & set(expected)):
                shape = tuple(file.get_slice(name).get_shape())
                if shape != expected[name]:
                    problems.append(f"mis-shaped: {name} got {shape}, expected {expected[name]}")
    if problems:
        raise ValueError(f"{directory}: weights do not fit {type(model).__name__}:\n  " + "\n  ".join(problems))


def _read(files: Mapping[str, Path], device: torch.device) -> Iterator[tuple[str, Tensor]]:
    for path, names in _by_file(files).items():
        with _open(path, str(device)) as file:
            for name in names:
                yield name, file.get_tensor(name)
