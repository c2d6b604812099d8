"""Context parallelism: two gloo processes against one. The same code runs on NCCL.

All that needs two processes runs in one pair of them; the tests compare what they left with one process.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from anyflow_kernels import AttentionPlan, FarLayout, load_ops
from anyflow_runtime import FarCache
from anyflow_runtime.cli import main
from anyflow_runtime.models.token_shards import HeldKeys, TokenShards, pieces
from anyflow_runtime.parallel import context_parallel
from anyflow_runtime.parallel.attention import merge
from anyflow_runtime.schedulers import FlowMapEulerSchedulerConfig
from anyflow_runtime.streaming import (
    AnyFlowFARStream,
    AnyFlowFARStreamConfig,
    DiffusionModelConfig,
    StreamInferencePipeline,
    StreamInferencePipelineConfig,
    stream,
)

from .parity import FP32_TOLERANCE, reference_cache, relative_error
from .tiny import tiny_model

WORLD = 2
SIDE = 14  # of the latents: 49 tokens in a full frame, 9 in a compressed one, so that no share is whole frames
PARTITION = [1, 2, 1, 2, 1]
VIDEO = ["a cat", "--size", "32x48", "--frames", "13", "--steps", "2", "--seed", "7", "--device", "cpu"]


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def build(heads: int, causal: bool = True, **options: Any) -> Any:
    options |= {"full_chunk_limit": 2} if causal else {}
    return tiny_model(causal, seed=heads, num_attention_heads=heads, **options)


def query(model: Any, cache: Any, x: Tensor, times: tuple[float, float], partition: list[int], **options: Any) -> Any:
    t, r = (torch.full(x.shape[:2], time) for time in times)
    return model(x, t, r, random(x.shape[0], 5, 8, seed=1), partition, kv_cache=cache, **options).sample


@torch.no_grad()
def rollout(model: Any, partition: list[int] = PARTITION) -> dict[str, Tensor]:
    """A video in two steps per chunk, each chunk the context of the later ones; and the size of the cache."""
    cache = FarCache.for_model(model, partition, SIDE, SIDE, batch_size=2)
    size = cache.nbytes
    chunks: list[Tensor] = []
    for i, x in enumerate(random(2, sum(partition), 4, SIDE, SIDE, seed=2).split(partition, dim=1)):
        for t, r in ((1000.0, 700.0), (700.0, 0.0)):
            x = x - (t - r) / 1000 * query(model, cache, x, (t, r), partition[: i + 1])
        chunks.append(x)
        if i + 1 < len(partition):
            model.prefill(cache, torch.cat(chunks, dim=1), partition[: i + 1], random(2, 5, 8, seed=1))
    assert cache.nbytes == size, "the cache grew"
    return {"video": torch.cat(chunks, dim=1), "bytes": torch.tensor(float(size))}


@torch.no_grad()
def given_context(model: Any) -> dict[str, Tensor]:
    """The velocity after four chunks encoded at once, and after the cache went back to other, fewer chunks."""
    cache = FarCache.for_model(model, PARTITION, SIDE, SIDE, batch_size=1)
    text, result = random(1, 5, 8, seed=1), {}
    for name, count, seed in (("four chunks", 4, 3), ("two others", 2, 4), ("three of these", 3, 4)):
        frames = sum(PARTITION[:count])
        context = random(1, 6, 4, SIDE, SIDE, seed=seed)[:, :frames]
        model.prefill(cache, context, PARTITION[:count], text)
        newest = random(1, PARTITION[count], 4, SIDE, SIDE, seed=5)
        result[name] = query(model, cache, newest, (900.0, 300.0), PARTITION[: count + 1])
    return result


@torch.no_grad()
def reference_dicts(model: Any) -> dict[str, Tensor]:
    """The protocol of the diffusers pipeline."""
    cache = reference_cache(model.config, PARTITION[:3], 1, SIDE, SIDE)
    context = random(1, 3, 4, SIDE, SIDE, seed=3)
    query(model, cache, context, (0.0, 0.0), PARTITION[:2], kv_cache_flag={"is_cache_step": True})
    flag = {"num_cached_chunks": 2, "is_cache_step": False}
    x = random(1, 1, 4, SIDE, SIDE, seed=5)
    return {"velocity": query(model, cache, x, (900.0, 300.0), PARTITION[:3], kv_cache_flag=flag)}


@torch.no_grad()
def bidirectional(model: Any) -> dict[str, Tensor]:
    x, t = random(2, 3, 4, SIDE, SIDE, seed=2), torch.tensor([[0.0, 500.0, 900.0], [10.0, 20.0, 30.0]])
    return {"velocity": model(x.to(model.dtype), t, t / 2, random(2, 5, 8, seed=1).to(model.dtype)).sample}


def pipeline(model: Any) -> StreamInferencePipeline:
    config = AnyFlowFARStreamConfig(height=SIDE, width=SIDE)
    scheduler = FlowMapEulerSchedulerConfig(num_inference_steps=2)
    diffusion = DiffusionModelConfig(transformer=config, scheduler=scheduler)
    return StreamInferencePipeline(
        StreamInferencePipelineConfig(name="test", diffusion_model=diffusion),
        transformer=AnyFlowFARStream(config, model),
    )


def streamed(model: Any) -> dict[str, Tensor]:
    """Noise of a seed, drawn per chunk; guidance."""
    prompts = {"prompt": random(1, 5, 8, seed=1), "negative_prompt": random(1, 5, 8, seed=2), "guidance_scale": 3.0}
    parts = stream(pipeline(model), **prompts, chunk_partition=(1, 2, 1), seed=3)
    return {"video": torch.cat(list(parts), dim=1)}


CASES: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, Tensor]], str]] = {
    "ulysses rollout": (lambda: build(2), rollout, "auto"),
    "ring rollout": (lambda: build(3), rollout, "auto"),
    "ring where heads divide": (lambda: build(2), given_context, "ring"),
    "ulysses given context": (lambda: build(2), given_context, "ulysses"),
    "ring given context": (lambda: build(3), given_context, "ring"),
    "ulysses phantom keys": (lambda: build(2, phantom_padding=True), given_context, "auto"),
    "ring phantom keys": (lambda: build(3, phantom_padding=True), given_context, "auto"),
    "ulysses reference dicts": (lambda: build(2), reference_dicts, "auto"),
    "ring reference dicts": (lambda: build(3), reference_dicts, "auto"),
    "ulysses bidirectional": (lambda: build(2, causal=False), bidirectional, "auto"),
    "ring bidirectional": (lambda: build(3, causal=False), bidirectional, "auto"),
    "ring bidirectional fp64": (lambda: build(3, causal=False).double(), bidirectional, "auto"),
    "ulysses stream": (lambda: build(2), streamed, "auto"),
    "trainable weights under no_grad": (lambda: build(2).requires_grad_(True), given_context, "auto"),
}


def message(call: Callable[[], Any]) -> str:
    try:
        call()
    except (ValueError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def refusals(mesh: DeviceMesh) -> dict[str, str]:
    """What must not run, with what is said of it."""
    far, cache = build(2), FarCache.for_model(build(2), PARTITION, SIDE, SIDE)
    context_parallel(far, mesh)
    trained = context_parallel(build(2, causal=False).requires_grad_(True), mesh)
    x, t = random(1, 1, 4, SIDE, SIDE, seed=2), torch.zeros(1, 1)
    small = random(1, 1, 4, 2, 2, seed=2)  # a single token
    text = random(1, 5, 8, seed=1)
    written = {0: {"full_cache": torch.zeros(2, 1, 2, 98, 16), "compressed_cache": torch.zeros(2, 1, 2, 9, 16)}}
    flag = {"num_cached_chunks": 1, "is_cache_step": False}
    return {
        "ulysses with odd heads": message(lambda: context_parallel(build(3), mesh, "ulysses")),
        "unknown mode": message(lambda: context_parallel(build(2), mesh, "both")),
        "no model": message(lambda: context_parallel(torch.nn.Linear(1, 1), mesh)),
        "two dimensions": message(
            lambda: context_parallel(build(2), init_device_mesh("cpu", (1, 2), mesh_dim_names=("a", "b")))
        ),
        "training path": message(lambda: far(x, t, t, text, [1])),
        "gradients": message(lambda: trained(x, t, t, text)),
        "gradient of the input": message(lambda: far(x.requires_grad_(), t, t, text, [1], kv_cache=cache)),
        "cache of one process": message(lambda: query(far, cache, x.detach(), (1.0, 0.0), [1])),
        "keys of diffusers": message(lambda: query(far, written, x.detach(), (1.0, 0.0), [1, 1], kv_cache_flag=flag)),
        "one token": message(lambda: bidirectional_of(context_parallel(build(2, causal=False), mesh), small)),
        "no seed": message(lambda: next(stream(pipeline(far), text, chunk_partition=(1,)))),
    }


@torch.no_grad()
def bidirectional_of(model: Any, x: Tensor) -> Tensor:
    t = torch.zeros(x.shape[:2])
    return model(x, t, t, random(1, 5, 8, seed=1)).sample


REFUSALS = {
    "ulysses with odd heads": "mode: got 'ulysses' for 3 heads on 2 processes, expected 'ring' or 'auto'",
    "unknown mode": "mode: got 'both'",
    "no model": "TypeError: model: got Linear",
    "two dimensions": "mesh: got shape (1, 2), expected one dimension",
    "training path": "kv_cache: got None on 2 processes",
    "gradients": "got gradients enabled on 2 processes",
    "gradient of the input": "got gradients enabled on 2 processes",
    "cache of one process": "kv_cache: got one made for one process",
    "keys of diffusers": "kv_cache: got keys of a diffusers model on several processes",
    "one token": "tokens: got 1 for 2 processes",
    "no seed": "seed: got None on 2 processes",
}


def generate(models: Path, name: str, out: Path, *arguments: str) -> int:
    latents = ["--save-latents", str(out.with_suffix(".safetensors")), "--stats", str(out.with_suffix(".json"))]
    return main(["generate", "--model", str(models / name), "--out", str(out), *VIDEO, *latents, *arguments])


COMMANDS = {"far": ["--chunks", "1,2,1"], "far ring": ["--chunks", "1,2,1", "--context-parallel", "ring"]} | {
    "bidirectional": []
}


def worker(rank: int, directory: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=WORLD)
    try:
        mesh = init_device_mesh("cpu", (WORLD,))
        # A group of its own, whose order the mesh does not follow: nothing may take a global rank for a rank of it.
        swapped = DeviceMesh("cpu", [1, 0])
        results: dict[str, Any] = {}
        for i, (name, (make, run, mode)) in enumerate(CASES.items()):
            results[name] = run(context_parallel(make(), swapped if i % 2 else mesh, mode))
        results["refusals"] = refusals(mesh)
        torch.save(results, f"{directory}/{rank}.pt")
        os.environ |= {"WORLD_SIZE": str(WORLD), "RANK": str(rank), "LOCAL_RANK": str(rank)}
        folder = Path(directory, str(rank))  # one per process, to see who writes
        folder.mkdir()
        for name, arguments in COMMANDS.items():
            assert generate(Path(directory), name.split()[0], folder / f"{name}.gif", *arguments) == 0
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left: `RANK.pt`, and videos in folders `RANK`."""
    pytest.importorskip("diffusers")
    pytest.importorskip("av")
    from bench.tiny_pipeline import tiny_pipeline

    root = tmp_path_factory.mktemp("gloo")
    for name, causal in (("far", True), ("bidirectional", False)):
        tiny_pipeline(causal, heads=2, head_dim=16, layers=1, text_dim=16, vae_dim=4).save_pretrained(root / name)
    # Forked: to import everything again in two processes would take longer than all the rest.
    mp.start_processes(worker, args=(str(root),), nprocs=WORLD, start_method="fork")
    return root


