"""What diffusers computes for each operation, as a rival: its tensors, its dtypes and its passes, one eager call each.

Written in our own words after diffusers 0.42.1; `tests/test_bench.py` holds every sequence against diffusers' modules,
which this file does not import. What diffusers makes once per forward and uses in every block (modulation repeated to
every token, complex rotations, separate projections) is made by `prepare` and not timed; what it repeats in every block
is in `call`.

Source: transformer_anyflow_far.py, normalization.py, embeddings.py and scheduling_flow_map_euler_discrete.py there.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from anyflow_kernels import AttentionPlan, FarLayout, TimestepMLP
from anyflow_kernels.operations import FrameMap

NAME = "diffusers eager"
BLOCK = 128  # its attention pads queries and keys to a multiple of it


def _given(out: Any) -> Any:
    return out


@dataclass(frozen=True)
class EagerSequence:
    """An operation as diffusers computes it.

    Args:
        prepare: from the arguments of our operation to those of `call`; not timed, differentiable.
        call: the timed passes.
        finish: from what `call` returns to the outputs of our operation; not timed, differentiable.
    """

    prepare: Callable[..., tuple]
    call: Callable[..., Any]
    finish: Callable[[Any], Any] = _given

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The whole of it, with the arguments and the outputs of our operation."""
        return self.finish(self.call(*self.prepare(*args, **kwargs)))


# --- AnyFlowTransformerBlock.forward: modulation, norms and gates


