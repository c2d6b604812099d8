"""Precomputed latents with prompt embeddings, from safetensors shards or WebDataset-style tars.

A directory holds `negative.safetensors` with `prompt_embeds` (S, D), the negative prompt's, and either
- `*.safetensors` shards with `latents` (N, F, C, H, W) and `prompt_embeds` (N, S, D), or
- `*.tar` files in which the members `KEY.latents.npy` (F, C, H, W) and `KEY.prompt_embeds.npy` (S, D) are one sample.

Everything is checked when the source is opened, from headers alone; later only the samples of a batch are read.
"""

from __future__ import annotations

import ast
import bisect
import struct
import tarfile
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from ..objectives.timesteps import GlobalBatch
from .source import EpochOrder, Samples, Shapes, check_sample

NEGATIVE = "negative.safetensors"
PARTS = ("latents", "prompt_embeds")


class SafetensorsSource:
    """Shards with many samples each.

    Args:
        files: shards in their order; None: all in the directory.

    Raises:
        FileNotFoundError: if there is no shard.
        ValueError: naming the shard that lacks its captions or does not fit the others.
    """

    def __init__(self, path: str | Path, seed: int, files: Sequence[Path] | None = None) -> None:
        found = _files(path, "*.safetensors") if files is None else list(files)
        self.files = [file for file in found if file.name != NEGATIVE]
        if not self.files:
            raise FileNotFoundError(f"no .safetensors shard in {path} besides {NEGATIVE}")
        counts = []
        expected: tuple[list[int], ...] = ()
        for file in self.files:
            shapes = _shapes(file)
            absent = [part for part in PARTS if part not in shapes]
            if absent:
                what = " (missing captions)" if "prompt_embeds" in absent else ""
                raise ValueError(f"{file}: has {sorted(shapes)}, lacks {absent}{what}")
            latents, text = (shapes[part] for part in PARTS)
            if latents[:1] != text[:1]:
                raise ValueError(f"{file}: got {latents[:1]} latents with {text[:1]} prompt_embeds, expected as many")
            expected = expected or (latents[1:], text[1:])
            check_sample(str(file), latents[1:], text[1:], expected)
            counts.append(latents[0])
        self.shapes: Shapes = tuple(expected[0]), tuple(expected[1])
        self.ends = list(accumulate(counts))
        self.order = EpochOrder(self.ends[-1], seed)
        self.negative: torch.Tensor | None = _negative(path, expected[1])

    def samples(self, draw: int, position: GlobalBatch) -> Samples:
        """Read this process's samples, each shard opened once."""
        rows: list[tuple[int, int]] = []
        for index in self.order.indices(draw, position):
            shard = bisect.bisect_right(self.ends, index)
            rows.append((shard, index - (self.ends[shard - 1] if shard else 0)))
        loaded: dict[tuple[int, int], list[torch.Tensor]] = {}
        for shard in sorted({shard for shard, _ in rows}):
            with safe_open(self.files[shard], framework="pt") as file:
                slices = [file.get_slice(part) for part in PARTS]
                for row in {r for s, r in rows if s == shard}:
                    loaded[shard, row] = [part[row : row + 1] for part in slices]
        latents, text = (torch.cat([loaded[key][i] for key in rows]).float() for i in range(2))
        return Samples(latents, tuple(f"{self.files[s].name}[{r}]" for s, r in rows), text)


