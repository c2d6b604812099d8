"""Patch embedding and its inverse for the head: the face of the C++ extension (csrc/).

    tokens[n] = weight @ patch[n] + bias

A patch embedding is a Conv3d whose stride is its kernel, so it is one GEMM on latents rearranged to (tokens, features).
The extension packs them straight from strided (B, F, C, H, W), converting to the dtype of the GEMM, which then writes
into the caller's token slab; on a device it was not built for PyTorch copies instead, with more passes. For N tokens of
K features: N*K elements read, packed and read again, N*D written; 2*N*K*D FLOPs.
Source: diffusers transformer_anyflow_far.py, `patch_embedding` and `far_patch_embedding`.
"""

from __future__ import annotations

import functools
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["extension_available", "extension_obstacle", "patch_embed", "unpatchify"]

_LOSS = "patch embedding and unpatchify run in plain PyTorch, with more passes over the latents"
_CURE = "in the source tree, with torch, setuptools and a C++ compiler: pip install -e . --no-build-isolation"


def extension_available() -> bool:
    """Whether the C++ extension is built and loads; without it `patch_embed` and `unpatchify` are slower."""
    return _load_error is None


def extension_obstacle() -> str | None:
    """Why the C++ extension does not load here, what that costs and what to do; None if it does."""
    if _load_error is None:
        return None
    return f"not built, or does not load here ({_load_error}): {_LOSS}. To build it, {_CURE}"


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
        return torch.ops.anyflow.patch_embed(latents, weight, bias)
    written = out[:, offset : offset + _token_count(latents.shape, patch_size)]
    # An operation that mutates its argument cannot carry an autograd formula: let the copy record the write.
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (latents, weight, bias, out)):
        return written.copy_(torch.ops.anyflow.patch_embed(latents, weight, bias))
    torch.ops.anyflow.patch_embed_out(latents, weight, bias, out, offset)
    return written


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: int) -> Tensor:
    """See `anyflow_kernels.operations.Ops.unpatchify`, which checks the arguments. Tokens may be a strided slice.

    Raises:
        RuntimeError: on what would leave the memory of an argument.
    """
    frames, rows, columns = (n * p for n, p in zip(grid, patch_size, strict=True))
    size = [tokens.shape[0], frames, channels, rows, columns]
    return torch.ops.anyflow.unpack_patches(tokens, size, patch_size, True, tokens.dtype)


