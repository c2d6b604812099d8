"""The training loop: networks, phases, checkpoints that resume to the same bits, several processes, samples."""

from __future__ import annotations

from .ema import EMA
from .lora import add_lora, lora_state_dict, merge_lora
from .trainer import train

__all__ = ["EMA", "add_lora", "lora_state_dict", "merge_lora", "train"]
