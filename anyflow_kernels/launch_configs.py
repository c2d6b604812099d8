"""Launch parameters per GPU: frozen rows, each with the reason for it.

A new GPU is a new row, a better measurement a changed one; no kernel holds a tile size of its own. "compiled" in a
reason means seen with `python -m anyflow_kernels.aot`; "timed" means a result under `bench/results/`. No row has been
timed on a GPU yet.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Protocol, TypeVar

import torch

ARCHITECTURES = (80, 89, 90, 100)
INTERPRETER = 0  # the rows for TRITON_INTERPRET=1


@dataclass(frozen=True)
class Gpu:
    """What the chip has. Shared memory is per block, the most a launch may ask for."""

    arch: int
    name: str
    multiprocessors: int
    shared_bytes: int
    registers: int = 65536
    threads: int = 2048


GPUS = {
    80: Gpu(80, "A100", 108, 163 * 1024),
    89: Gpu(89, "L40S, RTX 4090", 142, 99 * 1024, threads=1536),
    90: Gpu(90, "H100, H200", 132, 227 * 1024),
    100: Gpu(100, "B200", 148, 227 * 1024),
}


class _Row(Protocol):
    @property
    def arch(self) -> int: ...

    @property
    def reason(self) -> str: ...


Row = TypeVar("Row", bound=_Row)


def architecture(device: torch.device | str) -> int:
    """The architecture whose rows serve a device: 0 for the interpreter on a CPU.

    Chips without rows of their own take those with the same instructions and no more shared memory than they have: 8.6
    and 12.x take those of 8.9.

    Raises:
        RuntimeError: on a GPU older than 8.0.
    """
    device = torch.device(device)
    if device.type != "cuda":
        return INTERPRETER
    return _cuda_architecture(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _cuda_architecture(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    if major < 8:
        raise RuntimeError(f"compute capability: got {major}.{minor}, expected 8.0 or newer for the triton backend")
    if major == 8:
        return 80 if minor in (0, 7) else 89
    return {9: 90, 10: 100, 11: 100}.get(major, 89)


def rows_for(rows: Iterable[Row], arch: int) -> list[Row]:
    """The rows of a table for one architecture.

    Raises:
        ValueError: if there are none.
    """
    found = [row for row in rows if row.arch == arch]
    if not found:
        raise ValueError(f"arch: got {arch}, expected one of {sorted({row.arch for row in rows})}")
    return found


@dataclass(frozen=True)
class AttentionConfig:
    """A `far_attention` kernel up to `head_dim` channels per head (the smallest row that fits serves).

    block_m queries by block_n keys; a kernel walks the one it does not own. `descriptors`: tensor descriptors (TMA)
    where strides allow. `precision`: of the products of fp32 inputs. `split_cost`: see `tile_schedule.query_schedule`.
    `per_multiprocessor`: programs that fit a multiprocessor at once; the grid is that many per multiprocessor.
    """

    arch: int
    head_dim: int
    itemsize: int
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str
    descriptors: bool = False
    precision: str = "tf32x3"
    split_cost: int | None = None
    per_multiprocessor: int = 1


_NOT_TIMED = "; not timed on a GPU"


def _rows(*rows: tuple[int, int, int, int, int, int, int, bool, str], **fields: object) -> tuple[AttentionConfig, ...]:
    """Rows (arch, head_dim, itemsize, block_m, block_n, num_warps, num_stages, descriptors, reason)."""
    return tuple(
        AttentionConfig(*row[:7], reason=row[8] + _NOT_TIMED, descriptors=row[7], **fields)  # type: ignore[arg-type]
        for row in rows
    )


def _interpreted(itemsize: int) -> AttentionConfig:
    reason = "small blocks: many tiles and splits at tiny shapes"
    return AttentionConfig(INTERPRETER, 128, itemsize, 32, 32, 1, 1, reason, precision="ieee", split_cost=4)


_INTERPRETER_ROWS = (_interpreted(2), _interpreted(4))
# fp32 is for verification: three TF32 products per product (error about 1e-6) take the registers of a small tile.
_FP32 = "compiled: the largest tile that does not spill with tf32x3"

ATTENTION_FORWARD = (
    *_INTERPRETER_ROWS,
    *_rows(
        (80, 64, 2, 128, 64, 8, 3, False, "compiled: 216 registers, 48 KB"),
        (80, 128, 2, 128, 32, 8, 3, False, "compiled: 255 registers, 64 KB; 64 keys or 4 warps spill"),
        (89, 64, 2, 128, 64, 8, 3, False, "compiled: 191 registers, 48 KB"),
        (89, 128, 2, 128, 32, 8, 2, False, "compiled: 254 registers, 64 KB of 99; 64 keys spill"),
        (90, 64, 2, 128, 64, 8, 3, False, "compiled: 178 registers, 64 KB; where TMA cannot"),
        (90, 128, 2, 128, 64, 8, 3, False, "compiled: 255 registers, 128 KB; 128 keys spill; where TMA cannot"),
        (100, 64, 2, 128, 64, 8, 3, False, "compiled: 186 registers, 68 KB; where TMA cannot"),
        (100, 128, 2, 128, 32, 8, 3, False, "compiled: 246 registers, 88 KB; 64 keys spill; where TMA cannot"),
        (100, 128, 2, 128, 64, 8, 2, True, "compiled: 228 registers, 104 KB; 128 keys spill"),
        split_cost=8,
    ),
    *_rows(
        (90, 64, 2, 128, 128, 8, 2, True, "compiled: 197 registers, 80 KB"),
        (90, 128, 2, 128, 128, 8, 2, True, "compiled: 255 registers, 160 KB; 64 keys would rescale acc twice as often"),
        (100, 64, 2, 128, 64, 4, 2, True, "compiled: 204 registers, 48 KB; 128 keys spill with triton 3.6"),
        split_cost=4,
    ),
    *_rows(*((arch, 128, 4, 16, 32, 8, 1, False, _FP32) for arch in ARCHITECTURES), split_cost=64),
)  # fmt: skip
ATTENTION_DQ = (
    *_INTERPRETER_ROWS,
    *_rows(
        (80, 64, 2, 128, 64, 8, 2, False, "compiled: 252 registers, 48 KB; 64 queries spill"),
        (80, 128, 2, 64, 64, 8, 2, False, "compiled: 215 registers, 72 KB"),
        (89, 64, 2, 64, 64, 4, 2, False, "compiled: 254 registers, 32 KB; 128 queries spill"),
        (89, 128, 2, 64, 64, 8, 2, False, "compiled: 164 registers, 72 KB"),
        (90, 64, 2, 64, 64, 4, 2, False, "compiled: 210 registers, 48 KB; where TMA cannot"),
        (90, 128, 2, 128, 32, 8, 2, False, "compiled: 225 registers, 96 KB; 64 keys spill; where TMA cannot"),
        (90, 128, 2, 128, 64, 8, 2, True, "compiled: 220 registers, 128 KB; 128 keys reach 255"),
        (100, 64, 2, 64, 64, 4, 2, False, "compiled: 168 registers, 56 KB; where TMA cannot"),
        (100, 128, 2, 64, 64, 8, 2, False, "compiled: 240 registers, 112 KB; 4 warps spill; where TMA cannot"),
        (100, 128, 2, 128, 64, 8, 2, True, "compiled: 190 registers, 144 KB; 128 keys spill"),
    ),
    *_rows(
        (90, 64, 2, 128, 64, 8, 2, True, "compiled: 128 registers, 64 KB: two blocks fit"),
        (100, 64, 2, 128, 64, 8, 2, True, "compiled: 125 registers, 72 KB: two blocks fit"),
        per_multiprocessor=2,
    ),
    *_rows(*((arch, 128, 4, 16, 32, 8, 1, False, _FP32) for arch in ARCHITECTURES)),
)  # fmt: skip
ATTENTION_DKDV = (
    *_INTERPRETER_ROWS,
    *_rows(
        (80, 128, 2, 32, 64, 8, 2, False, "compiled: 168 registers, 52 KB; 64 queries or 128 keys spill"),
        (89, 128, 2, 32, 64, 8, 2, False, "compiled: 160 registers, 52 KB; 64 queries or 128 keys spill"),
        (90, 64, 2, 64, 64, 8, 2, False, "compiled: 198 registers, 48 KB; where TMA cannot"),
        (90, 128, 2, 64, 64, 8, 2, False, "compiled: 246 registers, 96 KB; 128 keys spill; where TMA cannot"),
        (90, 64, 2, 64, 128, 8, 2, True, "compiled: 189 registers, 64 KB"),
        (90, 128, 2, 64, 128, 8, 2, True, "compiled: 246 registers, 128 KB; p and ds are register operands of wgmma"),
        (100, 64, 2, 64, 64, 8, 2, False, "compiled: 140 registers, 64 KB; where TMA cannot"),
        (100, 128, 2, 64, 64, 8, 2, False, "compiled: 233 registers, 128 KB; where TMA cannot"),
        (100, 64, 2, 64, 128, 8, 2, True, "compiled: 182 registers, 80 KB"),
        (100, 128, 2, 64, 128, 8, 2, True, "compiled: 255 registers, 160 KB"),
    ),
    *_rows(*((arch, 128, 4, 32, 16, 8, 1, False, _FP32) for arch in ARCHITECTURES)),
)  # fmt: skip

# The warp-specialised kernel of sm_90, num_warps being those of one of its two compute warpgroups.
ATTENTION_GLUON = _rows(
    (90, 64, 2, 128, 128, 4, 4, True, "compiled: 240 registers in the computing warps, no spill, 144 KB"),
    (90, 128, 2, 128, 128, 4, 2, True, "compiled: 240 registers in the computing warps, no spill, 160 KB"),
    split_cost=4,
)
# Which kernel a forward takes where both could: "gluon" once `bench/far_attention.py` has shown that it is right and
# faster.
FORWARD_KERNEL = {90: "triton"}


def attention_row(
    table: tuple[AttentionConfig, ...], arch: int, head_dim: int, itemsize: int, descriptors: bool = True
) -> AttentionConfig:
    """The row of an attention table for an architecture, channels per head and bytes per element.

    `descriptors` says whether the tensors can be addressed by descriptors; rows that use them are preferred then.

    Raises:
        ValueError: if no row serves them.
    """
    found = [r for r in rows_for(table, arch) if r.itemsize == itemsize and head_dim <= r.head_dim]
    found = [r for r in found if descriptors or not r.descriptors]
    if not found:
        raise ValueError(
            f"q: got {head_dim} channels per head of {itemsize} bytes, expected at most 128 of 2 or 4 bytes"
        )
    return min(found, key=lambda r: (not r.descriptors, r.head_dim))


INTERPRETED_PROGRAMS = 3


def attention_programs(device: torch.device, config: AttentionConfig) -> int:
    """Size of the persistent grid."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * config.per_multiprocessor


