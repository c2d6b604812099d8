"""Processes of a training run: FSDP2 sharding, or whole copies with averaged gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .. import distributed


def use_fsdp(sharding: str, device: torch.device) -> bool:
    """Whether to shard, from the config's `sharding`."""
    if distributed.world_size() == 1:
        return False
    return device.type == "cuda" if sharding == "auto" else sharding == "fsdp"


def shard(model: nn.Module) -> None:
    """Shard a transformer over all processes by FSDP2, a unit per block, in place; gradients are reduced in fp32.

    Parameters that the model keeps in fp32 (norms, timestep embedders, modulation tables) stay whole on every process:
    they are small, a unit has one dtype, and the tables of all blocks are read together before any block runs.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    kept = set(getattr(model, "keep_in_fp32", ()))
    whole = {p for name, p in model.named_parameters() if not kept.isdisjoint(name.split("."))}
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (distributed.world_size(),))
    policy = MixedPrecisionPolicy(reduce_dtype=torch.float32)
    blocks: Iterable[nn.Module] = model.blocks  # type: ignore[assignment]
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=whole)
    fully_shard(model, mesh=mesh, mp_policy=policy, ignored_params=whole)


def drop_gathered(model: nn.Module) -> None:
    """Let sharded modules gather their parameters anew at the next forward; needed when weights were written.

    After a forward without backward the outermost unit keeps what it has gathered.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: Tensor) -> Tensor:
    """What of a tensor lies on this process; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole_tensor(tensor: Tensor) -> Tensor:
    """All of a tensor; a collective for sharded ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def average_gradients(parameters: Iterable[Tensor]) -> None:
    """Average over processes the gradients that FSDP has not averaged, in one collective."""
    gradients = [p.grad for p in parameters if p.grad is not None and not isinstance(p, DTensor)]
    if distributed.world_size() == 1 or not gradients:
        return
    flat = torch.cat([g.flatten() for g in gradients])
    total = distributed.all_reduce_sum(flat) / distributed.world_size()
    for gradient, part in zip(gradients, total.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """The norm of all gradients together, sharded or whole, in float64."""
    squares = {True: 0.0, False: 0.0}
    for p in parameters:
        if p.grad is not None:
            squares[isinstance(p, DTensor)] += local_part(p.grad).double().square().sum().item()
    sharded = distributed.all_reduce_sum(torch.tensor([squares[True]], dtype=torch.float64)).item()
    return (sharded + squares[False]) ** 0.5
