"""Gradients of both models on a CPU.

Witnesses: the float64 forward of `test_model_numerics`, differentiated by autograd; the `reference` backend in float64;
finite differences; diffusers for the bidirectional model (its FAR class has no backward on a CPU).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_kernels.testing.budget import check
from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel

from .parity import model_pair, prompt_inputs, random_config, relative_error
from .test_model_numerics import oracle_velocity

PARTITION, HEIGHT, WIDTH = [1, 2, 1, 2], 9, 13
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "text_dim": 6,
    "freq_dim": 16, "ffn_dim": 24, "num_layers": 2, "image_dim": 5,
}  # fmt: skip
FLOAT64_ERROR = 1e-9  # of a gradient: exact up to rounding, where an error of method is 1e-4 or more
Gradients = dict[str, Tensor]


def new_model(causal: bool = True, dtype: torch.dtype = torch.float64, backend: str = "torch", **config: Any) -> Any:
    torch.manual_seed(0)
    config = {**CONFIG, **({"full_chunk_limit": 2} if causal else {}), **config}
    model_class = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    model = model_class(**config, backend=backend)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    for name, parameter in model.named_parameters():
        kept = dtype != torch.float64 and not set(name.split(".")).isdisjoint(model.keep_in_fp32)
        parameter.data = parameter.data.to(torch.float32 if kept else dtype)
    model.fuse_projections()
    return model


def new_inputs(
    clean: bool = False, batch: int = 2, dtype: torch.dtype = torch.float64, limit: int = 2
) -> dict[str, Tensor]:
    """Latents, times and prompt as leaves that want gradients; times do not."""
    torch.manual_seed(1)
    frames, full = sum(PARTITION), sum(PARTITION[-limit:])
    inputs = {
        "hidden_states": torch.randn(batch, frames, 3, HEIGHT, WIDTH),
        "encoder_hidden_states": torch.randn(batch, 4, 6),
        "encoder_hidden_states_image": torch.randn(batch, 3, 5),
    }
    if clean:
        inputs["clean_hidden_states"] = torch.randn(batch, full, 3, HEIGHT, WIDTH)
    leaves = {name: x.to(dtype).requires_grad_(True) for name, x in inputs.items()}
    times = {"timestep": torch.rand(batch, frames) * 1000, "r_timestep": torch.rand(batch, frames) * 1000}
    if clean:
        times["clean_timestep"] = torch.rand(batch, full) * 300
    return {**leaves, **times}


def loss_of(velocity: Tensor) -> Tensor:
    """A fixed random projection, so that every output matters."""
    weights = torch.randn(velocity.shape, generator=torch.Generator().manual_seed(4))
    return (velocity * weights.to(velocity.dtype)).sum()


def gradients(loss: Tensor, named: Mapping[str, Tensor]) -> Gradients:
    wanted = {name: x for name, x in named.items() if x.requires_grad}
    grads = torch.autograd.grad(loss, list(wanted.values()), allow_unused=True)
    return {name: grad for name, grad in zip(wanted, grads, strict=True) if grad is not None}


def of_model(model: Any, inputs: dict[str, Tensor], **kwargs: Any) -> Gradients:
    """With respect to all parameters and inputs."""
    loss = loss_of(model(**inputs, **kwargs, return_dict=False)[0])
    return gradients(loss, {**dict(model.named_parameters()), **inputs})


def of_oracle(model: Any, inputs: dict[str, Tensor], partition: list[int], **kwargs: Any) -> Gradients:
    state = {name: p.detach().double().requires_grad_(True) for name, p in model.named_parameters()}
    x = {name: v.detach().double().requires_grad_(v.requires_grad) for name, v in inputs.items()}
    velocity = oracle_velocity(
        state, model.config, x["hidden_states"], x["timestep"], x["r_timestep"], x["encoder_hidden_states"], partition,
        x["encoder_hidden_states_image"], x.get("clean_hidden_states"), x.get("clean_timestep"), **kwargs,
    )  # fmt: skip
    return gradients(loss_of(velocity[:, -partition[-1] :] if kwargs else velocity), {**state, **x})


def assert_equal_gradients(got: Gradients, want: Gradients, tolerance: float = FLOAT64_ERROR) -> None:
    assert got.keys() == want.keys()
    errors = {name: relative_error(got[name], want[name]) for name in want}
    assert not {name: error for name, error in errors.items() if not error <= tolerance}


def assert_identical(got: Gradients, want: Gradients) -> None:
    assert got.keys() == want.keys()
    assert not [name for name in want if not torch.equal(got[name], want[name])]


# the FAR training path

with_and_without_clean = pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean"])


@pytest.mark.parametrize("backend", ["torch", "reference"])
@with_and_without_clean
def test_far_gradients_equal_the_oracle(clean: bool, backend: str) -> None:
    """Of every parameter and input, compressed context, clean copy and prompt included."""
    model, inputs = new_model(backend=backend), new_inputs(clean)
    want = of_oracle(model, inputs, PARTITION)
    assert set(want) >= {name for name, _ in model.named_parameters()}
    assert_equal_gradients(of_model(model, inputs, chunk_partition=PARTITION), want)


@pytest.mark.parametrize("deltatime_type", ["r", "t-r"])
@pytest.mark.parametrize("cross_attn_norm", [False, True])
@pytest.mark.parametrize("limit", [1, 3, 9])
def test_far_gradients_of_other_configurations(limit: int, cross_attn_norm: bool, deltatime_type: str) -> None:
    model = new_model(full_chunk_limit=limit, cross_attn_norm=cross_attn_norm, deltatime_type=deltatime_type)
    inputs = new_inputs(True, batch=1, limit=limit)
    assert_equal_gradients(of_model(model, inputs, chunk_partition=PARTITION), of_oracle(model, inputs, PARTITION))


@with_and_without_clean
def test_fp32_gradients_are_within_the_budget(clean: bool) -> None:
    """Against the `reference` backend in float64: <= 2 x its own fp32 error, and rounding the attention's LSE."""
    high_model, inputs = new_model(backend="reference"), new_inputs(clean)
    high = of_model(high_model, inputs, chunk_partition=PARTITION)
    narrow = {name: x.detach().float().requires_grad_(x.requires_grad) for name, x in inputs.items()}
    low, got = (
        of_model(new_model(dtype=torch.float32, backend=backend), narrow, chunk_partition=PARTITION)
        for backend in ("reference", "torch")
    )
    for name in high:
        check(name, got[name], low[name], high[name], steps=8)