# Which library serves forward attention where every query sees every key: "triton", or "cudnn" or "flash" (SDPA) once
# `bench/far_attention.py` has shown that it is faster on the chip.
DENSE_ATTENTION = {INTERPRETER: "triton", 80: "triton", 89: "triton", 90: "triton", 100: "triton"}


@dataclass(frozen=True)
class RowTile:
    """A kernel that holds whole rows of D <= `max_channels` channels in registers.

    `rows` is the tokens of a program: held at once by a forward, walked one by one by a backward.
    """

    operation: str
    archs: tuple[int, ...]
    max_channels: int
    rows: int
    num_warps: int
    reason: str


_NARROW = "no sum across warps"
_EXACT = "compiled: D a multiple of 256 * warps, no lane idles"
_L1 = f"{_EXACT}; modulation and weights stay in L1; "
_SUMS = "compiled; partial sums are 6 % of the traffic"
_NORM, _ROPE, _RMS = "gated_residual_layer_norm", "qk_norm_rope_append", "rms_norm"
ROW_TILES = (
    RowTile(_NORM, ARCHITECTURES, 512, 1, 1, _NARROW),
    RowTile(_NORM, ARCHITECTURES, 2048, 1, 2, _L1 + "D=1536 63 registers, 96 KB of rows in flight per SM"),
    RowTile(_NORM, ARCHITECTURES, 5120, 1, 4, _L1 + "D=5120 95 registers, 100 KB of rows in flight per SM"),
    RowTile(_NORM, ARCHITECTURES, 8192, 1, 8, _L1),
    RowTile(f"{_NORM}_backward", ARCHITECTURES, 512, 32, 1, _NARROW),
    RowTile(f"{_NORM}_backward", ARCHITECTURES, 5120, 32, 8, _SUMS + "; D=5120 spills with 4 or 16 warps"),
    RowTile(f"{_NORM}_backward", ARCHITECTURES, 8192, 32, 16, _SUMS),
    RowTile(_ROPE, ARCHITECTURES, 8192, 1, 4, "compiled: D=1536 72, D=5120 90 KB of rows in flight per SM"),
    RowTile(f"{_ROPE}_backward", ARCHITECTURES, 2048, 32, 4, _SUMS),
    RowTile(f"{_ROPE}_backward", ARCHITECTURES, 8192, 32, 8, _SUMS),
    RowTile(_RMS, ARCHITECTURES, 512, 1, 1, _NARROW),
    RowTile(_RMS, ARCHITECTURES, 2048, 1, 2, _EXACT),
    RowTile(_RMS, ARCHITECTURES, 5120, 1, 4, _EXACT),
    RowTile(_RMS, ARCHITECTURES, 8192, 1, 8, _EXACT),
    RowTile(f"{_RMS}_backward", ARCHITECTURES, 512, 32, 1, _NARROW),
    RowTile(f"{_RMS}_backward", ARCHITECTURES, 2048, 32, 4, _SUMS),
    RowTile(f"{_RMS}_backward", ARCHITECTURES, 8192, 32, 8, _SUMS),
    *(
        RowTile(operation, (INTERPRETER,), 8192, rows, 1, "several rows a program: the interpreter pays per program")
        for operation, rows in (
            *((_NORM, 4), (f"{_NORM}_backward", 4), (_ROPE, 1), (f"{_ROPE}_backward", 4)),
            *((_RMS, 8), (f"{_RMS}_backward", 8)),
        )
    ),
)