def _patch_embed(latents: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    packed = torch.ops.anyflow.pack_patches.default(latents, weight.shape[2:], False, weight.dtype)
    linear = _onednn_linear(packed)
    if linear is None:
        return F.linear(packed, weight.flatten(1), bias)
    return linear(packed, weight.flatten(1), bias, "none", [], "")


def _patch_embed_out(latents: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor, offset: int) -> None:
    packed = torch.ops.anyflow.pack_patches.default(latents, weight.shape[2:], False, weight.dtype)
    linear, matrix = _onednn_linear(packed), weight.flatten(1)
    for rows, target in zip(packed, out.narrow(1, offset, packed.shape[1]), strict=True):
        if linear is not None:
            # It cannot write into a given tensor; after a block of rows the copy finds it in the cache.
            for start in range(0, len(rows), 512):
                block = linear(rows[start : start + 512], matrix, bias, "none", [], "")
                target[start : start + 512].copy_(block)
        elif bias is None:
            torch.mm(rows, matrix.t(), out=target)
        else:
            torch.addmm(bias, rows, matrix.t(), out=target)


def _onednn_linear(packed: Tensor) -> Callable[..., Tensor] | None:
    """oneDNN's GEMM where torch has one and it is the faster.

    fp32 on an AMD EPYC: 215 GFLOP/s a core against 70 to 100 of MKL, which keeps its AVX-512 code for Intel.
    """
    if not packed.is_cpu or packed.dtype != torch.float32 or not packed.numel() or not torch.backends.mkldnn.enabled:
        return None
    return _onednn_operation()


@functools.cache
def _onednn_operation() -> Callable[..., Tensor] | None:
    linear = getattr(torch.ops.mkldnn, "_linear_pointwise", None)
    return linear and linear.default


def _pack_patches(latents: Tensor, patch_size: Sequence[int], channels_last: bool, dtype: torch.dtype) -> Tensor:
    _warn_once(latents.device.type)
    patches = _patches(latents, patch_size, channels_last)
    tokens = torch.empty(patches.shape, dtype=dtype, device=latents.device).copy_(patches)
    return tokens.flatten(4).flatten(1, 3)


def _unpack_patches(
    tokens: Tensor, size: Sequence[int], patch_size: Sequence[int], channels_last: bool, dtype: torch.dtype
) -> Tensor:
    _warn_once(tokens.device.type)
    latents = tokens.new_zeros(size, dtype=dtype)
    patches = _patches(latents, patch_size, channels_last)
    patches.copy_(tokens.reshape(patches.shape))
    return latents


def _patches(latents: Tensor, patch_size: Sequence[int], channels_last: bool) -> Tensor:
    """A view (batch, frames, rows, columns, ...) of the whole patches; "..." are the features of a token."""
    t, h, w = patch_size
    frames, rows, columns = latents.shape[1] // t, latents.shape[3] // h, latents.shape[4] // w
    whole = latents[:, : frames * t, :, : rows * h, : columns * w]
    apart = whole.unflatten(4, (columns, w)).unflatten(3, (rows, h)).unflatten(1, (frames, t))
    return apart.permute(0, 1, 4, 6, *((2, 5, 7, 3) if channels_last else (3, 2, 5, 7)))


@functools.cache
def _warn_once(device: str) -> None:
    what = f"has no part for {device}" if extension_available() else f"is not built, or does not load ({_load_error})"
    warnings.warn(f"the C++ extension of anyflow_kernels {what}: {_LOSS}. To build it, {_CURE}", stacklevel=2)


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


def _define(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    torch.library.define(f"anyflow::{name}", schema, tags=(torch.Tag.pt2_compliant_tag,))
    # For every device; a kernel that the extension registers for its device comes before it.
    torch.library.impl(f"anyflow::{name}", "default", implementation)
    torch.library.register_fake(f"anyflow::{name}", fake)


_define(
    "pack_patches",
    "(Tensor latents, int[3] patch_size, bool channels_last, ScalarType dtype) -> Tensor",
    _pack_patches,
    _fake_pack,
)
_define(
    "unpack_patches",
    "(Tensor tokens, SymInt[] size, int[3] patch_size, bool channels_last, ScalarType dtype) -> Tensor",
    _unpack_patches,
    _fake_unpack,
)
_define("patch_embed", "(Tensor latents, Tensor weight, Tensor? bias) -> Tensor", _patch_embed, _fake_patch_embed)
_define(
    "patch_embed_out",
    "(Tensor latents, Tensor weight, Tensor? bias, Tensor(a!) out, SymInt offset) -> ()",
    _patch_embed_out,
    lambda *arguments: None,
)
torch.library.register_autograd("anyflow::patch_embed", _backward_embed, setup_context=_save_embed)
torch.library.register_autograd("anyflow::pack_patches", _backward_pack, setup_context=_save_pack)
torch.library.register_autograd("anyflow::unpack_patches", _backward_unpack, setup_context=_save_unpack)

try:
    from . import _C  # noqa: F401  (loading it registers kernels of pack_patches and unpack_patches)
except ImportError as error:
    _load_error: ImportError | None = error
else:
    _load_error = None


class _Operation(ModuleType):
    """`anyflow_kernels.patch_embed` is this module once it is loaded, and is promised to be the operation too."""

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        from . import load_ops

        return load_ops("auto").patch_embed(*args, **kwargs)


sys.modules[__name__].__class__ = _Operation
