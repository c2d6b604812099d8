"""The bidirectional AnyFlow model: every frame at full resolution, every token sees every token.

Source: AnyFlow (arXiv 2605.13724) on the Wan2.1 backbone; constructor, parameters and forward of
`AnyFlowTransformer3DModel` in diffusers' src/diffusers/models/transformers/transformer_anyflow.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import AttentionPlan, FarLayout

from .base import AnyFlowModel
from .blocks import BlockInputs
from .checks import check_frame_count, check_parallel, check_video
from .conditioning import embed_times
from .outputs import TransformerOutput, output
from .prompt_keys import PromptKeys


class AnyFlowTransformer3DModel(AnyFlowModel):
    """Predicts the average velocity of all frames of a video at once.

    Args:
        patch_size: (1, rows, columns) of a token.
        num_attention_heads, attention_head_dim: their product is the width D.
        in_channels, out_channels: of the latents.
        text_dim, image_dim: widths of the prompt embeddings; no image branch if None.
        freq_dim: width of the timestep sinusoid.
        ffn_dim, num_layers, cross_attn_norm, eps: of the blocks.
        rope_max_seq_len: kept for the config; positions are computed, not looked up, and have no limit.
        gate_value, deltatime_type: of the dual-timestep embedding: weight of the delta, and whether it is "r" or "t-r".
        backend: see `anyflow_kernels.load_ops`.

    Raises:
        ValueError: on values that cannot make a model.
    """

    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        image_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
        backend: str = "auto",
    ) -> None:
        self._build(locals())
        self._init_runtime(backend)

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Tensor]:
        """Average velocity from `timestep` down to `r_timestep`.

        Args:
            hidden_states: (B, F, C, H, W) latents.
            timestep, r_timestep: (B, F) source and target time of each frame, 0..1000.
            encoder_hidden_states: (B, S, text_dim) text embeddings.
            encoder_hidden_states_image: (B, S_image, image_dim), for models with `image_dim`.
            attention_kwargs: accepted for the reference's signature; LoRA scales are applied by `accelerate`d models.
            return_dict: a `TransformerOutput` instead of a tuple.

        Returns:
            (B, F, C, H', W'): H and W without the rows and columns beyond a multiple of the patch.

        Raises:
            ValueError: on shapes that do not fit.
        """
        prompt = (encoder_hidden_states, encoder_hidden_states_image)
        check_video(self.config, hidden_states, timestep, r_timestep, *prompt)
        check_parallel(self, hidden_states)
        frames = hidden_states.shape[1]
        check_frame_count(hidden_states, timestep, frames, "the video")
        # One chunk at full resolution is the whole video without a mask.
        patch = tuple(self.config.patch_size)
        layout = FarLayout((frames,), hidden_states.shape[3], hidden_states.shape[4], patch, patch)
        rt, times = embed_times(self.condition_embedder, self.config, self.ops, timestep, r_timestep)
        rope = self._rotary(layout.segments, hidden_states.device, times.dtype)

        def step(latents: Tensor, rt: Tensor, times: Tensor, *prompt: Tensor) -> Tensor:
            inputs = BlockInputs(
                ops=self.ops,
                frame_map=layout.frame_map,
                times=times,
                rope=rope,
                plan=AttentionPlan.from_layout(layout),
                prompt=PromptKeys(self.condition_embedder, *prompt),
            )
            x = self._patchify(self.patch_embedding, latents)
            return self._head(self._run_blocks(x, inputs), rt, (frames, *layout.full_grid))

        inputs = (hidden_states, rt, times, *(x for x in prompt if x is not None))
        weights = None if torch.is_grad_enabled() else self._captured_weights(hidden_states.device)
        if weights is None:
            sample = step(*inputs)
        else:
            call = _Call()  # has the graphs' memory while it lasts
            workspace = self.idle_workspaces.lend(call, weights, 0, (0, 0, 0, 0), self.dtype, hidden_states.device)
            sample = workspace.graphs.run((layout, self.ops.backend), step, *inputs, reads=rope)
        return output(TransformerOutput, sample=sample) if return_dict else (sample,)


class _Call:
    """One forward."""
