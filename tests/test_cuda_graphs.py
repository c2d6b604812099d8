"""When a step is captured and what a replay may depend on.

A recorder stands in for CUDA: it re-runs the step on the captured buffers, so a replay that misses a changed prompt,
slab or input gives a wrong result here as it would there.
"""

from __future__ import annotations

import copy
import pickle
import weakref
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from anyflow_kernels import AttentionPlan
from anyflow_kernels.triton_ops.tile_schedule import encode, query_schedule
from anyflow_runtime import FarCache
from anyflow_runtime.models import cuda_graphs
from anyflow_runtime.models.cuda_graphs import StepGraphs
from anyflow_runtime.models.far import AnyFlowFARTransformer3DModel

from .tiny import tiny_model


def record(step: Any, inputs: tuple[torch.Tensor, ...], pool: Any) -> tuple[Any, torch.Tensor]:
    output = torch.full_like(step(*inputs), torch.nan)
    return lambda: output.copy_(step(*inputs)), output


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """Steps are captured only where no gradient is wanted: with one, each query makes its prompt's keys anew."""
    with torch.no_grad():
        yield


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> AnyFlowFARTransformer3DModel:
    monkeypatch.setattr(AnyFlowFARTransformer3DModel, "captures", lambda self, device: self.cuda_graphs)
    monkeypatch.setattr(cuda_graphs, "capture_cuda", record)
    return tiny_model()


def rollout(model: Any, text: torch.Tensor, graphs: bool, steps: int = 4, height: int = 8, fail_at: int = -1) -> Any:
    model.cuda_graphs = graphs
    partition, batch = [1, 2, 2], text.shape[0]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, 5, 4, height, 8, generator=generator)
    cache = FarCache.for_model(model, partition, height, 8, batch)
    count = 0
    for i, frames in enumerate(partition):
        start = sum(partition[:i])
        x = noise[:, start : start + frames]
        for k in range(steps):
            count += 1
            if count == fail_at:
                raise KeyboardInterrupt
            t, r = (torch.full((batch, frames), 1000.0 * (1 - j / steps)) for j in (k, k + 1))
            u = model(x, t, r, text, partition[: i + 1], kv_cache=cache, return_dict=False)[0]
            x = x - u / steps
        noise[:, start : start + frames] = x
        model.prefill(cache, noise[:, : start + frames], partition[: i + 1], text)
    return noise, cache.graphs


def test_replayed_rollout_equals_the_eager_one(model: Any) -> None:
    text = torch.randn(1, 5, 8)
    eager, _ = rollout(model, text, graphs=False)
    replayed, graphs = rollout(model, text, graphs=True)
    assert torch.equal(replayed, eager)
    assert (graphs.captures, graphs.replays) == (3, 9)  # per chunk: one eager step, one capture, three replays


def test_one_step_per_chunk_is_captured_by_the_second_rollout(model: Any) -> None:
    text = torch.randn(1, 5, 8)
    eager, _ = rollout(model, text, graphs=False, steps=1)
    for counts in ((0, 0), (3, 3), (3, 6)):
        replayed, graphs = rollout(model, text, graphs=True, steps=1)
        assert torch.equal(replayed, eager) and (graphs.captures, graphs.replays) == counts


def test_later_rollouts_replay_what_the_first_captured(model: Any) -> None:
    """Under any prompt: its keys are copied to where the captured steps read them."""
    for rollouts in (1, 2, 3):
        text = torch.randn(1, 5, 8)
        eager, _ = rollout(model, text, graphs=False)
        replayed, graphs = rollout(model, text, graphs=True)
        assert torch.equal(replayed, eager)
        assert (graphs.captures, graphs.replays) == (3, 9 + 12 * (rollouts - 1))


def test_rollouts_at_the_same_time_share_nothing(model: Any) -> None:
    model.cuda_graphs = True
    first = FarCache.for_model(model, [2, 2], 8, 8)
    second = FarCache.for_model(model, [2, 2], 8, 8)
    assert first.slabs[0][0].data_ptr() != second.slabs[0][0].data_ptr() and first.graphs is not second.graphs


