"""The `reference` backend: every operation in obvious PyTorch. It is a witness: nothing that ships imports it, and it
shares no formula with what it checks.

Attention runs through flex_attention with a BlockMask built element by element from the plan. Two things
flex_attention cannot do: float64 on a GPU, and a backward on a CPU. There the softmax is written out over a dense mask.
Float64 inputs stay float64, so the same code is the oracle of tests, benches and `anyflow verify`, on every device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from torch.utils.checkpoint import checkpoint

from .far_layout import AttentionPlan, FarLayout
from .operations import FrameMap, TimestepMLP

SCORES = 2**27  # entries of a block of scores: 1 GiB in float64


def far_mask(layout: FarLayout) -> Tensor:
    """The dense mask of a layout, (queries, keys) bool, from each token's kind and chunk (not from `key_ranges`)."""
    kinds = {"compressed": 0, "full": 1, "clean": 2}
    kind = torch.cat([torch.full((s.tokens,), kinds[s.kind]) for s in layout.segments])
    chunk = torch.cat([torch.full((s.tokens,), s.chunk) for s in layout.segments])
    q_kind, q_chunk = kind[layout.cache_offset :, None], chunk[layout.cache_offset :, None]
    causal = chunk[None] <= q_chunk
    if not layout.clean:
        return causal
    to_context = (kind[None] == 0) & causal
    noisy_to_self = (q_kind == 1) & (kind[None] == 1) & (chunk[None] == q_chunk)
    noisy_to_clean = (q_kind == 1) & (kind[None] == 2) & (chunk[None] < q_chunk)
    clean_to_clean = (q_kind == 2) & (kind[None] == 2) & causal
    return to_context | noisy_to_self | noisy_to_clean | clean_to_clean


def plan_mask(plan: AttentionPlan, device: torch.device | str = "cpu") -> Tensor:
    """The dense mask of a plan, (queries, keys) bool; phantom keys not included."""
    mask = torch.zeros(plan.num_queries, plan.num_keys, dtype=torch.bool, device=device)
    for q_start, q_end, keys in plan.ranges:
        for k_start, k_end in keys:
            mask[q_start:q_end, k_start:k_end] = True
    return mask


def dense_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Masked softmax attention with all scores in memory. q (B, Lq, H, d); the output and the LSE (B, H, Lq)."""
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(dim=-1), v)
    return out, scores.logsumexp(dim=-1)


def blockwise_attention(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float) -> tuple[Tensor, Tensor]:
    """`dense_attention` over a plan, a block of queries at a time: at most `SCORES` scores are in memory at once.

    A backward computes the blocks anew. Arguments and results are in the dtype of q throughout.
    """
    k, v, mask = with_phantom_keys(k, v, plan)
    rows = max(1, SCORES // (q.shape[0] * q.shape[2] * k.shape[1]))
    if rows >= q.shape[1]:
        return dense_attention(q, k, v, mask, scale)
    blocks = zip(q.split(rows, dim=1), mask.split(rows), strict=True)
    outs, lses = zip(
        *(checkpoint(dense_attention, part, k, v, seen, scale, use_reentrant=False) for part, seen in blocks),
        strict=True,
    )
    return torch.cat(outs, dim=1), torch.cat(lses, dim=2)


def far_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float, return_lse: bool
) -> Tensor | tuple[Tensor, Tensor]:
    if plan.num_queries == 0:
        lse = q.new_zeros(q.shape[0], q.shape[2], 0, dtype=torch.float32)
        return (torch.empty_like(q), lse) if return_lse else torch.empty_like(q)
    needs_grad = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if q.dtype == torch.float64 or (q.device.type == "cpu" and needs_grad):
        out, lse = blockwise_attention(q, k, v, plan, scale)
    else:
        if not needs_grad:  # flex_attention on a CPU refuses parameters even under no_grad
            q, k, v = q.detach(), k.detach(), v.detach()
        out, lse = masked_flex_attention(q, *with_phantom_keys(k, v, plan), scale)
    return (out, widen(lse.detach())) if return_lse else out


def with_phantom_keys(k: Tensor, v: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and their mask, with the plan's phantom keys as zeros that all queries see."""
    mask = plan_mask(plan, k.device)
    if plan.phantom_keys:
        zeros = k.new_zeros(k.shape[0], plan.phantom_keys, *k.shape[2:])
        k, v = torch.cat([k, zeros], dim=1), torch.cat([v, zeros], dim=1)
        mask = F.pad(mask, (0, plan.phantom_keys), value=True)
    return k, v, mask


def masked_flex_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """As `dense_attention`, through flex_attention, compiled where there is a GPU."""
    head_dim = q.shape[3]
    if head_dim < 16:  # flex_attention's minimum; zero channels change neither scores nor output
        q, k, v = (F.pad(x, (0, 16 - head_dim)) for x in (q, k, v))

    def mask_mod(b: Tensor, h: Tensor, q_index: Tensor, k_index: Tensor) -> Tensor:
        return mask[q_index, k_index]

    block_mask = create_block_mask(mask_mod, None, None, mask.shape[0], mask.shape[1], device=q.device)
    attend = flex_attention if q.device.type == "cpu" else torch.compile(flex_attention, dynamic=True)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out, aux = attend(q, k, v, block_mask=block_mask, scale=scale, return_aux=AuxRequest(lse=True))  # type: ignore[arg-type]
    return out.transpose(1, 2)[..., :head_dim], aux.lse


