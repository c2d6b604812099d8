"""UMT5 text encoder of the Wan and AnyFlow models.

The embedding is what diffusers' Wan pipelines make: prompt cleaned, padded to a fixed length, rows past the prompt set
to zero. The network itself only runs on the longest prompt's tokens: padding is masked out of its attention, so the
rows that count do not depend on it, and the rest is zero whatever it computes.
Source: diffusers/pipelines/wan/pipeline_wan.py (`_get_t5_prompt_embeds`).
"""

from __future__ import annotations

import functools
import html
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..optional import optional
from .base import Encoder, EncoderConfig


@dataclass(frozen=True, kw_only=True)
class UMT5TextEncoderConfig(EncoderConfig):
    """Config of `UMT5TextEncoder`.

    Args:
        path: diffusers directory or hub id to load from; None if `setup` is given `text_encoder` and `tokenizer`.
        subfolder: of `path`, where the text encoder lies.
        tokenizer_subfolder: of `path`, where the tokenizer lies.
        max_length: rows of every embedding; longer prompts are cut. AnyFlow is trained with 512.
        dtype: of weights and embedding; None keeps that of the text encoder.
    Raises:
        ValueError: at construction, for a length below one.
    """

    _target: type[UMT5TextEncoder] = field(default_factory=lambda: UMT5TextEncoder)
    path: str | None = None
    subfolder: str | None = "text_encoder"
    tokenizer_subfolder: str | None = "tokenizer"
    max_length: int = 512
    dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length < 1:
            raise ValueError(f"max_length: got {self.max_length}, expected at least 1")


class UMT5TextEncoder(Encoder):
    """Prompts in, (B, max_length, D) embeddings out.

    Args:
        config: a `UMT5TextEncoderConfig`.
        text_encoder: a transformers `UMT5EncoderModel`, instead of `config.path`.
        tokenizer: its tokenizer, likewise.
    Raises:
        ValueError: if not exactly one of `config.path` and both parts is given.
        ImportError: if `config.path` is given and transformers is not installed.
    """

    def __init__(self, config: UMT5TextEncoderConfig, text_encoder: Any = None, tokenizer: Any = None) -> None:
        super().__init__(config)
        given = [part is not None for part in (text_encoder, tokenizer)]
        if given != [config.path is None] * 2:
            raise ValueError(
                f"path, text_encoder, tokenizer: got path={config.path!r}, text_encoder "
                f"{'given' if given[0] else None}, tokenizer {'given' if given[1] else None}, expected either "
                "config.path or both parts"
            )
        if config.path is not None:
            text_encoder, tokenizer = _load(config)
        elif config.dtype is not None:
            text_encoder = text_encoder.to(config.dtype)
        self.text_encoder = text_encoder
        self.tokenizer = tokenizer

    @torch.no_grad()
    def forward(self, input: str | Sequence[str]) -> Tensor:
        """Embed prompts.

        Args:
            input: one prompt or several.
        Returns:
            (B, max_length, D) in the dtype and on the device of the text encoder, zero past each prompt's tokens.
        Raises:
            TypeError: if `input` is neither a string nor a sequence of strings.
            ValueError: if it is empty.
        """
        prompts = [input] if isinstance(input, str) else list(input)
        if not prompts:
            raise ValueError("input: got no prompts, expected at least one")
        for prompt in prompts:
            if not isinstance(prompt, str):
                raise TypeError(f"input: got {type(prompt).__name__}, expected strings")

        tokens = self.tokenizer(
            [clean_prompt(prompt) for prompt in prompts],
            padding="longest",
            max_length=self.config.max_length,
            truncation=True,
            add_special_tokens=True,
            return_attention_mask=True,
            return_tensors="pt",
        )
        device = next(self.text_encoder.parameters()).device
        mask = tokens.attention_mask.to(device)
        hidden = self.text_encoder(tokens.input_ids.to(device), mask).last_hidden_state
        hidden = hidden.masked_fill(mask.unsqueeze(-1) == 0, 0.0)
        return F.pad(hidden, (0, 0, 0, self.config.max_length - hidden.shape[1]))


def clean_prompt(text: str) -> str:
    """Mended Unicode (with ftfy installed), HTML entities resolved twice, whitespace runs as one space."""
    text = html.unescape(html.unescape(_unicode_fixer()(text)))
    return re.sub(r"\s+", " ", text).strip()


@functools.cache
def _unicode_fixer() -> Callable[[str], str]:
    try:
        from ftfy import fix_text
    except ImportError:
        warnings.warn(
            "ftfy is not installed, prompts with broken Unicode are used as they are: "
            "pip install 'anyflow-kernels[diffusers]'",
            stacklevel=2,
        )
        return str
    return fix_text


def _load(config: UMT5TextEncoderConfig) -> tuple[Any, Any]:
    transformers = optional("transformers", "the UMT5 text encoder", "diffusers")
    model = transformers.UMT5EncoderModel.from_pretrained(
        config.path, subfolder=config.subfolder, torch_dtype=config.dtype or "auto", use_safetensors=True
    )
    return model.eval(), transformers.AutoTokenizer.from_pretrained(config.path, subfolder=config.tokenizer_subfolder)
