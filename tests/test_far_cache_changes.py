"""FarCache when something is wrong: changed context, a prefill or step that raised, arguments that do not fit.

Witness: a fresh cache that is given the same chunks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import FarCache
from anyflow_runtime.models import workspaces

from .far_rollouts import (
    FULL,
    HEIGHT,
    PARTITION,
    STEPS,
    WIDTH,
    counted,
    far_model,
    new_cache,
    noise,
    prompt,
    query,
)
from .parity import FP32_TOLERANCE, relative_error

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


@pytest.mark.parametrize("change", ["nothing", "in place", "another tensor", "times"])
def test_chunks_that_are_the_same_tensors_are_known_without_being_read(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To compare values the host would wait for a GPU; what was written into a chunk is noticed all the same."""
    model, text, compared = far_model(), prompt(), []
    equal = torch.equal
    monkeypatch.setattr(torch, "equal", lambda a, b: (compared.append(a.ndim), equal(a, b))[1])
    cache, fresh = new_cache(model), new_cache(model)
    # Copies: views of one tensor share its count of changes.
    chunks = [chunk.clone() for chunk in noise(3).split(PARTITION[:2], dim=1)]
    time = torch.zeros(2, 3)
    model.prefill(cache, chunks[:1], PARTITION[:1], text, timestep=time[:, :1])
    if change == "in place":
        chunks[0] += 1
    if change == "another tensor":
        chunks[0] = chunks[0].clone()
    if change == "times":
        time = time + 200
    model.prefill(cache, chunks, PARTITION[:2], text, timestep=time)
    assert (5 in compared) is (change in ("in place", "another tensor"))
    model.prefill(fresh, torch.cat(chunks, dim=1), PARTITION[:2], text, timestep=time)
    used = cache.layout("inference", PARTITION[:3]).cache_offset
    for kept, new in zip(cache.slabs, fresh.slabs, strict=True):
        for a, b in zip(kept, new, strict=True):
            torch.testing.assert_close(a[:, :used], b[:, :used])


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

    monkeypatch.setattr(workspaces.torch, "empty", failing_empty)
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
