"""Rows of the attention kernels, and which implementation serves a forward."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .gpus import ARCHITECTURES, INTERPRETER, rows_for
from .tuned import Key, declined, tuned_row

__all__ = [
    "ATTENTION_DKDV", "ATTENTION_DQ", "ATTENTION_FORWARD", "ATTENTION_GLUON", "FORWARD_KERNELS", "AttentionConfig",
    "ForwardKernel", "attention_programs", "attention_row", "attention_shape",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class AttentionConfig:
    """A `far_attention` kernel up to `head_dim` channels per head (the smallest row that fits serves).

    block_m queries by block_n keys; a kernel walks the one it does not own. `descriptors`: tensor descriptors (TMA)
    where strides allow. `precision`: of the products of fp32 inputs. `split_cost`: see `tile_schedule.query_schedule`.
    `per_multiprocessor`: programs that fit a multiprocessor at once; the grid is that many per multiprocessor.
    `warp_specialize`: loading, products and softmax on warps of their own, where Triton can (tcgen05 of sm_100).
    """

    arch: int
    head_dim: int
    itemsize: int = 2
    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False
    precision: str = "tf32x3"
    split_cost: int | None = None
    per_multiprocessor: int = 1
    warp_specialize: bool = False
    reason: str


_INTERPRETED = tuple(
    AttentionConfig(arch=INTERPRETER, head_dim=128, itemsize=itemsize, block_m=32, block_n=32, num_warps=1,
        num_stages=1, precision="ieee", split_cost=4, reason="small blocks: many tiles and splits at tiny shapes")
    for itemsize in (2, 4)
)  # fmt: skip


def _fp32(arch: int, block_m: int, block_n: int, num_stages: int = 1, split_cost: int | None = None) -> AttentionConfig:
    """fp32 is for verification: three TF32 products each (error about 1e-6) take the registers of a small tile."""
    return AttentionConfig(arch=arch, head_dim=128, itemsize=4, block_m=block_m, block_n=block_n, num_warps=8,
        num_stages=num_stages, split_cost=split_cost,
        reason="compiled: the largest tile that does not spill with tf32x3")  # fmt: skip


ATTENTION_FORWARD = (
    *_INTERPRETED,
    AttentionConfig(arch=80, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 216 registers, 48 KB"),
    AttentionConfig(arch=80, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 255 registers, 64 KB; 64 keys or 4 warps spill"),
    *(AttentionConfig(arch=arch, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 191 registers, 48 KB")
        for arch in (86, 89)),
    *(AttentionConfig(arch=arch, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2,
        split_cost=8, reason="compiled: 254 registers, 64 KB of 99; 64 keys spill")
        for arch in (86, 89)),
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 178 registers, 64 KB; where TMA cannot"),
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        split_cost=4, reason="compiled: 197 registers, 80 KB"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 255 registers, 128 KB; 128 keys spill; where TMA cannot"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        split_cost=4, reason="compiled: 255 registers, 160 KB; 64 keys would rescale acc twice as often"),
    AttentionConfig(arch=100, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 186 registers, 68 KB; where TMA cannot"),
    AttentionConfig(arch=100, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, descriptors=True,
        split_cost=4, reason="compiled: 204 registers, 48 KB; 128 keys spill with triton 3.6"),
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 246 registers, 88 KB; 64 keys spill; where TMA cannot"),
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        split_cost=8, reason="compiled: 228 registers, 104 KB; 128 keys spill"),
    AttentionConfig(arch=120, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3,
        split_cost=8, reason="compiled: 204 registers, 48 KB of 99; 128 keys or 4 warps spill; where TMA cannot"),
    AttentionConfig(arch=120, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3, descriptors=True,
        split_cost=8, reason="compiled: 178 registers, 32 KB: no pointers to hold"),
    AttentionConfig(arch=120, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        split_cost=8, reason="compiled: 162 registers, 56 KB; the 128 x 32 of sm_89 spills here; where TMA cannot"),
    AttentionConfig(arch=120, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2, descriptors=True,
        split_cost=8, reason="compiled: 222 registers, 64 KB of 99; 64 keys or 4 warps spill"),
    *(_fp32(arch, 16, 32, split_cost=64) for arch in ARCHITECTURES),
)  # fmt: skip
ATTENTION_DQ = (
    *_INTERPRETED,
    AttentionConfig(arch=80, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 252 registers, 48 KB; 64 queries spill"),
    AttentionConfig(arch=80, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 215 registers, 72 KB"),
    *(AttentionConfig(arch=arch, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2,
        reason="compiled: 254 registers, 32 KB; 128 queries spill")
        for arch in (86, 89)),
    *(AttentionConfig(arch=arch, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 164 registers, 72 KB")
        for arch in (86, 89)),
    AttentionConfig(arch=90, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2,
        reason="compiled: 210 registers, 48 KB; where TMA cannot"),
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        per_multiprocessor=2, reason="compiled: 128 registers, 64 KB: two blocks fit"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2,
        reason="compiled: 225 registers, 96 KB; 64 keys spill; where TMA cannot"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        reason="compiled: 220 registers, 128 KB; 128 keys reach 255"),
    AttentionConfig(arch=100, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2,
        reason="compiled: 168 registers, 56 KB; where TMA cannot"),
    AttentionConfig(arch=100, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        per_multiprocessor=2, reason="compiled: 125 registers, 72 KB: two blocks fit"),
    AttentionConfig(arch=100, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 240 registers, 112 KB; 4 warps spill; where TMA cannot"),
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        reason="compiled: 190 registers, 144 KB; 128 keys spill"),
    AttentionConfig(arch=120, head_dim=64, block_m=128, block_n=32, num_warps=8, num_stages=2,
        reason="compiled: 174 registers, 40 KB; 64 keys, as on sm_89, spill"),
    AttentionConfig(arch=120, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 186 registers, 72 KB of 99; descriptors spill"),
    *(_fp32(arch, 16, 32) for arch in ARCHITECTURES if arch != 120),
    _fp32(120, 16, 16, num_stages=3),  # 32 keys spill
)  # fmt: skip
ATTENTION_DKDV = (
    *_INTERPRETED,
    AttentionConfig(arch=80, head_dim=128, block_m=32, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 168 registers, 52 KB; 64 queries or 128 keys spill"),
    *(AttentionConfig(arch=arch, head_dim=128, block_m=32, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 160 registers, 52 KB; 64 queries or 128 keys spill")
        for arch in (86, 89)),
    AttentionConfig(arch=90, head_dim=64, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 198 registers, 48 KB; where TMA cannot"),
    AttentionConfig(arch=90, head_dim=64, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        reason="compiled: 189 registers, 64 KB"),
    AttentionConfig(arch=90, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 246 registers, 96 KB; 128 keys spill; where TMA cannot"),
    AttentionConfig(arch=90, head_dim=128, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        reason="compiled: 246 registers, 128 KB; p and ds are register operands of wgmma"),
    AttentionConfig(arch=100, head_dim=64, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 140 registers, 64 KB; where TMA cannot"),
    AttentionConfig(arch=100, head_dim=64, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        reason="compiled: 182 registers, 80 KB"),
    AttentionConfig(arch=100, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 233 registers, 128 KB; where TMA cannot"),
    AttentionConfig(arch=100, head_dim=128, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        reason="compiled: 255 registers, 160 KB"),
    AttentionConfig(arch=120, head_dim=64, block_m=32, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 178 registers, 24 KB; 64 queries or descriptors spill"),
    AttentionConfig(arch=120, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2,
        reason="compiled: 254 registers, 73 KB of 99: half the steps of the 32 queries of sm_89"),
    *(_fp32(arch, 32, 16) for arch in ARCHITECTURES),
)  # fmt: skip
# The warp-specialised kernel of sm_90; num_warps are those of one of its two compute warpgroups.
ATTENTION_GLUON = (
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=128, num_warps=4, num_stages=4, descriptors=True,
        split_cost=4, reason="compiled: 240 registers in the computing warps, no spill, 144 KB"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=128, num_warps=4, num_stages=2, descriptors=True,
        split_cost=4, reason="compiled: 240 registers in the computing warps, no spill, 160 KB"),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ForwardKernel:
    """Which implementation a forward prefers where every query sees every key (`dense`), and where not (`ranges`).

    "triton" takes all calls. "gluon" is the row of `ATTENTION_GLUON`, "cudnn" and "flash" are SDPA in half precision,
    tried once per device before they serve. `triton_ops.far_attention.choose` is the one reader.
    """

    arch: int
    dense: str = "triton"
    ranges: str = "triton"
    reason: str


_PORTABLE = "takes every plan; a rival serves once `anyflow tune` has found it right and faster on the card"
FORWARD_KERNELS = (
    ForwardKernel(arch=INTERPRETER, reason="the only one that the interpreter runs"),
    ForwardKernel(arch=90, dense="cudnn",
        reason="published on an H100, head dim 128, no mask, from 2k tokens on (FlashAttention-3, arXiv 2407.08608): "
        "cuDNN 595 to 617 TFLOP/s, Triton 389 to 395; not timed by us"),
    *(ForwardKernel(arch=arch, reason=_PORTABLE) for arch in ARCHITECTURES if arch != 90),
)  # fmt: skip


def attention_row(
    table: tuple[AttentionConfig, ...],
    arch: int,
    head_dim: int,
    itemsize: int,
    descriptors: bool = True,
    key: Key | None = None,
) -> AttentionConfig:
    """The row of an attention table for an architecture, channels per head and bytes per element.

    Args:
        descriptors: whether the tensors can be addressed by descriptors; rows that use them are preferred then.
        key: of a launch; what was found fastest for it on this machine takes the row's place where it can.

    Raises:
        ValueError: if no row serves them.
    """
    found = [r for r in rows_for(table, arch) if r.itemsize == itemsize and head_dim <= r.head_dim]
    found = [r for r in found if descriptors or not r.descriptors]
    if not found:
        raise ValueError(
            f"q: got {head_dim} channels per head of {itemsize} bytes, expected at most 128 of 2 or 4 bytes"
        )
    row = min(found, key=lambda r: (not r.descriptors, r.head_dim))
    won = row if key is None else tuned_row(row, arch, key)
    if won.descriptors and not descriptors and key is not None:
        declined(key, "strides that no descriptor can have")
        return row
    return won


FEW_KEYS = 1024  # of a prompt, not of a video
Runs = tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]


def attention_shape(runs: Runs, num_keys: int, phantom_keys: int) -> str:
    """The class of calls among which one forward serves.

    Args:
        runs: `AttentionPlan.ranges`.

    Returns:
        "ranges", or, where every query sees every key and no phantom one, "dense" or "dense, few keys".
    """
    if phantom_keys or any(ranges != ((0, num_keys),) for _, _, ranges in runs):
        return "ranges"
    return "dense, few keys" if num_keys <= FEW_KEYS else "dense"


INTERPRETED_PROGRAMS = 3


def attention_programs(device: torch.device, config: AttentionConfig) -> int:
    """Size of the persistent grid."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * config.per_multiprocessor
