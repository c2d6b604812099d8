"""Encoder of the Wan VAE: one shot, or chunk by chunk with its causal history."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..causal_time import StreamOrderError
from ..encoders.base import EncoderConfig, StreamingEncoderCache, StreamingVideoEncoder, check_frames
from .layers import CausalPass, batch_as_frames, causal_conv, frames_as_batch, head, mid_block, residual_block
from .layers import attention_block as attention
from .tiles import History, Tiling, check_tiles, latent_tiles
from .weights import latent_statistics, owned_half, spatial_ratio, temporal_ratio, wan_vae

PIXEL_RANGES = ("signed", "unit")


@dataclass(frozen=True, kw_only=True)
class WanVAEEncoderConfig(EncoderConfig):
    """Config of `WanVAEEncoder`.

    Args:
        path: diffusers directory or hub id to load from; None if the VAE is given to `setup(vae=...)`.
        subfolder: of `path`, where the VAE lies.
        dtype: of weights and latents; None keeps that of the VAE.
        pixel_range: "signed" for video in [-1, 1], "unit" for video in [0, 1].
        latent_frames_per_pass: longer clips are encoded in several passes, which bounds the memory.
        tile_size: side in pixels of the spatial tiles larger frames are encoded in; None encodes them whole.
            Tiles save memory and change the latents slightly, as the attention sees one tile at a time.
        tile_stride: distance in pixels between tiles; what overlaps is blended.
    Raises:
        ValueError: at construction, for an unknown range, a count below one or a stride beyond the tile.
    """

    _target: type[WanVAEEncoder] = field(default_factory=lambda: WanVAEEncoder)
    path: str | None = None
    subfolder: str | None = "vae"
    dtype: torch.dtype | None = None
    pixel_range: str = "signed"
    latent_frames_per_pass: int = 1
    tile_size: int | None = None
    tile_stride: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pixel_range not in PIXEL_RANGES:
            raise ValueError(f"pixel_range: got {self.pixel_range!r}, expected one of {PIXEL_RANGES}")
        if self.latent_frames_per_pass < 1:
            raise ValueError(f"latent_frames_per_pass: got {self.latent_frames_per_pass}, expected at least 1")
        check_tiles(self.tile_size, self.tile_stride)


@dataclass
class WanVAEEncoderCache(StreamingEncoderCache):
    """The causal history of one rollout; replaced as a whole by every chunk, its tensors are never written into."""

    history: tuple[tuple[Tensor, ...], ...] | None = None  # one per tile
    video_shape: tuple[int, ...] | None = None  # (B, H, W) of every chunk of this rollout
    autoregressive_index: int = -1  # of the last chunk encoded


class WanVAEEncoder(StreamingVideoEncoder[WanVAEEncoderCache]):
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
        self._spatial_ratio, self._temporal_ratio = spatial_ratio(vae), temporal_ratio(vae)
        self._patch = vae.config.patch_size or 1
        self._channels = vae.config.in_channels // self._patch**2
        self._tiles = self._tiling()
        self.encoder: Any = owned_half(vae.encoder, config.dtype)
        self.output_weight, self.output_bias = _folded_output(vae)

    def _tiling(self) -> Tiling | None:
        if self.config.tile_size is None:
            return None
        size, stride = latent_tiles(self.config.tile_size, self.config.tile_stride, self._spatial_ratio)
        scale = self._spatial_ratio // self._patch
        return Tiling(size * scale, stride * scale, size, stride)

    @property
    def spatial_compression_ratio(self) -> int:
        return self._spatial_ratio

    @property
    def temporal_compression_ratio(self) -> int:
        return self._temporal_ratio

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
        shape = (video.shape[0], *video.shape[-2:])
        if cache is not None:
            if autoregressive_index != cache.autoregressive_index + 1:
                raise StreamOrderError(
                    f"autoregressive_index: got {autoregressive_index}, expected {cache.autoregressive_index + 1}, the "
                    "next of this cache"
                )
            if cache.video_shape is not None and cache.video_shape != shape:
                raise ValueError(f"input: got (B, H, W) = {shape}, expected {cache.video_shape}, that of this rollout")

        # Lists that the passes empty: only the tensors of the last chunk, in the cache, outlive their use.
        past = None if cache is None else cache.history
        history = None if past is None else [list(tile) for tile in past]
        latents, start, first = [], 0, autoregressive_index == 0
        while start < video.shape[2]:
            end = start + self.get_input_temporal_size(0 if first else 1, self.config.latent_frames_per_pass)
            encoded, history = self._encode_tiles(video[:, :, start:end], history, first)
            latents.append(encoded)
            start, first = end, False

        if cache is not None:
            cache.history = tuple(map(tuple, history or ()))
            cache.video_shape, cache.autoregressive_index = shape, autoregressive_index
        out = torch.cat(latents, dim=2).transpose(1, 2)
        return out.reshape(*input.shape[:-4], *out.shape[1:])

    def _encode_tiles(self, video: Tensor, history: list[History] | None, first: bool) -> tuple[Tensor, list[History]]:
        """(B, C, T, H, W) video -> latents, encoded whole or in blended tiles."""
        if self.config.pixel_range == "unit":
            video = video * 2 - 1
        x = _patchified(video, self._patch)
        if self._tiles is not None and not self._tiles.covers(*x.shape[-2:]):
            return self._tiles.run(self._encode_pass, x, history, first)
        latents, past = self._encode_pass(x, None if history is None else history[0], first)
        return latents, [past]

    def _encode_pass(self, x: Tensor, past: History | None, first: bool) -> tuple[Tensor, History]:
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