def widen(x: Tensor) -> Tensor:
    """fp32, or float64 for an oracle run."""
    return x if x.dtype == torch.float64 else x.float()


def _per_token(rows: Tensor, frame_map: FrameMap) -> Tensor:
    """(B, F, D) to (B, L, D): each frame's row repeated to its tokens."""
    runs = rows.split([frames for frames, _ in frame_map], dim=1)
    # Sizes from integers alone: no synchronisation, so that a compiler or a CUDA graph can take it whole.
    return torch.cat([run.repeat_interleave(n, dim=1) for run, (_, n) in zip(runs, frame_map, strict=True)], dim=1)


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
    if branch is not None:
        update = widen(branch) if gate is None else widen(branch) * _per_token(gate, frame_map)
        x = (widen(x) + update).to(x.dtype)
    wide = widen(x)
    mean = wide.mean(dim=-1, keepdim=True)
    variance = (wide - mean).square().mean(dim=-1, keepdim=True)
    y = (wide - mean) * torch.rsqrt(variance + eps)
    if weight is not None and bias is not None:
        y = y * weight + bias
    if shift is not None and scale is not None:
        y = y * (1 + _per_token(scale, frame_map)) + _per_token(shift, frame_map)
    return x, y.to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = widen(x)
    return (wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight).to(x.dtype)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate channel pairs (2i, 2i+1) of (B, L, H, d) by angle i of each token."""
    cos, sin = (table[None, :, None, :] for table in rope)
    even, odd = widen(x)[..., 0::2], widen(x)[..., 1::2]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).to(x.dtype)


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
    q, k, v = qkv.chunk(3, dim=-1)
    # One rounding in all: norm and rotation both happen in the wide type.
    q = rotate(rms_norm(widen(q), q_weight, eps).unflatten(-1, (heads, -1)), rope).to(qkv.dtype)
    k = rotate(rms_norm(widen(k), k_weight, eps).unflatten(-1, (heads, -1)), rope).to(qkv.dtype)
    v = v.unflatten(-1, (heads, -1))
    if k_cache is None or v_cache is None:
        return q, k, v
    k_cache[:, offset : offset + k.shape[1]] = k
    v_cache[:, offset : offset + v.shape[1]] = v
    return q


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight, bias), approximate="tanh")


def sinusoid(t: Tensor, width: int) -> Tensor:
    """[cos, sin] of t at frequencies 10000^(-2i/width), (N, width); fp32, or float64 if t is an oracle's."""
    t = widen(t)
    # The order of operations is the reference's: at t = 1000 one fp32 ulp of a frequency is 1e-4 radians.
    exponent = -math.log(10000.0) * torch.arange(width // 2, dtype=t.dtype, device=t.device) / (width // 2)
    angles = t[:, None] * exponent.exp()
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def _mlp(t: Tensor, mlp: TimestepMLP) -> Tensor:
    """Sinusoid, linear, SiLU, linear in fp32 (weights widened): N is tiny."""
    hidden = F.silu(
        F.linear(sinusoid(t, mlp.weight_1.shape[1]).to(widen(mlp.weight_1)), widen(mlp.weight_1), widen(mlp.bias_1))
    )
    return F.linear(hidden, widen(mlp.weight_2), widen(mlp.bias_2))


def dual_timestep_embedding(
    t: Tensor,
    delta: Tensor,
    time_mlp: TimestepMLP,
    delta_mlp: TimestepMLP,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gate: float,
) -> tuple[Tensor, Tensor]:
    rt = (1 - gate) * _mlp(t, time_mlp) + gate * _mlp(delta, delta_mlp)
    proj = F.linear(F.silu(rt).to(proj_weight.dtype), proj_weight, proj_bias)
    return rt, widen(proj)


def patch_embed(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    patch_size: tuple[int, int, int],
    out: Tensor | None,
    offset: int,
) -> Tensor:
    video = latents.transpose(1, 2).to(weight.dtype)
    tokens = F.conv3d(video, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    if out is None:
        return tokens
    out[:, offset : offset + tokens.shape[1]] = tokens
    return out[:, offset : offset + tokens.shape[1]]


def unpatchify(tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int], channels: int) -> Tensor:
    frames, rows, columns = grid
    t, h, w = patch_size
    x = tokens.reshape(tokens.shape[0], frames, rows, columns, t, h, w, channels)
    x = x.permute(0, 1, 4, 7, 2, 5, 3, 6)  # B, frames, t, C, rows, h, columns, w
    return x.reshape(tokens.shape[0], frames * t, channels, rows * h, columns * w)


def flow_map_step(
    x: Tensor,
    u: Tensor,
    sigma_t: Tensor | float,
    sigma_r: Tensor | float,
    u_uncond: Tensor | None,
    guidance: float,
) -> Tensor:
    velocity = u.double() if u_uncond is None else u_uncond.double() + guidance * (u.double() - u_uncond.double())
    return (x.double() - (_sigma(sigma_t, x) - _sigma(sigma_r, x)) * velocity).to(x.dtype)


def _sigma(sigma: Tensor | float, x: Tensor) -> Tensor:
    """A noise level as float64, so that the difference of two is not rounded twice, broadcastable to x."""
    sigma = torch.as_tensor(sigma, dtype=torch.float64, device=x.device)
    return sigma.reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
