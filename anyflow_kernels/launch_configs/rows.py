"""Rows of the kernels without attention: whole rows of channels, elements, few vectors, and how `linear_gelu` runs."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch

from .gpus import ARCHITECTURES, INTERPRETER, architecture, rows_for
from .tuned import Key, choice_for, tuned_row

__all__ = [
    "ELEMENT_TILES", "GEMV_TILES", "LINEAR_GELU", "ROW_TILES", "ElementTile", "GemvTile", "LinearGelu", "RowTile",
    "element_tile", "gemv_tile", "linear_gelu_way", "row_tile",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RowTile:
    """A kernel that holds whole rows of D <= `max_channels` channels in registers.

    `rows` is the tokens of a program: held at once by a forward, walked one by one by a backward.
    """

    operation: str
    archs: tuple[int, ...] = ARCHITECTURES
    max_channels: int
    rows: int
    num_warps: int
    reason: str


_INTERPRETED = "the interpreter pays per program"
_NARROW = "no sum across warps"
_EXACT = "compiled: D a multiple of 256 * warps, no lane idles"
_L1 = f"{_EXACT}; modulation and weights stay in L1; "
_SUMS = "compiled; partial sums are 6 % of the traffic"
_NORM, _ROPE, _RMS = "gated_residual_layer_norm", "qk_norm_rope_append", "rms_norm"
ROW_TILES = (
    RowTile(operation=_NORM, max_channels=512, rows=1, num_warps=1, reason=_NARROW),
    RowTile(operation=_NORM, max_channels=2048, rows=1, num_warps=2,
        reason=_L1 + "D=1536 63 registers, 96 KB of rows in flight per SM"),
    RowTile(operation=_NORM, max_channels=5120, rows=1, num_warps=4,
        reason=_L1 + "D=5120 95 registers, 100 KB of rows in flight per SM"),
    RowTile(operation=_NORM, max_channels=8192, rows=1, num_warps=8, reason=_L1),
    RowTile(operation=f"{_NORM}_backward", max_channels=512, rows=32, num_warps=1, reason=_NARROW),
    RowTile(operation=f"{_NORM}_backward", max_channels=5120, rows=32, num_warps=8,
        reason=_SUMS + "; D=5120 spills with 4 or 16 warps"),
    RowTile(operation=f"{_NORM}_backward", max_channels=8192, rows=32, num_warps=16, reason=_SUMS),
    RowTile(operation=_ROPE, max_channels=8192, rows=1, num_warps=4,
        reason="compiled: D=1536 72, D=5120 90 KB of rows in flight per SM"),
    RowTile(operation=f"{_ROPE}_backward", max_channels=2048, rows=32, num_warps=4, reason=_SUMS),
    RowTile(operation=f"{_ROPE}_backward", max_channels=8192, rows=32, num_warps=8, reason=_SUMS),
    RowTile(operation=_RMS, max_channels=512, rows=1, num_warps=1, reason=_NARROW),
    RowTile(operation=_RMS, max_channels=2048, rows=1, num_warps=2, reason=_EXACT),
    RowTile(operation=_RMS, max_channels=5120, rows=1, num_warps=4, reason=_EXACT),
    RowTile(operation=_RMS, max_channels=8192, rows=1, num_warps=8, reason=_EXACT),
    RowTile(operation=f"{_RMS}_backward", max_channels=512, rows=32, num_warps=1, reason=_NARROW),
    RowTile(operation=f"{_RMS}_backward", max_channels=2048, rows=32, num_warps=4, reason=_SUMS),
    RowTile(operation=f"{_RMS}_backward", max_channels=8192, rows=32, num_warps=8, reason=_SUMS),
    *(
        RowTile(operation=name, archs=(INTERPRETER,), max_channels=8192, rows=rows, num_warps=1,
            reason=f"several rows a program: {_INTERPRETED}")
        for name, rows in (
            (_NORM, 4), (f"{_NORM}_backward", 4), (_ROPE, 1), (f"{_ROPE}_backward", 4), (_RMS, 8),
            (f"{_RMS}_backward", 8),
        )
    ),
)  # fmt: skip


def row_tile(operation: str, arch: int, channels: int, dtype: torch.dtype | None = None) -> RowTile:
    """The row of `ROW_TILES` for an operation and D channels; with the dtype of a launch, what won on this machine.

    Raises:
        ValueError: if D is wider than every row.
    """
    row = _row_tile(operation, arch, channels)
    return row if dtype is None else tuned_row(row, arch, Key(operation, dtype, channels))


@cache
def _row_tile(operation: str, arch: int, channels: int) -> RowTile:
    found = [r for r in ROW_TILES if r.operation == operation and arch in r.archs]
    fits = [r for r in found if channels <= r.max_channels]
    if not fits:
        widest = max(r.max_channels for r in found)
        raise ValueError(f"D: got {channels} channels, expected at most {widest} for {operation}")
    return min(fits, key=lambda r: r.max_channels)


@dataclass(frozen=True, kw_only=True)
class ElementTile:
    """An elementwise kernel over a matrix: a program takes `rows` x `columns`, or `group` rows of them in a loop."""

    operation: str
    archs: tuple[int, ...] = ARCHITECTURES
    rows: int
    columns: int
    group: int
    num_warps: int
    reason: str


ELEMENT_TILES = (
    ElementTile(operation="bias_gelu", rows=16, columns=256, group=16, num_warps=4,
        reason="256 divides both FFN widths; 4 loads a thread"),
    ElementTile(operation="bias_gelu_backward", rows=16, columns=256, group=128, num_warps=4,
        reason="as forward; partial sums: 2 % of traffic"),
    ElementTile(operation="flow_map_step", rows=1, columns=1024, group=1, num_warps=4,
        reason="a frame of 99,840 latents is 98 programs"),
    ElementTile(
        operation="bias_gelu", archs=(INTERPRETER,), rows=32, columns=256, group=32, num_warps=1, reason=_INTERPRETED
    ),
    ElementTile(operation="bias_gelu_backward", archs=(INTERPRETER,), rows=8, columns=128, group=16, num_warps=1,
        reason="small groups, so that tests sum several"),
    ElementTile(
        operation="flow_map_step", archs=(INTERPRETER,), rows=1, columns=512, group=1, num_warps=1, reason=_INTERPRETED
    ),
)  # fmt: skip


def element_tile(operation: str, arch: int, dtype: torch.dtype | None = None) -> ElementTile:
    """The row of `ELEMENT_TILES` for an operation; with the dtype of a launch, what won on this machine."""
    row = _element_tile(operation, arch)
    return row if dtype is None else tuned_row(row, arch, Key(operation, dtype))


@cache
def _element_tile(operation: str, arch: int) -> ElementTile:
    return next(r for r in ELEMENT_TILES if r.operation == operation and arch in r.archs)


@dataclass(frozen=True, kw_only=True)
class GemvTile:
    """A matrix times few vectors: a program takes `outputs` channels, `depth` inputs at a time, `rows` vectors."""

    archs: tuple[int, ...] = ARCHITECTURES
    rows: int
    outputs: int
    depth: int
    num_warps: int
    reason: str


GEMV_TILES = (
    GemvTile(rows=4, outputs=4, depth=1024, num_warps=4,
        reason="16 KB of fp32 weights in flight per program, D/4 programs: 384 at D=1536"),
    GemvTile(archs=(INTERPRETER,), rows=4, outputs=128, depth=64, num_warps=1, reason=_INTERPRETED),
)  # fmt: skip


def gemv_tile(arch: int, dtype: torch.dtype | None = None, channels: int = 0) -> GemvTile:
    """The row of `GEMV_TILES`; with dtype and channels of a launch's projection, what won on this machine."""
    row = _gemv_tile(arch)
    return row if dtype is None else tuned_row(row, arch, Key("dual_timestep_embedding", dtype, channels))


