"""The rolling KV cache holds the first sink tokens and the last window tokens, whatever the order of calls."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anyflow_kernels.reference import rotate
from anyflow_runtime.streaming import LifecycleError, RollingKVCache

B, H, D = 2, 3, 8


def keys(index: int, chunk: int, head_dim: int = D) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    k, v = torch.randn(2, B, chunk, H, head_dim, generator=generator)
    return k, v


def make(sink: int = 4, window: int = 8, chunk: int = 4, **kwargs) -> RollingKVCache:
    cache = RollingKVCache(B, H, D, sink=sink, window=window, chunk=chunk, **kwargs)
    for slab in (cache._k, cache._v):
        slab.fill_(float("nan"))
    return cache


def step(cache: RollingKVCache, index: int) -> tuple[Tensor, Tensor]:
    cache.before_update(index)
    cache.update(*keys(index, cache.chunk))
    read = cache.cached_k().clone(), cache.cached_v().clone()
    cache.after_update(index)
    return read


LAYOUTS = [
    (0, 4, 4),
    (0, 12, 4),
    (4, 8, 4),
    (4, 4, 4),
    (8, 4, 4),
    (3, 9, 4),
    (1, 5, 3),
    (5, 7, 2),
    (2, 10, 6),
    (0, 1, 1),
]


@pytest.mark.parametrize(("sink", "window", "chunk"), LAYOUTS)
def test_holds_first_sink_and_last_window(sink, window, chunk):
    """Sinks that end inside a chunk are the hard case."""
    cache = make(sink, window, chunk)
    all_k, all_v = torch.empty(B, 0, H, D), torch.empty(B, 0, H, D)
    for i in range(9):
        k, v = keys(i, chunk)
        all_k, all_v = torch.cat([all_k, k], 1), torch.cat([all_v, v], 1)
        got = step(cache, i)
        for read, history in zip(got, (all_k, all_v), strict=True):
            if history.shape[1] > sink + window:
                history = torch.cat([history[:, :sink], history[:, -window:]], 1)
            torch.testing.assert_close(read, history, rtol=0, atol=0)


@given(
    sink=st.integers(0, 7),
    window=st.integers(1, 12),
    chunk=st.integers(1, 5),
    repeats=st.lists(st.integers(1, 3), min_size=1, max_size=8),
)
@settings(max_examples=60, deadline=None)
def test_repeated_updates_and_reopened_chunks_change_nothing(sink, window, chunk, repeats):
    if window < chunk or (sink + window) % chunk:
        with pytest.raises(ValueError, match="sink, window, chunk"):
            make(sink, window, chunk)
        return
    plain, busy = make(sink, window, chunk), make(sink, window, chunk)
    for i, count in enumerate(repeats):
        for attempt in range(count):
            busy.before_update(i)
            busy.update(*keys(1000 + attempt, chunk))
        if count == 2:  # committed, then opened again for the clean pass
            busy.after_update(i)
            busy.before_update(i)
        torch.testing.assert_close(step(busy, i), step(plain, i), rtol=0, atol=0)


def test_reads_are_views_of_one_slab():
    cache = make()
    cache.before_update(0)
    cache.update(*keys(0, 4))
    assert cache.cached_k().data_ptr() == cache._k.data_ptr() and cache.cached_k().shape == (B, 4, H, D)
    assert cache.cached_v().untyped_storage().data_ptr() == cache._v.untyped_storage().data_ptr()


def test_slots_are_the_rows_of_the_newest_chunk():
    cache = make()
    for i in range(5):
        step(cache, i)
        k, _ = keys(i, 4)
        torch.testing.assert_close(cache._k[:, cache.slots], k, rtol=0, atol=0)
    assert cache.slots == slice(8, 12) and cache.is_full


@pytest.mark.parametrize("index", [-1, 0, 3])
def test_index_must_be_the_latest_or_the_next(index):
    cache = make()
    step(cache, 0)
    step(cache, 1)
    with pytest.raises(AssertionError, match="expected 1 or 2"):
        cache.before_update(index)
    step(cache, 2)


def test_next_chunk_needs_the_latest_committed():
    cache = make()
    cache.before_update(0)
    with pytest.raises(AssertionError, match="0 is not committed"):
        cache.before_update(1)


def test_reading_outside_an_update_is_refused():
    cache = make()
    with pytest.raises(AssertionError, match="no chunk is open"):
        cache.cached_k()
    step(cache, 0)
    with pytest.raises(AssertionError, match="no chunk is open"):
        cache.cached_v()


def test_reading_before_writing_is_refused():
    cache = make()
    cache.before_update(0)
    with pytest.raises(AssertionError, match="not written yet"):
        cache.cached_k()


def test_update_and_commit_outside_an_update_are_refused():
    cache = make()
    with pytest.raises(LifecycleError, match="update: no chunk is open"):
        cache.update(*keys(0, 4))
    cache.before_update(0)
    cache.update(*keys(0, 4))
    with pytest.raises(LifecycleError, match="got 1, expected 0"):
        cache.after_update(1)


def test_reset_closes_an_open_update():
    cache = make()
    step(cache, 0)
    cache.before_update(1)
    cache.reset()
    with pytest.raises(LifecycleError, match="no chunk is open"):
        cache.update(*keys(0, 4))
    assert step(cache, 0)[0].shape[1] == 4


def test_chunk_of_another_size_is_refused():
    cache = make()
    cache.before_update(0)
    with pytest.raises(ValueError, match=r"k: got \(2, 3, 3, 8\), expected \(B, chunk, H, d\) = \(2, 4, 3, 8\)"):
        cache.update(*keys(0, 3))


def rope(tokens: int, head_dim: int = D) -> tuple[Tensor, Tensor]:
    angles = torch.arange(tokens)[:, None] * 10000.0 ** (-torch.arange(0, head_dim, 2) / head_dim)
    return angles.cos(), angles.sin()


def test_unrotated_keys_are_rotated_by_their_slot_on_read():
    tables = rope(12)
    cache, plain = make(rope=tables), make()
    for i in range(6):
        got, raw = step(cache, i), step(plain, i)
        rows = tuple(table[: raw[0].shape[1]] for table in tables)
        torch.testing.assert_close(got[0], rotate(raw[0], rows), rtol=0, atol=0)
        torch.testing.assert_close(got[1], raw[1], rtol=0, atol=0)


def test_rotation_on_read_agrees_with_rotation_before_caching_while_nothing_has_rolled():
    tables = rope(12)
    on_read, before = make(rope=tables), make()
    for i in range(3):
        on_read.before_update(i), before.before_update(i)
        k, v = keys(i, 4)
        on_read.update(k, v)
        before.update(rotate(k, tuple(table[before.slots] for table in tables)), v)
        torch.testing.assert_close(on_read.cached_k(), before.cached_k())
        on_read.after_update(i), before.after_update(i)


def test_rope_tables_of_another_size_are_refused():
    with pytest.raises(ValueError, match=r"rope: got tables .* = \(12, 4\)"):
        make(rope=rope(8))