@with_and_without_clean
def test_gradients_are_those_of_finite_differences(clean: bool) -> None:
    """Along one random direction through all parameters and inputs at once."""
    model, inputs = new_model(), new_inputs(clean)
    grads = of_model(model, inputs, chunk_partition=PARTITION)
    leaves = {name: x for name, x in {**dict(model.named_parameters()), **inputs}.items() if x.requires_grad}
    directions = {name: torch.randn_like(x) for name, x in leaves.items()}
    step, values = 1e-6, []
    with torch.no_grad():
        for sign in (1, -2):  # from x to x + step, then to x - step
            for name, x in leaves.items():
                x.add_(directions[name], alpha=sign * step)
            values.append(float(loss_of(model(**inputs, chunk_partition=PARTITION).sample)))
    slope = sum(float((grads[name] * directions[name]).sum()) for name in leaves)
    assert abs((values[0] - values[1]) / (2 * step) - slope) < 1e-5 * abs(slope)


def test_bf16_gradients_exist() -> None:
    """In the dtype of each parameter, those kept in fp32 included."""
    model, inputs = new_model(dtype=torch.bfloat16), new_inputs(True, dtype=torch.bfloat16)
    grads, want = of_model(model, inputs, chunk_partition=PARTITION), of_oracle(model, inputs, PARTITION)
    assert grads.keys() == want.keys()
    assert grads["scale_shift_table"].dtype == torch.float32
    assert all(relative_error(grads[name], want[name]) < 0.1 for name in want)


# the bidirectional model


def test_bidirectional_gradients_equal_the_oracle() -> None:
    model, inputs = new_model(causal=False), new_inputs()
    assert_equal_gradients(of_model(model, inputs), of_oracle(model, inputs, [sum(PARTITION)]))


@pytest.mark.parametrize("seed", range(3))
def test_bidirectional_gradients_are_as_exact_as_those_of_diffusers(seed: int) -> None:
    config = random_config(seed, causal=False)
    theirs, mine = model_pair(config, causal=False, seed=seed, backend="torch")
    x, times = torch.randn(2, 3, config["in_channels"], 8, 12), torch.rand(2, 2, 3) * 1000
    prompt = prompt_inputs(config, 2)
    results = []
    for model in (theirs, mine):
        model.requires_grad_(True)
        loss = loss_of(model(x, times[0], times[1], **prompt, return_dict=False)[0])
        results.append(gradients(loss, dict(model.named_parameters())))
    state = {name: p.detach().double().requires_grad_(True) for name, p in mine.named_parameters()}
    text, image = prompt["encoder_hidden_states"], prompt["encoder_hidden_states_image"]
    assert text is not None
    high = gradients(loss_of(oracle_velocity(state, config, x, times[0], times[1], text, [3], image)), state)
    low, got = results
    assert got.keys() == low.keys() == high.keys()
    for name in high:
        check(name, got[name], low[name], high[name], steps=8)


