"""Encoder of the Wan VAE: one shot, or chunk by chunk with its causal history."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..encoders.base import EncoderConfig, StreamingEncoderCache, StreamingVideoEncoder, check_frames
from .layers import CausalPass, batch_as_frames, causal_conv, frames_as_batch, head, mid_block, residual_block
from .layers import attention_block as attention
from .stream import WanVAECache, WanVAEConfig, WanVAEHalf
from .tiles import History, latent_tiling
from .weights import latent_statistics, owned_half, wan_vae

PIXEL_RANGES = ("signed", "unit")


@dataclass(frozen=True, kw_only=True)
class WanVAEEncoderConfig(WanVAEConfig, EncoderConfig):
    """Config of `WanVAEEncoder`.

    Args:
        pixel_range: "signed" for video in [-1, 1], "unit" for video in [0, 1].
        Others: as `WanVAEConfig`.
    Raises:
        ValueError: at construction, for an unknown range.
    """

    _target: type[WanVAEEncoder] = field(default_factory=lambda: WanVAEEncoder)
    pixel_range: str = "signed"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_range not in PIXEL_RANGES:
            raise ValueError(f"pixel_range: got {self.pixel_range!r}, expected one of {PIXEL_RANGES}")


@dataclass
class WanVAEEncoderCache(WanVAECache, StreamingEncoderCache):
    """See `WanVAECache`."""


class WanVAEEncoder(WanVAEHalf, StreamingVideoEncoder[WanVAEEncoderCache]):
    """Video in, normalised latents out: the posterior mean as (mu - mean) / std, which is not sampled.

    Chunked output equals encoding the whole clip at once. Inference only: no gradients.

    Args:
        config: a `WanVAEEncoderConfig`.
        vae: a diffusers `AutoencoderKLWan` (Wan 2.1 or 2.2) to share weights with, instead of `config.path`. It
            keeps working; its convolution weights take the channels_last layout.
    Raises:
        ValueError: if not exactly one of `vae` and `config.path` is given, or tiles do not fit the latent grid.
        ImportError: without diffusers.
    """

    def __init__(self, config: WanVAEEncoderConfig, vae: Any = None) -> None:
        super().__init__(config)
        vae = wan_vae(vae, config.path, config.subfolder, config.dtype)
        self._measure(vae)
        self._channels = vae.config.in_channels // self._patch**2
        tiling = latent_tiling(config.tile_size, config.tile_stride, self._spatial_ratio, self._patch)
        self._tiles = tiling and tiling.inverse
        self.encoder: Any = owned_half(vae.encoder, config.dtype)
        self.output_weight, self.output_bias = _folded_output(vae)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the latents."""
        return self.encoder.conv_in.weight.dtype

    def initialize_autoregressive_cache(self) -> WanVAEEncoderCache:
        """A cache for a new rollout; it takes its sizes from the first chunk."""
        return WanVAEEncoderCache()

    def encode(self, video: Tensor) -> Tensor:
        """Encode a whole clip (an image is a clip of one frame): `forward` without a cache."""
        return self(video)

    @torch.no_grad()
    def forward(self, input: Tensor, autoregressive_index: int = 0, cache: WanVAEEncoderCache | None = None) -> Tensor:
        """Encode one chunk.

        Args:
            input: (..., T, 3, H, W) video in the range of `config.pixel_range`, H and W multiples of
                `spatial_compression_ratio`, T as `get_input_temporal_size` says.
            autoregressive_index: of the chunk; 0 begins a video.
            cache: of this rollout, advanced once the chunk is encoded and untouched if anything raises. None encodes
                the chunk alone; with an index above 0 its history is taken to be zero.
        Returns:
            (..., t, C, h, w) normalised latents, in the dtype of the weights.
        Raises:
            ValueError: for a shape that is no such video, or not that of the rollout's other chunks.
            TemporalSizeError: (a ValueError and AssertionError) for a frame count no chunk can have.
            StreamOrderError: (also an AssertionError) if the index does not follow the last one in `cache`.
        """
        check_frames("input", input, self._channels)
        self.get_output_temporal_size(autoregressive_index, input.shape[-4])
        if input.shape[-2] % self._spatial_ratio or input.shape[-1] % self._spatial_ratio:
            raise ValueError(
                f"input: got height and width {tuple(input.shape[-2:])}, expected multiples of {self._spatial_ratio}"
            )
        video = input.reshape(-1, *input.shape[-4:]).transpose(1, 2)
        parts = self._parts(video, first=autoregressive_index == 0)
        latents = torch.cat([*self._passes(video, parts, autoregressive_index, cache)], dim=2)
        out = latents.transpose(1, 2)
        return out.reshape(*input.shape[:-4], *out.shape[1:])

    def _parts(self, video: Tensor, first: bool) -> Iterator[Tensor]:
        """The frames of each pass, signed and patchified."""
        start = 0
        while start < video.shape[2]:
            index = 0 if first and start == 0 else 1
            end = start + self.get_input_temporal_size(index, self.config.latent_frames_per_pass)
            part = video[:, :, start:end]
            yield _patchified(part * 2 - 1 if self.config.pixel_range == "unit" else part, self._patch)
            start = end

    def _pass(self, x: Tensor, past: History | None, first: bool) -> tuple[Tensor, History]:
        x = x.to(self.dtype, memory_format=torch.channels_last_3d)
        history = CausalPass(past, first)
        x = causal_conv(self.encoder.conv_in, x, history)
        for block in self.encoder.down_blocks:
            x = down_block(block, x, history)
        x = mid_block(self.encoder.mid_block, x, history)
        x = head(self.encoder.norm_out, self.encoder.conv_out, x, history)
        latents = F.conv3d(x.to(self.output_weight.dtype), self.output_weight, self.output_bias)
        return latents.to(self.dtype), history.next


