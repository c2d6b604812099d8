"""The `torch` backend: as fast as PyTorch and the C++ extension allow, on any device, with autograd throughout."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from .far_layout import AttentionPlan, KeyRanges
from .formulas import sinusoid, widen
from .operations import FrameMap, TimestepMLP
from .patch_embed import patch_embed, unpatchify  # noqa: F401  (operations of this backend too)

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def far_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    """One SDPA call per run of queries, on a view of its keys where contiguous, else on their concatenation."""
    outs, lses = [], []
    k_of, v_of = (_selector(x, plan) for x in (k, v))
    queries = q.split([q_end - q_start for q_start, q_end, _ in plan.ranges], dim=1) if plan.ranges else ()
    for own_q, (_, _, keys) in zip(queries, plan.ranges, strict=True):
        out, lse = _attend(own_q, k_of(keys), v_of(keys), scale, return_lse)
        outs.append(out)
        lses.append(lse)
    if not outs:
        outs, lses = [torch.empty_like(q)], [q.new_empty(q.shape[0], q.shape[2], 0, dtype=torch.float32)]
    out = outs[0] if len(outs) == 1 else torch.cat(outs, dim=1)
    return (out, torch.cat(lses, dim=2)) if return_lse else out


def _selector(x: Tensor, plan: AttentionPlan) -> Callable[[KeyRanges], Tensor]:
    """A function from key ranges to these rows of x (B, L, H, d), and the plan's zero rows.

    For a backward pass x is cut up once at all ends of ranges: the gradient of a slice is as large as x, that of all
    parts of a split together.
    """
    if torch.is_grad_enabled() and x.requires_grad and len(plan.ranges) > 1:
        ends = sorted({0, x.shape[1], *(end for _, _, keys in plan.ranges for span in keys for end in span)})
        pieces = dict(zip(ends, x.split([b - a for a, b in pairwise(ends)], dim=1), strict=False))

        def parts_of(start: int, end: int) -> list[Tensor]:
            return [pieces[at] for at in ends if start <= at < end]
    else:

        def parts_of(start: int, end: int) -> list[Tensor]:
            return [x[:, start:end]]

    def select(keys: KeyRanges) -> Tensor:
        parts = [part for span in keys for part in parts_of(*span)]
        if plan.phantom_keys:  # the parity mode pays for its zero rows; they are differentiable this way
            parts.append(x.new_zeros(x.shape[0], plan.phantom_keys, *x.shape[2:]))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

    return select


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float, need_lse: bool) -> tuple[Tensor, Tensor]:
    """Dense attention on (B, L, H, d). The LSE, (B, H, Lq) fp32, is empty unless needed."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if not need_lse:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
        return out.transpose(1, 2), q.new_empty(0, dtype=torch.float32)
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, scale=scale)
        return out.transpose(1, 2), lse.detach().float()
    scores = torch.matmul(q.float(), k.float().transpose(-1, -2)) * scale
    out = torch.matmul(scores.softmax(dim=-1).to(v.dtype), v)
    return out.transpose(1, 2), scores.logsumexp(dim=-1).detach()


