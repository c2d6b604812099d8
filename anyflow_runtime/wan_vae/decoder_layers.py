"""The decoder half of the Wan VAE as functions over `CausalPass` (see `layers`)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import CausalPass, batch_as_frames, causal_conv, frames_as_batch, head, mid_block, residual_block


class UpsampleConv(nn.Module):
    """Nearest-neighbour doubling followed by a 3x3 convolution, done at the low resolution.

    Of the nine taps over a doubled image, those that read the same source pixel are summed beforehand: each of the
    four output phases is then a 2x2 convolution of the small image, 16 products a pixel instead of 36, and the doubled
    input, the largest tensor of the decoder, is never written.

    Args:
        conv: 3x3 `nn.Conv2d` with padding 1; its weights are folded now, in fp32 or better.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        weight = conv.weight.detach()
        w = weight.to(torch.promote_types(weight.dtype, torch.float32))
        # Even output rows 2i read source rows i-1, i, i; odd rows 2i+1 read i, i, i+1. Columns likewise.
        rows = [(w[:, :, 0], w[:, :, 1] + w[:, :, 2]), (w[:, :, 0] + w[:, :, 1], w[:, :, 2])]
        phases = []
        for row in rows:
            r = torch.stack(row, dim=2)
            phases.append(torch.stack((r[..., 0], r[..., 1] + r[..., 2]), dim=3))
            phases.append(torch.stack((r[..., 0] + r[..., 1], r[..., 2]), dim=3))
        folded = torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)
        self.weight = nn.Parameter(folded, requires_grad=False)
        self.bias = None if conv.bias is None else nn.Parameter(conv.bias.detach().repeat(4), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, H, W) channels_last -> (N, O, 2H, 2W)."""
        height, width = x.shape[-2:]
        y = F.conv2d(x, self.weight, self.bias, padding=1)
        channels = y.shape[1] // 4
        out = torch.empty(
            (x.shape[0], channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=torch.channels_last,
        )
        for phase in range(4):
            a, b = divmod(phase, 2)
            part = y[:, phase * channels : (phase + 1) * channels, a : a + height, b : b + width]
            out[:, :, a::2, b::2].copy_(part)
        return out


def double_time(time_conv: Any, x: Tensor, history: CausalPass) -> Tensor:
    """Every frame becomes two, except the first of the video, which is passed on and leaves no history either."""
    if not history.first:
        return _doubled(time_conv, x, history)
    first, rest = x[:, :, :1], x[:, :, 1:]
    if rest.shape[2] == 0:
        history.extend(rest, time_conv.kernel_size[0] - 1)
        return first
    return torch.cat([first, _doubled(time_conv, rest, history)], dim=2)


def _doubled(time_conv: Any, x: Tensor, history: CausalPass) -> Tensor:
    # The convolution gives the even frames in its first half of channels and the odd ones in the second.
    halves = causal_conv(time_conv, x, history).unflatten(1, (2, -1))
    return halves.permute(0, 2, 3, 1, 4, 5).flatten(2, 3)


def duplicate(block: Any, x: Tensor, first: bool) -> Tensor:
    """Parameter-free shortcut of the Wan 2.2 up blocks: channels repeated, then spread over time and space."""
    batch, _, time, height, width = x.shape
    t, s = block.factor_t, block.factor_s
    x = x.repeat_interleave(block.repeats, dim=1).view(batch, block.out_channels, t, s, s, time, height, width)
    x = x.permute(0, 1, 5, 2, 6, 3, 7, 4).reshape(batch, block.out_channels, time * t, height * s, width * s)
    # As in `double_time`, the first frame of a video is not doubled.
    return x[:, :, t - 1 :] if first else x


def _upsampler(block: Any) -> Any:
    # Wan 2.2 blocks hold it directly, Wan 2.1 blocks in a list of one.
    return block.upsampler if hasattr(block, "upsampler") else (block.upsamplers or [None])[0]


def up_block(block: Any, upsample_conv: nn.Module, x: Tensor, history: CausalPass) -> Tensor:
    upsampler = _upsampler(block)
    shortcut = getattr(block, "avg_shortcut", None)
    y = x
    for resnet in block.resnets:
        y = residual_block(resnet, y, history)
    if upsampler is not None:
        if upsampler.mode == "upsample3d":
            y = double_time(upsampler.time_conv, y, history)
        y = batch_as_frames(upsample_conv(frames_as_batch(y)), y.shape[2])
    if shortcut is not None:
        y = y.add_(duplicate(shortcut, x, history.first))
    return y


def upsample_convs(decoder: Any) -> nn.ModuleList:
    """For each up block of diffusers' decoder its folded upsampling convolution; Identity where it has none."""
    convs = []
    for block in decoder.up_blocks:
        upsampler = _upsampler(block)
        convs.append(nn.Identity() if upsampler is None else UpsampleConv(upsampler.resample[1]))
    return nn.ModuleList(convs)


def decode_frames(
    decoder: Any, convs: nn.ModuleList, x: Tensor, past: list[Tensor] | None, first: bool
) -> tuple[Tensor, list[Tensor]]:
    """One pass of the decoder.

    Args:
        decoder: diffusers' `WanDecoder3d`.
        convs: of `upsample_convs(decoder)`.
        x: (B, C, T, h, w), after the 1x1x1 convolution that precedes the decoder, in the dtype of the weights.
        past: history left by the previous pass of this video, emptied on the way; None for zeros.
        first: whether `x` begins with the first frame of the video.
    Returns:
        (B, C', T', H', W') frames, before unpatchify and clamp, and the history for the next pass. T' is
        1 + (T - 1) * r for the first pass and T * r for the others.
    """
    history = CausalPass(past, first)
    x = causal_conv(decoder.conv_in, x, history)
    x = mid_block(decoder.mid_block, x, history)
    for block, conv in zip(decoder.up_blocks, convs, strict=True):
        x = up_block(block, conv, x, history)
    return head(decoder.norm_out, decoder.conv_out, x, history), history.next
