"""Patch embedding and its inverse for the head: the face of the C++ extension (csrc/).

    tokens[n] = weight @ patch[n] + bias

A patch embedding is a Conv3d whose stride is its kernel, so it is one GEMM on latents rearranged to (tokens, features).
The extension packs them straight from strided (B, F, C, H, W), converting to the dtype of the GEMM, which then writes
into the caller's token slab. For N tokens of K features: N*K elements read, packed and read again, N*D written;
2*N*K*D FLOPs. Source: diffusers transformer_anyflow_far.py, `patch_embedding` and `far_patch_embedding`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

try:
    from . import _C  # noqa: F401  (loading it registers torch.ops.anyflow)
except ImportError as error:
    _load_error: ImportError | None = error
else:
    _load_error = None

__all__ = ["extension_available", "patch_embed", "unpatchify"]

Triple = tuple[int, int, int]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def extension_available() -> bool:
    """Whether the C++ extension is built and loads; `patch_embed` and `unpatchify` need it."""
    return _load_error is None


def patch_embed(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_size: Sequence[int],
    out: Tensor | None = None,
    offset: int = 0,
) -> Tensor:
    """Latents to tokens, as a Conv3d with kernel = stride = patch_size; what fills no whole patch is dropped.

    Args:
        latents: (B, F, C, H, W), any strides; fp32, bf16, fp16 or float64, not necessarily the dtype of the weight.
        weight: (D, C, pt, ph, pw), the Conv3d weight. Its dtype is that of the GEMM and of the tokens.
        bias: (D,) in the dtype of the weight, or None.
        patch_size: (pt, ph, pw), that of the weight.
        out: (B, T, D) slab in the dtype of the weight with a dense last dimension; batches and tokens may be strided,
            as in a slice of a larger slab. If anything requires grad, autograd records the write.
        offset: first token of the slab to write.

    Returns:
        (B, F//pt * H//ph * W//pw, D), tokens in the order frame, row, column; with `out`, the written view of it.

    Raises:
        ValueError, TypeError: on sizes, dtypes or devices that do not fit together.
        RuntimeError: if the C++ extension is not built.
    """
    _require_extension()
    patch = _triple("patch_size", patch_size)
    _check_floating("latents", latents, 5, "(B, F, C, H, W)")
    _check_floating("weight", weight, 5, "(D, C, pt, ph, pw)")
    if tuple(weight.shape[1:]) != (latents.shape[2], *patch):
        raise ValueError(
            f"weight: got {tuple(weight.shape)}, expected (D, {latents.shape[2]}, {', '.join(map(str, patch))}) "
            f"for latents {tuple(latents.shape)} and patch_size {patch}"
        )
    if bias is not None and (tuple(bias.shape) != (weight.shape[0],) or bias.dtype != weight.dtype):
        raise ValueError(f"bias: got {tuple(bias.shape)} {bias.dtype}, expected ({weight.shape[0]},) {weight.dtype}")
    for name, tensor in (("weight", weight), ("bias", bias), ("out", out)):
        if tensor is not None and tensor.device != latents.device:
            raise ValueError(f"{name}: got device {tensor.device}, expected that of the latents, {latents.device}")
    if out is None:
        if offset != 0:
            raise ValueError(f"offset: got {offset} without out, expected 0")
        return torch.ops.anyflow.patch_embed(latents, weight, bias)

    tokens = (latents.shape[1] // patch[0]) * (latents.shape[3] // patch[1]) * (latents.shape[4] // patch[2])
    _check_slab(out, latents.shape[0], weight, tokens, offset)
    written = out[:, offset : offset + tokens]
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (latents, weight, bias, out)):
        # An operation that mutates its argument cannot carry an autograd formula: let the copy record the write.
        return written.copy_(torch.ops.anyflow.patch_embed(latents, weight, bias))
    torch.ops.anyflow.patch_embed_out(latents, weight, bias, out, offset)
    return written


def unpatchify(tokens: Tensor, grid: Sequence[int], patch_size: Sequence[int], channels: int) -> Tensor:
    """Tokens of the output head to latents, in one pass.

    Args:
        tokens: (B, frames*rows*columns, pt*ph*pw*C), tokens in the order frame, row, column, features of a token in the
            order (pt, ph, pw, C); may be a strided slice. fp32, bf16, fp16 or float64.
        grid: (frames, rows, columns) counted in tokens: latents of F x H x W have (F//pt, H//ph, W//pw).
        patch_size: (pt, ph, pw).
        channels: C, latent channels.

    Returns:
        (B, frames*pt, C, rows*ph, columns*pw), contiguous, dtype of the tokens.

    Raises:
        ValueError, TypeError: on sizes or dtypes that do not fit together.
        RuntimeError: if the C++ extension is not built.
    """
    _require_extension()
    patch, cells = _triple("patch_size", patch_size), _triple("grid", grid, minimum=0)
    _check_floating("tokens", tokens, 3, "(B, frames*rows*columns, pt*ph*pw*C)")
    if isinstance(channels, bool) or not isinstance(channels, int) or channels < 1:
        raise ValueError(f"channels: got {channels!r}, expected a positive integer")
    count, features = cells[0] * cells[1] * cells[2], patch[0] * patch[1] * patch[2] * channels
    if tokens.shape[1] != count or tokens.shape[2] != features:
        raise ValueError(
            f"tokens: got {tuple(tokens.shape)}, expected (B, {count}, {features}) for grid {cells}, "
            f"patch_size {patch} and {channels} channels"
        )
    size = [tokens.shape[0], cells[0] * patch[0], channels, cells[1] * patch[1], cells[2] * patch[2]]
    return torch.ops.anyflow.unpack_patches(tokens, size, patch, True, tokens.dtype)


def _require_extension() -> None:
    if _load_error is not None:
        raise RuntimeError(
            "anyflow_kernels was installed without its C++ extension, or it does not load here. Build it in the source "
            "tree: pip install -e . --no-build-isolation (needs torch and a C++ compiler; unset ANYFLOW_NO_EXT). "
            f"Import failed with: {_load_error}"
        )


def _triple(name: str, value: Sequence[int], minimum: int = 1) -> Triple:
    triple = tuple(value)
    if len(triple) != 3 or any(isinstance(x, float | bool) or x < minimum for x in triple):
        raise ValueError(f"{name}: got {value!r}, expected three integers >= {minimum}")
    return triple


def _check_floating(name: str, tensor: Tensor, dims: int, layout: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, expected a tensor {layout}")
    if tensor.ndim != dims:
        raise ValueError(f"{name}: got {tensor.ndim} dimensions {tuple(tensor.shape)}, expected {layout}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name}: got {tensor.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def _check_slab(out: Tensor, batch: int, weight: Tensor, tokens: int, offset: int) -> None:
    _check_floating("out", out, 3, "(B, T, D)")
    if out.shape[0] != batch or out.shape[2] != weight.shape[0]:
        raise ValueError(f"out: got {tuple(out.shape)}, expected ({batch}, T, {weight.shape[0]})")
    if out.dtype != weight.dtype:
        raise TypeError(f"out: got {out.dtype}, expected the dtype of the weight, {weight.dtype}")
    if out.stride(2) != 1:
        raise ValueError(f"out: got strides {out.stride()}, expected a dense last dimension")
    if offset < 0 or offset + tokens > out.shape[1]:
        raise ValueError(
            f"offset: got {offset}, expected 0 <= offset and offset + {tokens} tokens <= T = {out.shape[1]} of the slab"
        )


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
