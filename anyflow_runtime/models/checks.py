"""What a forward's inputs have to be; raised before any kernel runs, naming the argument."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import AnyFlowModel
    from .cache import Context, FarCache


def expect(condition: bool, name: str, got: object, expected: object) -> None:
    """Raise ValueError unless the condition holds."""
    if not condition:
        raise ValueError(f"{name}: got {got}, expected {expected}")


def check_video(
    config: Any,
    hidden_states: Tensor,
    timestep: Tensor,
    r_timestep: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_image: Tensor | None = None,
) -> None:
    """Raise ValueError, naming the argument, if the inputs of a forward cannot belong together."""
    shape, channels, patch = tuple(hidden_states.shape), config.in_channels, tuple(config.patch_size)
    batch = shape[:1]
    expect(len(shape) == 5 and shape[2] == channels, "hidden_states", shape, f"(B, F, {channels}, H, W)")
    fits = shape[3] >= patch[1] and shape[4] >= patch[2]
    expect(fits, "hidden_states", shape, f"H and W of at least one patch {patch}")
    times, r_times = tuple(timestep.shape), tuple(r_timestep.shape)
    for name, time in (("timestep", times), ("r_timestep", r_times)):
        expect(len(time) == 2 and time[:1] == batch, name, time, f"(B={shape[0]}, F)")
    expect(r_times == times, "r_timestep", r_times, f"that of timestep {times}")
    embeddings = [("encoder_hidden_states", encoder_hidden_states, config.text_dim)]
    if encoder_hidden_states_image is not None and config.image_dim is not None:
        embeddings.append(("encoder_hidden_states_image", encoder_hidden_states_image, config.image_dim))
    for name, x, width in embeddings:
        fits = x.ndim == 3 and x.shape[:1] == batch and x.shape[2] == width
        expect(fits, name, tuple(x.shape), f"(B={shape[0]}, S, {width})")


def check_frame_count(latents: Tensor, times: Tensor, frames: int, chunks: object) -> None:
    """Raise ValueError unless latents (B, F, C, H, W) and times (B, F) have the frames of `chunks`."""
    shape = tuple(latents.shape)
    expect(shape[1] == frames, "hidden_states", shape, f"F={frames} frames for {chunks}")
    expect(times.shape[1] == frames, "timestep", tuple(times.shape), f"(B, F={frames})")


def check_parallel(model: AnyFlowModel, latents: Tensor) -> None:
    """Raise ValueError if a gradient is wanted of several processes."""
    if model.parallel is not None and torch.is_grad_enabled():
        wanted = latents.requires_grad or any(p.requires_grad for p in model.parameters())
        got = f"gradients enabled on {model.parallel.world} processes"
        expect(not wanted, "context parallelism", got, "inference under torch.no_grad()")


def check_cache(model: AnyFlowModel, cache: FarCache, latents: Tensor) -> None:
    """Raise ValueError unless the cache was made for this model and this batch."""
    config, batch = model.config, cache.batch_size
    size = (config.num_layers, config.num_attention_heads, config.attention_head_dim)
    expect(cache.model_size == size, "kv_cache", cache.model_size, f"(layers, heads, head_dim) = {size}")
    made_for, now = cache.parallel or "one process", model.parallel or "one process"
    expect(made_for == now, "kv_cache", f"one made for {made_for}", f"one made for {now}")
    expect(latents.shape[0] == batch, "hidden_states", latents.shape[0], f"the batch of the cache, {batch}")


def check_context(model: AnyFlowModel, cache: FarCache, context: Context) -> None:
    """Raise ValueError unless finished chunks can become the context of the cache."""
    cache.layout("prefill", context.partition)  # raises on a bad partition
    shape, frames = () if context.latents is None else tuple(context.latents.shape), sum(context.partition)
    expected = (cache.batch_size, frames, model.config.in_channels, *cache.latent_size)
    expect(shape == expected, "hidden_states", shape, f"(B, F, C, H, W) = {expected} for {list(context.partition)}")
    expect(context.times.shape[2] == frames, "timestep", tuple(context.times.shape[1:]), f"(B, F={frames})")
