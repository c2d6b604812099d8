"""What `anyflow_kernels.aot` compiles of `far_attention`: each kernel under every row of its launch table."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import triton

from .. import launch_configs
from ..aot_case import MODELS, AotCase
from ..launch_configs import AttentionConfig, attention_row, rows_for
from .attention_tiles import MERGE_ROWS, _far_attention_merge_kernel, constants
from .far_attention import _far_attention_forward_kernel
from .far_attention_backward import (
    DELTA_ROWS,
    _far_attention_delta_kernel,
    _far_attention_dkdv_kernel,
    _far_attention_dq_kernel,
)

# Matrix products of a tile of queries with a tile of keys; in fp32 each is three of TF32.
_PRODUCTS = {
    "_far_attention_forward_kernel": 2,
    "_far_attention_dq_kernel": 3,
    "_far_attention_dkdv_kernel": 4,
}
_TILES = ((32, 64, 128), (32, 64, 128), (4, 8))  # queries, keys, warps
_TYPES = {2: "bf16", 4: "fp32"}
_FLOATS = ("lse_ptr", "statistics_ptr", "partial_ptr", "partial_lse_ptr")
_TABLES = ("starts_ptr", "items_ptr", "ranges_ptr", "merges_ptr")


def attention_case(kernel: Any, config: AttentionConfig, shape: str, head_dim: int) -> AotCase:
    """An attention kernel as `launch_forward` or `launch_backward` would launch it under this configuration."""
    dtype, block_d = _TYPES[config.itemsize], triton.next_power_of_2(max(head_dim, 16))
    blocks = {"q": config.block_m, "grad": config.block_m, "k": config.block_n, "v": config.block_n}

    def argument(name: str) -> str:
        if name in blocks and config.descriptors:
            return f"tensordesc<{dtype}[1,1,{blocks[name]},{block_d}]>"
        if name in _FLOATS or name in _TABLES:
            return "*fp32" if name in _FLOATS else "*i32"
        if name in blocks or name.endswith("_ptr"):
            return f"*{dtype}"
        return "fp32" if name.startswith("scale") else "i32"

    names = kernel.arg_names
    tile_products = _PRODUCTS.get(kernel.fn.__name__, 0) * (3 if config.itemsize == 4 else 1)
    walked = config.block_m if kernel is _far_attention_dkdv_kernel else config.block_n
    constexprs = constants(config, head_dim)
    constexprs |= {"WARP_SPECIALIZE": config.warp_specialize, "PDL": launch_configs.pdl(config.arch)}
    return AotCase(
        kernel,
        shape,
        {name: argument(name) for name in names if not name.isupper()},
        {name: value for name, value in constexprs.items() if name in names},
        config.num_warps,
        config.num_stages,
        tensor_cores=True,
        requires="HGMMA" if config.arch == 90 and config.itemsize == 2 else None,
        divisible=tuple(name for name in names if name.startswith("stride_") and head_dim % 16 == 0),
        products=tile_products * config.block_m * config.block_n * block_d,
        loaded=2 * walked * head_dim * config.itemsize,
        per_multiprocessor=None if kernel is _far_attention_dkdv_kernel else config.per_multiprocessor,
    )


def attention_cases(kernel: Any, table: tuple[AttentionConfig, ...], arch: int) -> list[AotCase]:
    """A kernel under every row of its table, at the released models' shapes where it serves those, else at its own."""
    cases = []
    for row in rows_for(table, arch):
        way = " specialised" if row.warp_specialize else "" if row.descriptors else " pointers"
        shapes = [f"{_TYPES[row.itemsize]} d{row.head_dim}{way}"]
        if row == attention_row(table, arch, 128, 2):
            shapes = [f"{name} {shapes[0]}" for name in MODELS]
        cases += [replace(attention_case(kernel, row, shape, row.head_dim), bound=row.bound) for shape in shapes]
    return cases


def aot_cases(arch: int) -> list[AotCase]:
    return [
        *attention_cases(_far_attention_forward_kernel, launch_configs.ATTENTION_FORWARD, arch),
        *attention_cases(_far_attention_dq_kernel, launch_configs.ATTENTION_DQ, arch),
        *attention_cases(_far_attention_dkdv_kernel, launch_configs.ATTENTION_DKDV, arch),
        *_row_cases(_far_attention_merge_kernel, launch_configs.ATTENTION_FORWARD, arch, MERGE_ROWS),
        *_row_cases(_far_attention_delta_kernel, launch_configs.ATTENTION_DQ, arch, DELTA_ROWS),
    ]


def aot_candidates(arch: int) -> list[AotCase]:
    """What could be a row for half precision, for `aot --sweep`; as many blocks share a multiprocessor as fit."""
    cases = []
    kernels = (_far_attention_forward_kernel, _far_attention_dq_kernel, _far_attention_dkdv_kernel)
    ways = (False, True)[: 1 + (arch >= 90)]
    for kernel, head_dim, tma, m, n, warps in itertools.product(kernels, (64, 128), ways, *_TILES):
        if m * n >= 32 * 64 and (warps == 8 or m * n <= 64 * 128):
            shape = f"d{head_dim}{'' if tma else ' pointers'} {m}x{n} {warps} warps"
            row = AttentionConfig(arch=arch, head_dim=head_dim, block_m=m, block_n=n, num_warps=warps, num_stages=2,
                descriptors=tma, reason=shape)  # fmt: skip
            cases.append(replace(attention_case(kernel, row, shape, head_dim), per_multiprocessor=None))
    return cases


def _row_cases(kernel: Any, table: tuple[AttentionConfig, ...], arch: int, rows: int) -> list[AotCase]:
    """A kernel that works row by row, without products, at the released models' shapes."""
    config = replace(attention_row(table, arch, 128, 2), descriptors=False, num_warps=4, num_stages=3)
    case = attention_case(kernel, config, "", 128)
    case = replace(
        case, constexprs={**case.constexprs, "ROWS": rows}, tensor_cores=False, requires=None, per_multiprocessor=None
    )
    return [replace(case, shape=f"{name} bf16 d128") for name in MODELS]
