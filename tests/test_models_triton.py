"""Both models whole on the `triton` backend (interpreted on a CPU): forward, rollout, gradients, launches a block.

Witness: the `reference` backend on the same weights, in fp32 and float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from anyflow_kernels import available_backends
from anyflow_kernels.testing.budget import check
from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, FarCache

from .launch_counting import LaunchCounter
from .parity import FP32_TOLERANCE, relative_error

pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 24,
    "num_layers": 2,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 40,
    "in_channels": 4,
    "out_channels": 4,
}


def make(model_class: Any, **kwargs: Any) -> Any:
    torch.manual_seed(0)
    model = model_class(**{**CONFIG, **kwargs}).to(DEVICE).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def both(model: Any, run: Any) -> tuple[torch.Tensor, torch.Tensor]:
    results = []
    for backend in ("triton", "reference"):
        model.set_backend(backend)
        results.append(run(model))
    return results[0], results[1]


def inputs(batch: int, frames: int, height: int = 6, width: int = 9) -> tuple[torch.Tensor, ...]:
    x = torch.randn(batch, frames, 4, height, width, device=DEVICE)
    t, r = (torch.rand(batch, frames, device=DEVICE) * 1000 for _ in range(2))
    return x, t, r, torch.randn(batch, 5, 8, device=DEVICE)


def test_bidirectional_model() -> None:
    args = inputs(2, 2)
    got, want = both(make(AnyFlowTransformer3DModel), lambda model: model(*args).sample)
    assert relative_error(got, want) < FP32_TOLERANCE


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean"])
def test_far_training_path(clean: bool) -> None:
    partition = [1, 1, 2, 1]
    args = inputs(1, 5)
    extra = {"clean_hidden_states": torch.randn_like(args[0][:, :4]), "clean_timestep": args[1][:, :4]} if clean else {}
    model = make(AnyFlowFARTransformer3DModel)
    got, want = both(model, lambda model: model(*args, partition, **extra).sample)
    assert relative_error(got, want) < FP32_TOLERANCE


@pytest.mark.parametrize("phantom", [False, True], ids=["exact", "phantom keys"])
def test_far_rollout(phantom: bool) -> None:
    """Prefill and inference through the slab, which starts as NaN: nothing may be read before it is written."""
    partition = [1, 2, 1, 1]
    model = make(AnyFlowFARTransformer3DModel, phantom_padding=phantom)
    noise, t, r, text = inputs(1, 5, 6, 8)

    def rollout(model: Any) -> torch.Tensor:
        video = noise.clone()
        cache = FarCache.for_model(model, partition, 6, 8)
        for slab in (slab for pair in cache.slabs for slab in pair):
            slab.fill_(torch.nan)
        for i in range(len(partition)):
            start, end = sum(partition[:i]), sum(partition[: i + 1])
            args = (t[:, start:end], r[:, start:end], text, partition[: i + 1])
            video[:, start:end] -= 0.5 * model(video[:, start:end], *args, kv_cache=cache).sample
            if i + 1 < len(partition):
                model.prefill(cache, video[:, :end], partition[: i + 1], text)
        return video

    got, want = both(model, rollout)
    assert relative_error(got, want) < FP32_TOLERANCE


@pytest.mark.emulated
@torch.no_grad()
def test_far_rollout_in_bf16() -> None:
    """Chunks, the last ones behind compressed context, on compiled kernels: the interpreter truncates bf16."""
    partition = [1, 2, 1, 1, 2]
    sizes = {"attention_head_dim": 64, "ffn_dim": 96, "text_dim": 16, "freq_dim": 32, "full_chunk_limit": 2}
    model = make(AnyFlowFARTransformer3DModel, **sizes)
    for name, parameter in model.named_parameters():
        if set(name.split(".")).isdisjoint(model.keep_in_fp32):
            parameter.data = parameter.to(torch.bfloat16)
    noise, text = torch.randn(1, 7, 4, 6, 8, device=DEVICE).bfloat16(), torch.randn(1, 5, 16, device=DEVICE).bfloat16()

    def rollout(model: Any, video: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        cache = FarCache.for_model(model, partition, 6, 8)
        video = video.clone()
        for slab in (slab for pair in cache.slabs for slab in pair):
            slab.fill_(torch.nan)
        for i, frames in enumerate(partition):
            start, end = sum(partition[:i]), sum(partition[: i + 1])
            t, r = (torch.full((1, frames), time, device=DEVICE) for time in (900.0, 300.0))
            velocity = model(video[:, start:end], t, r, text, partition[: i + 1], kv_cache=cache).sample
            video[:, start:end] -= 0.6 * velocity
            if i + 1 < len(partition):
                model.prefill(cache, video[:, :end], partition[: i + 1], text)
        return video

    got, low = both(model, lambda model: rollout(model, noise, text))
    high = rollout(model.double(), noise.double(), text.double())
    check("video", got, low, high)


def test_far_gradients() -> None:
    """Every parameter's gradient through the Triton backward kernels, against float64."""
    partition = [1, 1, 1, 1]
    args = inputs(1, 4)
    clean = {"clean_hidden_states": torch.randn_like(args[0][:, :3]), "clean_timestep": args[1][:, :3]}
    model = make(AnyFlowFARTransformer3DModel).requires_grad_(True)
    seed = torch.randn_like(args[0][:, :3, :, :6, :8])

    def gradients(model: Any, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (model(*args, partition, **kwargs).sample * seed.to(args[0].dtype)).sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    model.set_backend("triton")
    got = gradients(model, *args, **clean)
    model.set_backend("reference")
    low = gradients(model, *args, **clean)
    wide = {name: value.double() for name, value in clean.items()}
    high = gradients(model.double(), *(x.double() for x in args), **wide)
    assert got.keys() == high.keys()
    for name, oracle in high.items():  # sums over tokens in another order, layer after layer: 16 rounding steps
        check(name, got[name], low[name], oracle, steps=16)


def test_a_block_launches_at_most_fourteen_kernels() -> None:
    """A denoising step with the prompt's keys kept, as in a rollout; a second layer is the difference of two models."""
    counts = []
    for layers in (1, 2):
        torch.manual_seed(0)
        model = AnyFlowFARTransformer3DModel(**{**CONFIG, "num_layers": layers}, backend="triton").to(DEVICE)
        model.requires_grad_(False)
        cache = FarCache.for_model(model, [2], 6, 9)
        x, t, r, text = inputs(1, 2)
        with torch.no_grad():
            model(x, t, r, text, [2], kv_cache=cache)
        with torch.no_grad(), LaunchCounter() as counter:
            model(x, t, r, text, [2], kv_cache=cache)
        counts.append(len(counter.launches))
    assert counts[1] - counts[0] <= 14
