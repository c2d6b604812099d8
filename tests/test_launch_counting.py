"""Launches of every operation at inference: fusion that falls apart shows as a larger count."""

from __future__ import annotations

import pytest
import torch

from anyflow_kernels import TimestepMLP

from .launch_counting import LaunchCounter
from .triton_checks import DEVICE, TRITON


def random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE)


def mlp() -> TimestepMLP:
    return TimestepMLP(random(24, 8), random(24), random(24, 24), random(24))


def launches(operation: str, *args, **kwargs) -> list[str]:
    with torch.no_grad(), LaunchCounter() as counter:
        getattr(TRITON, operation)(*args, **kwargs)
    return counter.launches


def test_counter_sees_torch_and_triton_but_no_views():
    with LaunchCounter() as counter:
        x = torch.empty(2, 3, 24, device=DEVICE)
        y = x.zero_()[..., :12].transpose(0, 1).float() + 1
        TRITON.rms_norm(y, y[0, 0], 1e-6)
    assert counter.launches == ["aten::zero_", "aten::add", "rms_norm_kernel"]


def test_gated_residual_layer_norm_is_one_launch():
    """For any frame map of up to three runs, with modulation sliced out of a (B, F, 6, D) tensor."""
    modulation = random(2, 5, 6, 24)
    terms = {name: modulation[:, :, i] for i, name in enumerate(("shift", "scale", "gate"))}
    terms["branch"] = random(2, 17, 24)
    names = launches("gated_residual_layer_norm", random(2, 17, 24), ((1, 2), (3, 3), (1, 6)), **terms)
    assert names == ["gated_residual_layer_norm_kernel"]


@pytest.mark.parametrize("slabs", [True, False])
def test_qk_norm_rope_append_is_one_launch(slabs):
    caches = {"k_cache": random(1, 9, 2, 12), "v_cache": random(1, 9, 2, 12), "offset": 3} if slabs else {}
    rope = (random(5, 6), random(5, 6))
    names = launches("qk_norm_rope_append", random(1, 5, 72), random(24), random(24), rope, 2, 1e-6, **caches)
    assert names == ["qk_norm_rope_append_kernel"]


def test_rms_norm_of_a_slice_is_one_launch():
    assert launches("rms_norm", random(2, 5, 72)[..., :24], random(24), 1e-6) == ["rms_norm_kernel"]


def test_linear_gelu_is_a_gemm_and_at_most_one_pass():
    names = launches("linear_gelu", random(2, 5, 24), random(40, 24), random(40))
    assert names in (["aten::mm", "bias_gelu_kernel"], ["aten::_addmm_activation"])


def test_linear_is_a_gemm_with_its_bias():
    assert launches("linear", random(2, 5, 24), random(40, 24), random(40)) == ["aten::addmm"]


def test_dual_timestep_embedding_is_three_launches():
    names = launches("dual_timestep_embedding", random(3), random(3), mlp(), mlp(), random(144, 24), random(144), 0.25)
    assert names == ["timestep_hidden_kernel", "timestep_mix_kernel", "timestep_projection_kernel"]


def test_guided_flow_map_step_is_one_launch():
    x, sigma = random(1, 2, 4, 5, 6), torch.rand(1, 2, device=DEVICE)
    assert launches("flow_map_step", x, x, sigma, sigma / 2, x, 3.0) == ["flow_map_step_kernel"]
