"""A pixel model behind the face of a diffusers pipeline, as far as the commands look at one."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..decoders.pixels import PixelDecoder
from ..models import AnyFlowFARTransformer3DModel
from ..streaming.pixel_model import pixel_encoder, pixel_pipeline


class PixelPipe:
    """Transformer, text encoder and codec of a pixel model.

    Args:
        path: its directory.
        device, dtype: of transformer and text encoder.
        backend: see `anyflow_kernels.load_ops`.

    Raises:
        FileNotFoundError, ValueError: if a part is missing or does not fit.
    """

    vae = None
    tokenizer = None

    def __init__(self, path: Path, device: torch.device, dtype: torch.dtype, backend: str) -> None:
        self._config: Any = pixel_pipeline(path)
        model: Any = self._config.diffusion_model
        self.transformer = AnyFlowFARTransformer3DModel.from_pretrained(
            path, subfolder="transformer", dtype=dtype, device=device, backend=backend
        )
        self.text_encoder = model.transformer.context_encoder.setup().to(device, dtype)
        self.encoder = pixel_encoder(path, pixel_range="unit").setup()
        self.scheduler = SimpleNamespace(config=model.scheduler)

    def decoder(self) -> PixelDecoder:
        """A decoder to [-1, 1]."""
        return self._config.decoder.setup()

    def encode_prompt(
        self, prompt: str, negative_prompt: str | None, do_classifier_free_guidance: bool, **_: object
    ) -> tuple[Tensor, Tensor | None]:
        """Embeddings of the prompt and, under guidance, of the negative one, which is empty by default."""
        negative = self.text_encoder(negative_prompt or "") if do_classifier_free_guidance else None
        return self.text_encoder(prompt), negative

    def encode_video(self, video: Tensor, **_: object) -> Tensor:
        """Latents (B, T, C, H, W) of a video (B, T, 3, H, W) in [0, 1]."""
        return self.encoder(video).to(self.transformer.device, self.transformer.dtype)
