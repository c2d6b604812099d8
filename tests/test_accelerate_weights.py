"""What diffusers does to weights: adapters and quantisation, around `accelerate`. Witness: diffusers on the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from anyflow_runtime import accelerate, restore

from .parity import FP32_TOLERANCE, relative_error
from .test_accelerate import lora_state, make, run


def assert_as_diffusers(pipe: Any, tolerance: float = FP32_TOLERANCE) -> torch.Tensor:
    """The accelerated pipeline makes the video that it makes restored, which is returned."""
    got = run(accelerate(pipe, match_diffusers_padding=True))
    want = run(restore(pipe))
    accelerate(pipe, match_diffusers_padding=True)
    assert relative_error(got, want) < tolerance
    return want


def test_adapters_change_and_go() -> None:
    pytest.importorskip("peft")
    pipe = accelerate(make(), match_diffusers_padding=True)
    plain = run(pipe)
    pipe.load_lora_weights(lora_state(pipe, 0), adapter_name="a")
    pipe.load_lora_weights(lora_state(pipe, 1), adapter_name="b")
    videos = [plain]
    for names, weights in ((["a"], [1.0]), (["b"], [1.0]), (["a", "b"], [0.7, 0.4])):
        pipe.set_adapters(names, weights)
        videos.append(assert_as_diffusers(pipe))
    for i, video in enumerate(videos):
        assert all(relative_error(video, other) > 1e-3 for other in videos[:i])
    pipe.disable_lora()
    assert relative_error(run(pipe), plain) < FP32_TOLERANCE
    pipe.enable_lora()
    pipe.delete_adapters("b")
    pipe.set_adapters("a")
    assert relative_error(assert_as_diffusers(pipe), videos[1]) < FP32_TOLERANCE
    pipe.load_lora_weights(lora_state(pipe, 1), adapter_name="a", hotswap=True)
    assert relative_error(assert_as_diffusers(pipe), videos[2]) < FP32_TOLERANCE
    pipe.unload_lora_weights()
    assert relative_error(run(pipe), plain) < FP32_TOLERANCE


def test_adapters_under_the_keys_of_wan() -> None:
    pytest.importorskip("peft")
    pipe = accelerate(make(), match_diffusers_padding=True)
    plain, state = run(pipe), lora_state(pipe, 0)
    pipe.load_lora_weights(state)
    want = run(pipe)
    pipe.unload_lora_weights()
    wan = {"attn1.to_q": "self_attn.q", "attn1.to_out.0": "self_attn.o", "attn2.to_k": "cross_attn.k"}
    wan |= {"ffn.net.0.proj": "ffn.0", "transformer.": "diffusion_model.", "lora_A": "lora_down", "lora_B": "lora_up"}
    renamed = {}
    for key, value in state.items():
        for theirs, original in wan.items():
            key = key.replace(theirs, original)
        renamed[key] = value
    pipe.load_lora_weights(renamed)
    assert relative_error(run(pipe), want) < FP32_TOLERANCE < relative_error(want, plain)


def quantised(name: str, transformer: Any) -> None:
    if name.startswith("torchao"):
        quantization = pytest.importorskip("torchao.quantization")
        kinds = {"int8": "Int8WeightOnlyConfig", "int8 dynamic": "Int8DynamicActivationInt8WeightConfig"}
        config = getattr(quantization, kinds.get(name.removeprefix("torchao "), "Float8WeightOnlyConfig"))()
        quantization.quantize_(transformer.blocks, config)
    else:
        quanto = pytest.importorskip("optimum.quanto")
        quanto.quantize(transformer.blocks, weights=quanto.qint8)
        quanto.freeze(transformer.blocks)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("name", "tolerance"),
    # Activations rounded to int8 go either way where fp32 differs in its last bits: less than what int8 costs.
    [("torchao int8", 2e-5), ("torchao fp8", 2e-5), ("torchao int8 dynamic", 4e-4), ("quanto qint8", 2e-5)],
)
def test_quantised_weights(name: str, tolerance: float, when: str) -> None:
    pipe = make()
    plain = run(pipe)
    if when == "after":
        accelerate(pipe, match_diffusers_padding=True)
    quantised(name, pipe.transformer)
    assert relative_error(assert_as_diffusers(pipe, tolerance), plain) > tolerance


def test_vae_tiling() -> None:
    pipe = make()
    pipe.vae.enable_tiling(tile_sample_min_height=16, tile_sample_min_width=16)
    pipe.vae.enable_slicing()
    want = run(pipe, output_type="pt")
    assert relative_error(run(accelerate(pipe, match_diffusers_padding=True), output_type="pt"), want) < 1e-4
