"""FarCache: what it computes, what it holds, and that it is exact.

Witnesses: a rollout that encodes all finished chunks from scratch each time (itself compared with diffusers and with
float64 elsewhere), and token counts worked out by hand.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, FarCache
from anyflow_runtime.models import cache as cache_module

from .parity import FP32_TOLERANCE, reference_cache, relative_error

HEIGHT, WIDTH, FULL, COMPRESSED = 8, 12, 24, 6  # tokens per frame: 4*6 and 2*3
PARTITION = [1, 2, 1, 3, 2, 1]
STEPS = [(1000.0, 700.0), (700.0, 0.0)]
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 24, "num_layers": 3,
}  # fmt: skip


def far_model(seed: int = 0, backend: str = "torch", **config: Any) -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(seed)
    model = AnyFlowFARTransformer3DModel(**{**CONFIG, **config}, backend=backend).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def prompt(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, CONFIG["text_dim"], generator=torch.Generator().manual_seed(seed))


def noise(frames: int, seed: int = 2, batch: int = 2) -> Tensor:
    return torch.randn(batch, frames, 4, HEIGHT, WIDTH, generator=torch.Generator().manual_seed(seed))


def new_cache(model: AnyFlowFARTransformer3DModel, partition: list[int] = PARTITION, **options: Any) -> FarCache:
    return FarCache.for_model(model, partition, HEIGHT, WIDTH, batch_size=2, **options)


def query(model: Any, cache: Any, x: Tensor, times: tuple[float, float], partition: list[int], text: Tensor) -> Tensor:
    t, r = (torch.full(x.shape[:2], time) for time in times)
    return model(x, t, r, text, partition, kv_cache=cache).sample


@torch.no_grad()
def generate(
    model: Any,
    cache: FarCache,
    partition: list[int] = PARTITION,
    text: Tensor | None = None,
    before_prefill: Callable[[], None] = lambda: None,
    seed: int = 2,
) -> Tensor:
    """A video in two steps per chunk, each chunk the context of the later ones."""
    text = prompt() if text is None else text
    chunks: list[Tensor] = []
    for i, x in enumerate(noise(sum(partition), seed).split(partition, dim=1)):
        for t, r in STEPS:
            x = x - (t - r) / 1000 * query(model, cache, x, (t, r), partition[: i + 1], text)
        chunks.append(x)
        if i + 1 < len(partition):
            before_prefill()
            model.prefill(cache, torch.cat(chunks, dim=1), partition[: i + 1], text)
    return torch.cat(chunks, dim=1)


def generate_from_scratch(model: Any, partition: list[int] = PARTITION, **options: Any) -> Tensor:
    """The same video, all finished chunks encoded again after each."""
    cache = new_cache(model, partition)

    def forget() -> None:
        cache.context = None

    return generate(model, cache, partition, before_prefill=forget, **options)


@contextmanager
def counted(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Tokens through each block, by layer, and the attention calls with their (queries, keys)."""
    counts: dict[str, list[Any]] = {"tokens": [[] for _ in model.blocks], "attention": []}
    hooks = [
        block.register_forward_pre_hook(lambda _, args, layer=layer: counts["tokens"][layer].append(args[0].shape[1]))
        for layer, block in enumerate(model.blocks)
    ]
    inner = model.ops

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def far_attention(self, q: Tensor, k: Tensor, *args: Any) -> Any:
            counts["attention"].append((q.shape[1], k.shape[1]))
            return inner.far_attention(q, k, *args)

    model.ops = Counting()
    try:
        yield counts
    finally:
        model.ops = inner
        for hook in hooks:
            hook.remove()


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


# what makes cached keys worthless