def _prepare_norm(
    x: Tensor,
    frame_map: FrameMap,
    branch: Tensor | None = None,
    gate: Tensor | None = None,
    shift: Tensor | None = None,
    scale: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple:
    rows = [row for row in (gate, shift, scale) if row is not None]
    if not rows:
        return x, branch, None, None, False, weight, bias, eps
    runs = torch.stack(rows, dim=2).split([frames for frames, _ in frame_map], dim=1)
    repeated = [run.repeat_interleave(n, dim=1) for run, (_, n) in zip(runs, frame_map, strict=True)]
    # The projection comes in the compute dtype. The rows given are already the sum: the block's own table adds zero.
    projected = torch.cat(repeated, dim=1).to(x.dtype)
    table = torch.zeros(1, len(rows), x.shape[-1], device=x.device, dtype=_wide(x), requires_grad=x.requires_grad)
    return x, branch, projected, table, gate is not None, weight, bias, eps


def _norm(
    x: Tensor,
    branch: Tensor | None,
    projected: Tensor | None,
    table: Tensor | None,
    gated: bool,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    rows: list[Tensor] = []
    if projected is not None and table is not None:
        # A block adds all six rows in one pass: each use here pays for the rows that it takes.
        rows = [row.squeeze(2) for row in (table + projected.to(table.dtype)).chunk(table.shape[1], dim=2)]
    wide = _wide(x)
    if branch is not None and gated:
        # Only the FFN's output is widened by itself; attention's is in the product.
        update = branch.to(wide) if len(rows) == 3 else branch
        x = (x.to(wide) + update * rows[0]).type_as(x)
    elif branch is not None:
        x = x + branch
    weight, bias = (None if w is None else w.to(wide) for w in (weight, bias))
    y = F.layer_norm(x.to(wide), x.shape[-1:], weight, bias, eps)
    if len(rows) > gated:
        shift, scale = rows[-2:]
        y = y * (1 + scale) + shift
    return x, y.type_as(x)


gated_residual_layer_norm = EagerSequence(_prepare_norm, _norm)


# --- normalization.RMSNorm, and AnyFlowCausalAttnProcessor up to the attention


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    dtype = x.dtype
    variance = x.to(_wide(x)).pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + eps)
    if weight.dtype in (torch.float16, torch.bfloat16):
        x = x.to(weight.dtype)
    return (x * weight).to(dtype)


rms_norm = EagerSequence(lambda x, weight, eps: (x, weight, eps), _rms_norm)


def _prepare_qk(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    rope: tuple[Tensor, Tensor],
    heads: int,
    eps: float,
    k_cache: Tensor | None = None,
    v_cache: Tensor | None = None,
    offset: int = 0,
) -> tuple:
    q, k, v = (part.contiguous() for part in qkv.chunk(3, dim=-1))  # outputs of three linears
    own = torch.complex(rope[0].double(), rope[1].double())
    # Its cache keeps keys without rotation. Those given are rotated: the angle of the cached ones is zero.
    every = torch.cat([own.new_ones(offset, own.shape[1]), own])
    context = [None if c is None else c[:, :offset].transpose(1, 2).contiguous() for c in (k_cache, v_cache)]
    return q, k, v, q_weight, k_weight, own[None, None], every[None, None], heads, eps, *context


def _rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """`apply_rotary_emb`: (B, H, L, d) in complex128."""
    pairs = torch.view_as_complex(x.double().unflatten(3, (-1, 2)))
    return torch.view_as_real(pairs * rotation).flatten(3, 4).type_as(x)


def _qk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    q_rotation: Tensor,
    k_rotation: Tensor,
    heads: int,
    eps: float,
    k_context: Tensor | None,
    v_context: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and all keys and values, (B, H, L, d). Every step concatenates and rotates the cache anew; the step that
    fills it, and computes all earlier chunks to that end, copies keys and values into it instead."""
    q, k = _rms_norm(q, q_weight, eps), _rms_norm(k, k_weight, eps)
    q, k, v = (x.unflatten(2, (heads, -1)).transpose(1, 2) for x in (q, k, v))
    if k_context is not None and v_context is not None:
        k, v = torch.cat([k_context, k], dim=2), torch.cat([v_context, v], dim=2)
    return _rotate(q, q_rotation), _rotate(k, k_rotation), v


qk_norm_rope_append = EagerSequence(_prepare_qk, _qk, lambda out: tuple(x.transpose(1, 2) for x in out))


# --- the linears of a block: to_q, to_k, to_v, and activations.GELU


def _prepare_linear(x: Tensor, weight: Tensor, bias: Tensor) -> tuple:
    count = 3 if weight.shape[0] == 3 * x.shape[-1] else 1  # the fused projection, or any other linear
    return x, weight.chunk(count), bias.chunk(count)


def _linear(x: Tensor, weights: tuple[Tensor, ...], biases: tuple[Tensor, ...]) -> list[Tensor]:
    return [F.linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


linear = EagerSequence(_prepare_linear, _linear, lambda outs: torch.cat(outs, dim=-1))
linear_gelu = EagerSequence(
    lambda x, weight, bias: (x, weight, bias),
    lambda x, weight, bias: F.gelu(F.linear(x, weight, bias), approximate="tanh"),
)


# --- AnyFlowDualTimestepTextImageEmbeddingCausal.forward_timestep


def _prepare_times(
    t: Tensor,
    delta: Tensor,
    time_mlp: TimestepMLP,
    delta_mlp: TimestepMLP,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gate: float,
) -> tuple:
    dtype = proj_weight.dtype  # of all but the time embedder, which stays in fp32
    gates = torch.tensor([gate], device=t.device, dtype=dtype)
    return t, delta, time_mlp, TimestepMLP(*(w.to(dtype) for w in delta_mlp)), proj_weight, proj_bias, gates


def _times(
    t: Tensor,
    delta: Tensor,
    time_mlp: TimestepMLP,
    delta_mlp: TimestepMLP,
    proj_weight: Tensor,
    proj_bias: Tensor,
    gate: Tensor,
    tokens_per_frame: int,
) -> tuple[Tensor, Tensor]:
    """(1, N * tokens, D) and (1, N * tokens, 6D): the rows repeated to every token."""
    rt = (1 - gate) * _embed(t, time_mlp).type_as(proj_weight) + gate * _embed(delta, delta_mlp).type_as(proj_weight)
    projected = F.linear(F.silu(rt), proj_weight, proj_bias)
    rt, projected = (x[None].repeat_interleave(tokens_per_frame, dim=1) for x in (rt, projected))
    return rt, projected


def _embed(t: Tensor, mlp: TimestepMLP) -> Tensor:
    """`get_timestep_embedding` and `TimestepEmbedding`."""
    half = mlp.weight_1.shape[1] // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    angles = t[:, None].float() * torch.exp(exponent)[None, :]
    emb = torch.cat([torch.sin(angles), torch.cos(angles)], dim=-1)
    emb = torch.cat([emb[:, half:], emb[:, :half]], dim=-1).to(mlp.weight_1.dtype)
    return F.linear(F.silu(F.linear(emb, mlp.weight_1, mlp.bias_1)), mlp.weight_2, mlp.bias_2)


def dual_timestep_embedding(tokens_per_frame: int) -> EagerSequence:
    """Each (t, r) is that of one frame of so many tokens."""
    return EagerSequence(
        _prepare_times,
        partial(_times, tokens_per_frame=tokens_per_frame),
        lambda out: tuple(x[0, ::tokens_per_frame] for x in out),
    )


# --- AnyFlowFARTransformer3DModel._forward_far_patchify and ._unpack_latent_sequence


def _prepare_patches(
    latents: Tensor,
    weight: Tensor,
    bias: Tensor,
    patch_size: tuple[int, int, int],
    out: Tensor | None = None,
    offset: int = 0,
) -> tuple:
    context = None if out is None or offset == 0 else out[:, :offset].contiguous()
    return latents, weight, bias, patch_size, context


def _patches(
    latents: Tensor, weight: Tensor, bias: Tensor, patch_size: tuple[int, int, int], context: Tensor | None
) -> tuple[Tensor, int]:
    """The sequence, and where the tokens of the latents begin."""
    video = latents.to(weight.dtype).permute(0, 2, 1, 3, 4)
    tokens = F.conv3d(video, weight, bias, stride=patch_size).flatten(2).transpose(1, 2)
    return (tokens, 0) if context is None else (torch.cat([context, tokens], dim=1), context.shape[1])


patch_embed = EagerSequence(_prepare_patches, _patches, lambda out: out[0][:, out[1] :])


def _unpack(tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int], channels: int) -> Tensor:
    frames, rows, columns = grid
    _, height, width = patch_size  # a token is one frame deep
    x = tokens.view(tokens.shape[0] * frames, rows, columns, height, width, channels).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(tokens.shape[0], frames, channels, rows * height, columns * width)


unpatchify = EagerSequence(lambda *args: args, _unpack)


# --- FlowMapEulerDiscreteScheduler.step, after AnyFlowFARPipeline's guidance


def _prepare_step(
    x: Tensor,
    u: Tensor,
    sigma_t: Tensor,
    sigma_r: Tensor,
    u_uncond: Tensor | None = None,
    guidance: float = 1.0,
) -> tuple:
    # Looking up the noise levels, with a synchronisation each, is left out.
    sigmas = (s.double().view(*s.shape, *[1] * (x.ndim - s.ndim)) for s in (sigma_t, sigma_r))
    return x, u, *sigmas, u_uncond, guidance


def _step(x: Tensor, u: Tensor, sigma_t: Tensor, sigma_r: Tensor, u_uncond: Tensor | None, guidance: float) -> Tensor:
    """Its noise levels are float64, and so is the arithmetic on the latents."""
    if u_uncond is not None:
        u = u_uncond + guidance * (u - u_uncond)
    return (x - (sigma_t - sigma_r) * u).to(u.dtype)


flow_map_step = EagerSequence(_prepare_step, _step)


# --- the attention of AnyFlowCausalAttnProcessor, and of AnyFlowAttnProcessor


def far_attention(layout: FarLayout, device: str) -> tuple[Callable[[Tensor, Tensor, Tensor], Tensor], AttentionPlan]:
    """Attention on (B, L, H, d) as diffusers runs it for a layout, and the plan of what it computes.

    All in one chunk without a cache is its bidirectional model: SDPA. The rest is flex_attention without compilation,
    padded to multiples of 128: under a BlockMask, built here as diffusers builds it in every cache step; or, in
    inference, with no mask at all, so that the padding's zero keys are in the softmax (`phantom_keys` of the plan).
    Cache steps of diffusers compute all chunks; here it gets the queries of the layout.
    """
    plan = AttentionPlan.from_layout(layout)
    if layout.num_chunks == 1 and layout.mode == "train" and not layout.clean:
        return _sdpa, plan
    padding = -plan.num_queries % BLOCK
    if layout.mode == "inference":
        return partial(_flex, padding=(padding, padding), mask=None), replace(plan, phantom_keys=padding)
    key_padding = -plan.num_keys % BLOCK
    queries, keys = plan.num_queries + padding, plan.num_keys + key_padding
    mask = create_block_mask(range_mask(plan, queries, device), None, None, queries, keys, device=device)
    return partial(_flex, padding=(padding, key_padding), mask=mask), plan


def range_mask(plan: AttentionPlan, num_queries: int, device: str) -> Callable[..., Tensor]:
    """flex_attention's `mask_mod` of a plan; queries beyond the plan's see nothing."""
    bounds = torch.zeros(num_queries, AttentionPlan.MAX_RANGES, 2, dtype=torch.int32, device=device)
    for q_start, q_end, ranges in plan.ranges:
        bounds[q_start:q_end, : len(ranges)] = torch.tensor(ranges, dtype=torch.int32, device=device)

    def mask_mod(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        own = [(key >= bounds[query, i, 0]) & (key < bounds[query, i, 1]) for i in range(AttentionPlan.MAX_RANGES)]
        return own[0] | own[1] | own[2]

    return mask_mod


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _flex(q: Tensor, k: Tensor, v: Tensor, padding: tuple[int, int], mask: BlockMask | None) -> Tensor:
    length = q.shape[1]
    q, k, v = (_pad(x.transpose(1, 2), n) for x, n in ((q, padding[0]), (k, padding[1]), (v, padding[1])))
    out: Any = flex_attention(q, k, v, block_mask=mask)
    return out.transpose(1, 2)[:, :length]


def _pad(x: Tensor, count: int) -> Tensor:
    return torch.cat([x, x.new_zeros(*x.shape[:2], count, x.shape[3])], dim=2) if count else x


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