def test_no_memory_waits_while_another_rollout_is_under_way(model: Any) -> None:
    """A loop that makes the next cache before it drops the last must not hold a third one."""
    model.cuda_graphs = True
    x, time, text = torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    for _ in range(3):
        cache = FarCache.for_model(model, [1], 8, 8)
        model(x, time, time, text, [1], kv_cache=cache)
        assert not model.idle_workspaces._idle
    del cache
    assert len(model.idle_workspaces._idle) == 1


@pytest.mark.parametrize("change", ["nothing", "weights", "size", "batch", "released", "graphs off", "inference mode"])
def test_memory_is_left_only_to_a_rollout_it_fits(model: Any, change: str) -> None:
    """A graph over weights or slabs that have gone would read freed memory."""
    text = torch.randn(1, 5, 8)
    rollout(model, text, graphs=True)
    (idle,) = model.idle_workspaces._idle
    model.cuda_graphs = change != "graphs off"
    if change == "weights":
        weight = model.blocks[1].ffn.net[2].weight
        weight.data = weight.detach().clone()
    if change == "released":
        model.release_memory()
    height, batch = 12 if change == "size" else 8, 2 if change == "batch" else 1
    with torch.inference_mode(change == "inference mode"):
        cache = FarCache.for_model(model, [1, 2, 2], height, 8, batch)
    assert (cache.workspace is idle) is (change == "nothing")


def test_a_larger_slab_forgets_what_was_captured_over_the_old_one(model: Any) -> None:
    model.cuda_graphs = True
    cache = FarCache.for_model(model, [1], 8, 8)
    x, time, text = torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    for _ in range(3):
        model(x, time, time, text, [1], kv_cache=cache)
    assert cache.graphs.captures == 1
    model.prefill(cache, x, [1], text)
    model(x, time, time, text, [1, 1], kv_cache=cache)
    assert len(cache.graphs) == 1  # the step over the new slabs
    del cache
    assert not model.idle_workspaces._idle


def test_a_copied_model_keeps_no_memory_of_the_original(model: Any) -> None:
    rollout(model, torch.randn(1, 5, 8), graphs=True)
    assert not copy.deepcopy(model).idle_workspaces._idle
    assert not pickle.loads(pickle.dumps(model.idle_workspaces))._idle


def test_another_number_of_prompt_tokens_is_another_graph(model: Any) -> None:
    for tokens in (5, 9, 5):
        text = torch.randn(1, tokens, 8)
        eager, _ = rollout(model, text, graphs=False)
        assert torch.equal(rollout(model, text, graphs=True)[0], eager)


def test_other_prompts_and_sizes_are_other_graphs(model: Any) -> None:
    texts = [torch.randn(1, 5, 8), torch.randn(1, 5, 8), torch.randn(2, 7, 8)]
    for text, height in zip(texts, (8, 8, 12), strict=True):
        eager, _ = rollout(model, text, graphs=False, height=height)
        assert torch.equal(rollout(model, text, graphs=True, height=height)[0], eager)


def test_a_prompt_changed_within_a_chunk_is_seen(model: Any) -> None:
    model.cuda_graphs = True
    cache = FarCache.for_model(model, [2], 8, 8)
    x, time = torch.randn(1, 2, 4, 8, 8), torch.full((1, 2), 500.0)
    texts = [torch.randn(1, 5, 8) for _ in range(2)]
    eager = [model(x, time, time, text, [2], kv_cache=FarCache.for_model(model, [2], 8, 8)).sample for text in texts]
    for text, want in [*zip(texts, eager, strict=True)] * 3:
        assert torch.equal(model(x, time, time, text, [2], kv_cache=cache).sample, want)
    assert cache.graphs.captures == 1


def test_usable_after_an_exception(model: Any) -> None:
    text = torch.randn(1, 5, 8)
    eager, _ = rollout(model, text, graphs=False)
    with pytest.raises(KeyboardInterrupt):
        rollout(model, text, graphs=True, fail_at=7)
    assert torch.equal(rollout(model, text, graphs=True)[0], eager)


def test_a_failed_capture_leaves_nothing() -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("capture failed")

    graphs, x = StepGraphs(fail), torch.ones(2)
    assert torch.equal(graphs.run("key", lambda x: x + 1, x), x + 1)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="capture failed"):
            graphs.run("key", lambda x: x + 1, x)
    assert graphs.captures == 0