def change_prompt(video: Tensor, text: Tensor, partition: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    return video, prompt(7), partition


def change_prompt_in_place(video: Tensor, text: Tensor, partition: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    return video, text.add_(0.5), partition


def change_oldest_frame(video: Tensor, text: Tensor, partition: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    video = video.clone()
    video[:, 0] += 0.5
    return video, text, partition


def change_in_place(video: Tensor, text: Tensor, partition: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    video[:, 1] += 0.5
    return video, text, partition


def change_partition(video: Tensor, text: Tensor, partition: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    return video, text, [2, 1, *partition[2:]]


def go_back(video: Tensor, text: Tensor, partition: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    return video[:, : sum(partition[:2])], text, partition[:2]


@pytest.mark.parametrize(
    "change",
    [change_prompt, change_prompt_in_place, change_oldest_frame, change_in_place, change_partition, go_back],
    ids=lambda change: change.__name__,
)
@pytest.mark.parametrize("inference_mode", [False, True], ids=["no_grad", "inference_mode"])
def test_changed_context_is_encoded_again(inference_mode: bool, change: Callable[..., Any]) -> None:
    with torch.inference_mode(inference_mode):
        model, text, video, partition = far_model(), prompt(), noise(sum(PARTITION[:5])), PARTITION[:5]
        cache = new_cache(model)
        model.prefill(cache, video[:, : sum(PARTITION[:4])], PARTITION[:4], text)
        video, text, partition = change(video, text, partition)
        model.prefill(cache, video, partition, text)
        fresh = new_cache(model)
        model.prefill(fresh, video.clone(), partition, text.clone())
        got, want = (query(model, c, noise(1, 5), STEPS[0], [*partition, 1], text) for c in (cache, fresh))
    assert relative_error(got, want) < FP32_TOLERANCE


def test_changed_times_are_encoded_again() -> None:
    """Context may be noisy on purpose; the reference protocol carries its times."""
    model, text, video = far_model(), prompt(), noise(3)
    results = []
    for history in ([0.0, 300.0], [300.0]):
        cache = new_cache(model)
        for time in history:
            t = torch.full((2, 3), time)
            model(video, t, t, text, PARTITION[:2], kv_cache=cache, kv_cache_flag={"is_cache_step": True})
        results.append(query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text))
    assert torch.equal(*results)


def test_a_step_may_run_under_another_prompt_than_the_prefill() -> None:
    """Both prompts stay known: going back and forth encodes nothing again."""
    model, texts, video = far_model(), [prompt(1), prompt(7)], noise(3)
    cache = new_cache(model)
    model.prefill(cache, video, PARTITION[:2], texts[0])
    with counted(model) as counts:
        for _ in range(2):
            for text in texts:
                query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text)
        model.prefill(cache, video, PARTITION[:2], texts[0])
    assert counts["tokens"] == [[FULL] * 4] * 3


# failures half-way


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("immutable", [False, True], ids=["in place", "immutable"])
@pytest.mark.parametrize("layer", [0, 2])
def test_a_prefill_that_raised_can_be_repeated(layer: int, immutable: bool) -> None:
    model, text, video = far_model(), prompt(), noise(7)
    cache = new_cache(model, immutable=immutable)
    model.prefill(cache, video[:, :4], PARTITION[:3], text)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    hook = model.blocks[layer].register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        model.prefill(cache, video, PARTITION[:4], text)
    hook.remove()
    model.prefill(cache, video, PARTITION[:4], text)
    fresh = new_cache(model)
    model.prefill(fresh, video, PARTITION[:4], text)
    got, want = (query(model, c, noise(2, 5), STEPS[0], PARTITION[:5], text) for c in (cache, fresh))
    assert relative_error(got, want) < FP32_TOLERANCE


def test_a_prefill_that_raised_leaves_no_half_context() -> None:
    """A step right after it encodes the context first, or says that it is missing; it never reads half-written keys."""
    model, text, video = far_model(), prompt(), noise(7)
    cache = new_cache(model)
    model.prefill(cache, video[:, :4], PARTITION[:3], text)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        model.prefill(cache, video, PARTITION[:4], text)
    hook.remove()
    fresh = new_cache(model)
    model.prefill(fresh, video, PARTITION[:4], text)
    got, want = (query(model, c, noise(2, 5), STEPS[0], PARTITION[:5], text) for c in (cache, fresh))
    assert relative_error(got, want) < FP32_TOLERANCE


def test_a_step_that_raised_can_be_repeated() -> None:
    model, text = far_model(), prompt()
    cache = new_cache(model)
    model.prefill(cache, noise(3), PARTITION[:2], text)
    want = query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text)

    def interrupt(*_: Any) -> None:
        raise Interrupted

    hook = model.blocks[1].register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupted):
        query(model, cache, noise(1, 6), STEPS[0], PARTITION[:3], text)
    hook.remove()
    assert torch.equal(query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text), want)


@pytest.mark.parametrize("immutable", [False, True], ids=["growing", "immutable"])
def test_running_out_of_memory_leaves_the_cache_usable(immutable: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocation of the second block's slab fails once; the same call then succeeds."""
    model, text, video = far_model(), prompt(), noise(7)
    cache = new_cache(model, PARTITION if immutable else PARTITION[:1], immutable=immutable)
    calls, real = 0, torch.empty

    def failing_empty(*args: Any, **kwargs: Any) -> Tensor:
        nonlocal calls
        calls += len(args) == 5  # a pair of slabs
        if calls == 2:
            raise MemoryError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(cache_module.torch, "empty", failing_empty)
    with pytest.raises(MemoryError):
        model.prefill(cache, video, PARTITION[:4], text)
    monkeypatch.undo()
    model.prefill(cache, video, PARTITION[:4], text)
    fresh = new_cache(model)
    model.prefill(fresh, video, PARTITION[:4], text)
    got, want = (query(model, c, noise(2, 5), STEPS[0], PARTITION[:5], text) for c in (cache, fresh))
    assert torch.equal(got, want)


def test_a_refused_context_changes_nothing() -> None:
    model, text, video = far_model(), prompt(), noise(3)
    cache = new_cache(model)
    model.prefill(cache, video, PARTITION[:2], text)
    want = query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text)
    with pytest.raises(ValueError, match="hidden_states"):
        model.prefill(cache, noise(9), PARTITION[:2], text)
    assert torch.equal(query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text), want)


