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
    `bound`: percent of the tensor cores' peak by `pipe_model` if all pipes overlap, the least of triton 3.6 and 3.7;
    `aot --check` holds the row to it.
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
    bound: int = 0
    reason: str


_INTERPRETED = tuple(
    AttentionConfig(arch=INTERPRETER, head_dim=128, itemsize=itemsize, block_m=32, block_n=32, num_warps=1,
        num_stages=1, precision="ieee", split_cost=4, reason="small blocks: many tiles and splits at tiny shapes")
    for itemsize in (2, 4)
)  # fmt: skip


def _fp32(arch: int, block_m: int, block_n: int, per_multiprocessor: int, split_cost: int | None) -> AttentionConfig:
    """fp32 is for verification: three TF32 products each (error about 1e-6) take the registers of a small tile."""
    return AttentionConfig(arch=arch, head_dim=128, itemsize=4, block_m=block_m, block_n=block_n, num_warps=4,
        num_stages=1, split_cost=split_cost, per_multiprocessor=per_multiprocessor,
        reason="model: 8 warps compute products 1.5 to 3 times")  # fmt: skip


_SHARED_BY_WARPS = "model: 4 warps of 32 rows read keys from shared memory half as often as 8 of 16"
_NO_TMA = "where TMA cannot; "
# What the pipe model says of a row is `bound`; "serial" is its bound if products overlap with nothing within a block.
ATTENTION_FORWARD = (
    *_INTERPRETED,
    AttentionConfig(arch=80, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, bound=100,
        split_cost=8, per_multiprocessor=2, reason=_SHARED_BY_WARPS + " (76 %); 32 bytes of spills, in L1"),
    AttentionConfig(arch=80, head_dim=128, block_m=128, block_n=32, num_warps=4, num_stages=2, bound=100,
        split_cost=8, per_multiprocessor=2, reason=_SHARED_BY_WARPS + " (68 %); 104 bytes of spills, in L1"),
    *(AttentionConfig(arch=arch, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, bound=100,
        split_cost=8, per_multiprocessor=2, reason="model: serial 71 %, two blocks overlap; 8 warps 60 %, one block")
        for arch in (86, 89)),
    *(AttentionConfig(arch=arch, head_dim=128, block_m=128, block_n=32, num_warps=4, num_stages=2, bound=100,
        split_cost=8, per_multiprocessor=2, reason="model: serial 68 %, two blocks overlap; 8 warps 58 %, one block")
        for arch in (86, 89)),
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=128, num_warps=8, num_stages=2, bound=97,
        split_cost=4, reason=_NO_TMA + "model: limited by exponentials; 64 keys by shared memory, 81 %"),
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=97, split_cost=4, reason="model: limited by exponentials; 64 queries read L2 at 54 bytes a clock"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=3, bound=90,
        split_cost=8, reason=_NO_TMA + "model: limited by shared memory; 128 keys spill"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=100, split_cost=4, reason="model: serial 66 %; 64 keys would rescale acc twice as often"),
    AttentionConfig(arch=100, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, bound=49,
        split_cost=8, per_multiprocessor=2, reason=_NO_TMA + "model: limited by exponentials; 8 warps 26 %"),
    AttentionConfig(arch=100, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, descriptors=True,
        bound=49, split_cost=8, per_multiprocessor=2, reason="model: limited by exponentials, and two blocks overlap"),
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=32, num_warps=4, num_stages=1, bound=50,
        split_cost=8, per_multiprocessor=2, reason=_NO_TMA + "model: 8 warps 16 %: p crosses shared memory"),
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=32, num_warps=4, num_stages=2, descriptors=True,
        bound=50, split_cost=8, per_multiprocessor=2, reason="model: 8 warps 28 %: p crosses shared memory"),
    # The first row serves, unless `anyflow tune` finds the second right and faster: no test here can run tcgen05.
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        warp_specialize=True, bound=77, split_cost=4, reason="model: limited by shared memory; 80 bytes of spills"),
    AttentionConfig(arch=120, head_dim=64, block_m=128, block_n=64, num_warps=8, num_stages=3, bound=100,
        split_cost=8, reason=_NO_TMA + "model: serial 60 %; 4 warps spill 240 bytes"),
    AttentionConfig(arch=120, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, descriptors=True,
        bound=100, split_cost=8, per_multiprocessor=2, reason="model: serial 77 %, two blocks overlap; 8 warps 65 %"),
    AttentionConfig(arch=120, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2, bound=100,
        split_cost=8, reason=_NO_TMA + "model: serial 58 %; 64 x 64 by shared memory, 72 %; 40 bytes of spills"),
    AttentionConfig(arch=120, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2, descriptors=True,
        bound=100, split_cost=8, reason="model: serial 65 %; 4 warps spill 376 bytes"),
    *(_fp32(arch, 16, 32, 2, split_cost=64) for arch in ARCHITECTURES),
)  # fmt: skip
ATTENTION_DQ = (
    *_INTERPRETED,
    AttentionConfig(arch=80, head_dim=64, block_m=128, block_n=32, num_warps=4, num_stages=2, bound=100,
        per_multiprocessor=2, reason=_SHARED_BY_WARPS + " (79 %); 40 bytes of spills, in L1"),
    AttentionConfig(arch=80, head_dim=128, block_m=32, block_n=64, num_warps=4, num_stages=2, bound=58,
        per_multiprocessor=2, reason="model: limited by shared memory, without spills; 64 x 64 47 %, one block"),
    *(AttentionConfig(arch=arch, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2, bound=100,
        per_multiprocessor=2, reason="model: serial 60 %, and two blocks overlap") for arch in (86, 89)),
    *(AttentionConfig(arch=arch, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2, bound=100,
        reason="model: serial 58 %; 64 x 64 93 and 48 %, by shared memory; 32 bytes of spills") for arch in (86, 89)),
    AttentionConfig(arch=90, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2, bound=81,
        per_multiprocessor=2, reason=_NO_TMA + "model: limited by shared memory, and two blocks overlap"),
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=100, reason="model: serial 60 %; two blocks of 64 keys fit with triton 3.7 alone"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2, bound=97,
        reason=_NO_TMA + "model: serial 72 %; 32 keys 71 and 59 %, by shared memory; 104 bytes of spills"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        bound=100, reason="model: serial 72 %; 220 registers"),
    AttentionConfig(arch=100, head_dim=64, block_m=64, block_n=64, num_warps=4, num_stages=2, bound=40,
        reason=_NO_TMA + "model: limited by shared memory; 168 registers"),
    AttentionConfig(arch=100, head_dim=64, block_m=128, block_n=64, num_warps=4, num_stages=2, descriptors=True,
        bound=67, per_multiprocessor=2, reason="model: limited by shared memory, and two blocks overlap"),
    AttentionConfig(arch=100, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2, bound=40,
        reason=_NO_TMA + "model: limited by shared memory; 128 queries spill 168 bytes"),
    AttentionConfig(arch=100, head_dim=128, block_m=128, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=86, reason="model: limited by shared memory; 64 keys 67 %"),
    AttentionConfig(arch=120, head_dim=64, block_m=128, block_n=32, num_warps=8, num_stages=2, bound=100,
        reason="model: serial 58 %; 64 keys spill"),
    AttentionConfig(arch=120, head_dim=128, block_m=128, block_n=32, num_warps=8, num_stages=2, bound=100,
        reason="model: serial 58 %; 64 x 64 93 and 48 %, by shared memory; descriptors spill 208 bytes, this 56"),
    *(_fp32(arch, 16, 32, 2, split_cost=None) for arch in ARCHITECTURES),
)  # fmt: skip
ATTENTION_DKDV = (
    *_INTERPRETED,
    AttentionConfig(arch=80, head_dim=64, block_m=32, block_n=64, num_warps=4, num_stages=2, bound=61,
        reason="model: limited by shared memory, and two blocks overlap; 64 queries 72 %, but 120 bytes of spills"),
    AttentionConfig(arch=80, head_dim=128, block_m=32, block_n=64, num_warps=4, num_stages=2, bound=58,
        reason="model: limited by shared memory, and two blocks overlap; 8 warps compute products 1.5 times: 31 %"),
    *(AttentionConfig(arch=arch, head_dim=64, block_m=32, block_n=64, num_warps=4, num_stages=2, bound=100,
        reason="model: serial 57 %, and two blocks overlap; no spills") for arch in (86, 89)),
    *(AttentionConfig(arch=arch, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2, bound=100,
        reason="model: serial 50 %; with 32 queries 8 warps compute products 1.5 times: 63 %") for arch in (86, 89)),
    AttentionConfig(arch=90, head_dim=64, block_m=64, block_n=128, num_warps=8, num_stages=2, bound=72,
        reason=_NO_TMA + "model: limited by shared memory; with 64 keys 8 warps compute products 1.5 times: 38 %"),
    AttentionConfig(arch=90, head_dim=64, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=72, reason="model: limited by shared memory; 89 % with triton 3.7"),
    AttentionConfig(arch=90, head_dim=128, block_m=32, block_n=128, num_warps=8, num_stages=2, bound=72,
        reason=_NO_TMA + "model: 64 queries 94 %, but 144 bytes of spills; with 64 keys products 1.5 times: 43 %"),
    AttentionConfig(arch=90, head_dim=128, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=88, reason="model: 100 % with triton 3.7; p and ds are register operands of wgmma"),
    AttentionConfig(arch=100, head_dim=64, block_m=64, block_n=64, num_warps=8, num_stages=2, bound=24,
        reason=_NO_TMA + "model: limited by shared memory; 30 % with triton 3.7"),
    AttentionConfig(arch=100, head_dim=64, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=30, reason="model: limited by shared memory; 43 % with triton 3.7"),
    AttentionConfig(arch=100, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2, bound=32,
        reason=_NO_TMA + "model: limited by shared memory; 128 keys spill 248 bytes"),
    AttentionConfig(arch=100, head_dim=128, block_m=64, block_n=128, num_warps=8, num_stages=2, descriptors=True,
        bound=44, reason="model: limited by shared memory; 56 % with triton 3.7"),
    AttentionConfig(arch=120, head_dim=64, block_m=32, block_n=64, num_warps=4, num_stages=2, bound=100,
        reason="model: serial 57 %, and two blocks overlap; 8 warps compute products twice: 50 %"),
    AttentionConfig(arch=120, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2, bound=100,
        reason=_NO_TMA + "model: serial 50 %; 255 registers"),
    AttentionConfig(arch=120, head_dim=128, block_m=64, block_n=64, num_warps=8, num_stages=2, descriptors=True,
        bound=100, reason="model: serial 52 %; no spills"),
    *(_fp32(arch, 32, 16, 1, split_cost=None) for arch in ARCHITECTURES),
)  # fmt: skip
# The warp-specialised kernel of sm_90; num_warps are those of one of its two compute warpgroups.
ATTENTION_GLUON = (
    AttentionConfig(arch=90, head_dim=64, block_m=128, block_n=128, num_warps=4, num_stages=4, descriptors=True,
        split_cost=4, reason="compiled: 240 registers in the computing warps, no spill, 160 KB"),
    AttentionConfig(arch=90, head_dim=128, block_m=128, block_n=128, num_warps=4, num_stages=2, descriptors=True,
        split_cost=4, reason="compiled: 240 registers in the computing warps, no spill, 176 KB"),
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