def test_a_result_survives_the_next_replay() -> None:
    graphs = StepGraphs(record)
    results = [graphs.run("key", lambda x: 2 * x, torch.full((2,), float(i))) for i in range(4)]
    assert [r[0].item() for r in results] == [0.0, 2.0, 4.0, 6.0]


def test_a_captured_step_keeps_the_tables_its_kernels_read() -> None:
    """The cache of schedules is bounded: what it drops, a replay may still read."""
    graphs, x, ranges = StepGraphs(record), torch.ones(2), tuple(encode(AttentionPlan.dense(37, 41).ranges))

    def step(x: torch.Tensor) -> torch.Tensor:
        query_schedule(ranges, 2, 16, 16, 7, None, 0, torch.device("cpu"))
        return x

    for _ in range(2):
        graphs.run("key", step, x)
    table = weakref.ref(query_schedule(ranges, 2, 16, 16, 7, None, 0, torch.device("cpu")).items)
    query_schedule.__wrapped__.cache_clear()
    assert table() is not None
    graphs.clear()
    assert table() is None


def test_a_moved_model_keeps_no_memory(model: Any) -> None:
    rollout(model, torch.randn(1, 5, 8), graphs=True)
    assert not model.to(torch.float64).idle_workspaces._idle


def test_weights_that_went_and_came_back_are_captured_anew(model: Any) -> None:
    """In the middle of a rollout, as offloading moves them, and even to where the first of them has been."""
    model.cuda_graphs = True
    cache = FarCache.for_model(model, [1], 8, 8)
    x, time, text = torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    for moved, captures in ((False, 0), (False, 1), (False, 1), (True, 1), (False, 2)):
        if moved:
            model._apply(lambda weight: weight)
        model(x, time, time, text, [1], kv_cache=cache)
        assert cache.graphs.captures == captures


def test_finished_chunks_are_forgotten() -> None:
    """An endless rollout meets a new key per chunk: graphs may not pile up."""
    graphs, x = StepGraphs(record), torch.ones(2)
    for chunk in range(40):
        for _ in range(3):
            assert torch.equal(graphs.run(chunk, lambda x, c=chunk: x + c, x), x + chunk)
    assert len(graphs) == StepGraphs.KEPT and graphs.captures == 40


@pytest.mark.parametrize("obstacle", ["nothing", "switched off", "cpu", "gradients", "adapter", "offloaded", "hooked"])
def test_captured_only_where_weights_stay(obstacle: str) -> None:
    """A replay reads the addresses it was captured with: weights that change or move between steps rule it out."""
    model = tiny_model()
    latents: Any = SimpleNamespace(device=torch.device("cpu" if obstacle == "cpu" else "cuda"))
    model.cuda_graphs = obstacle != "switched off"
    if obstacle == "adapter":
        model.peft_config = {"default": object()}
    if obstacle == "offloaded":
        model.patch_embedding.to("meta")
    if obstacle == "hooked":
        model.blocks[1]._hf_hook = object()
    with torch.set_grad_enabled(obstacle == "gradients"):
        assert model._may_capture(latents) is (obstacle == "nothing")


@pytest.mark.gpu
def test_replayed_rollout_equals_the_eager_one_on_cuda() -> None:
    model = tiny_model(backend="auto").cuda().to(torch.bfloat16)
    text = torch.randn(1, 5, 8, device="cuda", dtype=torch.bfloat16)
    noise = torch.randn(1, 2, 4, 8, 8, device="cuda", dtype=torch.bfloat16)
    time = torch.full((1, 2), 500.0, device="cuda")
    outputs = []
    for graphs in (False, True, True):  # the third replays what the second has captured
        model.cuda_graphs = graphs
        cache = FarCache.for_model(model, [2], 8, 8)
        outputs.append([model(noise * k, time, time, text, [2], kv_cache=cache).sample for k in (1, 2, 3)])
        counts = cache.graphs.captures, cache.graphs.replays
        del cache  # before the next one is made, which takes its memory over
    assert counts == (1, 5)
    for eager, *replayed in zip(*outputs, strict=True):
        assert all(torch.equal(eager, other) for other in replayed)
