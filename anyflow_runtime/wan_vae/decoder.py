"""Streaming decoder of the Wan VAE: chunk by chunk, with the same frames as decoding the whole video at once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..decoders.base import DecoderConfig, StreamingDecoderCache, StreamingVideoDecoder
from ..encoders.base import check_frames
from .decoder_layers import decode_frames, upsample_convs
from .stream import WanVAECache, WanVAEConfig, WanVAEHalf
from .tiles import History, latent_tiling
from .weights import latent_statistics, owned_half, wan_vae

COMPILE_MODES = ("default", "max-autotune-no-cudagraphs")


@dataclass(frozen=True, kw_only=True)
class WanVAEStreamDecoderConfig(WanVAEConfig, DecoderConfig):
    """Config of `WanVAEStreamDecoder`.

    Args:
        compile_mode: "default" or "max-autotune-no-cudagraphs" runs a pass through torch.compile, once for the
            first frame and once for each number of frames in a pass. A pass launches some 150 kernels for tens of
            milliseconds of work at 480p, so capturing it as a CUDA graph is not offered.
        Others: as `WanVAEConfig`.
    Raises:
        ValueError: at construction, for an unknown mode.
    """

    _target: type[WanVAEStreamDecoder] = field(default_factory=lambda: WanVAEStreamDecoder)
    compile_mode: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile_mode is not None and self.compile_mode not in COMPILE_MODES:
            raise ValueError(f"compile_mode: got {self.compile_mode!r}, expected None or one of {COMPILE_MODES}")


@dataclass
class WanVAEStreamDecoderCache(WanVAECache, StreamingDecoderCache):
    """See `WanVAECache`."""


class WanVAEStreamDecoder(WanVAEHalf, StreamingVideoDecoder[WanVAEStreamDecoderCache]):
    """Normalised latents in, video out, a chunk at a time.

    Chunked output equals decoding everything at once for every split into chunks, single latent frames anywhere
    included; rollouts with a cache each may interleave. Inference only: no gradients.

    Args:
        config: a `WanVAEStreamDecoderConfig`.
        vae: a diffusers `AutoencoderKLWan` (Wan 2.1 or 2.2) to share weights with, instead of `config.path`. It
            keeps working; its convolution weights take the channels_last layout. Weights loaded into it later do not
            reach this decoder completely.
    Raises:
        ValueError: if not exactly one of `vae` and `config.path` is given, or tiles do not fit the latent grid.
        ImportError: without diffusers.
    """

    def __init__(self, config: WanVAEStreamDecoderConfig, vae: Any = None) -> None:
        super().__init__(config)
        vae = wan_vae(vae, config.path, config.subfolder, config.dtype)
        self._measure(vae)
        self._latent_channels = vae.config.z_dim
        self._channels = vae.config.out_channels // self._patch**2
        self._tiles = latent_tiling(config.tile_size, config.tile_stride, self._spatial_ratio, self._patch)
        self.decoder: Any = owned_half(vae.decoder, config.dtype)
        self.upsample_convs = upsample_convs(self.decoder)
        self.input_weight, self.input_bias = _folded_input(vae)
        self._pass = self._decode_pass
        if config.compile_mode is not None:
            self._pass = torch.compile(self._decode_pass, mode=config.compile_mode, fullgraph=True, dynamic=False)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the video."""
        return self.decoder.conv_in.weight.dtype

    def initialize_autoregressive_cache(self) -> WanVAEStreamDecoderCache:
        """A cache for a new rollout; it takes its sizes from the first chunk."""
        return WanVAEStreamDecoderCache()

    @torch.no_grad()
    def forward(
        self, input: Tensor, autoregressive_index: int = 0, cache: WanVAEStreamDecoderCache | None = None
    ) -> Tensor:
        """Decode one chunk.

        Args:
            input: (..., T, C, h, w) normalised latents, (z - mean) / std, in any floating-point dtype.
            autoregressive_index: of the chunk; 0 begins a video.
            cache: of this rollout, advanced once the chunk is decoded and untouched if anything raises. None decodes
                the chunk alone; with an index above 0 its history is taken to be zero.
        Returns:
            (..., T', 3, H, W) in [-1, 1], in the dtype of the weights; T' of `get_output_temporal_size`.
        Raises:
            ValueError: for a shape that is not latents, or not that of the rollout's other chunks.
            StreamOrderError: (also an AssertionError) if the index does not follow the last one in `cache`.
        """
        check_frames("input", input, self._latent_channels)
        latents = input.reshape(-1, *input.shape[-4:]).transpose(1, 2)
        frames = self.get_output_temporal_size(autoregressive_index, latents.shape[2])
        height, width = (side * self._spatial_ratio for side in latents.shape[-2:])
        video = torch.empty(
            (latents.shape[0], frames, self._channels, height, width), dtype=self.dtype, device=latents.device
        )

        end = 0
        parts = latents.split(self.config.latent_frames_per_pass, dim=2)
        for decoded in self._passes(latents, parts, autoregressive_index, cache):
            start, end = end, end + decoded.shape[2]
            self._write(decoded, video[:, start:end])
        return video.reshape(*input.shape[:-4], *video.shape[1:])

    def _decode_pass(self, latents: Tensor, past: History | None, first: bool) -> tuple[Tensor, History]:
        x = latents.to(self.input_weight.dtype).contiguous(memory_format=torch.channels_last_3d)
        x = F.conv3d(x, self.input_weight, self.input_bias).to(self.dtype)
        return decode_frames(self.decoder, self.upsample_convs, x, past, first)

    def _write(self, frames: Tensor, video: Tensor) -> None:
        """Clamp (B, C * p * p, T, H, W) into (B, T, C, H * p, W * p)."""
        p = self._patch
        frames = frames.transpose(1, 2)
        if p > 1:
            frames = frames.unflatten(2, (-1, p, p)).permute(0, 1, 2, 5, 4, 6, 3)  # width phase outermost: (C, pw, ph)
            frames = frames.reshape(video.shape)
        torch.clamp(frames, -1.0, 1.0, out=video)


def _folded_input(vae: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """Denormalisation and the 1x1x1 convolution in front of the decoder, W (z * std + mean) + b, as one, in fp32."""
    mean, std = latent_statistics(vae)
    conv = vae.post_quant_conv
    weight = conv.weight.detach().double()
    bias = conv.bias.detach().double() + weight.flatten(1) @ mean
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    weight = weight * std.view(1, -1, 1, 1, 1)
    return nn.Parameter(weight.to(dtype), requires_grad=False), nn.Parameter(bias.to(dtype), requires_grad=False)
