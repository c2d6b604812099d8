"""EMA and LoRA. Witnesses: data/training.json; the merge formula W + alpha / rank * B A in float64."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.training import EMA, BidirectionalVelocity, add_lora, lora_state_dict, merge_lora

from . import trainer_runs
from .trainer_runs import SIZES

ORACLE = trainer_runs.ORACLE["ema"]


def one_parameter(value: float, dtype: torch.dtype = torch.float64) -> nn.Module:
    module = nn.Module()
    module.weight = nn.Parameter(torch.tensor([value], dtype=dtype))
    module.frozen = nn.Parameter(torch.zeros(1), requires_grad=False)
    return module


def test_ema_matches_oracle() -> None:
    """Decay 0 until the warm-up, judged by the step before it is incremented."""
    module = one_parameter(ORACLE["init"])
    ema, shadows = EMA(module, ORACLE["d"], ORACLE["warmup"]), []
    for step, value in enumerate(ORACLE["params"]):
        with torch.no_grad():
            module.weight.fill_(value)
        ema.update(step)
        shadows.append(ema.shadow["weight"].item())
    assert shadows == pytest.approx(ORACLE["shadow"], rel=1e-12)


def test_ema_of_bfloat16_parameters_is_float32() -> None:
    """Steps of 0.1 % of a difference round away in bfloat16: the average would never move."""
    module = one_parameter(1.0, torch.bfloat16)
    ema = EMA(module, 0.999)
    with torch.no_grad():
        module.weight.fill_(2.0)
    ema.update(0)
    assert ema.shadow["weight"].dtype == torch.float32
    assert ema.shadow["weight"].item() == pytest.approx(1.001, rel=1e-6)


def test_ema_holds_trainable_parameters_only() -> None:
    assert set(EMA(one_parameter(1.0)).state_dict()) == {"weight"}


def test_applied_ema_is_undone_bit_for_bit() -> None:
    module = one_parameter(1.0)
    ema = EMA(module, 0.9)
    with torch.no_grad():
        module.weight.fill_(0.1)
    with ema.applied(module):
        assert module.weight.item() == 1.0
    assert module.weight.item() == 0.1


def test_ema_state_round_trips_and_refuses_other_names() -> None:
    module = one_parameter(1.0)
    ema, other = EMA(module), EMA(one_parameter(5.0))
    other.load_state_dict(ema.state_dict())
    assert other.shadow["weight"].item() == 1.0
    with pytest.raises(ValueError, match="names differ"):
        other.load_state_dict({"bias": torch.zeros(1)})


def model(far: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return AnyFlowFARTransformer3DModel(**SIZES) if far else AnyFlowTransformer3DModel(**SIZES)


def fill_adapters(module: nn.Module) -> None:
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.2)


@pytest.mark.parametrize("student", [True, False], ids=["student", "score"])
def test_adapters_are_on_the_published_layers_only(student: bool) -> None:
    pytest.importorskip("peft")
    net = model()
    trainable = add_lora(net, rank=4, alpha=4, student=student)
    adapted = {name.split(".lora_")[0] for name in trainable if ".lora_" in name}
    block = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    expected = {f"blocks.{i}.{name}" for i in range(2) for name in block}
    if student:
        embedders = ("time_embedder", "delta_embedder")
        expected |= {f"condition_embedder.{e}.linear_{i}" for e in embedders for i in (1, 2)}
    assert adapted == expected
    assert {n for n in trainable if ".lora_" not in n} == {"far_patch_embedding.weight", "far_patch_embedding.bias"}
    assert all(("lora_A" in n or "lora_B" in n) for n in trainable if ".lora_" in n)


def velocity_of(net: nn.Module) -> torch.Tensor:
    torch.manual_seed(5)
    x, text = torch.randn(2, 3, 3, 8, 8), torch.randn(2, 4, 6)
    t = torch.full((2, 3), 700.0)
    return BidirectionalVelocity(net)(x, t, t / 2, text)


@pytest.mark.parametrize("far", [True, False], ids=["far", "bidirectional"])
def test_fresh_adapters_change_nothing_and_trained_ones_do(far: bool) -> None:
    """The model's fused projections must call the adapters, not read the weights past them."""
    pytest.importorskip("peft")
    net = model(far)
    with torch.no_grad():
        plain = velocity_of(net)
        add_lora(net, rank=4, alpha=8)
        torch.testing.assert_close(velocity_of(net), plain)
        for layer in ("blocks.0.attn1.to_q", "blocks.1.ffn.net.0.proj", "condition_embedder.delta_embedder.linear_1"):
            weight = net.get_parameter(f"{layer}.lora_B.default.weight")
            weight.normal_()
            assert (velocity_of(net) - plain).abs().max() > 1e-5, layer
            weight.zero_()


def test_gradient_reaches_adapters_and_the_compressed_patch_only() -> None:
    pytest.importorskip("peft")
    net = model()
    trainable = set(add_lora(net, rank=4, alpha=8))
    fill_adapters(net)
    velocity_of(net).square().mean().backward()
    with_gradient = {n for n, p in net.named_parameters() if p.grad is not None}
    assert with_gradient == {n for n in trainable if ".lora_" in n}  # one chunk: no compressed frames here


def test_merge_adds_the_scaled_product_and_keeps_the_function() -> None:
    pytest.importorskip("peft")
    net = model().double()
    add_lora(net, rank=4, alpha=8)
    fill_adapters(net)
    layer = net.blocks[0].attn1.to_q
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.base_layer.weight + 8 / 4 * b @ a
    torch.manual_seed(5)
    merged = merge_lora(net)
    torch.testing.assert_close(merged.blocks[0].attn1.to_q.weight, expected)
    assert set(merged.state_dict()) == set(model().state_dict())


def test_merged_model_computes_what_the_adapted_one_did() -> None:
    pytest.importorskip("peft")
    net = model()
    add_lora(net, rank=4, alpha=8)
    fill_adapters(net)
    with torch.no_grad():
        adapted = velocity_of(net)
        merged = velocity_of(merge_lora(net))
    assert (merged - adapted).norm() / adapted.norm() < 1e-5


def test_lora_state_holds_all_that_training_changes() -> None:
    pytest.importorskip("peft")
    net = model()
    trainable = add_lora(net, rank=4, alpha=4)
    assert set(lora_state_dict(net)) == set(trainable)


def test_models_without_targets_are_refused() -> None:
    with pytest.raises(ValueError, match="no linear layer named like"):
        add_lora(nn.Sequential(nn.Linear(2, 2)), rank=2)