def down_block(block: Any, x: Tensor, history: CausalPass) -> Tensor:
    """A layer of the encoder's downward path: residual, attention, resampling, or the Wan 2.2 group of these."""
    if hasattr(block, "avg_shortcut"):
        y = x
        for resnet in block.resnets:
            y = residual_block(resnet, y, history)
        if block.downsampler is not None:
            y = downsample(block.downsampler, y, history)
        return y.add_(average(block.avg_shortcut, x))
    if hasattr(block, "resample"):
        return downsample(block, x, history)
    if hasattr(block, "to_qkv"):
        return attention(block, x)
    return residual_block(block, x, history)


def downsample(block: Any, x: Tensor, history: CausalPass) -> Tensor:
    x = batch_as_frames(block.resample(frames_as_batch(x)), x.shape[2])
    if block.mode != "downsample3d":
        return x
    conv = block.time_conv
    if not history.first:
        return F.conv3d(history.extend(x, 1), conv.weight, conv.bias, stride=conv.stride)
    # The first frame of a video is passed on as it is; the pairs after it see it as their past.
    history.keep(x[:, :, -1:])
    first = x[:, :, :1]
    if x.shape[2] == 1:
        return first
    return torch.cat([first, F.conv3d(x, conv.weight, conv.bias, stride=conv.stride)], dim=2)


def average(block: Any, x: Tensor) -> Tensor:
    """Parameter-free shortcut of the Wan 2.2 down blocks: time and space folded into channels, then group means."""
    t, s = block.factor_t, block.factor_s
    x = F.pad(x, (0, 0, 0, 0, -x.shape[2] % t, 0))
    batch, channels, time, height, width = x.shape
    x = x.reshape(batch, channels, time // t, t, height // s, s, width // s, s).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(batch, block.out_channels, block.group_size, time // t, height // s, width // s).mean(dim=2)


def _patchified(video: Tensor, p: int) -> Tensor:
    """(B, C, T, H, W) -> (B, C * p * p, T, H / p, W / p), the phase along the width outermost."""
    if p == 1:
        return video
    x = video.unflatten(3, (-1, p)).unflatten(5, (-1, p))  # (B, C, T, h, ph, w, pw)
    return x.permute(0, 1, 6, 4, 2, 3, 5).flatten(1, 3)


def _folded_output(vae: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """The mean's half of the 1x1x1 convolution behind the encoder and (mu - mean) / std as one, in fp32."""
    mean, std = latent_statistics(vae)
    conv, channels = vae.quant_conv, vae.config.z_dim
    weight = conv.weight.detach()[:channels].double() / std.view(-1, 1, 1, 1, 1)
    bias = (conv.bias.detach()[:channels].double() - mean) / std
    dtype = torch.promote_types(conv.weight.dtype, torch.float32)
    return nn.Parameter(weight.to(dtype), requires_grad=False), nn.Parameter(bias.to(dtype), requires_grad=False)
