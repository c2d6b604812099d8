"""What the row kernels share: tiles of tokens that never leave their frame, and sums over such tiles.

A modulation row belongs to a frame. Tiles are cut inside each frame, so a tile reads its modulation once, and a sum
over a frame is a sum over whole tiles: two stages, no atomics, the same bits on every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..aot_case import MODELS, AotCase, argument_types

RUNS = ["frames_0", "tokens_0", "frames_1", "tokens_1", "frames_2", "tokens_2"]  # kernel arguments
MAX_RUNS = 3  # runs of a frame map in one launch; `FarLayout` makes one or two
SUM_ROWS, SUM_BLOCK_D = 32, 64  # 8 KB in flight per program of the second stage, which is a hundredth of the first
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def locate_tile(tile, frames_0, tokens_0, frames_1, tokens_1, frames_2, tokens_2, ROWS: tl.constexpr):
    """Frame, first token and end token of a tile of at most ROWS tokens.

    Tiles count along the runs `(frames, tokens per frame)`, ceil(tokens / ROWS) to a frame. An absent run is (0, 1).
    """
    tiles_0 = frames_0 * tl.cdiv(tokens_0, ROWS)
    tiles_01 = tiles_0 + frames_1 * tl.cdiv(tokens_1, ROWS)
    in_1, in_2 = tile >= tiles_0, tile >= tiles_01
    tokens = tl.where(in_2, tokens_2, tl.where(in_1, tokens_1, tokens_0))
    first_tile = tl.where(in_2, tiles_01, tl.where(in_1, tiles_0, 0))
    first_frame = tl.where(in_2, frames_0 + frames_1, tl.where(in_1, frames_0, 0))
    first_token = tl.where(in_2, frames_0 * tokens_0 + frames_1 * tokens_1, tl.where(in_1, frames_0 * tokens_0, 0))
    per_frame = tl.cdiv(tokens, ROWS)
    frame = (tile - first_tile) // per_frame
    start = first_token + frame * tokens + (tile - first_tile - frame * per_frame) * ROWS
    return first_frame + frame, start, first_token + (frame + 1) * tokens


@triton.jit(
    do_not_specialize=["frames_0", "tiles_0", "frames_1", "tiles_1", "frames_2", "tiles_2", "num_tiles", "num_frames"]
)
def _sum_tiles_kernel(
    partial_ptr,
    out_ptr,
    frames_0,
    tiles_0,
    frames_1,
    tiles_1,
    frames_2,
    tiles_2,
    num_tiles,
    num_frames,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_f, i_d, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    in_1, in_2 = i_f >= frames_0, i_f >= frames_0 + frames_1
    tiles = tl.where(in_2, tiles_2, tl.where(in_1, tiles_1, tiles_0))
    first = tl.where(in_2, frames_0 * tiles_0 + frames_1 * tiles_1, tl.where(in_1, frames_0 * tiles_0, 0))
    frame = i_f - tl.where(in_2, frames_0 + frames_1, tl.where(in_1, frames_0, 0))
    c = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    frame_ptr = partial_ptr + (i_b * num_tiles + first + frame * tiles) * D + c[None, :]
    total = tl.zeros([ROWS, BLOCK_D], tl.float32)
    start = tl.zeros([], tl.int32)
    while start < tiles:
        i_t = start + tl.arange(0, ROWS)[:, None]
        total += tl.load(frame_ptr + i_t.to(tl.int64) * D, mask=(i_t < tiles) & (c < D)[None, :], other=0.0)
        start += ROWS
    tl.store(out_ptr + (i_b * num_frames + i_f) * D + c, tl.sum(total, axis=0), mask=c < D)


def sum_tiles(partial: Tensor, tile_map: Sequence[int]) -> Tensor:
    """Second stage of a deterministic sum: (B, tiles, D) fp32 to (B, F, D), adding each frame's tiles in a fixed order.

    Args:
        partial: contiguous.
        tile_map: `frames, tiles per frame, frames, ...`, flat.
    """
    batch, num_tiles, width = partial.shape
    num_frames = sum(tile_map[0::2])
    out = partial.new_empty(batch, num_frames, width)
    for tile, _, frame, runs in run_groups(tile_map) if out.numel() else ():
        grid = (sum(runs[0::2]), triton.cdiv(width, SUM_BLOCK_D), batch)
        with torch.cuda.device_of(partial):
            _sum_tiles_kernel[grid](
                partial[:, tile:],
                out[:, frame:],
                *runs,
                num_tiles,
                num_frames,
                D=width,
                ROWS=SUM_ROWS,
                BLOCK_D=SUM_BLOCK_D,
                num_warps=4,
            )
    return out


def sum_all(partial: Tensor) -> Tensor:
    """(B, tiles, D) fp32 to (D,), adding all tiles in a fixed order."""
    rows = partial.shape[0] * partial.shape[1]
    return sum_tiles(partial.view(1, rows, partial.shape[2]), (1, rows))[0, 0]


def run_groups(frame_map: Sequence[int]) -> Iterator[tuple[int, int, int, tuple[int, ...]]]:
    """Split a flat frame map `frames, tokens, frames, tokens, ...` into launches of MAX_RUNS runs.

    Yields `(first token, tokens, first frame, runs)`, `runs` flat and padded with absent runs (0, 1).
    """
    token = frame = 0
    for i in range(0, len(frame_map), 2 * MAX_RUNS):
        runs = tuple(frame_map[i : i + 2 * MAX_RUNS])
        frames, tokens = sum(runs[0::2]), sum(f * t for f, t in zip(runs[0::2], runs[1::2], strict=True))
        yield token, tokens, frame, runs + (0, 1) * (MAX_RUNS - len(runs) // 2)
        token, frame = token + tokens, frame + frames


def count_tiles(runs: Sequence[int], rows: int) -> int:
    """Tiles of `rows` tokens in flat runs."""
    return sum(frames * triton.cdiv(tokens, rows) for frames, tokens in zip(runs[0::2], runs[1::2], strict=True))


def dense_rows(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def strides_2d(x: Tensor | None) -> tuple[int, int]:
    """The first two strides, or zeros for an absent tensor."""
    return (0, 0) if x is None else (x.stride(0), x.stride(1))


def check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name}.dtype: got {x.dtype}, expected one of {DTYPES} on the triton backend")


def aot_cases(arch: int) -> list[AotCase]:
    """The second stage of the sums at the width of each released model."""
    types = argument_types(_sum_tiles_kernel, "fp32")
    tile = {"ROWS": SUM_ROWS, "BLOCK_D": SUM_BLOCK_D}
    return [
        AotCase(_sum_tiles_kernel, f"{model} training", types, {"D": size["dim"], **tile}, num_warps=4)
        for model, size in MODELS.items()
    ]
