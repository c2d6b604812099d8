"""FarCache: what it computes, what it holds, and that it is exact.

Witnesses: a rollout that encodes all finished chunks from scratch each time (itself compared with diffusers and with
float64 elsewhere), and token counts worked out by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import FarCache

from .far_rollouts import (
    COMPRESSED,
    FULL,
    HEIGHT,
    PARTITION,
    STEPS,
    WIDTH,
    counted,
    far_model,
    generate,
    generate_from_scratch,
    new_cache,
    noise,
    prompt,
    query,
)
from .parity import FP32_TOLERANCE, reference_cache, relative_error

# exactness


@pytest.mark.parametrize(
    ("limit", "backend"), [*((n, "torch") for n in (1, 2, 3, 4, 9)), (3, "reference")], ids=lambda value: str(value)
)
def test_incremental_prefill_gives_the_video_of_a_full_one(limit: int, backend: str) -> None:
    model = far_model(limit, backend, full_chunk_limit=limit)
    assert relative_error(generate(model, new_cache(model)), generate_from_scratch(model)) < FP32_TOLERANCE


def test_chunks_may_be_prefilled_together_or_one_by_one() -> None:
    model, text, video = far_model(), prompt(), noise(sum(PARTITION[:5]))
    together, single = new_cache(model), new_cache(model)
    model.prefill(together, video, PARTITION[:5], text)
    for n in range(1, 6):
        model.prefill(single, video[:, : sum(PARTITION[:n])], PARTITION[:n], text)
    live = together.layout("prefill", PARTITION[:5]).num_key_tokens
    for (k, v), (k_single, v_single) in zip(together.slabs, single.slabs, strict=True):
        assert relative_error(k_single[:, :live], k[:, :live]) < FP32_TOLERANCE
        assert relative_error(v_single[:, :live], v[:, :live]) < FP32_TOLERANCE


def test_nan_in_fresh_slabs_never_shows() -> None:
    """Everything that is read has been written."""
    model = far_model()
    cache = new_cache(model)
    for pair in cache.slabs:
        for slab in pair:
            slab.fill_(math.nan)
    assert torch.equal(generate(model, cache), generate(model, new_cache(model)))


def test_slabs_grow_beyond_the_given_partition() -> None:
    model = far_model()
    small = new_cache(model, PARTITION[:2])
    capacity = small.capacity
    assert torch.equal(generate(model, small), generate(model, new_cache(model)))
    assert small.capacity > capacity


def test_slabs_stay_where_they_are_during_a_rollout() -> None:
    """Allocated once; nothing grows, nothing moves."""
    model = far_model()
    cache = new_cache(model)
    before = [(k.data_ptr(), v.data_ptr()) for k, v in cache.slabs]
    generate(model, cache)
    assert [(k.data_ptr(), v.data_ptr()) for k, v in cache.slabs] == before


def test_a_cache_serves_a_second_video() -> None:
    """Its given first chunks replace whatever the cache held."""
    model, text, video = far_model(), prompt(), noise(3, 9)
    used, fresh = new_cache(model), new_cache(model)
    generate(model, used)
    for cache in (used, fresh):
        model.prefill(cache, video, PARTITION[:2], text)
    got, want = (query(model, c, noise(1, 5), STEPS[0], PARTITION[:3], text) for c in (used, fresh))
    assert relative_error(got, want) < FP32_TOLERANCE


def test_two_rollouts_do_not_disturb_each_other() -> None:
    model, texts = far_model(), [prompt(1), prompt(8)]
    caches = [new_cache(model), new_cache(model)]
    video = noise(6)
    results = []
    for n in (1, 2, 3):
        for cache, text in zip(caches, texts, strict=True):
            model.prefill(cache, video[:, : sum(PARTITION[:n])], PARTITION[:n], text)
    for cache, text in zip(caches, texts, strict=True):
        alone = new_cache(model)
        model.prefill(alone, video[:, :4], PARTITION[:3], text)
        results.append(query(model, cache, noise(3, 5), STEPS[0], PARTITION[:4], text))
        want = query(model, alone, noise(3, 5), STEPS[0], PARTITION[:4], text)
        assert relative_error(results[-1], want) < FP32_TOLERANCE
    assert not torch.equal(*results)


def test_phantom_keys_do_not_touch_the_cache() -> None:
    """The switch may be turned during a rollout: it only pads the query's softmax."""
    model, text, video = far_model(), prompt(), noise(3)
    cache = new_cache(model)
    model.prefill(cache, video, PARTITION[:2], text)
    want = query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text)
    model.phantom_padding = True
    padded = query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text)
    model.phantom_padding = False
    assert torch.equal(query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text), want)
    assert relative_error(padded, want) > FP32_TOLERANCE


