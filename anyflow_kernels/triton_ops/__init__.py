"""The `triton` backend: hand-written kernels for NVIDIA GPUs, or for a CPU under TRITON_INTERPRET=1.

One module per operation: kernel, registration with torch, launch, the bytes and FLOPs it costs, and its `aot_cases`.
"""

from __future__ import annotations

from torch.nn.functional import linear

from ..patch_embed import patch_embed, unpatchify
from . import far_attention_backward  # noqa: F401  (registers what the forward's autograd calls)
from .dual_timestep_embedding import dual_timestep_embedding
from .far_attention import far_attention
from .flow_map_step import flow_map_step
from .gated_residual_layer_norm import gated_residual_layer_norm
from .linear_gelu import linear_gelu
from .qk_norm_rope_append import qk_norm_rope_append
from .rms_norm import rms_norm

__all__ = [
    "dual_timestep_embedding", "far_attention", "flow_map_step", "gated_residual_layer_norm", "linear", "linear_gelu",
    "patch_embed", "qk_norm_rope_append", "rms_norm", "unpatchify",
]  # fmt: skip
