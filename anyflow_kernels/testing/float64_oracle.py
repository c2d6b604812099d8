"""The operations in float64: what every backend is judged by.

They are those of the reference backend, which keeps float64, but for attention: the softmax is written out over a dense
mask, a block of queries at a time, since flex_attention has no float64 on a GPU. A backward computes the blocks anew.
"""

from __future__ import annotations

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from anyflow_kernels import OPERATIONS, AttentionPlan, Ops, reference
from anyflow_kernels.reference import dense_attention, plan_mask

_SCORES = 2**27  # entries of a block of scores: 1 GiB


def oracle_ops() -> Ops:
    """The operations for float64 tensors, with the checks of every backend."""
    operations = ModuleType("float64")
    vars(operations).update({name: getattr(reference, name) for name in OPERATIONS} | {"far_attention": far_attention})
    return Ops("float64", operations)


def far_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    mask = plan_mask(plan, q.device)
    if plan.phantom_keys:
        zeros = k.new_zeros(k.shape[0], plan.phantom_keys, *k.shape[2:])
        k, v = torch.cat([k, zeros], dim=1), torch.cat([v, zeros], dim=1)
        mask = F.pad(mask, (0, plan.phantom_keys), value=True)
    rows = max(1, _SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    blocks = zip(q.split(rows, dim=1), mask.split(rows), strict=True)
    outs, lses = zip(
        *(checkpoint(dense_attention, part, k, v, seen, scale, use_reentrant=False) for part, seen in blocks),
        strict=True,
    )
    out, lse = torch.cat(outs, dim=1), torch.cat(lses, dim=2).detach()
    return (out, lse) if return_lse else out
