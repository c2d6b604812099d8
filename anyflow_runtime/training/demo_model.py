"""The demo's network: a FAR model of a million parameters on pixels, with a text encoder of its own vocabulary.

Latents are the pixels of `shapes` (AMPLITUDE times RGB), so it needs no VAE and no download.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..models import AnyFlowFARTransformer3DModel
from .rollout import far_rollout
from .shapes import CAPTION_LENGTH, VOCABULARY, encode_caption
from .timesteps import schedule

TEXT_FILE = "text_encoder.safetensors"
TRANSFORMER: dict[str, Any] = {
    "patch_size": (1, 4, 4),
    "compressed_patch_size": (1, 8, 8),
    "full_chunk_limit": 2,
    "chunk_partition": (1, 2, 2, 2),
    "num_attention_heads": 4,
    "attention_head_dim": 32,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 64,
    "freq_dim": 128,
    "ffn_dim": 512,
    "num_layers": 4,
}


class TextBlock(nn.Module):
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


class DemoTextEncoder(nn.Module):
    """Captions to embeddings, (B, CAPTION_LENGTH, dim).

    Padding is a word like any other, so the empty caption (the negative prompt) has an embedding too.
    """

    def __init__(self, dim: int = 64, layers: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.words = nn.Embedding(len(VOCABULARY), dim)
        self.positions = nn.Parameter(0.02 * torch.randn(CAPTION_LENGTH, dim))
        self.blocks = nn.ModuleList(TextBlock(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)

    def forward(self, captions: Sequence[str]) -> Tensor:
        """Raises ValueError on words that are not in the vocabulary."""
        tokens = torch.tensor([encode_caption(caption) for caption in captions], device=self.positions.device)
        x = self.words(tokens) + self.positions
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class DemoModel(nn.Module):
    """`transformer` and `text_encoder`; 1.5 million parameters with the default config."""

    def __init__(self, backend: str = "auto", **config: Any) -> None:
        super().__init__()
        self.transformer = AnyFlowFARTransformer3DModel(**(TRANSFORMER | config), backend=backend)
        self.text_encoder = DemoTextEncoder(self.transformer.config.text_dim)

    def generate(
        self, captions: Sequence[str], steps: int, size: int = 16, seed: int = 0, shift: float = 2.0
    ) -> Tensor:
        """Videos of the model's chunk partition, (B, F, 3, size, size); see `generate`."""
        partition = self.transformer.config.chunk_partition
        return generate(self.transformer, self.text_encoder, captions, steps, partition, (size, size), seed, shift)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `transformer/` in diffusers' format and the text encoder's weights."""
        self.transformer.save_pretrained(Path(path) / "transformer")
        save_text_encoder(self.text_encoder.state_dict(), path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: str = "auto") -> DemoModel:
        """A model from a directory that `save` wrote.

        Raises:
            FileNotFoundError: if a part is missing.
        """
        text_file = Path(path) / TEXT_FILE
        if not text_file.is_file():
            raise FileNotFoundError(f"no {TEXT_FILE} in {path}: expected the directory of a demo model")
        transformer = AnyFlowFARTransformer3DModel.from_pretrained(path, subfolder="transformer", backend=backend)
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.transformer = transformer
        model.text_encoder = DemoTextEncoder(transformer.config.text_dim)
        model.text_encoder.load_state_dict(load_file(text_file))
        return model.eval()


@torch.no_grad()
def generate(
    transformer: nn.Module,
    text_encoder: Any,
    captions: Sequence[str],
    steps: int,
    partition: Sequence[int],
    size: tuple[int, int],
    seed: int = 0,
    shift: float = 2.0,
) -> Tensor:
    """Videos (B, F, 3, H, W) in AMPLITUDE times RGB, F = sum(partition), chunk by chunk.

    Args:
        steps: flow-map steps per chunk.
        size: (H, W).  seed: of the noise, drawn on the CPU.  shift: of the schedule.

    Raises:
        ValueError: on captions with words that are not in the vocabulary.
    """
    model: Any = transformer
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(len(captions), sum(partition), 3, *size, generator=generator)
    text = text_encoder(captions)
    segments = list(pairwise(schedule(steps, shift)))
    return far_rollout(model, noise.to(text.device), text, partition, segments, model.dtype)


def save_text_encoder(state: Mapping[str, Tensor], path: str | os.PathLike[str]) -> None:
    """Write the text encoder's weights into a demo model's directory."""
    temporary = Path(path) / f".{TEXT_FILE}.partial"
    save_file({key: value.detach().contiguous() for key, value in state.items()}, temporary)
    temporary.replace(Path(path) / TEXT_FILE)