@cache
def row_tile(operation: str, arch: int, channels: int) -> RowTile:
    """The row of `ROW_TILES` for an operation and D channels.

    Raises:
        ValueError: if D is wider than every row.
    """
    found = [r for r in ROW_TILES if r.operation == operation and arch in r.archs]
    fits = [r for r in found if channels <= r.max_channels]
    if not fits:
        widest = max(r.max_channels for r in found)
        raise ValueError(f"D: got {channels} channels, expected at most {widest} for {operation}")
    return min(fits, key=lambda r: r.max_channels)


@dataclass(frozen=True)
class ElementTile:
    """An elementwise kernel over a matrix: a program takes `rows` x `columns`, or `group` rows of them in a loop."""

    operation: str
    archs: tuple[int, ...]
    rows: int
    columns: int
    group: int
    num_warps: int
    reason: str


ELEMENT_TILES = (
    ElementTile("bias_gelu", ARCHITECTURES, 16, 256, 16, 4, "256 divides both FFN widths; 4 loads a thread"),
    ElementTile("bias_gelu_backward", ARCHITECTURES, 16, 256, 128, 4, "as forward; partial sums: 2 % of traffic"),
    ElementTile("flow_map_step", ARCHITECTURES, 1, 1024, 1, 4, "a frame of 99,840 latents is 98 programs"),
    ElementTile("bias_gelu", (INTERPRETER,), 32, 256, 32, 1, "the interpreter pays per program"),
    ElementTile("bias_gelu_backward", (INTERPRETER,), 8, 128, 16, 1, "small groups, so that tests sum several"),
    ElementTile("flow_map_step", (INTERPRETER,), 1, 512, 1, 1, "the interpreter pays per program"),
)


