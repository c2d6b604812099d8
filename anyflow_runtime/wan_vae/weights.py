"""What the Wan VAE encoder and decoder share: getting the weights, and their layout."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from ..optional import optional


def wan_vae(vae: Any, path: str | None, subfolder: str | None, dtype: torch.dtype | None) -> Any:
    """`vae` itself, or diffusers' `AutoencoderKLWan` loaded from `path`.

    Raises:
        ValueError: if neither or both of `vae` and `path` are given.
        TypeError: if `vae` is no AutoencoderKLWan.
        ImportError: if diffusers is not installed.
    """
    if (vae is None) == (path is None):
        given = "neither" if vae is None else "both"
        raise ValueError(f"vae, path: got {given}, expected exactly one of config.path and setup(vae=...)")
    AutoencoderKLWan = optional("diffusers", "the Wan VAE", "diffusers").AutoencoderKLWan
    if vae is None:
        return AutoencoderKLWan.from_pretrained(
            path, subfolder=subfolder, torch_dtype=dtype, use_safetensors=True
        ).eval()
    if not isinstance(vae, AutoencoderKLWan):
        raise TypeError(f"vae: got {type(vae).__name__}, expected a diffusers AutoencoderKLWan")
    return vae


def owned_half(half: Any, dtype: torch.dtype | None) -> Any:
    """`half` of a VAE in `dtype` and channels_last: the same parameters, copied only where the dtype differs.

    The layout of shared weights changes in memory, their values, shapes and owner do not.
    """
    if dtype is not None and dtype != next(half.parameters()).dtype:
        half = copy.deepcopy(half).to(dtype)
    for layer in half.modules():
        if isinstance(layer, nn.Conv3d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last_3d)
        elif isinstance(layer, nn.Conv2d):
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
    return half


def latent_statistics(vae: Any) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each latent channel, (z_dim,) fp64, on the device of the weights."""
    device = next(vae.parameters()).device
    mean = torch.tensor(vae.config.latents_mean, dtype=torch.float64, device=device)
    std = torch.tensor(vae.config.latents_std, dtype=torch.float64, device=device)
    if mean.shape != (vae.config.z_dim,) or std.shape != mean.shape:
        raise ValueError(
            f"vae: got {mean.numel()} values of latents_mean and {std.numel()} of latents_std, expected z_dim = "
            f"{vae.config.z_dim}"
        )
    return mean, std