@pytest.fixture(scope="module")
def results(directory: Path) -> list[dict[str, Any]]:
    """By process."""
    return [torch.load(directory / f"{rank}.pt") for rank in range(WORLD)]


@pytest.mark.parametrize("name", CASES)
def test_two_processes_make_what_one_does(name, results):
    make, run, _ = CASES[name]
    expected = run(make())
    for rank in range(WORLD):
        for key in expected.keys() - {"bytes"}:
            assert relative_error(results[rank][name][key], expected[key]) < FP32_TOLERANCE, key


@pytest.mark.parametrize("name", CASES)
def test_all_processes_get_the_same_bits(name, results):
    """Else their latents would drift apart from step to step."""
    for key, value in results[0][name].items():
        assert key == "bytes" or torch.equal(value, results[1][name][key]), key


def test_each_process_holds_its_part_of_the_cache(results):
    whole = {heads: float(rollout(build(heads))["bytes"]) for heads in (2, 3)}
    for rank in range(WORLD):
        assert results[rank]["ulysses rollout"]["bytes"] == whole[2] / 2
        assert results[rank]["ring rollout"]["bytes"] < 0.55 * whole[3]  # odd segments are rounded up


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(name, results):
    for rank in range(WORLD):
        assert REFUSALS[name] in results[rank]["refusals"][name]


