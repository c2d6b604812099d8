"""Named pipelines: the released checkpoints and the bundled demo model as configs, each one printable tree.

    pipeline = preset("anyflow-far-wan2.1-1.3b").setup().to("cuda")
    print(derive_config(preset("anyflow-far-wan2.1-14b"), diffusion_model={"seed": 7}))

Sizes, shift and partition are those the models were made with: the released ones for 480 x 832, 81 frames, shift 5.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..encoders.text import UMT5TextEncoderConfig
from ..schedulers.flow_map_stream import FlowMapEulerSchedulerConfig
from ..wan_vae.decoder import WanVAEStreamDecoderConfig
from ..wan_vae.encoder import WanVAEEncoderConfig
from .bidirectional_stream import AnyFlowBidirectionalStreamConfig
from .diffusion_model import DiffusionModelConfig
from .far_stream import AnyFlowFARStreamConfig
from .model_directory import RELEASED
from .pipeline import StreamInferencePipelineConfig
from .pixel_model import pixel_pipeline

RELEASED_PARTITION = (1, 3, 3, 3, 3, 3, 3, 2)


def released_pipeline(
    name: str,
    path: str,
    *,
    causal: bool,
    steps: int = 4,
    dtype: torch.dtype | None = torch.bfloat16,
    chunk_partition: Sequence[int] | None = None,
    shift: float = 5.0,
    num_train_timesteps: int = 1000,
) -> StreamInferencePipelineConfig:
    """The config of a pipeline directory in diffusers' format, or of a hub repository that holds one.

    Args:
        name: slug of the pipeline.
        path: directory or hub id.
        causal: an AnyFlow-FAR checkpoint, else a bidirectional one.
        steps: denoising steps per chunk.
        dtype: of all weights, save those that stay fp32; None as stored.
        chunk_partition: latent frames per chunk; None is that of the released models.
        shift, num_train_timesteps: of the schedule.
    """
    # The adapters' own defaults for the latent size are those of the released models.
    text = UMT5TextEncoderConfig(path=path, dtype=dtype)
    transformer: AnyFlowFARStreamConfig | AnyFlowBidirectionalStreamConfig
    if causal:
        transformer = AnyFlowFARStreamConfig(
            path=path, dtype=dtype, context_encoder=text, chunk_partition=chunk_partition or RELEASED_PARTITION
        )
    else:
        transformer = AnyFlowBidirectionalStreamConfig(
            path=path, dtype=dtype, context_encoder=text, chunk_partition=chunk_partition or (sum(RELEASED_PARTITION),)
        )
    return StreamInferencePipelineConfig(
        name=name,
        diffusion_model=DiffusionModelConfig(
            transformer=transformer,
            scheduler=FlowMapEulerSchedulerConfig(
                num_inference_steps=steps, shift=shift, num_train_timesteps=num_train_timesteps
            ),
        ),
        decoder=WanVAEStreamDecoderConfig(path=path, dtype=dtype),
        video_encoder=WanVAEEncoderConfig(path=path, dtype=dtype, pixel_range="unit"),
    )


PRESETS: dict[str, StreamInferencePipelineConfig] = {
    name: released_pipeline(name, path, causal="FAR" in path) for name, path in RELEASED.items()
} | {"anyflow-demo": pixel_pipeline(name="anyflow-demo")}


def preset(name: str) -> StreamInferencePipelineConfig:
    """The config of that name.

    Raises:
        KeyError: listing the names there are.
    """
    if name not in PRESETS:
        raise KeyError(f"unknown preset {name!r}, expected one of {', '.join(sorted(PRESETS))}")
    return PRESETS[name]
