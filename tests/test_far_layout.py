"""FarLayout and AttentionPlan against a list of tokens and a dense mask written here, token by token."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow_kernels import AttentionPlan, FarLayout
from anyflow_kernels.reference import far_mask, plan_mask

PATCHES = [((1, 2, 2), (1, 4, 4)), ((1, 1, 1), (1, 2, 2)), ((1, 2, 1), (1, 4, 3)), ((1, 2, 2), (1, 2, 2))]


class Token(NamedTuple):
    kind: str
    chunk: int
    frame: int  # absolute


@st.composite
def layouts(draw: Any) -> FarLayout:
    """Any mode, uneven chunks, any limit, frames smaller than a patch included."""
    partition = tuple(draw(st.lists(st.integers(1, 3), min_size=1, max_size=6)))
    patch, compressed = draw(st.sampled_from(PATCHES))
    mode = draw(st.sampled_from(["train", "prefill", "inference"]))
    return FarLayout(
        partition,
        draw(st.integers(1, 9)),
        draw(st.integers(1, 9)),
        patch,
        compressed,
        draw(st.integers(1, 7)),
        mode,
        clean=mode == "train" and draw(st.booleans()),
        cached=draw(st.integers(0, len(partition) - 1)) if mode == "prefill" else 0,
    )


def tokens_of(layout: FarLayout) -> list[Token]:
    """All key tokens in order, from the constructor's arguments alone."""
    n = len(layout.chunk_partition)
    num_full = min(n, layout.full_chunk_limit - (1 if layout.mode == "prefill" else 0))
    chunk_of_frame = [i for i, frames in enumerate(layout.chunk_partition) for _ in range(frames)]
    old = [f for f, chunk in enumerate(chunk_of_frame) if chunk < n - num_full]
    new = [f for f, chunk in enumerate(chunk_of_frame) if chunk >= n - num_full]
    runs = [("compressed", old, layout.compressed_patch_size), ("full", new, layout.patch_size)]
    runs += [("clean", new, layout.patch_size)] if layout.clean else []
    tokens = []
    for kind, frames, (_, ph, pw) in runs:
        per_frame = (layout.height // ph) * (layout.width // pw)
        tokens += [Token(kind, chunk_of_frame[f], f) for f in frames for _ in range(per_frame)]
    return tokens


def is_query(layout: FarLayout, token: Token) -> bool:
    if layout.mode == "inference":
        return token.chunk == len(layout.chunk_partition) - 1
    return token.chunk >= layout.cached


def sees(query: Token, key: Token, clean: bool) -> bool:
    """Who sees whom in FAR (arXiv 2503.19325), token by token."""
    if key.kind == "compressed":
        return key.chunk <= query.chunk
    if not clean:
        return query.kind == "full" and key.chunk <= query.chunk
    if query.kind == "full":
        return key.chunk == query.chunk if key.kind == "full" else key.chunk < query.chunk
    return query.kind == "clean" and key.kind == "clean" and key.chunk <= query.chunk


def mask_of(layout: FarLayout) -> Tensor:
    tokens = tokens_of(layout)
    queries = [t for t in tokens if is_query(layout, t)]
    rows = [[sees(q, k, layout.clean) for k in tokens] for q in queries]
    return torch.tensor(rows, dtype=torch.bool).reshape(len(queries), len(tokens))


@settings(max_examples=120, deadline=None)
@given(layouts())
def test_plan_shows_every_query_exactly_the_keys_of_the_dense_mask(layout: FarLayout) -> None:
    expected = mask_of(layout)
    plan = AttentionPlan.from_layout(layout)
    assert torch.equal(plan_mask(plan), expected)
    assert plan.num_pairs == int(expected.sum())


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_reference_mask_is_the_dense_mask(layout: FarLayout) -> None:
    """The `reference` backend's own derivation, from segments instead of ranges."""
    assert torch.equal(far_mask(layout), mask_of(layout))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_key_ranges_are_few_ascending_and_not_adjacent(layout: FarLayout) -> None:
    """Adjacent ranges would cost an attention kernel a second tail; a fourth range does not fit its arguments."""
    for q_start, q_end, keys in layout.key_ranges:
        assert q_start < q_end
        assert 1 <= len(keys) <= 3
        assert all(start < end for start, end in keys)
        assert all(end < start for (_, end), (start, _) in pairwise(keys))


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_segments_tile_the_tokens(layout: FarLayout) -> None:
    listed = [
        Token(s.kind, s.chunk, s.first_frame + i // s.tokens_per_frame)
        for s in layout.segments
        for i in range(s.tokens)
    ]
    tokens = tokens_of(layout)
    assert listed == tokens
    assert [s.offset for s in layout.segments] == [0, *(s.end for s in layout.segments)][:-1]
    assert layout.num_key_tokens == len(tokens)
    assert layout.num_query_tokens == sum(is_query(layout, t) for t in tokens)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_queries_are_the_tail_of_the_keys(layout: FarLayout) -> None:
    """A query's keys and values go to slab position cache_offset + i: cached tokens must all stand before it."""
    queries = [is_query(layout, t) for t in tokens_of(layout)]
    assert queries == [False] * layout.cache_offset + [True] * layout.num_query_tokens
    assert [s.cached for s in layout.segments] == sorted((s.cached for s in layout.segments), reverse=True)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_frame_map_gives_each_query_the_modulation_row_of_its_frame(layout: FarLayout) -> None:
    rows = [
        i for i, tokens in enumerate(n for frames, n in layout.frame_map for _ in range(frames)) for _ in range(tokens)
    ]
    frames = [(s.kind, s.first_frame + i) for s in layout.query_segments for i in range(s.frames)]
    queries = [(t.kind, t.frame) for t in tokens_of(layout) if is_query(layout, t)]
    assert [frames[row] for row in rows] == queries
    assert sum(count for count, _ in layout.frame_map) == len(frames)


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_frame_counts_split_the_video(layout: FarLayout) -> None:
    frames = {
        kind: sum(s.frames for s in layout.segments if s.kind == kind) for kind in ("compressed", "full", "clean")
    }
    assert frames["compressed"] == layout.num_compressed_frames
    assert frames["full"] == layout.num_full_frames
    assert frames["compressed"] + frames["full"] == sum(layout.chunk_partition)
    assert frames["clean"] == (frames["full"] if layout.clean else 0)


@settings(max_examples=40, deadline=None)
@given(layouts().filter(lambda layout: layout.mode == "prefill"))
def test_cached_prefill_computes_the_last_rows_of_a_full_prefill(layout: FarLayout) -> None:
    """Leaving out cached chunks changes which queries are computed, not what they see or where they stand."""
    whole = dataclasses.replace(layout, cached=0)
    assert whole.segments == tuple(dataclasses.replace(s, cached=False) for s in layout.segments)
    assert torch.equal(plan_mask(AttentionPlan.from_layout(whole))[layout.cache_offset :], mask_of(layout))


@settings(max_examples=40, deadline=None)
@given(layouts().filter(lambda layout: layout.mode == "inference"))
def test_inference_keys_are_the_prefill_of_the_finished_chunks_and_the_newest(layout: FarLayout) -> None:
    """A prefill fills the slab positions that the next chunk's query reads."""
    if len(layout.chunk_partition) == 1:
        assert layout.cache_offset == 0
        return
    before = dataclasses.replace(layout, mode="prefill", chunk_partition=layout.chunk_partition[:-1])
    assert [dataclasses.replace(s, cached=True) for s in before.segments] == list(layout.segments[:-1])
    assert before.num_key_tokens == layout.cache_offset


def test_published_sizes() -> None:
    """480p latents of 60x104: 1560 tokens a full frame, 390 a compressed one."""
    layout = FarLayout((1, 3, 3, 3, 3, 3, 3, 2), 60, 104, mode="inference")
    assert layout.num_query_tokens == 2 * 1560
    assert layout.num_key_tokens == 13 * 390 + 8 * 1560
    assert layout.frame_map == ((2, 1560),)
    train = FarLayout([1, 3, 3, 3], 60, 104)  # type: ignore[arg-type]
    assert train.frame_map == ((1, 390), (9, 1560))


def test_equal_layouts_are_one_key_and_cannot_change() -> None:
    a, b = FarLayout((1, 2), 8, 8), FarLayout([1, 2], 8, 8)  # type: ignore[arg-type]
    assert len({a, b}) == 1
    assert len({AttentionPlan.from_layout(a), AttentionPlan.from_layout(b)}) == 1
    assert a != FarLayout((2, 1), 8, 8)
    with pytest.raises(dataclasses.FrozenInstanceError):
        a.height = 4  # type: ignore[misc]


BAD_LAYOUTS: dict[str, dict[str, Any]] = {
    "chunk_partition": {"chunk_partition": ()},
    "chunk_partition ": {"chunk_partition": (1, 0)},
    "chunk_partition  ": {"chunk_partition": (1.5, 2)},
    "height": {"height": 0},
    "height ": {"height": 8.5},
    "width": {"width": -1},
    "full_chunk_limit": {"full_chunk_limit": 0},
    "full_chunk_limit ": {"full_chunk_limit": 1.5},
    "patch_size": {"patch_size": (2, 2, 2)},
    "patch_size ": {"patch_size": (1, 2)},
    "compressed_patch_size": {"compressed_patch_size": (1, 0, 4)},
    "mode": {"mode": "cache"},
    "clean": {"clean": True, "mode": "prefill"},
    "cached": {"cached": 1},
    "cached ": {"cached": 2, "mode": "prefill"},
    "cached  ": {"cached": -1, "mode": "prefill"},
}


@pytest.mark.parametrize("name", BAD_LAYOUTS)
def test_bad_argument_is_named(name: str) -> None:
    good: dict[str, Any] = {"chunk_partition": (1, 2), "height": 8, "width": 8}
    with pytest.raises((ValueError, TypeError), match=f"^{name.strip()}: got .*expected"):
        FarLayout(**{**good, **BAD_LAYOUTS[name]})


BAD_PLANS: dict[str, tuple[Any, ...]] = {
    "gap between runs": (4, 4, ((0, 2, ((0, 4),)), (3, 4, ((0, 4),)))),
    "queries left over": (4, 4, ((0, 2, ((0, 4),)),)),
    "empty run": (2, 4, ((0, 0, ((0, 4),)), (0, 2, ((0, 4),)))),
    "no keys": (2, 4, ((0, 2, ()),)),
    "empty range": (2, 4, ((0, 2, ((1, 1),)),)),
    "beyond the keys": (2, 4, ((0, 2, ((0, 5),)),)),
    "descending": (2, 4, ((0, 2, ((2, 4), (0, 1))),)),
    "overlapping": (2, 4, ((0, 2, ((0, 3), (2, 4))),)),
    "four ranges": (2, 8, ((0, 2, ((0, 1), (2, 3), (4, 5), (6, 7))),)),
}


@pytest.mark.parametrize("name", BAD_PLANS)
def test_bad_plan_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"^ranges: got .*expected"):
        AttentionPlan(*BAD_PLANS[name])


def test_negative_phantom_keys_are_refused() -> None:
    with pytest.raises(ValueError, match="phantom_keys: got -1, expected >= 0"):
        AttentionPlan.dense(2, 2, phantom_keys=-1)


def test_layout_prints_one_row_per_segment() -> None:
    layout = FarLayout((1, 2, 1), 8, 12, full_chunk_limit=2, clean=True)
    head, columns, *rows = str(layout).splitlines()
    assert "train + clean" in head and "[1, 2, 1]" in head and "8x12" in head
    assert f"{layout.num_query_tokens} queries" in head and f"{layout.num_key_tokens} keys" in head
    assert columns.split()[:2] == ["segment", "chunk"]
    assert len(rows) == len(layout.segments)
    ranges = {start: keys for start, _, keys in layout.key_ranges}
    for row, s in zip(rows, layout.segments, strict=True):
        kind, chunk, frames, per_frame, span, *seen = row.split()
        assert (kind, int(chunk), int(per_frame)) == (s.kind, s.chunk, s.tokens_per_frame)
        assert frames == f"{s.first_frame}-{s.first_frame + s.frames - 1}" and span == f"{s.offset}-{s.end}"
        assert seen == [f"{a}-{b}" for a, b in ranges[s.offset]]


def test_layout_prints_cached_segments() -> None:
    rows = str(FarLayout((1, 2, 1), 8, 12, mode="inference")).splitlines()[2:]
    assert [row.endswith("(cached)") for row in rows] == [True, True, False]


def test_plan_prints_its_runs() -> None:
    plan = AttentionPlan(3, 8, ((0, 1, ((0, 4),)), (1, 3, ((0, 2), (4, 8)))), phantom_keys=5)
    text = str(plan)
    assert "3 queries, 8 keys, 66.7% of the pairs" in text
    assert "queries 1-3: keys 0-2, 4-8" in text
    assert "5 phantom zero keys" in text


@pytest.mark.parametrize(
    "layout",
    [
        FarLayout((1, 2, 1, 1), 4, 8, full_chunk_limit=2, clean=True),
        FarLayout((1, 2, 1), 4, 8, full_chunk_limit=2, mode="prefill", cached=1),
        FarLayout((1, 2, 1), 4, 8, full_chunk_limit=2, mode="inference"),
    ],
    ids=lambda layout: layout.mode,
)
def test_drawing_shows_the_mask(layout: FarLayout, tmp_path: Path) -> None:
    """At eight pixels a token, the centre of every cell is coloured exactly where the query sees the key."""
    image_module = pytest.importorskip("PIL.Image")
    layout.draw(tmp_path / "mask.png", size=8 * layout.num_key_tokens)
    image = image_module.open(tmp_path / "mask.png")
    assert image.format == "PNG"
    assert image.size == (8 * layout.num_key_tokens, 8 * layout.num_query_tokens)
    tokens, mask = tokens_of(layout), mask_of(layout)
    colours: dict[str, set[Any]] = {}
    for q in range(layout.num_query_tokens):
        for k in range(layout.num_key_tokens):
            colours.setdefault(tokens[k].kind if mask[q, k] else "hidden", set()).add(
                image.getpixel((8 * k + 4, 8 * q + 4))
            )
    assert all(len(found) == 1 for found in colours.values())
    assert len({next(iter(found)) for found in colours.values()}) == len(colours)
