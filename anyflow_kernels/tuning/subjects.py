"""What is tuned, and the candidates: those of the launch tables and their neighbours, at the shapes of a model.

A subject is a key that launches ask `launch_configs.tuned` for. Its first candidate is what serves without a table;
the others are the rows of the architecture's table that can serve, each one step away in every launch parameter where
the chip's registers and shared memory allow it, and the rival implementations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from .. import launch_configs
from ..aot_case import MODELS
from ..far_layout import AttentionPlan
from ..launch_configs import GPUS, INTERPRETER, AttentionConfig, attention_row, attention_shape, rows_for
from ..launch_configs.tuned import Choice, Key, launch_fields
from ..testing.cases import OperationCase, Sizes, attention_case, attention_plans, operation_cases

# FLOPs of a float64 oracle that a consumer card, without float64 tensor cores, does in seconds.
ORACLE_FLOPS = 5e12
ACCUMULATORS = 0.75  # of a thread's registers, at most
Steps = Mapping[str, tuple[int, int]]  # bounds by launch parameter; num_stages goes by one, the others by two


@dataclass(frozen=True)
class Shape:
    """What is timed, and what is judged against float64: the same, or smaller of the same kind."""

    timed: OperationCase
    judged: OperationCase


@dataclass(frozen=True, kw_only=True)
class Subject:
    """One question: which candidate serves the launches of `key`.

    Args:
        candidates: the default first; the reason of each says where it comes from.
        backward: gradients are judged and timed, not results.
        beside: choices that hold while it is tried.
    """

    key: Key
    candidates: tuple[Choice, ...]
    shapes: tuple[Shape, ...]
    backward: bool = False
    beside: Mapping[Key, Choice] = field(default_factory=dict)


def model_sizes(model: str) -> Sizes:
    """A released model at 480p: compressed context and two full chunks before the newest.

    Raises:
        ValueError: on an unknown name.
    """
    if model not in MODELS:
        raise ValueError(f"model: got {model!r}, expected one of {', '.join(MODELS)}")
    size = MODELS[model]
    return Sizes(size["heads"], size["head_dim"], size["ffn"], 256, 4096, 512, 60, 104, (1, 3, 3, 3))


def subjects(arch: int, models: Mapping[str, Sizes], dtype: torch.dtype = torch.bfloat16) -> list[Subject]:
    """Every subject of these models on an architecture. Where several models ask for one key, its candidates are
    judged and timed at the shapes of all of them."""
    found: dict[Key, Subject] = {}
    for name, sizes in models.items():
        for subject in (*_attention(arch, name, sizes, dtype), *_others(arch, name, sizes, dtype)):
            known = found.get(subject.key)
            found[subject.key] = replace(known, shapes=known.shapes + subject.shapes) if known else subject
    return list(found.values())


def _attention(arch: int, model: str, sizes: Sizes, dtype: torch.dtype) -> Iterator[Subject]:
    first, last = (replace(sizes, chunks=chunks) for chunks in (sizes.chunks[:2], sizes.chunks + 3 * sizes.chunks[-1:]))
    uses = [(first, "newest chunk"), (last, "newest chunk"), (sizes, "text"), (sizes, "prefill")]
    grouped: dict[Key, list[Shape]] = {}
    for own, name in (*uses, (sizes, "newest chunk, phantom keys")):
        plan = attention_plans(own)[name]
        shape = attention_shape(plan.ranges, plan.num_keys, plan.phantom_keys)
        key = Key("far_attention", dtype, sizes.head_dim, shape)
        grouped.setdefault(key, []).append(_shape_of(model, own, name, backward=False))
    for key, shapes in grouped.items():
        yield Subject(key=key, candidates=_forwards(arch, key), shapes=tuple(shapes))
    training = _shape_of(model, sizes, "train, clean copy", backward=True)
    for operation, table in (("far_attention_dq", "ATTENTION_DQ"), ("far_attention_dkdv", "ATTENTION_DKDV")):
        key = Key(operation, dtype, sizes.head_dim)
        rows = _attention_rows(getattr(launch_configs, table), arch, key)
        yield Subject(key=key, candidates=tuple(map(_choice, rows)), shapes=(training,), backward=True)


def _shape_of(model: str, sizes: Sizes, name: str, backward: bool) -> Shape:
    judged = sizes
    while _oracle_flops(attention_plans(judged)[name], judged, backward) > ORACLE_FLOPS:
        judged = replace(judged, height=judged.height // 2, width=judged.width // 2)
    timed, smaller = (attention_case(s, f"{model} {name}", attention_plans(s)[name]) for s in (sizes, judged))
    return Shape(timed, timed if judged == sizes else smaller)


def _oracle_flops(plan: AttentionPlan, sizes: Sizes, backward: bool) -> float:
    """Of the dense formula: two products forward, as many again to recompute them and four in the backward."""
    return (16 if backward else 4) * sizes.batch * sizes.dim * plan.num_queries * plan.num_keys


def _forwards(arch: int, key: Key) -> tuple[Choice, ...]:
    """The forward that serves now, and all that might."""
    preferred = rows_for(launch_configs.FORWARD_KERNELS, arch)[0]
    default = preferred.ranges if key.shape == "ranges" else preferred.dense
    found = [_choice(row) for row in _attention_rows(launch_configs.ATTENTION_FORWARD, arch, key)]
    if key.dtype.itemsize == 2:
        own = [row for row in launch_configs.ATTENTION_GLUON if (row.arch, row.head_dim) == (arch, key.size)]
        steps = {"num_stages": (2, 4)}
        found += [_choice(row, "gluon") for row in _with_neighbours(own, steps, _fits_attention("far_attention", arch))]
        if key.shape != "ranges":
            found += [
                Choice(way=way, fields={}, reason=preferred.reason if way == default else "SDPA of PyTorch")
                for way in ("cudnn", "flash")
            ]
    return tuple(sorted(found, key=lambda choice: choice.way != default))


def _attention_rows(table: Sequence[AttentionConfig], arch: int, key: Key) -> list[AttentionConfig]:
    """The row that serves, the others of the table that can, and their neighbours."""
    itemsize = key.dtype.itemsize
    own = [row for row in rows_for(table, arch) if row.itemsize == itemsize and key.size <= row.head_dim]
    own.sort(key=lambda row: row != attention_row(tuple(table), arch, key.size, itemsize))
    own = [replace(row, head_dim=key.size) for row in own]
    steps = {"block_m": (16, 256), "block_n": (16, 256)}
    if arch != INTERPRETER:  # which has neither warps nor stages
        steps |= {"num_warps": (4, 8), "num_stages": (1, 4), "per_multiprocessor": (1, 2)}
    return _with_neighbours(own, steps, _fits_attention(key.operation, arch))


def _fits_attention(operation: str, arch: int) -> Callable[[AttentionConfig], bool]:
    """Whether tiles and accumulators can fit the chip; what the compiler makes of them, the trial will show."""

    def fits(row: AttentionConfig) -> bool:
        if arch == INTERPRETER:
            return row.block_m <= 64 and row.block_n <= 64
        gpu, d, m, n = GPUS[arch], row.head_dim, row.block_m, row.block_n
        held, walked, sums = {
            "far_attention": (m, 2 * n, m * (d + n)),
            "far_attention_dq": (2 * m, 2 * n, m * (d + 2 * n)),
            "far_attention_dkdv": (2 * n, 2 * m, n * (2 * d + 2 * m)),
        }[operation]
        threads = 32 * row.num_warps
        blocks = row.per_multiprocessor
        registers = min(255, gpu.registers // (threads * blocks))
        shared = (held + walked * row.num_stages) * d * row.itemsize
        room = min(gpu.shared_bytes, gpu.shared_per_multiprocessor // blocks - 1024)
        return shared <= room and sums / threads <= ACCUMULATORS * registers

    return fits


def _others(arch: int, model: str, sizes: Sizes, dtype: torch.dtype) -> Iterator[Subject]:
    queries = sizes.layout("inference").num_query_tokens
    # The pass over the hidden layer, with a product before it that costs next to nothing.
    narrow = replace(sizes, heads=1, head_dim=16)
    cross = replace(sizes, text_tokens=queries)  # the queries of cross-attention pass the same norm
    passes = {Key("linear_gelu", dtype): Choice(way="triton", fields={})}

    def cases(operation: str, own: Sizes = sizes) -> tuple[Shape, ...]:
        chosen = (case for case in operation_cases(own) if case.operation == operation)
        named = (replace(case, shape=f"{model} {case.shape}") for case in chosen)
        return tuple(Shape(case, case) for case in named)

    for operation, own in (
        ("gated_residual_layer_norm", sizes), ("qk_norm_rope_append", sizes), ("rms_norm", cross),
    ):  # fmt: skip
        for name, backward in ((operation, False), (f"{operation}_backward", True)):
            shapes = tuple(s for s in cases(operation, own) if s.timed.differentiable or not backward)
            key = Key(name, dtype, sizes.dim)
            yield Subject(key=key, candidates=_row_tiles(arch, key), shapes=shapes, backward=backward)
    pass_steps = {"rows": (1, 64), "columns": (128, 1024), "num_warps": (1, 8)}
    elements = {
        "bias_gelu": ("linear_gelu", narrow, False, pass_steps),
        "bias_gelu_backward": ("linear_gelu", narrow, True, {**pass_steps, "group": (16, 512)}),
        "flow_map_step": ("flow_map_step", sizes, False, {"columns": (256, 4096), "num_warps": (1, 8)}),
    }
    for name, (operation, own, backward, steps) in elements.items():
        rows = _with_neighbours([launch_configs.element_tile(name, arch)], steps, _whole_groups)
        yield Subject(
            key=Key(name, dtype),
            candidates=tuple(map(_choice, rows)),
            shapes=cases(operation, own),
            backward=backward,
            beside=passes,
        )
    gemv = _with_neighbours(
        [launch_configs.gemv_tile(arch)], {"outputs": (1, 16), "depth": (256, 4096), "num_warps": (1, 8)}, _always
    )
    key = Key("dual_timestep_embedding", dtype, sizes.dim)
    yield Subject(key=key, candidates=tuple(map(_choice, gemv)), shapes=cases(key.operation))
    now = rows_for(launch_configs.LINEAR_GELU, arch)[0]
    ways = {"cublaslt": "in the GEMM's epilogue", "triton": "a pass after the GEMM"}
    ways = {now.way: now.reason} | {way: reason for way, reason in ways.items() if way != now.way}
    yield Subject(
        key=Key("linear_gelu", dtype),
        candidates=tuple(Choice(way=way, fields={}, reason=reason) for way, reason in ways.items()),
        shapes=cases("linear_gelu"),
    )


def _row_tiles(arch: int, key: Key) -> tuple[Choice, ...]:
    row = launch_configs.row_tile(key.operation, arch, key.size)
    own = [row, *(r for r in launch_configs.ROW_TILES if r.operation == key.operation and arch in r.archs)]
    steps: Steps = {"num_warps": (1, 16)}
    if key.operation != "qk_norm_rope_append":  # a program of it is one token
        steps = {**steps, "rows": (8, 128) if key.operation.endswith("_backward") else (1, 8)}
    per_row = 1 << (key.size - 1).bit_length()

    def fits(r: Any) -> bool:
        held = 1 if key.operation.endswith("_backward") else r.rows
        return arch == INTERPRETER or 8 <= per_row * held / (32 * r.num_warps) <= 128

    return tuple(map(_choice, _with_neighbours(own, steps, fits)))


def _with_neighbours(rows: Iterable[Any], steps: Steps, fits: Callable[[Any], bool]) -> list[Any]:
    """The rows, then what fits of those that differ by one step in one parameter; each set of parameters once."""
    rows = list(rows)
    found = {tuple(launch_fields(row).items()): row for row in reversed(rows)}
    found = dict(reversed(found.items()))
    for row in rows:
        for name, (low, high) in steps.items():
            value = getattr(row, name)
            for other in (value - 1, value + 1) if name == "num_stages" else (value // 2, value * 2):
                near = replace(row, **{name: other}, reason=f"{name} {value} to {other}")
                if low <= other <= high and fits(near):
                    found.setdefault(tuple(launch_fields(near).items()), near)
    return list(found.values())


def _choice(row: Any, way: str = "triton") -> Choice:
    return Choice(way=way, fields=launch_fields(row), reason=row.reason)


def _whole_groups(row: Any) -> bool:
    """A program of a backward takes its group `rows` at a time; a forward has no groups."""
    return "backward" not in row.operation or row.group % row.rows == 0


def _always(row: Any) -> bool:
    return True