@pytest.mark.parametrize("name", COMMANDS)
def test_generate_under_torchrun_makes_the_video_of_one_process(name, directory, tmp_path):
    arguments = [a for a in COMMANDS[name] if a not in ("--context-parallel", "ring")]
    assert generate(directory, name.split()[0], tmp_path / "one.gif", *arguments) == 0
    one = load_file(tmp_path / "one.safetensors")["latents"]
    two = load_file(directory / "0" / f"{name}.safetensors")["latents"]
    assert relative_error(two, one) < FP32_TOLERANCE
    assert (directory / "0" / f"{name}.gif").stat().st_size > 0
    assert '"processes": 2' in (directory / "0" / f"{name}.json").read_text()


def test_only_the_first_process_writes(directory):
    assert len(list((directory / "0").iterdir())) == 3 * len(COMMANDS)
    assert not list((directory / "1").iterdir())


def test_a_gpu_named_to_several_processes_is_refused(directory, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert generate(directory, "far", tmp_path / "o.gif", "--device", "cuda:1") == 2
    assert "--device: got 'cuda:1' for 2 processes" in capfd.readouterr().err


# The integers, and the merge


@pytest.mark.parametrize("world", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("by_run", [False, True])
@pytest.mark.parametrize("frame_map", [((3, 4),), ((5, 0), (3, 7)), ((2, 9), (3, 49), (1, 1))])
def test_shards_cover_every_token_once_with_its_frame(frame_map, by_run, world):
    frame_of = [
        i for i, tokens in enumerate(t for frames, t in frame_map for _ in range(frames)) for _ in range(tokens)
    ]
    shards = TokenShards(frame_map, world, by_run)
    covered = []
    for rank in range(world):
        own = [i for a, b in shards.spans(rank) for i in range(a, b)]
        rows, runs = shards.frames(rank)
        frames = [f for a, b in rows for f in range(a, b)]
        per_frame = [tokens for count, tokens in runs for _ in range(count)]
        assert [f for f, n in zip(frames, per_frame, strict=True) for _ in range(n)] == [frame_of[i] for i in own]
        assert shards.counts[rank] == len(own)
        covered += own
    assert sorted(covered) == list(range(len(frame_of)))
    assert max(shards.counts) - min(shards.counts) <= (len(frame_map) if by_run else 1)
    if not by_run:
        assert covered == sorted(covered)


@pytest.mark.parametrize("frames", [4, 6])
def test_frames_that_divide_stay_whole(frames):
    shards = TokenShards(((frames, 7),), 2, by_run=False)
    assert shards.frames(0) == (((0, frames // 2),), ((frames // 2, 7),))


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("cached", [0, 2])
def test_pieces_of_all_processes_merge_to_the_whole_attention(world, cached):
    """Causal queries after a context of two chunks that came one by one; every key in exactly one piece."""
    ops = load_ops("torch")
    layout = FarLayout((1, 2, 1, 2), SIDE, SIDE, full_chunk_limit=2, mode="prefill", cached=cached)
    plan = AttentionPlan.from_layout(layout)
    q = random(1, plan.num_queries, 3, 16, seed=0)
    k, v = random(2, 1, plan.num_keys, 3, 16, seed=1)
    held, before = HeldKeys.none(world), 0
    for segment in layout.segments:
        if segment.cached:
            held = held.followed_by(TokenShards(((1, segment.tokens),), world, True), before)
            before = segment.end
    shards = TokenShards(layout.frame_map, world, by_run=True)
    held = held.followed_by(shards, layout.cache_offset)
    expected, expected_lse = ops.far_attention(q, k, v, plan, return_lse=True)
    for rank in range(world):
        own = [i for a, b in shards.spans(rank) for i in range(a, b)]
        out, lse = torch.zeros(1, len(own), 3, 16), torch.full((1, 3, len(own)), -torch.inf)
        for owner in range(world):
            keys = [i for a, b in held.spans[owner] for i in range(a, b)]
            for piece in pieces(plan, shards.spans(rank), held, owner):
                rows = slice(piece.start, piece.start + piece.plan.num_queries)
                part = ops.far_attention(q[:, own][:, rows], k[:, keys], v[:, keys], piece.plan, return_lse=True)
                merge(out[:, rows], lse[:, :, rows], *part)
        assert relative_error(out, expected[:, own]) < FP32_TOLERANCE
        assert relative_error(lse, expected_lse[:, :, own]) < FP32_TOLERANCE


def test_held_keys_forget_what_is_overwritten():
    """A cache that went back: a span that was cut keeps its place in the slab."""
    first = HeldKeys.none(2).followed_by(TokenShards(((1, 10),), 2, True), 0)
    assert first.spans == (((0, 5),), ((5, 10),))
    second = first.followed_by(TokenShards(((1, 4),), 2, True), 7)
    assert second.spans == (((0, 5), (7, 9)), ((5, 7), (9, 11)))
    assert second.count(1) == 4 and second.count(1, before=10) == 3


def test_one_process_is_left_as_it_is():
    model = build(2)
    assert context_parallel(model, None) is model and model.parallel is None
