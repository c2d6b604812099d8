"""Gradients of a step on the newest chunk through a cache. Witness: the float64 oracle, as in `test_model_training`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_runtime import FarCache

from .parity import relative_error
from .test_model_training import (
    FLOAT64_ERROR,
    HEIGHT,
    PARTITION,
    WIDTH,
    Gradients,
    assert_equal_gradients,
    assert_identical,
    gradients,
    loss_of,
    new_inputs,
    new_model,
    of_oracle,
)


def cached_step(model: Any, cache: FarCache, inputs: dict[str, Tensor]) -> Tensor:
    """The velocity of the newest chunk; its slice of the inputs keeps its gradient."""
    frames = PARTITION[-1]
    newest = {name: inputs[name][:, -frames:] for name in ("hidden_states", "timestep", "r_timestep")}
    prompt = {name: x for name, x in inputs.items() if name.startswith("encoder")}
    return model(**newest, **prompt, chunk_partition=PARTITION, kv_cache=cache).sample


def prefilled(model: Any, inputs: dict[str, Tensor]) -> FarCache:
    cache = FarCache.for_model(model, PARTITION, HEIGHT, WIDTH, batch_size=2, immutable=True)
    context = inputs["hidden_states"][:, : -PARTITION[-1]].detach()
    prompt = (inputs["encoder_hidden_states"].detach(), inputs["encoder_hidden_states_image"].detach())
    with torch.no_grad():
        model.prefill(cache, context, PARTITION[:-1], *prompt)
    return cache


def of_cached_step(model: Any, cache: FarCache, inputs: dict[str, Tensor]) -> Gradients:
    return gradients(loss_of(cached_step(model, cache, inputs)), {**dict(model.named_parameters()), **inputs})


def clean_context(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The inputs with the finished chunks at t = r = 0."""
    times = {name: inputs[name].clone() for name in ("timestep", "r_timestep")}
    for time in times.values():
        time[:, : -PARTITION[-1]] = 0
    return {**inputs, **times}


def cached_oracle(model: Any, inputs: dict[str, Tensor]) -> Gradients:
    """Without `far_patch_embedding`, which only the context uses: constants have no gradient."""
    grads = of_oracle(model, clean_context(inputs), PARTITION, constant_context=True)
    return {name: grad for name, grad in grads.items() if not name.startswith("far_patch_embedding")}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_of_a_cached_step_equal_the_oracle(backend: str, checkpointing: bool) -> None:
    """Everything but the cached keys is differentiated, the prompt's own keys included."""
    model, inputs = new_model(backend=backend), new_inputs()
    model.gradient_checkpointing = checkpointing
    got = of_cached_step(model, prefilled(model, inputs), inputs)
    assert_equal_gradients(got, cached_oracle(model, inputs))


def test_checkpointing_changes_no_gradient_of_a_cached_step() -> None:
    model, inputs = new_model(dtype=torch.float32), new_inputs(dtype=torch.float32)
    cache = prefilled(model, inputs)
    want = of_cached_step(model, cache, inputs)
    model.enable_gradient_checkpointing()
    assert_identical(of_cached_step(model, cache, inputs), want)


def test_each_step_on_a_cache_has_a_backward_of_its_own() -> None:
    """Steps share the prompt's keys and the cache, not a graph that the first backward frees."""
    model, inputs = new_model(), new_inputs()
    cache = prefilled(model, inputs)
    results = [of_cached_step(model, cache, inputs) for _ in range(3)]
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])


def test_a_step_after_an_update_sees_the_new_weights() -> None:
    """The prompt's keys are functions of the weights: none from before an optimiser step may be used."""
    model, inputs = new_model(), new_inputs()
    cache = prefilled(model, inputs)
    of_cached_step(model, cache, inputs)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "text_embedder" in name or "attn2" in name:
                parameter.mul_(1.1)
    got = cached_step(model, cache, inputs)
    cache._prompts.clear()  # what the prompt's keys are kept in
    assert relative_error(got, cached_step(model, cache, inputs)) < FLOAT64_ERROR


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_gradient_steps_and_plain_steps_may_alternate(checkpointing: bool) -> None:
    """A step without gradients, and the next chunk's prefill, between a forward and its backward change nothing."""
    model, inputs = new_model(dtype=torch.float32), new_inputs(dtype=torch.float32)
    model.gradient_checkpointing = checkpointing
    want = of_cached_step(model, prefilled(model, inputs), inputs)
    cache = prefilled(model, inputs)
    loss = loss_of(cached_step(model, cache, inputs))
    with torch.no_grad():
        cached_step(model, cache, {**inputs, "hidden_states": inputs["hidden_states"] + 1})
        prompt = (inputs["encoder_hidden_states"].detach(), inputs["encoder_hidden_states_image"].detach())
        model.prefill(cache, inputs["hidden_states"].detach() + 1, PARTITION, *prompt)
    assert_identical(gradients(loss, {**dict(model.named_parameters()), **inputs}), want)


def test_a_rollout_of_several_chunks_has_one_backward() -> None:
    """Steps of two chunks, a prefill between them; each chunk's gradient is the one it has alone."""
    model, inputs = new_model(), new_inputs()
    prompt = {name: x.detach() for name, x in inputs.items() if name.startswith("encoder")}
    video, parameters = inputs["hidden_states"].detach(), dict(model.named_parameters())

    def step(cache: FarCache, n: int) -> Tensor:
        start, frames = sum(PARTITION[:n]), PARTITION[n]
        t = inputs["timestep"][:, start : start + frames]
        x = video[:, start : start + frames]
        return loss_of(model(x, t, t / 2, **prompt, chunk_partition=PARTITION[: n + 1], kv_cache=cache).sample)

    def alone(n: int) -> Gradients:
        cache = FarCache.for_model(model, PARTITION, HEIGHT, WIDTH, batch_size=2, immutable=True)
        model.prefill(cache, video[:, : sum(PARTITION[:n])], PARTITION[:n], *prompt.values())
        return gradients(step(cache, n), parameters)

    cache, losses = FarCache.for_model(model, PARTITION, HEIGHT, WIDTH, batch_size=2, immutable=True), []
    for n in range(1, 4):
        model.prefill(cache, video[:, : sum(PARTITION[:n])], PARTITION[:n], *prompt.values())
        losses.append(step(cache, n))
    got = gradients(torch.stack(losses).sum(), parameters)
    parts = [alone(n) for n in range(1, 4)]
    assert_equal_gradients(got, {name: sum(part[name] for part in parts) for name in parts[0]})  # type: ignore[misc]
