"""What one denoising step of a streamed video launches: guidance and step are a single kernel.

Triton kernels are counted under the interpreter, torch operators by dispatch; views and allocations are free.
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch

from anyflow_kernels import available_backends
from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, open_model, stream

from .launch_counting import LaunchCounter

pytestmark = pytest.mark.skipif(available_backends()["triton"] is not None, reason=str(available_backends()["triton"]))
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYERS = 2
CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "num_layers": LAYERS,
    "text_dim": 8,
    "freq_dim": 16,
    "ffn_dim": 40,
    "in_channels": 4,
    "out_channels": 4,
    "backend": "triton",
}
PER_BLOCK = 14  # see tests/test_models_triton.py
# What a step adds to its blocks: the rows of its times and the modulation of all blocks put together, patch embedding,
# the head's modulation, norm, projection and unpatchify, and the step itself.
AROUND = {
    "aten::stack": 3,
    "aten::add": 2,
    "anyflow::patch_embed": 1,
    "gated_residual_layer_norm_kernel": 1,
    "aten::addmm": 1,
    "anyflow::unpack_patches": 1,
    "flow_map_step_kernel": 1,
}


@cache
def launches_of_a_step(model_class: Any, guidance: float) -> Counter[str]:
    """Those of a chunk's third step: of a chunk with 3 steps less those of one with 2.

    Under FAR the chunk is the second one, when the times have been embedded.
    """
    torch.manual_seed(0)
    model = model_class(**CONFIG).to(DEVICE).eval()
    model.cuda_graphs = False  # a replay would hide the launches
    causal = model_class is AnyFlowFARTransformer3DModel
    text = torch.randn(1, 5, 8, device=DEVICE)
    settings: dict[str, Any] = {"chunk_partition": (1, 1) if causal else (2,), "height": 4, "width": 4}
    if guidance > 1:
        settings |= {"guidance_scale": guidance, "negative_prompt": text.flip(1)}
    counts = []
    for steps in (2, 2, 3):  # the first one fills the model's rotary tables
        chunks = stream(open_model(model, steps=steps, backend="triton"), text, seed=0, **settings)
        if causal:
            next(chunks)
        with LaunchCounter() as counter:
            next(chunks)
        chunks.close()
        counts.append(Counter(name for name in counter.launches if name != "aten::promote_types"))
    return counts[2] - counts[1]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_step_of_a_chunk_is_its_blocks_and_eleven_launches_at_most(guidance):
    counts = launches_of_a_step(AnyFlowFARTransformer3DModel, guidance)
    # The latents once per prompt; the times too, which are on the host and seen only where all is.
    around = AROUND | ({"aten::cat": 1 if DEVICE == "cuda" else 3} if guidance > 1 else {})
    assert sum(counts.values()) == PER_BLOCK * LAYERS + sum(around.values())
    assert all(counts[name] >= count for name, count in around.items())


@pytest.mark.parametrize("model_class", [AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel])
@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_guidance_and_step_are_one_launch(guidance, model_class):
    """u_n + s (u - u_n) and x - (sigma_t - sigma_r) u in eager passes would be multiplications and differences."""
    counts = launches_of_a_step(model_class, guidance)
    assert counts["flow_map_step_kernel"] == 1
    assert not [name for name in counts if name.removesuffix("_") in ("aten::mul", "aten::sub", "aten::lerp")]
