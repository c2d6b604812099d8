"""Both models against diffusers on every path, and the errors they raise. Witness: diffusers 0.42.1 in fp32."""

from __future__ import annotations

import copy

import pytest
import torch

from anyflow_kernels import Ops, portable
from anyflow_runtime import FarCache

from .parity import FP32_TOLERANCE, model_pair, prompt_inputs, random_config, reference_cache, relative_error

BACKENDS = ["torch", "reference"]
SIZES = [
    (8, 12),
    (10, 14),
    (9, 13),
    (6, 7),
]  # full tokens per frame 24, 35, 24, 9; remainders dropped in both patch sizes


def times(batch: int, frames: int) -> torch.Tensor:
    return torch.rand(batch, frames, dtype=torch.float64) * 1000


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("seed", range(10))
def test_bidirectional_matches_diffusers(seed: int, backend: str) -> None:
    config = random_config(seed, causal=False)
    theirs, mine = model_pair(config, causal=False, seed=seed, backend=backend)
    batch, frames = 1 + seed % 2, 1 + seed % 4
    x = torch.randn(batch, frames, config["in_channels"], 8, 12 - 2 * (seed % 3))
    args = (x, times(batch, frames), times(batch, frames))
    prompt = prompt_inputs(config, batch)
    with torch.no_grad():
        want = theirs(*args, **prompt, return_dict=False)[0]
        got = mine(*args, **prompt).sample
    assert relative_error(got, want) < FP32_TOLERANCE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean"])
@pytest.mark.parametrize("seed", range(10))
def test_far_training_path_matches_diffusers(seed: int, clean: bool, backend: str) -> None:
    config = random_config(seed, causal=True)
    theirs, mine = model_pair(config, causal=True, seed=seed, backend=backend)
    partition = [[1, 2, 1], [2], [1, 2, 2, 1], [1, 1, 1, 1, 2]][seed % 4]
    height, width = SIZES[seed % 4]
    batch, frames = 1 + seed % 2, sum(partition)
    full = sum(partition[-config["full_chunk_limit"] :])
    x = torch.randn(batch, frames, config["in_channels"], height, width)
    extra = (
        {"clean_hidden_states": torch.randn_like(x[:, :full]), "clean_timestep": times(batch, full)} if clean else {}
    )
    kwargs = {**prompt_inputs(config, batch), **extra, "chunk_partition": partition}
    args = (x, times(batch, frames), times(batch, frames))
    with torch.no_grad():
        want = theirs(*args, **kwargs, return_dict=False)[0]
        got = mine(*args, **kwargs, return_dict=False)[0]
    assert relative_error(got, want) < FP32_TOLERANCE


@pytest.mark.parametrize("seed", range(10))
def test_far_rollout_matches_diffusers_with_its_phantom_keys(seed: int) -> None:
    """Prefill and inference over five chunks, reference protocol on both sides: incremental prefill changes nothing."""
    config = random_config(seed, causal=True)
    theirs, mine = model_pair(config, causal=True, seed=seed, backend=BACKENDS[seed % 2], phantom_padding=True)
    partition = [[1, 2, 1, 2, 1], [2, 1, 1, 1, 1], [1, 3, 3, 2, 1]][seed % 3]
    height, width = SIZES[seed % 4]
    batch = 1 + seed % 2
    prompt = prompt_inputs(config, batch)
    video = torch.randn(batch, sum(partition), config["in_channels"], height, width)
    caches = {id(m): reference_cache(theirs.config, partition, batch, height, width) for m in (theirs, mine)}
    for i, frames in enumerate(partition):
        done = partition[: i + 1]
        chunk = torch.randn(batch, frames, config["in_channels"], height, width)
        t, r = times(batch, frames), times(batch, frames)
        query, step = {"num_cached_chunks": i, "is_cache_step": False}, {"num_cached_chunks": i, "is_cache_step": True}
        outputs = []
        for model in (theirs, mine):
            with torch.no_grad():
                common = {**prompt, "chunk_partition": done, "kv_cache": caches[id(model)], "return_dict": False}
                outputs.append(model(chunk, t, r, kv_cache_flag=copy.deepcopy(query), **common)[0])
                zeros = torch.zeros(batch, sum(done))
                if i + 1 < len(partition):
                    model(video[:, : sum(done)], zeros, zeros, kv_cache_flag=copy.deepcopy(step), **common)
        assert relative_error(outputs[1], outputs[0]) < FP32_TOLERANCE, f"chunk {i}"


def test_keys_cached_by_diffusers_are_taken_over() -> None:
    """A rollout begun by the reference continues on ours: its unrotated keys are rotated on the way in."""
    config = random_config(3, causal=True)
    theirs, mine = model_pair(config, causal=True, backend="torch", phantom_padding=True)
    partition, batch = [1, 2, 1, 2, 2], 2
    prompt = prompt_inputs(config, batch)
    cache = reference_cache(theirs.config, partition, batch, 8, 12)
    zeros = torch.zeros(batch, 6)
    common = {**prompt, "kv_cache": cache, "return_dict": False}
    with torch.no_grad():
        flag = {"num_cached_chunks": 3, "is_cache_step": True}
        video = torch.randn(batch, 6, config["in_channels"], 8, 12)
        theirs(video, zeros, zeros, chunk_partition=partition[:4], kv_cache_flag=flag, **common)
        chunk, t, r = torch.randn_like(video[:, :2]), times(batch, 2), times(batch, 2)
        flag = {"num_cached_chunks": 4, "is_cache_step": False}
        want = theirs(chunk, t, r, chunk_partition=partition, kv_cache_flag=dict(flag), **common)[0]
        got = mine(chunk, t, r, chunk_partition=partition, kv_cache_flag=dict(flag), **common)[0]
    assert relative_error(got, want) < FP32_TOLERANCE


def test_each_time_pair_is_embedded_once_per_rollout() -> None:
    """Two steps in each of three chunks and two cache steps meet three pairs: (1000, 600), (600, 0) and (0, 0)."""
    config = random_config(4, causal=True)
    _, mine = model_pair(config, causal=True, backend="torch")
    embed, embedded = mine.ops._implementation.dual_timestep_embedding, []

    class Counting:
        def __getattr__(self, name: str) -> object:
            return getattr(portable, name)

        @staticmethod
        def dual_timestep_embedding(t: torch.Tensor, delta: torch.Tensor, *args: object) -> object:
            embedded.extend(t.tolist())
            return embed(t, delta, *args)

    mine.ops = Ops("torch", Counting())  # type: ignore[arg-type]
    partition, text = [1, 2, 1], prompt_inputs(config, 1)
    cache = FarCache.for_model(mine, partition, 8, 8)
    video = torch.randn(1, 4, config["in_channels"], 8, 8)
    with torch.no_grad():
        for i, frames in enumerate(partition):
            for t, r in ((1000.0, 600.0), (600.0, 0.0)):
                level = [torch.full((1, frames), x) for x in (t, r)]
                mine(video[:, :frames], *level, **text, chunk_partition=partition[: i + 1], kv_cache=cache)
            if i < 2:
                done = partition[: i + 1]
                embeds = (text["encoder_hidden_states"], text["encoder_hidden_states_image"])
                mine.prefill(cache, video[:, : sum(done)], done, *embeds)
    assert sorted(embedded) == [0.0, 600.0, 1000.0]
