"""Accuracy of both models against float64 on every path, in bf16 and fp32.

Witnesses: a float64 forward written here from the papers (AnyFlow, arXiv 2605.13724; FAR, arXiv 2503.19325) and the
released code alone (one token after the other in a dense mask, no cache, nothing shared with the packages), and
diffusers 0.42.1 in the same dtype.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, FarCache

from .parity import FP32_TOLERANCE, model_pair, prompt_inputs, random_config, reference_cache, relative_error

PARTITION, HEIGHT, WIDTH = [1, 2, 1, 2, 1], 9, 13  # remainders in both patch sizes, chunks demoted at every limit


def oracle_velocity(
    state: Mapping[str, Tensor],
    config: Mapping[str, Any],
    latents: Tensor,
    t: Tensor,
    r: Tensor,
    text: Tensor,
    partition: Sequence[int],
    image: Tensor | None = None,
    clean: Tensor | None = None,
    clean_t: Tensor | None = None,
    phantom_keys: int = 0,
    constant_context: bool = False,
) -> Tensor:
    """The velocity of the full-resolution noisy frames, in float64, differentiable in everything.

    A rollout is the same function: finished chunks at t = r = 0 and the newest chunk behind them, its frames cut out of
    the result. `phantom_keys` are zero logits in every softmax of the newest chunk; with `constant_context` no gradient
    passes through the keys and values of the others. The bidirectional model is one chunk.
    """
    w = {name: tensor.double() for name, tensor in state.items()}
    heads, width = config["num_attention_heads"], config["num_attention_heads"] * config["attention_head_dim"]
    eps, limit = config.get("eps", 1e-6), config.get("full_chunk_limit", 1)
    num_compressed = max(0, len(partition) - limit)
    chunk_of_frame = [i for i, frames in enumerate(partition) for _ in range(frames)]
    compressed_frames = sum(partition[:num_compressed])

    # One entry per frame: (kind, chunk, absolute frame, pixels, t, delta)
    delta = r.double() if config.get("deltatime_type", "r") == "r" else t.double() - r.double()
    frames = [
        (0 if f < compressed_frames else 1, chunk_of_frame[f], f, latents[:, f].double(), t[:, f].double(), delta[:, f])
        for f in range(sum(partition))
    ]
    if clean is not None and clean_t is not None:
        for i in range(clean.shape[1]):
            f = compressed_frames + i
            time = clean_t[:, i].double()
            frames.append((2, chunk_of_frame[f], f, clean[:, i].double(), time, time))

    tokens, rotations, kinds, chunks, rts, times = [], [], [], [], [], []
    for kind, chunk, frame, pixels, time, d in frames:
        name, size = ("far_patch_embedding", 4) if kind == 0 else ("patch_embedding", 2)
        rows, columns = pixels.shape[2] // size, pixels.shape[3] // size
        cut = pixels[:, :, : rows * size, : columns * size].unflatten(3, (columns, size)).unflatten(2, (rows, size))
        patches = cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)  # (B, rows*columns, C*ph*pw)
        tokens.append(patches @ w[f"{name}.weight"].flatten(1).T + w[f"{name}.bias"])
        rotations.append(_rotation(config["attention_head_dim"], frame, rows, columns, size // 2))
        kinds += [kind] * (rows * columns)
        chunks += [chunk] * (rows * columns)
        rt, proj = _time_condition(w, config, time, d)
        rts.append(rt.unsqueeze(1).expand(-1, rows * columns, -1))
        times.append(proj.unflatten(1, (6, width)).unsqueeze(1).expand(-1, rows * columns, -1, -1))
    x, rotation, rt, times6 = (
        torch.cat(parts, dim) for parts, dim in ((tokens, 1), (rotations, 0), (rts, 1), (times, 1))
    )
    kind_of, chunk_of = torch.tensor(kinds), torch.tensor(chunks)
    newest = (chunk_of == len(partition) - 1).double() * phantom_keys
    constant = chunk_of < len(partition) - 1 if constant_context else None

    prompt = _mlp(
        w, "condition_embedder.text_embedder.linear_1", "condition_embedder.text_embedder.linear_2", text.double()
    )
    if image is not None:
        name = "condition_embedder.image_embedder"
        y = F.layer_norm(image.double(), image.shape[-1:], w[f"{name}.norm1.weight"], w[f"{name}.norm1.bias"], 1e-5)
        y = _linear(w, f"{name}.ff.net.2", F.gelu(_linear(w, f"{name}.ff.net.0.proj", y)))
        y = F.layer_norm(y, y.shape[-1:], w[f"{name}.norm2.weight"], w[f"{name}.norm2.bias"], 1e-5)
        prompt = torch.cat([y, prompt], dim=1)

    mask = dense_mask(kind_of, chunk_of)
    for i in range(config["num_layers"]):
        b = f"blocks.{i}"
        shift1, scale1, gate1, shift2, scale2, gate2 = (w[f"{b}.scale_shift_table"] + times6).unbind(2)
        y = F.layer_norm(x, (width,), eps=eps) * (1 + scale1) + shift1
        x = x + gate1 * _attention(w, f"{b}.attn1", y, y, heads, eps, rotation, mask, newest, constant)
        y, norm2 = x, f"{b}.norm2"
        if f"{norm2}.weight" in w:
            y = F.layer_norm(x, (width,), w[f"{norm2}.weight"], w[f"{norm2}.bias"], eps)
        x = x + _attention(w, f"{b}.attn2", y, prompt, heads, eps)
        y = F.layer_norm(x, (width,), eps=eps) * (1 + scale2) + shift2
        y = F.gelu(_linear(w, f"{b}.ffn.net.0.proj", y), approximate="tanh")
        x = x + gate2 * _linear(w, f"{b}.ffn.net.2", y)

    shift, scale = (w["scale_shift_table"] + rt.unsqueeze(2)).unbind(2)
    y = _linear(w, "proj_out", F.layer_norm(x, (width,), eps=eps) * (1 + scale) + shift)[:, kind_of == 1]
    rows, columns = latents.shape[3] // 2, latents.shape[4] // 2
    y = y.unflatten(1, (-1, rows, columns)).unflatten(4, (2, 2, -1))  # B, F, rows, columns, ph, pw, C
    return y.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)


def dense_mask(kind: Tensor, chunk: Tensor) -> Tensor:
    """(L, L) bool, query by key: kind 0 compressed, 1 full noisy, 2 clean; the rules of FAR one by one."""
    qk, kk, qc, kc = kind[:, None], kind[None], chunk[:, None], chunk[None]
    if not (kind == 2).any():
        return kc <= qc
    context = (kk == 0) & (kc <= qc)
    noisy = (qk == 1) & (((kk == 1) & (kc == qc)) | ((kk == 2) & (kc < qc)))
    clean = (qk == 2) & (kk == 2) & (kc <= qc)
    return context | noisy | clean


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _mlp(w: Mapping[str, Tensor], first: str, second: str, x: Tensor) -> Tensor:
    return _linear(w, second, F.gelu(_linear(w, first, x), approximate="tanh"))


def _time_condition(
    w: Mapping[str, Tensor], config: Mapping[str, Any], t: Tensor, delta: Tensor
) -> tuple[Tensor, Tensor]:
    half, gate = config["freq_dim"] // 2, config.get("gate_value", 0.25)
    rt = torch.zeros(())
    for name, value, weight in (("time_embedder", t, 1 - gate), ("delta_embedder", delta, gate)):
        angles = value.double()[:, None] * torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64))
        y = torch.cat([angles.cos(), angles.sin()], dim=1)
        y = F.silu(_linear(w, f"condition_embedder.{name}.linear_1", y))
        rt = rt + weight * _linear(w, f"condition_embedder.{name}.linear_2", y)
    return rt, _linear(w, "condition_embedder.time_proj", F.silu(rt))


def _rotation(head_dim: int, frame: int, rows: int, columns: int, window: int) -> Tensor:
    """Unit complex numbers (rows*columns, head_dim/2) of one frame; a compressed token averages `window` positions."""

    def axis(dim: int, position: int, window: int) -> Tensor:
        frequencies = 10000.0 ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        parts = [torch.exp(1j * (position * window + i) * frequencies) for i in range(window)]
        mean = torch.stack(parts).mean(0)
        return mean / mean.abs()

    side = 2 * (head_dim // 6)
    time = axis(head_dim - 2 * side, frame, 1)
    grid = [
        torch.cat([time, axis(side, y, window), axis(side, x, window)]) for y in range(rows) for x in range(columns)
    ]
    return torch.stack(grid) if grid else torch.zeros(0, head_dim // 2, dtype=torch.complex128)


def _attention(
    w: Mapping[str, Tensor],
    name: str,
    x: Tensor,
    context: Tensor,
    heads: int,
    eps: float,
    rotation: Tensor | None = None,
    mask: Tensor | None = None,
    phantom: Tensor | None = None,
    constant: Tensor | None = None,
) -> Tensor:
    def norm(y: Tensor, which: str) -> Tensor:
        return y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * w[f"{name}.{which}.weight"]

    q, k = norm(_linear(w, f"{name}.to_q", x), "norm_q"), norm(_linear(w, f"{name}.to_k", context), "norm_k")
    q, k, v = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, _linear(w, f"{name}.to_v", context)))
    if rotation is not None:
        turn = [torch.view_as_complex(y.unflatten(-1, (-1, 2)).contiguous()) * rotation for y in (q, k)]
        q, k = (torch.view_as_real(y).flatten(-2) for y in turn)
    if constant is not None:
        k, v = (torch.where(constant[:, None], y.detach(), y) for y in (k, v))
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)
    top = scores.amax(-1, keepdim=True).clamp_min(0).detach()
    weights = (scores - top).exp()
    extra = 0.0 if phantom is None else phantom[:, None] * (-top).exp()
    y = weights @ v / (weights.sum(-1, keepdim=True) + extra)
    return _linear(w, f"{name}.to_out.0", y.transpose(1, 2).flatten(2))


def video_times(batch: int, frames: int) -> Tensor:
    return torch.rand(batch, frames) * 1000


def bf16_pair(config: dict[str, Any], causal: bool, seed: int, path: Path) -> tuple[Any, Any]:
    """Both models in bf16, each read by its own loader, so each keeps in fp32 what it means to keep."""
    diffusers = pytest.importorskip("diffusers")
    model_pair(config, causal, seed)[0].save_pretrained(path)  # type: ignore[operator]
    mine = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    theirs = getattr(diffusers, mine.__name__).from_pretrained(path, torch_dtype=torch.bfloat16).eval()
    return theirs, mine.from_pretrained(path, dtype=torch.bfloat16, backend="torch")


def in_bf16(prompt: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if x is None else x.bfloat16() for name, x in prompt.items()}


def oracle(
    model: Any, config: dict[str, Any], x: Tensor, t: Tensor, r: Tensor, prompt: Any, partition: Any, **kw: Any
) -> Tensor:
    image = prompt["encoder_hidden_states_image"]
    with torch.no_grad():
        return oracle_velocity(
            model.state_dict(), config, x, t, r, prompt["encoder_hidden_states"], partition, image=image, **kw
        )


def roll(
    model: Any, cache: Any, prompt: Any, video: Tensor, chunks: list[Tensor], t: Tensor, r: Tensor
) -> list[Tensor]:
    """The velocity of each chunk after the finished frames of `video`, by prefill and inference."""
    outputs = []
    for i, chunk in enumerate(chunks):
        done, n = PARTITION[: i + 1], sum(PARTITION[:i])
        span = slice(n, n + PARTITION[i])
        common = {**prompt, "chunk_partition": done, "kv_cache": cache, "return_dict": False}
        with torch.no_grad():
            flag = {"num_cached_chunks": i, "is_cache_step": False}
            outputs.append(model(chunk, t[:, span], r[:, span], kv_cache_flag=flag, **common)[0])
            if i + 1 < len(chunks):
                zeros = torch.zeros(len(video), sum(done))
                flag = {"num_cached_chunks": i, "is_cache_step": True}
                model(video[:, : sum(done)], zeros, zeros, kv_cache_flag=flag, **common)
    return outputs


def rollout_oracle(
    model: Any,
    config: dict[str, Any],
    prompt: Any,
    video: Tensor,
    chunks: list[Tensor],
    t: Tensor,
    r: Tensor,
    phantom: bool = False,
) -> list[Tensor]:
    outputs = []
    for i, chunk in enumerate(chunks):
        n, frames = sum(PARTITION[:i]), PARTITION[i]
        x = torch.cat([video[:, :n], chunk], dim=1)
        t_now, r_now = (torch.cat([torch.zeros(len(x), n), s[:, n : n + frames]], dim=1) for s in (t, r))
        tokens = frames * (HEIGHT // 2) * (WIDTH // 2)
        keys = -tokens % 128 if phantom else 0
        out = oracle(model, config, x, t_now, r_now, prompt, PARTITION[: i + 1], phantom_keys=keys)
        outputs.append(out[:, -frames:])
    return outputs


@pytest.mark.parametrize("seed", range(4))
def test_bf16_bidirectional_is_no_worse_than_diffusers(seed: int, tmp_path: Path) -> None:
    config = random_config(seed, causal=False)
    theirs, mine = bf16_pair(config, False, seed, tmp_path)
    x = torch.randn(2, 3, config["in_channels"], 8, 12).bfloat16()  # diffusers' class takes no remainders
    t, r = video_times(2, 3), video_times(2, 3)
    prompt = in_bf16(prompt_inputs(config, 2))
    with torch.no_grad():
        got, low = (model(x, t, r, **prompt, return_dict=False)[0] for model in (mine, theirs))
    high = oracle(mine, config, x, t, r, prompt, [3])
    assert relative_error(got, high) <= 1.1 * relative_error(low, high)


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean"])
@pytest.mark.parametrize("seed", range(4))
def test_bf16_training_path_is_no_worse_than_diffusers(seed: int, clean: bool, tmp_path: Path) -> None:
    config = random_config(seed, causal=True)
    theirs, mine = bf16_pair(config, True, seed, tmp_path)
    frames, full = sum(PARTITION), sum(PARTITION[-config["full_chunk_limit"] :])
    x, t, r = (
        torch.randn(2, frames, config["in_channels"], HEIGHT, WIDTH).bfloat16(),
        video_times(2, frames),
        video_times(2, frames),
    )
    copy = (torch.randn_like(x[:, :full]), video_times(2, full)) if clean else (None, None)
    prompt = in_bf16(prompt_inputs(config, 2))
    kwargs = {**prompt, "chunk_partition": PARTITION, "clean_hidden_states": copy[0], "clean_timestep": copy[1]}
    with torch.no_grad():
        got, low = (model(x, t, r, **kwargs, return_dict=False)[0] for model in (mine, theirs))
    high = oracle(mine, config, x, t, r, prompt, PARTITION, clean=copy[0], clean_t=copy[1])
    assert relative_error(got, high) <= 1.1 * relative_error(low, high)


@pytest.mark.parametrize("seed", range(4))
def test_bf16_rollout_is_no_worse_than_diffusers(seed: int, tmp_path: Path) -> None:
    """Prefill and inference; both with the phantom keys, so that rounding is all that differs from the oracle."""
    config = random_config(seed, causal=True)
    theirs, mine = bf16_pair(config, True, seed, tmp_path)
    mine.phantom_padding = True
    prompt, video, chunks, t, r = rollout_inputs(config, torch.bfloat16)
    got = roll(mine, FarCache.for_model(mine, PARTITION, HEIGHT, WIDTH, 2), prompt, video, chunks, t, r)
    cache = reference_cache(theirs.config, PARTITION, 2, HEIGHT, WIDTH)
    cache = {i: {name: x.bfloat16() for name, x in entry.items()} for i, entry in cache.items()}
    low = roll(theirs, cache, prompt, video, chunks, t, r)
    high = rollout_oracle(mine, config, prompt, video, chunks, t, r, phantom=True)
    got_error, low_error = (relative_error(torch.cat(out, 1), torch.cat(high, 1)) for out in (got, low))
    assert got_error <= 1.1 * low_error


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_model_cast_as_a_whole_is_no_worse_than_diffusers(dtype: torch.dtype) -> None:
    """`model.to(dtype)` narrows the norms' weights too; the arithmetic around them stays fp32."""
    config = random_config(0, causal=True) | {"cross_attn_norm": True}
    theirs, mine = (model.to(dtype) for model in model_pair(config, True, backend="torch"))
    frames = sum(PARTITION)
    x = torch.randn(2, frames, config["in_channels"], HEIGHT, WIDTH).to(dtype)
    t, r = video_times(2, frames), video_times(2, frames)
    prompt = {name: None if v is None else v.to(dtype) for name, v in prompt_inputs(config, 2).items()}
    with torch.no_grad():
        got, low = (m(x, t, r, **prompt, chunk_partition=PARTITION, return_dict=False)[0] for m in (mine, theirs))
    high = oracle(mine, config, x, t, r, prompt, PARTITION)
    assert relative_error(got, high) <= 1.1 * relative_error(low, high)


