"""The demo's network: a FAR model of a million parameters on pixels, with a text encoder of its own vocabulary.

Latents are the pixels of `shapes` (AMPLITUDE times RGB), so it needs no VAE and no download.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...encoders.words import WordEncoder, WordEncoderConfig
from ...models import AnyFlowFARTransformer3DModel
from ...streaming.pixel_model import PixelModelIndex
from ..objectives.rollout import far_rollout
from ..objectives.timesteps import schedule
from .shapes import AMPLITUDE, CAPTION_LENGTH, VOCABULARY

TEXT_FOLDER = "text_encoder"
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


def demo_text_encoder(dim: int = TRANSFORMER["text_dim"]) -> WordEncoder:
    """A fresh text encoder for the captions of `shapes`."""
    return WordEncoder(WordEncoderConfig(vocabulary=VOCABULARY, length=CAPTION_LENGTH, dim=dim))


class DemoModel(nn.Module):
    """`transformer` and `text_encoder`; 1.5 million parameters with the default config."""

    def __init__(self, backend: str = "auto", **config: Any) -> None:
        super().__init__()
        self.transformer = AnyFlowFARTransformer3DModel(**(TRANSFORMER | config), backend=backend)
        self.text_encoder = demo_text_encoder(self.transformer.config.text_dim)

    @torch.no_grad()
    def generate(
        self, captions: Sequence[str], steps: int, size: int = 16, seed: int = 0, shift: float = 2.0
    ) -> Tensor:
        """Videos of the model's chunk partition, (B, F, 3, size, size) in AMPLITUDE times RGB.

        Args:
            steps: flow-map steps per chunk.
            seed: of the noise, drawn on the CPU.  shift: of the schedule.

        Raises:
            ValueError: on captions with words that are not in the vocabulary.
        """
        model: Any = self.transformer
        partition, text = model.config.chunk_partition, self.text_encoder(captions)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(captions), sum(partition), 3, size, size, generator=generator)
        return far_rollout(
            model, noise.to(text.device), text, partition, list(pairwise(schedule(steps, shift))), model.dtype
        )

    def save(self, path: str | os.PathLike[str], size: tuple[int, int] = (16, 16), shift: float = 2.0) -> None:
        """Write a directory that `load`, `pixel_pipeline` and `anyflow generate --model` read.

        Args:
            size: height and width of its videos.  shift: of the schedule.
        """
        self.transformer.save_pretrained(Path(path) / "transformer")
        save_pixel_parts(self.text_encoder, path, size, shift)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: str = "auto") -> DemoModel:
        """A model from a directory that `save` wrote.

        Raises:
            FileNotFoundError: if a part is missing.
        """
        text_encoder = WordEncoder(WordEncoderConfig(path=str(Path(path) / TEXT_FOLDER)))
        model = cls.__new__(cls)
        nn.Module.__init__(model)
        model.transformer = AnyFlowFARTransformer3DModel.from_pretrained(path, subfolder="transformer", backend=backend)
        model.text_encoder = text_encoder
        return model.eval()


def save_pixel_parts(
    text_encoder: WordEncoder, path: str | os.PathLike[str], size: tuple[int, int], shift: float
) -> None:
    """Write what a pixel model's directory holds beside its transformer."""
    text_encoder.save(Path(path) / TEXT_FOLDER)
    PixelModelIndex(*size, shift=shift, latent_range=(0.0, AMPLITUDE)).save(path)
