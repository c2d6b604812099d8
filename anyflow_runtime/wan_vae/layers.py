"""The layers of the Wan video VAE as functions of (frames, past) -> (frames, next past).

diffusers' `AutoencoderKLWan` keeps its causal history in lists on the module, frame by frame. Here the history is an
argument: a `CausalPass` hands every convolution the frames before the chunk and collects those the next chunk needs,
so nothing is left on the module, rollouts may interleave, a pass that fails changes nothing, and a pass may hold any
number of frames, one included. The parameters are diffusers' own.

Activations are `(B, C, T, H, W)` in channels_last_3d: a frame is one dense block, so history is copied by memcpy,
normalisation runs over neighbours in memory, and the 2-D layers see a free view.
Source: Wan 2.1 and 2.2 VAE as in diffusers/models/autoencoders/autoencoder_kl_wan.py.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# The norm divides by max(|x|, 1e-12); this only keeps 0/0 out of an all-zero pixel.
NORM_EPS = 1e-30


class CausalPass:
    """The history of one pass over the convolutions, in calling order.

    Args:
        past: what the previous pass left in `next`, None for a history of zeros. The list is emptied on the way, so
            that what nobody else holds is freed as it is replaced.
        first: whether this pass holds the first frame of the video.
    """

    def __init__(self, past: list[Tensor] | None, first: bool) -> None:
        self.first = first
        self.next: list[Tensor] = []
        self._past = past

    def extend(self, x: Tensor, frames: int, activation: bool = False) -> Tensor:
        """`[past | x]` on the time axis, `x` through SiLU if asked; the last `frames` frames are kept for `next`."""
        batch, channels, time, height, width = x.shape
        joined = torch.empty(
            (batch, channels, frames + time, height, width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last_3d,
        )
        if self._past is None:
            joined[:, :, :frames].zero_()
        else:
            joined[:, :, :frames].copy_(self._past.pop(0))
        if activation and not torch.compiler.is_compiling():
            torch.ops.aten.silu.out(x, out=joined[:, :, frames:])
        else:
            # A compiler fuses SiLU and copy by itself, and takes no `out=` that is a view.
            joined[:, :, frames:].copy_(F.silu(x) if activation else x)
        self.keep(joined[:, :, -frames:])
        return joined

    def keep(self, x: Tensor) -> None:
        """Leave `x` to the next pass, copied: a view would keep the whole chunk alive."""
        self.next.append(x.clone(memory_format=torch.channels_last_3d))


def channel_norm(norm: Any, x: Tensor) -> Tensor:
    """`x / |x| * sqrt(C) * gamma` over the channels of every pixel: RMSNorm, fp32 inside."""
    channels_last = F.rms_norm(x.movedim(1, -1), (x.shape[1],), norm.gamma.flatten(), NORM_EPS)
    return channels_last.movedim(-1, 1)


def causal_conv(conv: Any, x: Tensor, history: CausalPass, activation: bool = False) -> Tensor:
    """Convolution that sees `kernel - 1` frames of the past and none of the future."""
    time, height, width = conv.kernel_size
    x = history.extend(x, time - 1, activation)
    # The spatial zeros are left to the convolution; padding by hand would copy the chunk again.
    return F.conv3d(x, conv.weight, conv.bias, padding=(0, height // 2, width // 2))


def pointwise_conv(conv: Any, x: Tensor) -> Tensor:
    """Convolution with a 1x1x1 kernel."""
    return F.conv3d(x, conv.weight, conv.bias)


def residual_block(block: Any, x: Tensor, history: CausalPass) -> Tensor:
    shortcut = x if isinstance(block.conv_shortcut, nn.Identity) else pointwise_conv(block.conv_shortcut, x)
    x = causal_conv(block.conv1, channel_norm(block.norm1, x), history, activation=True)
    x = causal_conv(block.conv2, channel_norm(block.norm2, x), history, activation=True)
    return x.add_(shortcut)


def attention_block(block: Any, x: Tensor) -> Tensor:
    """Single-head attention among the pixels of each frame."""
    batch, channels, time, height, width = x.shape
    h = channel_norm(block.norm, x).movedim(1, -1).reshape(batch * time, height * width, channels)
    q, k, v = F.linear(h, block.to_qkv.weight.flatten(1), block.to_qkv.bias).chunk(3, dim=-1)
    h = F.scaled_dot_product_attention(q, k, v)
    h = F.linear(h, block.proj.weight.flatten(1), block.proj.bias)
    return h.view(batch, time, height, width, channels).movedim(-1, 1) + x


def mid_block(block: Any, x: Tensor, history: CausalPass) -> Tensor:
    x = residual_block(block.resnets[0], x, history)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        if attention is not None:
            x = attention_block(attention, x)
        x = residual_block(resnet, x, history)
    return x


def frames_as_batch(x: Tensor) -> Tensor:
    """(B, C, T, H, W) -> (B*T, C, H, W), a view in channels_last_3d."""
    return x.transpose(1, 2).flatten(0, 1)


def batch_as_frames(x: Tensor, time: int) -> Tensor:
    """The inverse of `frames_as_batch`."""
    return x.unflatten(0, (-1, time)).transpose(1, 2)


def head(norm: Any, conv: Any, x: Tensor, history: CausalPass) -> Tensor:
    return causal_conv(conv, channel_norm(norm, x), history, activation=True)
