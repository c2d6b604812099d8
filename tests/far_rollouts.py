"""FAR rollouts of a tiny model, step by step, and a count of the work they do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, FarCache

from .tiny import TINY, tiny_model

HEIGHT, WIDTH, FULL, COMPRESSED = 8, 12, 24, 6  # tokens per frame: 4*6 and 2*3
PARTITION = [1, 2, 1, 3, 2, 1]
STEPS = [(1000.0, 700.0), (700.0, 0.0)]


def far_model(seed: int = 0, backend: str = "torch", **config: Any) -> AnyFlowFARTransformer3DModel:
    return tiny_model(seed=seed, backend=backend, **({"num_layers": 3} | config))


def prompt(seed: int = 1, batch: int = 2) -> Tensor:
    return torch.randn(batch, 5, TINY["text_dim"], generator=torch.Generator().manual_seed(seed))


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