# bad input


def wrong_calls(model: Any, cache: FarCache) -> dict[str, tuple[str, Callable[[], Any]]]:
    """Calls on a cache of batch 2 that holds chunks [1, 2], and the argument each error must name."""
    text, times, done = prompt(), STEPS[0], PARTITION[:3]
    zeros = torch.zeros(2, 1)

    def step(x: Tensor, t: Tensor, **more: Any) -> Any:
        return model(x, t, t, text, done, kv_cache=cache, **more)

    return {
        "batch": ("hidden_states", lambda: query(model, cache, noise(1, batch=1), times, done, prompt(batch=1))),
        "frames": ("hidden_states", lambda: query(model, cache, noise(2), times, done, text)),
        "size": ("hidden_states", lambda: query(model, cache, noise(1)[..., :8], times, done, text)),
        "channels": ("hidden_states", lambda: query(model, cache, noise(1)[:, :, :3], times, done, text)),
        "times": ("timestep", lambda: step(noise(1), torch.zeros(2, 2))),
        "target times": ("r_timestep", lambda: model(noise(1), zeros, zeros[:1], text, done, kv_cache=cache)),
        "too many chunks": ("chunk_partition", lambda: query(model, cache, noise(3), times, PARTITION[:4], text)),
        "other chunks": ("chunk_partition", lambda: query(model, cache, noise(1), times, [2, 1, 1], text)),
        "no chunks": ("chunk_partition", lambda: query(model, cache, noise(1), times, [], text)),
        "clean copy": ("clean_hidden_states", lambda: step(noise(1), zeros, clean_hidden_states=noise(1))),
        "text batch": ("encoder_hidden_states", lambda: query(model, cache, noise(1), times, done, prompt(batch=1))),
        "text width": ("encoder_hidden_states", lambda: query(model, cache, noise(1), times, done, text[..., :5])),
        "image": (
            "encoder_hidden_states_image",
            lambda: step(noise(1), zeros, encoder_hidden_states_image=torch.ones(2, 3, 4)),
        ),
        "prefill frames": ("hidden_states|latents", lambda: model.prefill(cache, noise(2), done, text)),
        "prefill batch": (
            "hidden_states|latents",
            lambda: model.prefill(cache, noise(4, batch=1), done, prompt(batch=1)),
        ),
        "prefill dimensions": ("hidden_states|latents", lambda: model.prefill(cache, noise(4)[0], done, text)),
        "prefill chunks": ("chunk_partition", lambda: model.prefill(cache, noise(0), [], text)),
        "prefill text batch": ("encoder_hidden_states", lambda: model.prefill(cache, noise(4), done, prompt(batch=3))),
        "prefill text width": ("encoder_hidden_states", lambda: model.prefill(cache, noise(4), done, text[..., :5])),
        "not a cache": ("kv_cache", lambda: model(noise(1), zeros, zeros, text, [1], kv_cache=[1])),
        "unknown dict": ("kv_cache", lambda: model(noise(1), zeros, zeros, text, [1], kv_cache={0: {"k": 1}})),
        "cache of another model": (
            "kv_cache|cache",
            lambda: query(model, new_cache(far_model(num_layers=2)), noise(1), times, [1], text),
        ),
        "cache of other heads": (
            "kv_cache|cache",
            lambda: query(model, new_cache(far_model(num_attention_heads=1)), noise(1), times, [1], text),
        ),
        "batch size": ("batch_size", lambda: FarCache.for_model(model, PARTITION, HEIGHT, WIDTH, batch_size=0)),
        "empty partition": ("chunk_partition", lambda: FarCache.for_model(model, [], HEIGHT, WIDTH)),
        "height": ("height", lambda: FarCache.for_model(model, PARTITION, 0, WIDTH)),
    }


@pytest.mark.parametrize("name", wrong_calls(None, None))  # type: ignore[arg-type]
def test_bad_argument_is_named(name: str) -> None:
    """Before any work: the cache still serves the next step."""
    model, text = far_model(), prompt()
    cache = new_cache(model)
    model.prefill(cache, noise(3), PARTITION[:2], text)
    want = query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text)
    argument, call = wrong_calls(model, cache)[name]
    with pytest.raises((ValueError, TypeError), match=rf"^({argument}): got .*expected"):
        call()
    assert torch.equal(query(model, cache, noise(1, 5), STEPS[0], PARTITION[:3], text), want)
