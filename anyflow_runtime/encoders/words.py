"""A text encoder for a small fixed vocabulary: a word per token and two transformer layers, trained with its model.

Saved as `config.json` and `model.safetensors`, as text encoders in diffusers' directories are.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..files import whole_file, write_json
from .base import Encoder, EncoderConfig

CONFIG_FILE, WEIGHTS_FILE = "config.json", "model.safetensors"
_SETTINGS = ("vocabulary", "length", "dim", "layers", "heads")


@dataclass(frozen=True, kw_only=True)
class WordEncoderConfig(EncoderConfig):
    """Config of `WordEncoder`.

    Args:
        path: directory that `WordEncoder.save` wrote; its settings replace those below. None: fresh weights.
        vocabulary: the words; padding is the empty word, the first one.
        length: words of a caption, to which shorter ones are padded.
        dim, layers, heads: of the network.
    Raises:
        ValueError: at construction, for a vocabulary without the empty word in front or with a word twice, or for
            sizes that do not fit.
    """

    _target: type[WordEncoder] = field(default_factory=lambda: WordEncoder)
    path: str | None = None
    vocabulary: Sequence[str] = ("",)
    length: int = 16
    dim: int = 64
    layers: int = 2
    heads: int = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        words = self.vocabulary
        if not words or words[0] != "" or len(set(words)) != len(words):
            raise ValueError(f"vocabulary: got {words}, expected different words after the empty one")
        for name in ("length", "dim", "layers", "heads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        if self.dim % self.heads:
            raise ValueError(f"dim: got {self.dim}, expected a multiple of heads = {self.heads}")


class WordEncoder(Encoder):
    """Captions to embeddings, (B, length, dim).

    Padding is a word like any other, so the empty caption (the negative prompt) has an embedding too. Unlike the other
    encoders it can be trained: its forward keeps a graph where gradients are enabled.

    Raises:
        FileNotFoundError: if `config.path` holds no such encoder.
    """

    def __init__(self, config: WordEncoderConfig) -> None:
        if config.path is not None:
            config = _stored_config(Path(config.path))
        super().__init__(config)
        self.words = nn.Embedding(len(config.vocabulary), config.dim)
        self.positions = nn.Parameter(0.02 * torch.randn(config.length, config.dim))
        self.blocks = nn.ModuleList(WordBlock(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)
        self._index = {word: i for i, word in enumerate(config.vocabulary)}
        if config.path is not None:
            self.load_state_dict(load_file(Path(config.path) / WEIGHTS_FILE))

    def tokens(self, caption: str) -> list[int]:
        """Word indices, padded; upper case, commas and a final full stop do not matter.

        Raises:
            ValueError: on unknown words, which are named, or on too many of them.
        """
        words = caption.lower().replace(",", " ").rstrip(" .").split()
        unknown = [word for word in words if word not in self._index]
        if unknown:
            known = " ".join(self.config.vocabulary).strip()
            raise ValueError(f"caption: got unknown words {unknown}, expected only: {known}")
        if len(words) > self.config.length:
            raise ValueError(f"caption: got {len(words)} words, expected at most {self.config.length}")
        return [self._index[word] for word in words] + [0] * (self.config.length - len(words))

    def forward(self, input: str | Sequence[str]) -> Tensor:
        """Embeddings of one caption or several, (B, length, dim).

        Raises:
            ValueError: as `tokens`, or without a caption.
        """
        captions = [input] if isinstance(input, str) else list(input)
        if not captions:
            raise ValueError("input: got no captions, expected at least one")
        x = self.words(torch.tensor([self.tokens(caption) for caption in captions], device=self.positions.device))
        x = x + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write config and weights into the directory `path`, which is made if absent."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        settings = {name: getattr(self.config, name) for name in _SETTINGS}
        write_json(directory / CONFIG_FILE, settings, indent=1)
        with whole_file(directory / WEIGHTS_FILE) as partial:
            save_file({key: value.detach().cpu().contiguous() for key, value in self.state_dict().items()}, partial)


class WordBlock(nn.Module):
    """A pre-norm transformer layer: self-attention over the words, then a feed-forward of four times the width."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.up, self.down = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


def _stored_config(directory: Path) -> WordEncoderConfig:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (directory / name).is_file():
            raise FileNotFoundError(f"path: no {name} in {directory}, expected a directory that WordEncoder.save wrote")
    settings = json.loads((directory / CONFIG_FILE).read_text())
    return WordEncoderConfig(path=str(directory), **{name: settings[name] for name in _SETTINGS})
