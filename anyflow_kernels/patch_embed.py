"""Patch embedding and its inverse for the head: the face of the C++ extension (csrc/).

    tokens[n] = weight @ patch[n] + bias

A patch embedding is a Conv3d whose stride is its kernel, so it is one GEMM on latents rearranged to (tokens, features).
The extension packs them straight from strided (B, F, C, H, W), converting to the dtype of the GEMM, which then writes
into the caller's token slab; without the extension PyTorch rearranges and copies. For N tokens of K features: N*K
elements read, packed and read again, N*D written; 2*N*K*D FLOPs.
Source: diffusers transformer_anyflow_far.py, `patch_embedding` and `far_patch_embedding`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

try:
    from . import _C  # noqa: F401  (loading it registers torch.ops.anyflow)
except ImportError as error:
    _load_error: ImportError | None = error
else:
    _load_error = None

__all__ = ["extension_available", "extension_obstacle", "patch_embed", "unpatchify"]


def extension_available() -> bool:
    """Whether the C++ extension is built and loads; without it `patch_embed` and `unpatchify` are slower."""
    return _load_error is None


def extension_obstacle() -> str | None:
    """Why the C++ extension does not load here, what that costs and what to do; None if it does."""
    if _load_error is None:
        return None
    return (
        f"not built, or does not load here ({_load_error}): patch embedding and unpatchify run in plain PyTorch, with "
        "more passes over the latents. To build it, in the source tree: pip install -e . --no-build-isolation (needs "
        "torch and a C++ compiler; unset ANYFLOW_NO_EXT)"
    )


def patch_embed(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_size: Sequence[int],
    out: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """See `anyflow_kernels.operations.Ops.patch_embed`, which checks the arguments.

    fp32, bf16, fp16 or float64; the latents need not have the dtype of the weight, which is that of the GEMM. The slab
    may be a slice of a larger one. If anything requires grad, autograd records the write.

    Raises:
        RuntimeError: on what would leave the memory of an argument.
    """
    if bias is not None:
        bias = bias.contiguous()  # the GEMMs read a bias as dense
    if out is None:
        return _embed(latents, weight, bias)
    written = out[:, offset : offset + _token_count(latents.shape, patch_size)]
    recorded = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (latents, weight, bias, out))
    # An operation that mutates its argument cannot carry an autograd formula: let the copy record the write.
    if recorded or not extension_available():
        return written.copy_(_embed(latents, weight, bias))
    torch.ops.anyflow.patch_embed_out(latents, weight, bias, out, offset)
    return written


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: int) -> Tensor:
    """See `anyflow_kernels.operations.Ops.unpatchify`, which checks the arguments. Tokens may be a strided slice.

    Raises:
        RuntimeError: on what would leave the memory of an argument.
    """
    if not extension_available():
        (f, h, w), (pt, ph, pw) = grid, patch_size
        places = {"f": f, "h": h, "w": w, "pt": pt, "ph": ph, "pw": pw}
        return rearrange(tokens, "b (f h w) (pt ph pw c) -> b (f pt) c (h ph) (w pw)", **places).contiguous()
    frames, rows, columns = (n * p for n, p in zip(grid, patch_size, strict=True))
    size = [tokens.shape[0], frames, channels, rows, columns]
    return torch.ops.anyflow.unpack_patches(tokens, size, patch_size, True, tokens.dtype)


def _embed(latents: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if extension_available():
        return torch.ops.anyflow.patch_embed(latents, weight, bias)
    pt, ph, pw = weight.shape[2:]
    frames, rows, columns = latents.shape[1] // pt * pt, latents.shape[3] // ph * ph, latents.shape[4] // pw * pw
    whole = latents[:, :frames, :, :rows, :columns].to(weight.dtype)
    packed = rearrange(whole, "b (f pt) c (h ph) (w pw) -> b (f h w) (c pt ph pw)", pt=pt, ph=ph, pw=pw)
    return F.linear(packed, weight.flatten(1), bias)


def _fake_patch_embed(latents: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return weight.new_empty(latents.shape[0], _token_count(latents.shape, weight.shape[2:]), weight.shape[0])


def _fake_pack(latents: Tensor, patch_size: Sequence[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    features = latents.shape[2] * math.prod(patch_size)
    return latents.new_empty(latents.shape[0], _token_count(latents.shape, patch_size), features, dtype=dtype)


def _fake_unpack(
    tokens: Tensor, size: Sequence[int], patch_size: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> Tensor:
    return tokens.new_empty(size, dtype=dtype)


def _token_count(size: Sequence[int], patch: Sequence[int]) -> int:
    return (size[1] // patch[0]) * (size[3] // patch[1]) * (size[4] // patch[2])


def _save_embed(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latents, weight, bias = inputs
    ctx.save_for_backward(latents, weight)
    ctx.has_bias = bias is not None


def _backward_embed(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    latents, weight = ctx.saved_tensors
    need_latents, need_weight, need_bias = ctx.needs_input_grad
    patch = list(weight.shape[2:])
    grad_latents = grad_weight = grad_bias = None
    if need_latents:
        features = grad @ weight.flatten(1)
        grad_latents = torch.ops.anyflow.unpack_patches(features, latents.shape, patch, False, latents.dtype)
    if need_weight:  # packing again is cheaper than keeping the packed latents alive
        packed = torch.ops.anyflow.pack_patches(latents, patch, False, weight.dtype)
        grad_weight = (grad.flatten(0, 1).T @ packed.flatten(0, 1)).view(weight.shape)
    if need_bias and ctx.has_bias:
        grad_bias = grad.sum((0, 1))
    return grad_latents, grad_weight, grad_bias


# Packing and unpacking are linear and adjoint: each is the other's backward.
def _save_pack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    latents, ctx.patch_size, ctx.channels_last, _ = inputs
    ctx.size, ctx.dtype = latents.shape, latents.dtype


def _backward_pack(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return (
        torch.ops.anyflow.unpack_patches(grad, ctx.size, ctx.patch_size, ctx.channels_last, ctx.dtype),
        None,
        None,
        None,
    )


def _save_unpack(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tokens, _, ctx.patch_size, ctx.channels_last, _ = inputs
    ctx.dtype = tokens.dtype


def _backward_unpack(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
    return torch.ops.anyflow.pack_patches(grad, ctx.patch_size, ctx.channels_last, ctx.dtype), None, None, None, None


if extension_available():
    torch.library.register_fake("anyflow::patch_embed", _fake_patch_embed)
    torch.library.register_fake("anyflow::patch_embed_out", lambda *arguments: None)
    torch.library.register_fake("anyflow::pack_patches", _fake_pack)
    torch.library.register_fake("anyflow::unpack_patches", _fake_unpack)
    torch.library.register_autograd("anyflow::patch_embed", _backward_embed, setup_context=_save_embed)
    torch.library.register_autograd("anyflow::pack_patches", _backward_pack, setup_context=_save_pack)
    torch.library.register_autograd("anyflow::unpack_patches", _backward_unpack, setup_context=_save_unpack)


class _Operation(ModuleType):
    """`anyflow_kernels.patch_embed` is this module once it is loaded, and is promised to be the operation too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        from . import load_ops

        return load_ops("auto").patch_embed(*args, **kwargs)


sys.modules[__name__].__class__ = _Operation