def rollout_inputs(config: dict[str, Any], dtype: torch.dtype) -> tuple[Any, Tensor, list[Tensor], Tensor, Tensor]:
    frames = sum(PARTITION)
    video, noise = torch.randn(2, 2, frames, config["in_channels"], HEIGHT, WIDTH).to(dtype).unbind(0)
    prompt = {name: None if x is None else x.to(dtype) for name, x in prompt_inputs(config, 2).items()}
    return prompt, video, list(noise.split(PARTITION, 1)), video_times(2, frames), video_times(2, frames)


@pytest.mark.parametrize("phantom", [False, True], ids=["correct softmax", "phantom keys"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("seed", range(2))
def test_fp32_rollout_matches_the_oracle(seed: int, backend: str, phantom: bool) -> None:
    """Without padding the softmax is the correct one; with it, the denominator has the reference's zero keys."""
    config = random_config(seed, causal=True)
    _, mine = model_pair(config, True, seed, backend=backend, phantom_padding=phantom)
    prompt, video, chunks, t, r = rollout_inputs(config, torch.float32)
    got = roll(mine, FarCache.for_model(mine, PARTITION, HEIGHT, WIDTH, 2), prompt, video, chunks, t, r)
    high = rollout_oracle(mine, config, prompt, video, chunks, t, r, phantom)
    for i, (out, want) in enumerate(zip(got, high, strict=True)):
        assert relative_error(out, want) < FP32_TOLERANCE, f"chunk {i}"


def test_phantom_keys_change_the_result() -> None:
    """Else the two cases above would show nothing."""
    config = random_config(0, causal=True)
    _, mine = model_pair(config, True, backend="torch")
    inputs = rollout_inputs(config, torch.float32)
    plain, padded = (torch.cat(rollout_oracle(mine, config, *inputs, phantom), 1) for phantom in (False, True))
    assert relative_error(padded, plain) > 100 * FP32_TOLERANCE


@pytest.mark.parametrize("clean", [False, True], ids=["plain", "clean"])
def test_float64_model_equals_the_oracle(clean: bool) -> None:
    """In float64 nothing of the training path is computed in a narrower type."""
    config = random_config(1, causal=True)
    mine = model_pair(config, True, 1, backend="torch")[1].double()
    frames, full = sum(PARTITION), sum(PARTITION[-config["full_chunk_limit"] :])
    x, t, r = (
        torch.randn(1, frames, config["in_channels"], HEIGHT, WIDTH).double(),
        video_times(1, frames),
        video_times(1, frames),
    )
    copy = (torch.randn_like(x[:, :full]), video_times(1, full)) if clean else (None, None)
    prompt = {name: None if v is None else v.double() for name, v in prompt_inputs(config, 1).items()}
    extra = {"clean_hidden_states": copy[0], "clean_timestep": copy[1]}
    with torch.no_grad():
        got = mine(x, t, r, **prompt, chunk_partition=PARTITION, **extra).sample
    high = oracle(mine, config, x, t, r, prompt, PARTITION, clean=copy[0], clean_t=copy[1])
    assert relative_error(got, high) < 1e-12
