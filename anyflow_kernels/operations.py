"""The operations of an AnyFlow model: their contract, checked once for every backend.

A backend is a module with a function of the same name and arguments for each operation here; it may assume that the
arguments passed these checks. `load_ops` in `anyflow_kernels` picks the module.

Letters: B batch, L tokens, S text tokens, T cache slots, H heads, d channels per head, D = H*d, F frames.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor

from .far_layout import AttentionPlan

FrameMap = tuple[tuple[int, int], ...]
OPERATIONS = (
    "far_attention",
    "gated_residual_layer_norm",
    "qk_norm_rope_append",
    "rms_norm",
    "linear",
    "linear_gelu",
    "dual_timestep_embedding",
    "patch_embed",
    "unpatchify",
    "flow_map_step",
)


class TimestepMLP(NamedTuple):
    """Weights of one timestep embedder: linear (D, freq_dim), SiLU, linear (D, D)."""

    weight_1: Tensor
    bias_1: Tensor
    weight_2: Tensor
    bias_2: Tensor


class Ops:
    """Every operation on one backend. `backend` is its name: "triton", "torch" or "reference"."""

    def __init__(self, backend: str, implementation: ModuleType) -> None:
        self.backend = backend
        self._implementation = implementation

    def __repr__(self) -> str:
        return f"Ops({self.backend!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or unpickled model runs on the same backend: modules cannot be copied."""
        from . import load_ops

        return load_ops, (self.backend,)

    @overload
    def far_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scale: float | None = None,
        return_lse: Literal[False] = False,
    ) -> Tensor: ...

    @overload
    def far_attention(
        self, q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scale: float | None = None, *, return_lse: bool
    ) -> Any: ...

    def far_attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: AttentionPlan,
        scale: float | None = None,
        return_lse: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Softmax attention in which each query sees the key ranges of the plan.

        Args:
            q: (B, Lq, H, d), any strides with a dense last dimension.
            k, v: (B, Lk, H, d), same dtype; may be views of a cache slab.
            plan: with `num_queries == Lq` and `num_keys == Lk`.
            scale: of the logits; d ** -0.5 if None.
            return_lse: also return the log-sum-exp of the scaled logits, phantom keys included, (B, H, Lq) fp32. It
                carries no gradient.

        Returns:
            (B, Lq, H, d) in the dtype of q, or (out, lse).

        Raises:
            ValueError: on shapes or dtypes that do not fit together or to the plan.
        """
        _expect_dims("q", q, 4)
        for name, tensor in (("k", k), ("v", v)):
            keys = (q.shape[0], plan.num_keys, *q.shape[2:])
            _expect(tuple(tensor.shape) == keys, name, tuple(tensor.shape), "{} for this q and plan", keys)
            _expect(tensor.dtype == q.dtype, name + ".dtype", tensor.dtype, "that of q, {}", q.dtype)
        _expect(q.shape[1] == plan.num_queries, "q", tuple(q.shape), "(B, {}, H, d) for this plan", plan.num_queries)
        scale = q.shape[3] ** -0.5 if scale is None else scale
        return self._implementation.far_attention(q, k, v, plan, scale, return_lse)

    def gated_residual_layer_norm(
        self,
        x: Tensor,
        frame_map: FrameMap,
        branch: Tensor | None = None,
        gate: Tensor | None = None,
        shift: Tensor | None = None,
        scale: Tensor | None = None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-6,
    ) -> tuple[Tensor, Tensor]:
        """Gated residual, LayerNorm and modulation in one pass over the tokens.

        `x_new = x + gate * branch`, rounded to the dtype of x; `y = LN(x_new) [* weight + bias] * (1 + scale) +
        shift`. All arithmetic is fp32. Absent tensors drop their term: without branch `x_new` is x, without gate it
        is `x + branch`.

        Args:
            x, branch: (B, L, D), dense last dimension; under autocast branch may have another dtype.
            frame_map: runs `(frames, tokens_per_frame)` in token order, summing to L tokens and F frames.
            gate, shift, scale: (B, F, D) fp32, a row per frame; shift and scale come together.
            weight, bias: (D,), together.

        Returns:
            (x_new, y), both (B, L, D) in the dtype of x.

        Raises:
            ValueError: on shapes that do not fit.
        """
        _expect_dims("x", x, 3)
        tokens = sum(frames * per_frame for frames, per_frame in frame_map)
        _expect(tokens == x.shape[1], "frame_map", frame_map, "runs of frames that sum to {} tokens", x.shape[1])
        if branch is not None:
            _expect(branch.shape == x.shape, "branch", tuple(branch.shape), tuple(x.shape))
            if torch.is_autocast_enabled(x.device.type):  # a linear before it has rounded, x has not
                branch = branch.to(x.dtype)
            _expect(branch.dtype == x.dtype, "branch.dtype", branch.dtype, "that of x, {}", x.dtype)
        _expect(gate is None or branch is not None, "gate", "a tensor without branch", "both or only branch")
        _expect((shift is None) == (scale is None), "shift, scale", "one of them", "both or none")
        _expect((weight is None) == (bias is None), "weight, bias", "one of them", "both or none")
        rows = (x.shape[0], sum(frames for frames, _ in frame_map), x.shape[2])
        for name, tensor in (("gate", gate), ("shift", shift), ("scale", scale)):
            if tensor is not None:
                _expect(tuple(tensor.shape) == rows, name, tuple(tensor.shape), "(B, F, D) = {}", rows)
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                _expect(tensor.shape == x.shape[2:], name, tuple(tensor.shape), tuple(x.shape[2:]))
        return self._implementation.gated_residual_layer_norm(
            x, frame_map, branch, gate, shift, scale, weight, bias, eps
        )

    def qk_norm_rope_append(
        self,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        rope: tuple[Tensor, Tensor],
        heads: int,
        eps: float,
        k_cache: Tensor | None = None,
        v_cache: Tensor | None = None,
        offset: int = 0,
    ) -> Any:
        """RMSNorm of q and k over all D channels, RoPE, and the write of k and v into the cache, in one pass.

        Args:
            qkv: (B, L, 3D), the output of the fused projection; q, k, v side by side.
            q_weight, k_weight: (D,).
            rope: (cos, sin), each (L, d/2) fp32; channels 2i and 2i+1 of every head rotate by entry i.
            heads: H.
            eps: of both norms.
            k_cache, v_cache: (B, T, H, d) slabs, written in place at tokens offset to offset + L; both or none.

        Returns:
            q (B, L, H, d) with slabs, else (q, k, v), in the dtype of qkv.

        Raises:
            ValueError: on shapes that do not fit, or if offset + L > T.
        """
        _expect_dims("qkv", qkv, 3)
        batch, length, width = qkv.shape
        _expect(heads >= 1, "heads", heads, ">= 1")
        divides = width % 3 == 0 and (width // 3) % (2 * heads) == 0
        _expect(divides, "qkv", tuple(qkv.shape), "(B, L, 3*H*d), H={}, even d", heads)
        head_dim = width // 3 // heads
        for name, tensor in (("q_weight", q_weight), ("k_weight", k_weight)):
            _expect(tuple(tensor.shape) == (heads * head_dim,), name, tuple(tensor.shape), (heads * head_dim,))
        for name, tensor in (("rope cos", rope[0]), ("rope sin", rope[1])):
            expected = (length, head_dim // 2)
            _expect(tuple(tensor.shape) == expected, name, tuple(tensor.shape), "(L, d/2) = {}", expected)
        _expect((k_cache is None) == (v_cache is None), "k_cache, v_cache", "one of them", "both or none")
        for name, cache in (("k_cache", k_cache), ("v_cache", v_cache)):
            if cache is not None:
                _expect_dims(name, cache, 4)
                slab = (batch, cache.shape[1], heads, head_dim)
                _expect(tuple(cache.shape) == slab, name, tuple(cache.shape), "(B, T, H, d) = {}", slab)
                _expect(cache.dtype == qkv.dtype, name + ".dtype", cache.dtype, "that of qkv, {}", qkv.dtype)
                fits = 0 <= offset and offset + length <= cache.shape[1]
                _expect(fits, "offset", offset, "0 <= offset and offset + L={} <= T={}", length, cache.shape[1])
        return self._implementation.qk_norm_rope_append(
            qkv, q_weight, k_weight, rope, heads, eps, k_cache, v_cache, offset
        )

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension D of x (..., D), fp32 inside, dtype of x."""
        _expect(weight.shape == x.shape[-1:], "weight", tuple(weight.shape), tuple(x.shape[-1:]))
        return self._implementation.rms_norm(x, weight, eps)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`x @ weight.T + bias`. x (..., K), weight (N, K), bias (N,), all of one dtype."""
        _check_linear(x, weight, bias)
        return self._implementation.linear(x, weight, bias)

    def linear_gelu(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`gelu_tanh(x @ weight.T + bias)`: the first half of the FFN. x (..., K), weight (N, K), bias (N,)."""
        _check_linear(x, weight, bias)
        return self._implementation.linear_gelu(x, weight, bias)

    def dual_timestep_embedding(
        self,
        t: Tensor,
        delta: Tensor,
        time_mlp: TimestepMLP,
        delta_mlp: TimestepMLP,
        proj_weight: Tensor,
        proj_bias: Tensor,
        gate: float,
    ) -> tuple[Tensor, Tensor]:
        """The gated embedding of a source and a target time, and its modulation.

        `rt = (1 - gate) * time_mlp(sinusoid(t)) + gate * delta_mlp(sinusoid(delta))`;
        `proj = linear(SiLU(rt))`. A sinusoid is [cos, sin] of width freq_dim with frequencies 10000^(-2i/freq_dim),
        in fp32.

        Args:
            t, delta: (N,), one entry per distinct pair, on the 0..1000 scale; never rounded below fp32.
            time_mlp, delta_mlp: see `TimestepMLP`.
            proj_weight, proj_bias: (6D, D) and (6D,); their dtype is the compute dtype.
            gate: weight of the delta embedding, 0.25 in the released models.

        Returns:
            rt (N, D) and proj (N, 6D), both fp32.

        Raises:
            ValueError: on shapes that do not fit, or an odd freq_dim.
        """
        _expect_dims("t", t, 1)
        _expect(delta.shape == t.shape, "delta", tuple(delta.shape), "the shape of t, {}", tuple(t.shape))
        width = proj_weight.shape[1]
        for name, mlp in (("time_mlp", time_mlp), ("delta_mlp", delta_mlp)):
            shape = tuple(mlp.weight_2.shape)
            _expect(shape == (width, mlp.weight_1.shape[0]), name + ".weight_2", shape, "(D, D)")
            _expect(mlp.weight_1.shape[1] % 2 == 0, name + ".weight_1", tuple(mlp.weight_1.shape), "an even freq_dim")
        outputs = proj_weight.shape[:1]
        _expect(proj_bias.shape == outputs, "proj_bias", tuple(proj_bias.shape), tuple(outputs))
        return self._implementation.dual_timestep_embedding(t, delta, time_mlp, delta_mlp, proj_weight, proj_bias, gate)

    def patch_embed(
        self,
        latents: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        patch_size: tuple[int, int, int],
        out: Tensor | None = None,
        offset: int = 0,
    ) -> Tensor:
        """Latents to tokens: a convolution whose stride is its kernel, written straight into a token slab.

        Args:
            latents: (B, F, C, H, W), any strides and dtype; what fills no whole patch is dropped.
            weight: (D, C, pt, ph, pw), bias: (D,): those of the Conv3d, of one dtype, which the tokens have too.
            patch_size: (pt, ph, pw).
            out: (B, T, D) slab with a dense last dimension, written at token `offset`; a new tensor if None.

        Returns:
            The tokens, (B, F//pt * H//ph * W//pw, D), order frame, row, column; a view of `out` if given.

        Raises:
            ValueError: on shapes, dtypes or devices that do not fit, or if the tokens do not fit the slab.
        """
        _expect_dims("latents", latents, 5)
        _expect_dims("weight", weight, 5)
        _expect_three("patch_size", patch_size, 1)
        kernel = (latents.shape[2], *patch_size)
        _expect(
            tuple(weight.shape[1:]) == kernel, "weight", tuple(weight.shape), "(D, C, pt, ph, pw) = (D, *{})", kernel
        )
        if bias is not None:
            _expect(bias.shape == weight.shape[:1], "bias", tuple(bias.shape), "({},)", weight.shape[0])
        for name, tensor in (("weight", weight), ("bias", bias), ("out", out)):
            if tensor is not None:
                _expect(tensor.dtype == weight.dtype, name + ".dtype", tensor.dtype, "that of weight, {}", weight.dtype)
                same = tensor.device == latents.device
                _expect(same, name + ".device", tensor.device, "that of latents, {}", latents.device)
        if out is None:
            _expect(offset == 0, "offset", offset, "0 without out")
        else:
            size = [n // p for n, p in zip((latents.shape[1], *latents.shape[3:]), patch_size, strict=True)]
            _expect_dims("out", out, 3)
            tokens, slab = size[0] * size[1] * size[2], (latents.shape[0], out.shape[1], weight.shape[0])
            _expect(tuple(out.shape) == slab, "out", tuple(out.shape), "(B, T, D) = {}", slab)
            _expect(out.stride(2) == 1, "out.stride", out.stride(), "a dense last dimension")
            _expect(not out.is_neg(), "out", "a negated view", "a tensor that can be written (out.resolve_neg())")
            fits = 0 <= offset and offset + tokens <= out.shape[1]
            _expect(fits, "offset", offset, "0 <= offset and offset + {} tokens <= T={}", tokens, out.shape[1])
        return self._implementation.patch_embed(latents, weight, bias, patch_size, out, offset)

    def unpatchify(
        self, tokens: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int], channels: int
    ) -> Tensor:
        """Tokens of the head to latents.

        Args:
            tokens: (B, frames*rows*columns, pt*ph*pw*C), inside a token ordered (pt, ph, pw, C).
            grid: (frames, rows, columns) of tokens.

        Returns:
            (B, frames*pt, C, rows*ph, columns*pw), contiguous.

        Raises:
            ValueError: on numbers or a shape that do not fit.
        """
        _expect_dims("tokens", tokens, 3)
        _expect_three("grid", grid, 0)
        _expect_three("patch_size", patch_size, 1)
        _expect(channels >= 1, "channels", channels, ">= 1")
        features = patch_size[0] * patch_size[1] * patch_size[2] * channels
        expected = (tokens.shape[0], grid[0] * grid[1] * grid[2], features)
        _expect(tuple(tokens.shape) == expected, "tokens", tuple(tokens.shape), expected)
        return self._implementation.unpatchify(tokens, grid, patch_size, channels)

    def flow_map_step(
        self,
        x: Tensor,
        u: Tensor,
        sigma_t: Tensor | float,
        sigma_r: Tensor | float,
        u_uncond: Tensor | None = None,
        guidance: float = 1.0,
    ) -> Tensor:
        """One step of the flow map: `x - (sigma_t - sigma_r) * (u_uncond + guidance * (u - u_uncond))`.

        In float64, rounded once, as diffusers steps.

        Args:
            x, u, u_uncond: latents of one shape (B, F, ...), floating point.
            sigma_t, sigma_r: source and target noise level, a float or a tensor of shape (), (B,) or (B, F).
            guidance: classifier-free guidance scale; needs `u_uncond` unless 1.

        Returns:
            The latents at sigma_r, in the dtype of x.
        """
        for name, tensor in (("u", u), ("u_uncond", u_uncond)):
            if tensor is not None:
                _expect(tensor.shape == x.shape, name, tuple(tensor.shape), "the shape of x, {}", tuple(x.shape))
        _expect(u_uncond is not None or guidance == 1.0, "guidance", guidance, "1.0 without u_uncond")
        for name, sigma in (("sigma_t", sigma_t), ("sigma_r", sigma_r)):
            if isinstance(sigma, Tensor):
                fits = sigma.ndim <= 2 and sigma.shape == x.shape[: sigma.ndim]
                _expect(fits, name, tuple(sigma.shape), "(), (B,) or (B, F)")
        return self._implementation.flow_map_step(x, u, sigma_t, sigma_r, u_uncond, guidance)


