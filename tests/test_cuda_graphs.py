"""When a step is captured and what a replay may depend on.

A recorder stands in for CUDA: it re-runs the step on the captured buffers, so a replay that misses a changed prompt,
slab or input gives a wrong result here as it would there.
"""

from __future__ import annotations

import copy
import pickle
import threading
import weakref
from typing import Any

import pytest
import torch

from anyflow_kernels import AttentionPlan
from anyflow_kernels.triton_ops.tile_schedule import encode, query_schedule
from anyflow_runtime import FarCache
from anyflow_runtime.models import AnyFlowModel, cuda_graphs
from anyflow_runtime.models.cuda_graphs import StepGraphs
from anyflow_runtime.models.far import AnyFlowFARTransformer3DModel

from .tiny import tiny_model


def record(step: Any, inputs: tuple[torch.Tensor, ...], pool: Any) -> tuple[Any, torch.Tensor]:
    result = step(*inputs)
    if result is None:
        return lambda: step(*inputs), None
    output = torch.full_like(result, torch.nan)
    return lambda: output.copy_(step(*inputs)), output


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    """Steps are captured only where no gradient is wanted: with one, each query makes its prompt's keys anew."""
    with torch.no_grad():
        yield


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> AnyFlowFARTransformer3DModel:
    on_cpu(monkeypatch)
    return tiny_model()


def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Capture on this machine, by the recorder; all conditions but the device's are the model's own."""
    captured = AnyFlowModel._captured_weights
    monkeypatch.setattr(AnyFlowModel, "_captured_weights", lambda self, _: captured(self, torch.device("cuda")))
    monkeypatch.setattr(cuda_graphs, "capture_cuda", record)


def rollout(model: Any, text: torch.Tensor, graphs: bool, steps: int = 4, height: int = 8, fail_at: int = -1) -> Any:
    model.cuda_graphs = graphs
    partition, batch = [1, 2, 2], text.shape[0]
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn(batch, 5, 4, height, 8, generator=generator).to(text)
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
    for counts in ((0, 0), (6, 6), (6, 12)):  # a step and a prefill per chunk
        replayed, graphs = rollout(model, text, graphs=True, steps=1)
        assert torch.equal(replayed, eager) and (graphs.captures, graphs.replays) == counts


def test_later_rollouts_replay_what_the_first_captured(model: Any) -> None:
    """Under any prompt: its keys are copied to where the captured steps read them."""
    for rollouts in (1, 2, 3):
        text = torch.randn(1, 5, 8)
        eager, _ = rollout(model, text, graphs=False)
        replayed, graphs = rollout(model, text, graphs=True)
        assert torch.equal(replayed, eager)
        # The steps from the first rollout on, the prefills, one per chunk, from the second on.
        assert (graphs.captures, graphs.replays) == (3 if rollouts == 1 else 6, 9 + 15 * (rollouts - 1))


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
    assert len(cache.graphs) == 1  # the step over the new slabs, and no prefill over the old
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


def moved(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().clone()


MOVES: dict[str, Any] = {
    "the model": lambda model: model._apply(moved),
    "a block": lambda model: model.blocks[1]._apply(moved),
    "a linear": lambda model: model.blocks[1].attn2.to_v.to(torch.float64).to(torch.float32),
    "the data of a bias": lambda model: setattr(model.proj_out.bias, "data", moved(model.proj_out.bias)),
    "a state dict": lambda model: model.load_state_dict(
        {name: moved(weight) for name, weight in model.state_dict().items()}, assign=True
    ),
    "a module": lambda model: setattr(model, "proj_out", copy.deepcopy(model.proj_out)),
}


@pytest.mark.parametrize("move", [None, *MOVES])
def test_weights_that_moved_are_captured_anew(model: Any, move: str | None) -> None:
    """In the middle of a rollout, as offloading moves them: a replay would read freed memory."""
    cache = FarCache.for_model(model, [1], 8, 8)
    before, x, time, text = [], torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    for step, captures in enumerate((0, 1, 1, 1, 2)):
        if step == 3 and move is not None:
            before = [*model.parameters()], [p.data for p in model.parameters()]  # held: none may come back by chance
            MOVES[move](model)
        model(x, time, time, text, [1], kv_cache=cache)
        assert cache.graphs.captures == (captures if move else min(captures, 1))
    del before


def test_weights_changed_in_place_are_seen_by_a_replay(model: Any) -> None:
    """As an optimiser changes them: nothing has moved, so nothing is captured anew."""
    x, time, text = torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    cache = FarCache.for_model(model, [1], 8, 8)
    samples = []
    for step in range(4):
        if step == 3:
            model.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()})
        samples.append(model(x, time, time, text, [1], kv_cache=cache).sample)
    assert cache.graphs.captures == 1 and torch.equal(samples[1], samples[2])
    assert not torch.equal(samples[2], samples[3])


def test_the_bidirectional_model_replays_its_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """At any prompt and time, in later videos too; another size is another graph."""
    on_cpu(monkeypatch)
    model = tiny_model(causal=False)
    for frames in (2, 3):
        calls = [
            (torch.randn(1, frames, 4, 8, 8), torch.full((1, frames), t), torch.zeros(1, frames), torch.randn(1, 5, 8))
            for t in (1000.0, 500.0, 250.0)
        ]
        model.cuda_graphs = False
        eager = [model(*call).sample for call in calls]
        model.cuda_graphs = True
        assert all(torch.equal(model(*call).sample, want) for call, want in zip(calls, eager, strict=True))
    (idle,) = model.idle_workspaces._idle
    assert (idle.graphs.captures, idle.graphs.replays) == (2, 4)


def test_a_call_within_a_call_has_memory_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of another thread: the inputs of the first may not be overwritten before its replay."""
    on_cpu(monkeypatch)
    model = tiny_model(causal=False)
    call = (torch.randn(1, 2, 4, 8, 8), torch.full((1, 2), 500.0), torch.zeros(1, 2), torch.randn(1, 5, 8))
    want = model(*call).sample
    patchify, other = model._patchify, (torch.randn(1, 2, 4, 8, 8), *call[1:])

    def calling(*arguments: Any) -> torch.Tensor:
        model._patchify = patchify
        model(*other)
        return patchify(*arguments)

    for _ in range(3):
        model._patchify = calling
        assert torch.equal(model(*call).sample, want)