def gated_residual_layer_norm(
    x: Tensor,
    frame_map: FrameMap,
    branch: Tensor | None,
    gate: Tensor | None,
    shift: Tensor | None,
    scale: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    if branch is not None and gate is None:
        x = x + branch
    elif branch is not None and gate is not None:
        runs = zip(_runs(x, frame_map), _runs(branch, frame_map), _rows(gate, frame_map), strict=True)
        x = _join([torch.addcmul(widen(x), widen(b), g).to(x.dtype) for x, b, g in runs])
    wide = widen(x)
    weight, bias = (None if w is None else w.to(wide.dtype) for w in (weight, bias))
    y = F.layer_norm(wide, x.shape[-1:], weight, bias, eps)
    if shift is not None and scale is not None:
        modulation = zip(_runs(y, frame_map), _rows(shift, frame_map), _rows(scale, frame_map), strict=True)
        y = _join([torch.addcmul(shift, y, scale + 1).to(x.dtype) for y, shift, scale in modulation])
    return x, y.to(x.dtype)


def _runs(x: Tensor, frame_map: FrameMap) -> list[Tensor]:
    """(B, L, D) as one (B, frames, tokens, D) view per run, so that a frame's row broadcasts without being repeated."""
    lengths = [frames * tokens for frames, tokens in frame_map]
    parts = x.split(lengths, dim=1)
    return [part.unflatten(1, run) for part, run in zip(parts, frame_map, strict=True)]


def _rows(rows: Tensor, frame_map: FrameMap) -> list[Tensor]:
    """(B, F, D) as one (B, frames, 1, D) view per run."""
    return [part.unsqueeze(2) for part in rows.split([frames for frames, _ in frame_map], dim=1)]


def _join(parts: list[Tensor]) -> Tensor:
    """The inverse of `_runs`."""
    flat = [part.flatten(1, 2) for part in parts]
    return flat[0] if len(flat) == 1 else torch.cat(flat, dim=1)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(widen(x), x.shape[-1:], widen(weight), eps).to(x.dtype)


def qk_norm_rope_append(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    k_cache: Tensor | None,
    v_cache: Tensor | None,
    offset: int,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """The rotation is one complex multiplication; a slab is written once, in place."""
    rotation = torch.complex(*rope).unsqueeze(1)  # (L, 1, d/2)

    def norm_rope(x: Tensor, weight: Tensor) -> Tensor:
        x = F.rms_norm(widen(x), x.shape[-1:], widen(weight), eps)
        pairs = torch.view_as_complex(x.unflatten(-1, (heads, -1, 2)))  # (B, L, H, d/2)
        return torch.view_as_real(pairs * rotation).flatten(-2)

    q, k, v = qkv.chunk(3, dim=-1)
    q, k, v = norm_rope(q, q_weight).to(qkv.dtype), norm_rope(k, k_weight), v.unflatten(-1, (heads, -1))
    if k_cache is None or v_cache is None:
        return q, k.to(qkv.dtype), v
    k_cache[:, offset : offset + k.shape[1]] = k
    v_cache[:, offset : offset + v.shape[1]] = v
    return q


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _prefers_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, _dense(bias), "none", [], "")
    return F.linear(x, weight, _dense(bias))


def _dense(bias: Tensor | None) -> Tensor | None:
    """oneDNN reads a bias without its stride."""
    return None if bias is None else bias.contiguous()


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if _prefers_onednn(x, weight, bias):
        return torch.ops.mkldnn._linear_pointwise(x, weight, _dense(bias), "gelu", [], "tanh")
    hidden = F.linear(x, weight, _dense(bias))
    if torch.is_grad_enabled() and hidden.requires_grad:
        return F.gelu(hidden, approximate="tanh")
    return torch.ops.aten.gelu_(hidden, approximate="tanh")


def _prefers_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """fp32 on a CPU without gradients: torch sends that to MKL, which on AMD chips runs at half the speed of oneDNN
    (both strict fp32; `bench/linear.py`). Lower precisions go to oneDNN anyway."""
    if x.device.type != "cpu" or x.dtype != torch.float32 or x.numel() == 0 or not _HAS_ONEDNN:
        return False
    if torch.is_autocast_enabled("cpu"):  # which F.linear heeds
        return False
    if torch.compiler.is_compiling():  # inductor only lowers the operation with a frozen weight
        return False
    return not (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, weight, bias)))


def dual_timestep_embedding(
    t: Tensor,
    delta: Tensor,
    time_mlp: TimestepMLP,
    delta_mlp: TimestepMLP,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gate: float,
) -> tuple[Tensor, Tensor]:
    """Both MLPs in fp32 whatever their weights: N is tiny."""

    def embed(times: Tensor, mlp: TimestepMLP) -> Tensor:
        weight_1, bias_1, weight_2, bias_2 = map(widen, mlp)
        hidden = F.linear(sinusoid(times, weight_1.shape[1]).to(weight_1.dtype), weight_1, bias_1)
        return F.linear(F.silu(hidden), weight_2, bias_2)

    rt = (1 - gate) * embed(t, time_mlp) + gate * embed(delta, delta_mlp)
    return rt, widen(F.linear(F.silu(rt).to(proj_weight.dtype), proj_weight, proj_bias))


def flow_map_step(
    x: Tensor,
    u: Tensor,
    sigma_t: Tensor | float,
    sigma_r: Tensor | float,
    u_uncond: Tensor | None,
    guidance: float,
) -> Tensor:
    """In float64, rounded once; two floats need no tensor."""
    velocity = u.double()
    if u_uncond is not None:
        velocity = torch.lerp(u_uncond.double(), velocity, guidance)

    def level(sigma: Tensor | float) -> Tensor | float:
        if not isinstance(sigma, Tensor):
            return sigma
        return sigma.to(x.device, torch.float64).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))

    return (x.double() - (level(sigma_t) - level(sigma_r)) * velocity).to(x.dtype)