# work


@pytest.mark.parametrize("limit", [1, 2, 3])
def test_a_prefill_encodes_the_demoted_chunk_and_the_last_full_ones(limit: int) -> None:
    """Tokens through every block after each finished chunk, and through none of the older chunks."""
    model, text = far_model(full_chunk_limit=limit), prompt()
    cache, video = new_cache(model), noise(sum(PARTITION))
    for n in range(1, len(PARTITION)):
        with counted(model) as counts:
            model.prefill(cache, video[:, : sum(PARTITION[:n])], PARTITION[:n], text)
        full, older = PARTITION[max(0, n - limit + 1) : n], PARTITION[: max(0, n - limit + 1)]
        if older:  # one chunk has just been demoted: the full ones have lost a neighbour
            expected = older[-1] * COMPRESSED + sum(full) * FULL
        else:  # nothing has: only the newest is new
            expected = PARTITION[n - 1] * FULL
        assert counts["tokens"] == [[expected]] * 3, f"after chunk {n}"


def test_the_last_block_of_a_prefill_stops_after_its_keys() -> None:
    """Self- and cross-attention in all blocks but the last, on the visible keys."""
    model, text = far_model(), prompt()
    cache, video = new_cache(model), noise(7)
    model.prefill(cache, video[:, :4], PARTITION[:3], text)
    with counted(model) as counts:
        model.prefill(cache, video, PARTITION[:4], text)
    queries = 2 * COMPRESSED + 4 * FULL  # chunk 1 demoted; chunks 2 and 3 full
    assert counts["attention"] == [(queries, COMPRESSED + queries), (queries, 5)] * 2


def test_a_step_computes_the_newest_chunk_alone() -> None:
    model, text = far_model(), prompt()
    cache = new_cache(model)
    model.prefill(cache, noise(7), PARTITION[:4], text)
    with counted(model) as counts:
        query(model, cache, noise(2, 5), STEPS[0], PARTITION[:5], text)
    own, visible = 2 * FULL, 3 * COMPRESSED + 4 * FULL + 2 * FULL
    assert counts["tokens"] == [[own]] * 3
    assert counts["attention"] == [(own, visible), (own, 5)] * 3


def test_the_same_context_again_costs_nothing() -> None:
    model, text, video = far_model(), prompt(), noise(7)
    cache = new_cache(model)
    model.prefill(cache, video, PARTITION[:4], text)
    with counted(model) as counts:
        model.prefill(cache, video.clone(), PARTITION[:4], text.clone())
    assert counts["tokens"] == [[]] * 3


def test_prompt_and_times_are_embedded_once_per_rollout() -> None:
    """Cross-attention keys once per block; a time embedding per distinct (t, r): two steps and the clean frames."""
    model = far_model()
    calls = {"k": 0, "v": 0, "times": 0}

    def counting(name: str) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Tensor, ...], output: Tensor) -> None:
            calls[name] += len(output) if name == "times" else 1

        return hook

    for block in model.blocks:
        attn: Any = block.attn2
        attn.to_k.register_forward_hook(counting("k"))
        attn.to_v.register_forward_hook(counting("v"))
    model.condition_embedder.time_proj.register_forward_hook(counting("times"))
    generate(model, new_cache(model))
    assert calls == {"k": 3, "v": 3, "times": 3}