def test_finished_chunks_are_forgotten() -> None:
    """An endless rollout meets a new key per chunk: graphs may not pile up."""
    graphs, x = StepGraphs(record), torch.ones(2)
    for chunk in range(40):
        for _ in range(3):
            assert torch.equal(graphs.run(chunk, lambda x, c=chunk: x + c, x), x + chunk)
    assert len(graphs) == StepGraphs.KEPT and graphs.captures == 40


OBSTACLES: dict[str, Any] = {
    "nothing": lambda model: None,
    "hook of the model": lambda model: setattr(model, "_hf_hook", object()),  # it runs outside the step
    "switched off": lambda model: setattr(model, "cuda_graphs", False),
    "adapter": lambda model: setattr(model, "peft_config", {"default": object()}),
    "offloaded": lambda model: model.blocks[1].norm2.to("meta"),
    "offload of a block": lambda model: setattr(model.blocks[1], "_hf_hook", object()),
    "offload of groups": lambda model: setattr(model.blocks[1].ffn.net[2], "_diffusers_hook", object()),
    "cast of a layer": lambda model: setattr(model.proj_out, "_diffusers_hook", object()),
    "forward hook": lambda model: model.blocks[0].attn1.to_q.register_forward_hook(lambda *_: None),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_captured_only_where_weights_stay(obstacle: str) -> None:
    """A replay reads the addresses it was captured with: weights that change or move within a step rule it out, and
    so does what a call does beside the forward."""
    model = tiny_model()
    OBSTACLES[obstacle](model)
    assert model.captures(torch.device("cuda")) is (obstacle in ("nothing", "hook of the model"))
    assert not model.captures(torch.device("cpu"))


def test_nothing_is_captured_where_a_gradient_is_wanted(model: Any) -> None:
    x, time, text = torch.randn(1, 1, 4, 8, 8), torch.full((1, 1), 500.0), torch.randn(1, 5, 8)
    cache = FarCache.for_model(model, [1], 8, 8)
    with torch.enable_grad():
        for _ in range(3):
            model(x, time, time, text, [1], kv_cache=cache)
    assert len(cache.graphs) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
def test_captured_beside_a_thread_that_uses_cuda(causal: bool) -> None:
    """As a program's own: the capture fails neither itself nor the other's copies, which wait for the device."""
    model = tiny_model(causal, backend="auto").cuda().to(torch.bfloat16)
    text = torch.randn(1, 5, 8, device="cuda", dtype=torch.bfloat16)
    done, failures = threading.Event(), []

    def copying() -> None:
        try:
            while not done.is_set():
                torch.ones(8, device="cuda").cpu()
        except RuntimeError as error:
            failures.append(error)

    other = threading.Thread(target=copying)
    other.start()
    try:
        outputs = []
        for _ in range(3):
            if causal:
                outputs.append(rollout(model, text, graphs=True)[0])
            else:
                time = torch.full((1, 2), 500.0)
                noise = torch.ones(1, 2, 4, 8, 8, device="cuda", dtype=torch.bfloat16)
                outputs.append(model(noise, time, time, text).sample)
    finally:
        done.set()
        other.join()
    assert not failures and torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[0], outputs[2])


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