@cache
def _gemv_tile(arch: int) -> GemvTile:
    return next(r for r in GEMV_TILES if arch in r.archs)


@dataclass(frozen=True, kw_only=True)
class LinearGelu:
    """How `linear_gelu` runs without gradients: "cublaslt" (in the GEMM's epilogue) or "triton" (a pass after it)."""

    arch: int
    way: str
    reason: str


LINEAR_GELU = (
    LinearGelu(arch=INTERPRETER, way="triton", reason="the CPU's _addmm_activation is the erf GELU"),
    LinearGelu(arch=80, way="triton", reason="no measurement known: one pass more, but of known cost"),
    LinearGelu(arch=86, way="triton", reason="no measurement known; as sm_120"),
    LinearGelu(arch=89, way="triton", reason="no measurement known; as sm_120"),
    LinearGelu(arch=90, way="cublaslt", reason="sglang#34350 and #28366: beneficial on H100 and H200; not timed by us"),
    LinearGelu(arch=100, way="cublaslt", reason="sglang#28168: 1.18x to 1.24x on a B200; not timed by us"),
    LinearGelu(arch=120, way="triton", reason="sglang#34350: the epilogue is slower than a pass on consumer chips"),
)


@torch.compiler.assume_constant_result
def linear_gelu_way(device: torch.device, dtype: torch.dtype) -> str:
    """The way of `linear_gelu` on a device, the one that won there if any did; a constant to torch.compile."""
    # Emulated kernels run beside a CPU's library.
    arch = architecture(device) if device.type == "cuda" else INTERPRETER
    won = choice_for(arch, Key("linear_gelu", dtype))
    return rows_for(LINEAR_GELU, arch)[0].way if won is None else won.way
