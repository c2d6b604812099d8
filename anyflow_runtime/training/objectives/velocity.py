"""How training sees a model: `velocity(x, t, r, text) -> u`.

x and u are (B, F, C, H, W), t and r (B, F) in 0..1000 (float32 or float64), text (B, S, D). Any function of that form
works; the classes here adapt the two transformers. A velocity that keeps per-sample state (the clean context of a FAR
clip) also has `select(rows)`, which returns the same velocity for some samples of the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from .timesteps import require_precise_time

Velocity = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def select_rows(velocity: Velocity, rows: torch.Tensor) -> Velocity:
    """The velocity of the samples `rows` (int64 indices) of the batch that `velocity` belongs to."""
    select = getattr(velocity, "select", None)
    return velocity if select is None else select(rows)


class BidirectionalVelocity:
    """Full attention over the whole clip, at full resolution, by either transformer.

    Args:
        model: `AnyFlowTransformer3DModel`, or `AnyFlowFARTransformer3DModel`, which is given all frames as one chunk:
            a single chunk is causal in nothing and compressed in nothing.
        far: whether `model` is the FAR class; None reads it off `model.config`.
        input_dtype: x and text are cast to it before the model; times never are. None leaves them as they come.
        single_time: ignore r and send t twice, for the plain networks that score in distillation.
    """

    def __init__(
        self,
        model: nn.Module,
        far: bool | None = None,
        input_dtype: torch.dtype | None = None,
        single_time: bool = False,
    ) -> None:
        self.model, self.input_dtype, self.single_time = model, input_dtype, single_time
        self.far = is_far(model) if far is None else far

    def __call__(self, x: torch.Tensor, t: torch.Tensor, r: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        require_precise_time("t", t)
        require_precise_time("r", r)
        inputs: dict[str, Any] = {"chunk_partition": [x.shape[1]]} if self.far else {}
        return self.model(
            hidden_states=_cast(x, self.input_dtype),
            timestep=t,
            r_timestep=t if self.single_time else r,
            encoder_hidden_states=_cast(text, self.input_dtype),
            return_dict=False,
            **inputs,
        )[0]


def is_far(model: nn.Module) -> bool:
    """True if `model` takes a chunk partition: its config has a `full_chunk_limit`."""
    config = getattr(model, "config", None)
    if config is None:
        raise ValueError(f"model: got {type(model).__name__} without a config, expected one, or far=True / far=False")
    return "full_chunk_limit" in config if hasattr(config, "keys") else hasattr(config, "full_chunk_limit")


def _cast(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    return x if dtype is None else x.to(dtype)
