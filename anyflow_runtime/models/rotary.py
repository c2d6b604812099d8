"""Rotary position tables of video tokens, full and compressed.

Head dimension d is split over the axes: height and width take 2*(d//6) channels each, time the rest. Angles are
computed in float64 and stored as fp32 cosines and sines, one row per token.
Source: FAR (arXiv 2503.19325) on Wan2.1's axes; `AnyFlowCausalRotaryPosEmbed` of diffusers' transformer_anyflow_far.py.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import Segment

THETA = 10000.0
_LOCK = threading.Lock()  # of all tables: a model, which is copied and pickled, cannot hold one


class RotaryTables:
    """Tables (cos, sin), each (tokens, d/2) fp32, for runs of segments.

    They are made on the device that wants them (in host memory and copied, its queue would have to be waited for), and
    those used last are kept, `KEPT_BYTES` of them: a rollout of the released models needs 70 MB, a later one of the
    same shape no other.

    Args:
        head_dim: d, even.
        patch_size, compressed_patch_size: their ratio is the window over which a compressed token averages positions.
    """

    KEPT_BYTES = 256 * 2**20

    def __init__(
        self, head_dim: int, patch_size: Sequence[int], compressed_patch_size: Sequence[int] | None = None
    ) -> None:
        if head_dim % 2:
            raise ValueError(f"attention_head_dim: got {head_dim}, expected an even number")
        height_width = 2 * (head_dim // 6)
        self.axis_dims = (head_dim - 2 * height_width, height_width, height_width)
        compressed = compressed_patch_size or patch_size
        self.windows = tuple(max(1, c // p) for c, p in zip(compressed, patch_size, strict=True))
        self._kept: OrderedDict[Hashable, tuple[Tensor, Tensor]] = OrderedDict()
        self.nbytes = 0  # of what is kept

    def __call__(
        self, segments: Sequence[Segment], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """The rows of these segments' tokens, in order."""
        key = (tuple(segments), device, dtype)
        with _LOCK:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        parts = [self._segment(s, device) for s in segments]
        angles = torch.cat(parts) if parts else torch.zeros(0, sum(self.axis_dims) // 2, dtype=torch.complex128)
        tables = (angles.real.to(device, dtype), angles.imag.to(device, dtype))
        with _LOCK:
            if key not in self._kept:
                self.nbytes += _nbytes(tables)
            self._kept[key] = tables
            while self.nbytes > self.KEPT_BYTES and len(self._kept) > 1:
                self.nbytes -= _nbytes(self._kept.popitem(last=False)[1])
        return tables

    def _segment(self, s: Segment, device: torch.device) -> Tensor:
        """Unit complex numbers, (tokens, d/2)."""
        starts, counts = (s.first_frame, 0, 0), (s.frames, s.rows, s.columns)
        windows = self.windows if s.kind == "compressed" else (1, 1, 1)
        axes = [
            _axis(dim, start, count, window, device)
            for dim, start, count, window in zip(self.axis_dims, starts, counts, windows, strict=True)
        ]
        t, h, w = (
            axis.reshape([-1 if i == j else 1 for j in range(3)] + [axis.shape[1]]) for i, axis in enumerate(axes)
        )
        grid = (*counts, -1)
        return torch.cat([t.expand(grid), h.expand(grid), w.expand(grid)], dim=-1).flatten(0, 2)


def _axis(dim: int, start: int, count: int, window: int, device: torch.device) -> Tensor:
    """(count, dim/2) unit complex numbers; with a window, the renormalised mean over that many full positions."""
    double: Any = {"dtype": torch.float64, "device": "cpu" if device.type == "mps" else device}  # which has no float64
    frequencies = THETA ** (-torch.arange(0, dim, 2, **double) / dim)
    positions = torch.arange(start * window, (start + count) * window, **double)
    phases = torch.polar(torch.ones((), **double), positions[:, None] * frequencies)
    pooled = phases.reshape(count, window, dim // 2).mean(dim=1)
    return pooled / pooled.abs()


def _nbytes(tables: tuple[Tensor, Tensor]) -> int:
    return sum(table.nbytes for table in tables)