@cache
def element_tile(operation: str, arch: int) -> ElementTile:
    """The row of `ELEMENT_TILES` for an operation."""
    return next(r for r in ELEMENT_TILES if r.operation == operation and arch in r.archs)


@dataclass(frozen=True)
class GemvTile:
    """A matrix times few vectors: a program takes `outputs` channels, `depth` inputs at a time, `rows` vectors."""

    archs: tuple[int, ...]
    rows: int
    outputs: int
    depth: int
    num_warps: int
    reason: str


GEMV_TILES = (
    GemvTile(ARCHITECTURES, 4, 4, 1024, 4, "16 KB of fp32 weights in flight per program, D/4 programs: 384 at D=1536"),
    GemvTile((INTERPRETER,), 4, 128, 64, 1, "the interpreter pays per program"),
)


@cache
def gemv_tile(arch: int) -> GemvTile:
    """The row of `GEMV_TILES`."""
    return next(r for r in GEMV_TILES if arch in r.archs)


@dataclass(frozen=True)
class LinearGelu:
    """How `linear_gelu` runs without gradients: "cublaslt" (in the GEMM's epilogue) or "triton" (a pass after it)."""

    arch: int
    way: str
    reason: str


LINEAR_GELU = (
    LinearGelu(INTERPRETER, "triton", "the CPU's _addmm_activation is the erf GELU"),
    LinearGelu(80, "triton", "no measurement known: one pass more, but of known cost"),
    LinearGelu(89, "triton", "sglang#34350: the epilogue is slower than a pass on consumer chips (sm_120)"),
    LinearGelu(90, "cublaslt", "sglang#34350 and #28366: beneficial on H100 and H200; not timed by us"),
    LinearGelu(100, "cublaslt", "sglang#28168: 1.18x to 1.24x on a B200; not timed by us"),
)


@torch.compiler.assume_constant_result
def linear_gelu_way(device: torch.device) -> str:
    """The way of `linear_gelu` on a device; a constant to torch.compile."""
    return rows_for(LINEAR_GELU, architecture(device))[0].way