class TarSource:
    """Tars in the manner of WebDataset; the samples' places in the files are found once, by their headers.

    Raises:
        FileNotFoundError: if there is no tar.
        ValueError: naming the sample that lacks a part or does not fit the others.
    """

    def __init__(self, path: str | Path, seed: int) -> None:
        files = _files(path, "*.tar")
        if not files:
            raise FileNotFoundError(f"no .tar in {path}")
        self.places: list[tuple[Path, str, list[int]]] = []
        expected: tuple[list[int], ...] = ()
        for file in files:
            for key, members in _members(file).items():
                absent = [part for part in PARTS if part not in members]
                if absent:
                    what = " (missing caption)" if "prompt_embeds" in absent else ""
                    raise ValueError(f"{file}: sample {key!r} lacks {[f'{key}.{p}.npy' for p in absent]}{what}")
                offsets = [members[part] for part in PARTS]
                with file.open("rb") as stream:
                    latents, text = (list(_npy_header(stream, offset, f"{file}: {key}")[1]) for offset in offsets)
                expected = expected or (latents, text)
                check_sample(f"{file}: sample {key!r}", latents, text, expected)
                self.places.append((file, key, offsets))
        if not self.places:
            raise ValueError(f"{path}: its tars hold no member like KEY.latents.npy")
        self.shapes: Shapes = tuple(expected[0]), tuple(expected[1])
        self.order = EpochOrder(len(self.places), seed)
        self.negative: torch.Tensor | None = _negative(path, expected[1])

    def samples(self, draw: int, position: GlobalBatch) -> Samples:
        """Read this process's samples."""
        places = [self.places[index] for index in self.order.indices(draw, position)]
        parts: tuple[list[torch.Tensor], list[torch.Tensor]] = ([], [])
        for file, key, offsets in places:
            with file.open("rb") as stream:
                for part, offset in zip(parts, offsets, strict=True):
                    part.append(_npy(stream, offset, f"{file}: {key}"))
        names = tuple(f"{file.name}:{key}" for file, key, _ in places)
        return Samples(torch.stack(parts[0]), names, torch.stack(parts[1]))


def _files(path: str | Path, pattern: str) -> list[Path]:
    if not Path(path).is_dir():
        raise FileNotFoundError(f"data.path: no directory {path}")
    return sorted(Path(path).glob(pattern))


def _shapes(file: Path) -> dict[str, list[int]]:
    try:
        with safe_open(file, framework="pt") as opened:
            return {key: opened.get_slice(key).get_shape() for key in opened.keys()}
    except SafetensorError as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error})") from error


def _negative(path: str | Path, expected: list[int]) -> torch.Tensor:
    file = Path(path) / NEGATIVE
    if not file.is_file():
        raise FileNotFoundError(f"no {NEGATIVE} in {path}: expected the negative prompt's prompt_embeds {expected}")
    shape = _shapes(file).get("prompt_embeds")
    if shape != expected:
        raise ValueError(f"{file}: got prompt_embeds {shape}, expected {expected} as in the shards")
    with safe_open(file, framework="pt") as opened:
        return opened.get_tensor("prompt_embeds").float()


def _members(file: Path) -> dict[str, dict[str, int]]:
    """key -> part -> offset of its data in the tar."""
    found: dict[str, dict[str, int]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                key, _, rest = member.name.partition(".")
                part = rest.removesuffix(".npy")
                if member.isfile() and rest.endswith(".npy"):
                    found.setdefault(key, {})[part] = member.offset_data
    except tarfile.TarError as error:
        raise ValueError(f"{file}: not a readable uncompressed tar ({error})") from error
    return found


def _npy_header(stream: Any, offset: int, name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """Dtype and shape of an array in NumPy's format at `offset`; the stream is left at its data."""
    stream.seek(offset)
    magic = stream.read(8)
    if magic[:6] != b"\x93NUMPY":
        raise ValueError(f"{name}: not an array in NumPy's format")
    length = struct.unpack("<H", stream.read(2)) if magic[6] == 1 else struct.unpack("<I", stream.read(4))
    header = ast.literal_eval(stream.read(length[0]).decode("latin1"))
    dtype = np.dtype(header["descr"])
    if header["fortran_order"] or dtype.kind != "f":
        raise ValueError(f"{name}: got dtype {dtype}, expected floating point values in C order")
    return dtype, header["shape"]


def _npy(stream: Any, offset: int, name: str) -> torch.Tensor:
    dtype, shape = _npy_header(stream, offset, name)
    data = stream.read(dtype.itemsize * int(np.prod(shape)))
    return torch.from_numpy(np.frombuffer(data, dtype).reshape(shape).astype(np.float32))