def dict_step(model: Any, cache: Any, x: Tensor, text: Tensor, partition: list[int], cached: int, prefill: bool) -> Any:
    zeros = torch.zeros(x.shape[:2])
    flag = {"num_cached_chunks": cached, "is_cache_step": prefill}
    times = (zeros, zeros) if prefill else (zeros + 700, zeros)
    return model(x, *times, text, partition, kv_cache=cache, kv_cache_flag=copy.deepcopy(flag), return_dict=False)[0]


def test_given_context_is_encoded_in_one_pass_under_the_dict_protocol() -> None:
    """The pipeline steps through conditioning chunks one cache step at a time; the work is one encoding."""
    model, text, video = far_model(), prompt(), noise(7)
    cache = reference_cache(model.config, PARTITION, 2, HEIGHT, WIDTH)
    with counted(model) as counts:
        for n in range(1, 5):
            dict_step(model, cache, video[:, : sum(PARTITION[:n])], text, PARTITION[:n], n - 1, prefill=True)
        assert counts["tokens"] == [[]] * 3
        got = dict_step(model, cache, noise(2, 5), text, PARTITION[:5], 4, prefill=False)
    assert counts["tokens"] == [[3 * COMPRESSED + 4 * FULL, 2 * FULL]] * 3
    own = new_cache(model)
    model.prefill(own, video, PARTITION[:4], text)
    assert torch.equal(got, query(model, own, noise(2, 5), (700.0, 0.0), PARTITION[:5], text))


# memory


def test_capacity_is_what_is_live_at_once() -> None:
    """Chunks [1, 3, 3, 3, 2], limit 3. Four chunks: 1 compressed frame, 9 full; five: 4 compressed, 8 full."""
    model = far_model()
    cache = new_cache(model, [1, 3, 3, 3, 2])
    assert cache.capacity == max(1 * COMPRESSED + 9 * FULL, 4 * COMPRESSED + 8 * FULL) == 222
    layers, keys_and_values, batch, heads, head_dim, float32 = 3, 2, 2, 2, 16, 4
    assert cache.nbytes == layers * keys_and_values * batch * 222 * heads * head_dim * float32
    assert cache.nbytes == sum(slab.untyped_storage().nbytes() for slab, _ in cache.slabs)  # k and v share a storage


def test_slabs_have_the_dtype_of_the_model() -> None:
    model = far_model().to(torch.bfloat16)
    assert {slab.dtype for pair in new_cache(model).slabs for slab in pair} == {torch.bfloat16}


def test_reference_tensors_are_let_go() -> None:
    """Under the dict protocol too, memory is no more than diffusers' and its own tensors are gone."""
    model = far_model()
    cache: Any = reference_cache(model.config, PARTITION, 2, HEIGHT, WIDTH)
    theirs = sum(tensor.nbytes for entry in cache.values() for tensor in entry.values())
    dict_step(model, cache, noise(1), prompt(), PARTITION[:1], 0, prefill=False)
    assert not [value for entry in cache.values() for value in entry.values() if isinstance(value, Tensor)]
    ours = [value for entry in cache.values() for value in entry.values() if isinstance(value, FarCache)]
    assert len(ours) == 1 and ours[0].nbytes <= theirs


def test_an_immutable_cache_keeps_what_a_backward_pass_saved() -> None:
    model, text, video = far_model(), prompt(), noise(4)
    cache = new_cache(model, immutable=True)
    model.prefill(cache, video[:, :3], PARTITION[:2], text)
    saved = [(k, v) for k, v in cache.slabs]
    copies = [(k.clone(), v.clone()) for k, v in saved]
    model.prefill(cache, video, PARTITION[:3], text)
    used = 3 * FULL
    for (k, v), (k_copy, v_copy) in zip(saved, copies, strict=True):
        assert torch.equal(k[:, :used], k_copy[:, :used]) and torch.equal(v[:, :used], v_copy[:, :used])
    assert not {k.data_ptr() for k, _ in saved} & {k.data_ptr() for k, _ in cache.slabs}
