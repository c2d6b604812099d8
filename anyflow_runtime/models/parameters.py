"""Parameters used directly, without calling their module: several linears as one GEMM, norm weights inside a kernel.

The fused tensor owns the memory and the original parameters are views of it: names, state dicts, optimisers and LoRA
see ordinary `nn.Linear`s, and there is no second copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from anyflow_kernels import Ops


def is_plain(module: nn.Module) -> bool:
    """True for an `nn.Linear` without adapters, offload hooks or quantisation: its weight may be used directly."""
    return type(module) is nn.Linear and _is_ordinary(module.weight) and not _is_hooked(module.__dict__)


def _is_ordinary(weight: Any) -> bool:
    """Neither quantised nor sharded: those are parameters of other classes."""
    return type(weight) is nn.Parameter


def weight_addresses(model: nn.Module) -> int | None:
    """A number that changes whenever a weight or buffer moves, in whatever way: it is read off all of them.

    None where a captured step would not do what a call does: a submodule has hooks, such as those that move or cast
    its weights, or a weight is not there (meta). Hooks of the model itself run outside its steps.
    """
    addresses: list[int] = []
    modules = [model]
    for module in modules:  # it grows on the way
        state = module.__dict__  # at every step: `hasattr`, and `modules()`, take ten times as long
        if module is not model and _is_hooked(state):
            return None
        for weight in chain(state["_parameters"].values(), state["_buffers"].values()):
            if weight is not None:
                addresses.append(weight.data_ptr())
        modules.extend(child for child in state["_modules"].values() if child is not None)
    return None if 0 in addresses else hash(tuple(addresses))  # those of meta tensors are 0


def _is_hooked(state: dict[str, Any]) -> bool:
    """Whether calling the module of this `__dict__` does more than its forward."""
    return bool(
        state["_forward_hooks"] or state["_forward_pre_hooks"] or "_hf_hook" in state or "_diffusers_hook" in state
    )


def parameter_dtype(module: nn.Module) -> torch.dtype:
    """The dtype of a module's first parameter."""
    return next(module.parameters()).dtype


@contextmanager
def onloaded(*modules: nn.Module) -> Iterator[None]:
    """Have the parameters of these modules in place, which hooks of accelerate or diffusers bring when one is called:
    those that offload one by one or in groups, or store weights in another dtype.
    """
    hooks = [(module, hook) for module in modules for hook in _hooks(module)]
    for module, hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for module, hook in reversed(hooks):
            hook.post_forward(module, None)


def _hooks(module: nn.Module) -> list[Any]:
    """Those of a module in the order of their `pre_forward`: the one that was added last comes first."""
    state = module.__dict__
    hooks = [*state["_diffusers_hook"].hooks.values()][::-1] if "_diffusers_hook" in state else []
    return [state["_hf_hook"], *hooks] if "_hf_hook" in state else hooks


def in_place(module: nn.Module) -> bool:
    """Whether a module's own parameters are there outside its forward: no hook brings them, none is meta."""
    hooked = _is_hooked(module.__dict__)
    return not hooked and not any(p is not None and p.is_meta for p in module._parameters.values())


def fuse_storage(linears: Sequence[nn.Module]) -> None:
    """Move weights and biases of plain linears of one input size into one storage, in order; leave others alone."""
    if not all(is_plain(linear) and not linear.weight.is_meta for linear in linears) or fused_weight(linears):
        return
    with torch.no_grad():
        for name in ("weight", "bias"):
            parts = [getattr(linear, name) for linear in linears]
            if any(part is None for part in parts) or len({(p.dtype, p.device) for p in parts}) > 1:
                return
            fused = torch.empty(
                sum(len(p) for p in parts), *parts[0].shape[1:], dtype=parts[0].dtype, device=parts[0].device
            )
            for part, view in zip(parts, fused.split([len(p) for p in parts]), strict=True):
                view.copy_(part)
                part.data = view


def fused_weight(linears: Sequence[nn.Module]) -> tuple[Tensor, Tensor] | None:
    """The weight and bias of all, concatenated without a copy, or None if they do not stand side by side in memory."""
    fused = []
    for name in ("weight", "bias"):
        parts = [getattr(linear, name) for linear in linears]
        first = parts[0]
        if first is None or first.is_meta or not first.is_contiguous():
            return None
        end = first.data_ptr()
        for part in parts:
            if part is None or part.data_ptr() != end or part.dtype != first.dtype or not part.is_contiguous():
                return None
            end += part.numel() * part.element_size()
        if end > first.untyped_storage().data_ptr() + first.untyped_storage().nbytes():
            return None
        rows = sum(len(part) for part in parts)
        fused.append(first.detach().as_strided((rows, *first.shape[1:]), first.stride()))
    return fused[0], fused[1]


def apply_linear(ops: Ops, module: nn.Module, x: Tensor) -> Tensor:
    """A linear through the backend, or by calling it if it is more than that."""
    return ops.linear(x, module.weight, module.bias) if is_plain(module) else module(x)  # type: ignore[arg-type]


def project(ops: Ops, x: Tensor, linears: Sequence[nn.Module]) -> Tensor:
    """The outputs of several linears side by side, (..., sum of widths): one GEMM if their storage is fused.

    A compiled graph has no addresses to compare, and takes the linears one by one.
    """
    if not torch.compiler.is_compiling() and all(is_plain(linear) for linear in linears):
        trained = torch.is_grad_enabled() and any(p.requires_grad for linear in linears for p in linear.parameters())
        fused = None if trained else fused_weight(linears)
        if fused is not None:
            return ops.linear(x, *fused)
    return torch.cat([apply_linear(ops, linear, x) for linear in linears], dim=-1)


def warm_start_compressed_weight(weight: Tensor, compressed_patch_size: Sequence[int]) -> Tensor:
    """The initial weight of `far_patch_embedding`: the patch embedding's kernel, resized trilinearly.

    Sampled at cell centres (align_corners=False), each (D, C) kernel by itself.

    Args:
        weight: (D, C, pt, ph, pw), floating point.
        compressed_patch_size: (pt, ph, pw) of the compressed tokens.

    Returns:
        (D, C, *compressed_patch_size), dtype of the weight, detached. The bias is copied unchanged by the caller.

    Raises:
        ValueError: on other shapes or dtypes.
    """
    size = tuple(compressed_patch_size)
    if weight.ndim != 5 or not weight.is_floating_point():
        raise ValueError(
            f"weight: got {tuple(weight.shape)} {weight.dtype}, expected (D, C, pt, ph, pw), floating point"
        )
    if len(size) != 3 or any(isinstance(n, (bool, float)) or n < 1 for n in size):
        raise ValueError(f"compressed_patch_size: got {compressed_patch_size!r}, expected three integers >= 1")
    wide = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    return F.interpolate(wide, size=size, mode="trilinear", align_corners=False).to(weight.dtype)