def _expect(condition: bool, name: str, got: object, expected: object, *values: object) -> None:
    """Raise unless the condition holds. The message is made only then: formatting a symbolic size fixes its value."""
    if not condition:
        text = expected.format(*values) if isinstance(expected, str) else expected
        raise ValueError(f"{name}: got {got}, expected {text}")


def _check_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    _expect(weight.ndim == 2 and weight.shape[1] == x.shape[-1], "weight", tuple(weight.shape), "(N, {})", x.shape[-1])
    if bias is not None:
        _expect(bias.shape == weight.shape[:1], "bias", tuple(bias.shape), "({},)", weight.shape[0])
    if not torch.is_autocast_enabled(x.device.type):
        for name, tensor in (("weight", weight), ("bias", bias)):
            if tensor is not None:
                _expect(tensor.dtype == x.dtype, name + ".dtype", tensor.dtype, "that of x, {}", x.dtype)


def _expect_three(name: str, numbers: tuple[int, ...], least: int) -> None:
    _expect(len(numbers) == 3 and all(n >= least for n in numbers), name, numbers, "three integers >= {}", least)


def _expect_dims(name: str, tensor: Tensor, dims: int) -> None:
    if tensor.ndim != dims:
        raise ValueError(f"{name}: got {tensor.ndim} dimensions {tuple(tensor.shape)}, expected {dims}")
    if not torch.is_floating_point(tensor):
        raise ValueError(f"{name}: got dtype {tensor.dtype}, expected floating point")