# what is trained


def test_each_parameter_alone_gets_the_gradient_it_gets_among_all() -> None:
    """Fast paths ask who is trained; whoever is must not be forgotten: a bias, a norm, one projection of three."""
    model = new_model()
    inputs = {name: x.detach() for name, x in new_inputs(True, batch=1).items()}
    want = of_model(model, inputs, chunk_partition=PARTITION)
    wrong = []
    for name, parameter in model.named_parameters():
        model.requires_grad_(False)
        parameter.requires_grad_(True)
        velocity = model(**inputs, chunk_partition=PARTITION).sample
        got = gradients(loss_of(velocity), {name: parameter}) if velocity.requires_grad else {}
        if name not in got or not relative_error(got[name], want[name]) < FLOAT64_ERROR:
            wrong.append(name)
    assert not wrong


def test_a_frozen_model_passes_gradients_to_its_inputs() -> None:
    model, inputs = new_model().requires_grad_(False), new_inputs(True)
    want = of_oracle(model, inputs, PARTITION)
    got = of_model(model, inputs, chunk_partition=PARTITION)
    assert_equal_gradients(got, {name: grad for name, grad in want.items() if name in inputs})


def test_inference_follows_an_optimiser_step() -> None:
    """q, k and v share one storage; a step writes through their views, and inference reads the storage."""
    model, inputs = new_model(dtype=torch.float32), new_inputs(dtype=torch.float32)
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    with torch.no_grad():
        before = model(**inputs, chunk_partition=PARTITION).sample
    loss_of(model(**inputs, chunk_partition=PARTITION).sample).backward()
    optimiser.step()
    with torch.no_grad():
        after = model(**inputs, chunk_partition=PARTITION).sample
    assert relative_error(after, before) > 1e-3
    fresh = AnyFlowFARTransformer3DModel.from_config(model.config, backend="torch")
    fresh.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(fresh(**inputs, chunk_partition=PARTITION).sample, after)


def test_a_copied_model_is_trained_apart() -> None:
    """An EMA copy must not share the fused storage."""
    model, inputs = new_model(), new_inputs()
    twin = copy.deepcopy(model)
    with torch.no_grad():
        want = model(**inputs, chunk_partition=PARTITION).sample
        for parameter in model.parameters():
            parameter.add_(1)
        assert relative_error(twin(**inputs, chunk_partition=PARTITION).sample, want) < FLOAT64_ERROR


# gradient checkpointing


@with_and_without_clean
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_checkpointing_changes_no_far_gradient(dtype: torch.dtype, clean: bool) -> None:
    model, inputs = new_model(dtype=dtype), new_inputs(clean, dtype=dtype)
    want = of_model(model, inputs, chunk_partition=PARTITION)
    model.enable_gradient_checkpointing()
    assert_identical(of_model(model, inputs, chunk_partition=PARTITION), want)
    model.disable_gradient_checkpointing()
    assert not model.gradient_checkpointing


def test_checkpointing_changes_no_bidirectional_gradient() -> None:
    model, inputs = new_model(causal=False, dtype=torch.float32), new_inputs(dtype=torch.float32)
    want = of_model(model, inputs)
    model.enable_gradient_checkpointing()
    assert_identical(of_model(model, inputs), want)


@pytest.mark.parametrize("frozen", ["condition_embedder", "attn1", "blocks.0"])
def test_checkpointing_with_a_part_of_the_model_frozen(frozen: str) -> None:
    """LoRA-like training: the prompt's tokens, or the first blocks, need no gradient."""
    model, inputs = new_model(dtype=torch.float32), {n: x.detach() for n, x in new_inputs(dtype=torch.float32).items()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(frozen not in name)
    want = of_model(model, inputs, chunk_partition=PARTITION)
    model.enable_gradient_checkpointing()
    assert_identical(of_model(model, inputs, chunk_partition=PARTITION), want)


def test_checkpointing_recomputes_each_block_once() -> None:
    model, inputs = new_model(dtype=torch.float32), new_inputs(dtype=torch.float32)
    model.enable_gradient_checkpointing()
    calls = []
    for layer, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda module, args, layer=layer: calls.append(layer))
    of_model(model, inputs, chunk_partition=PARTITION)
    assert calls == [0, 1, 1, 0]
