"""The causal AnyFlow model (FAR): video chunk by chunk, older chunks as compressed context.

Source: FAR (arXiv 2503.19325) and AnyFlow (arXiv 2605.13724) on the Wan2.1 backbone; constructor, parameters and
forward of diffusers' src/diffusers/models/transformers/transformer_anyflow_far.py, here called the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from anyflow_kernels import AttentionPlan, FarLayout, Segment

from .base import AnyFlowModel
from .blocks import BlockInputs
from .cache import Context, FarCache
from .checks import check_cache, check_context, check_frame_count, check_parallel, check_video, expect
from .conditioning import embed_times
from .outputs import AnyFlowFARTransformerOutput, TransformerOutput, output
from .parameters import onloaded, warm_start_compressed_weight
from .prompt_keys import CrossAttentionKeys, PromptKeys, Seen
from .reference_cache import adopt_reference_cache
from .token_shards import HeldKeys
from .workspaces import Slabs

Rope = tuple[Tensor, Tensor]
PHANTOM_BLOCK = 128  # the reference pads inference queries and keys with zeros to this multiple


class AnyFlowFARTransformer3DModel(AnyFlowModel):
    """Predicts the average velocity of the newest chunk, or, in training, of all full-resolution chunks.

    Args:
        patch_size, compressed_patch_size: (1, rows, columns) of a full and of a compressed token.
        full_chunk_limit: chunks at full resolution, the newest included.
        chunk_partition: the pipeline's default frames per chunk.
        phantom_padding: reproduce the zero keys that diffusers' inference path lets into the softmax by padding to a
            multiple of 128; off, the softmax is the correct one.
        Others: as `AnyFlowTransformer3DModel`.

    Raises:
        ValueError: on values that cannot make a model.
    """

    def __init__(
        self,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        compressed_patch_size: tuple[int, int, int] = (1, 4, 4),
        full_chunk_limit: int = 3,
        num_attention_heads: int = 40,
        attention_head_dim: int = 128,
        in_channels: int = 16,
        out_channels: int = 16,
        text_dim: int = 4096,
        freq_dim: int = 256,
        ffn_dim: int = 13824,
        num_layers: int = 40,
        cross_attn_norm: bool = True,
        eps: float = 1e-6,
        image_dim: int | None = None,
        rope_max_seq_len: int = 1024,
        gate_value: float = 0.25,
        deltatime_type: str = "r",
        chunk_partition: tuple[int, ...] = (1, 3, 3, 3, 3, 3, 3, 2),
        backend: str = "auto",
        phantom_padding: bool = False,
    ) -> None:
        self._build(locals())
        full, patch = self.patch_embedding, compressed_patch_size
        self.far_patch_embedding = nn.Conv3d(full.in_channels, full.out_channels, patch, patch)
        self.warm_start_compressed()
        self._init_runtime(backend, phantom_padding)

    @torch.no_grad()
    def warm_start_compressed(self) -> None:
        """Start the compressed patch embedding as the full one, resized."""
        full, compressed = self.patch_embedding, self.far_patch_embedding
        compressed.weight.copy_(warm_start_compressed_weight(full.weight, compressed.kernel_size))
        compressed.bias.copy_(full.bias)  # type: ignore[union-attr]

    def layout(
        self,
        mode: str,
        chunk_partition: Sequence[int],
        height: int,
        width: int,
        clean: bool = False,
        cached: int = 0,
    ) -> FarLayout:
        """The token sequence of these chunks under this model's config; see `FarLayout`."""
        config = self.config
        sizes = (tuple(config.patch_size), tuple(config.compressed_patch_size), config.full_chunk_limit)
        return FarLayout(tuple(chunk_partition), height, width, *sizes, mode, clean, cached)

    def rotary(self, segments: Sequence[Segment], device: torch.device) -> tuple[Tensor, Tensor]:
        """(cos, sin) of the segments' tokens, in float64 for a float64 model, else fp32."""
        return self._rotary(segments, device, torch.float64 if self.dtype == torch.float64 else torch.float32)

    def build_attention_mask(
        self,
        *,
        chunk_partition: Sequence[int],
        height: int,
        width: int,
        has_clean_context: bool = False,
        device: torch.device | None = None,
        mode: str = "train",
    ) -> AttentionPlan:
        """The plan that `forward` makes for itself anyway, in place of the reference's BlockMask: integers, no tensor.

        Args:
            mode: "train" or "cache", the reference's names.
            device: accepted for the reference's signature.

        Raises:
            ValueError: on another mode or sizes that do not fit.
        """
        if mode not in ("train", "cache"):
            raise ValueError(f"mode: got {mode!r}, expected 'train' or 'cache'")
        layout_mode = "prefill" if mode == "cache" else "train"
        return AttentionPlan.from_layout(self.layout(layout_mode, chunk_partition, height, width, has_clean_context))

    def forward(
        self,
        hidden_states: Tensor,
        timestep: Tensor,
        r_timestep: Tensor,
        encoder_hidden_states: Tensor,
        chunk_partition: Sequence[int],
        encoder_hidden_states_image: Tensor | None = None,
        clean_hidden_states: Tensor | None = None,
        clean_timestep: Tensor | None = None,
        kv_cache: Any = None,
        kv_cache_flag: dict[str, Any] | None = None,
        attention_mask: Any = None,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> TransformerOutput | tuple[Any, ...]:
        """Average velocity from `timestep` down to `r_timestep`, by one of three paths.

        Without a cache: training. All chunks come in; the oldest are compressed context, the last `full_chunk_limit`
        give the result. With one and `kv_cache_flag["is_cache_step"]`: the chunks are finished and become context.
        With one otherwise: `hidden_states` is the newest chunk and sees the cache.

        Args:
            hidden_states: (B, F, C, H, W) latents.
            timestep, r_timestep: (B, F), one value per frame, 0..1000.
            encoder_hidden_states: (B, S, text_dim).
            chunk_partition: frames per chunk, including the cached ones.
            encoder_hidden_states_image: (B, S_image, image_dim), for models with `image_dim`.
            clean_hidden_states: (B, F_full, C, H, W), the clean copy of the full chunks (training).
            clean_timestep: (B, F_full), t and r of the clean copy.
            kv_cache: a `FarCache`, or the reference's dicts; see `adopt_reference_cache`. A cache step on dicts is
                lazy: the work is done when the next chunk needs it, so given context is encoded in one pass.
            kv_cache_flag: the reference's flags; with a `FarCache` None means a query.
            attention_mask, attention_kwargs: for the reference's signature; the mask follows from the partition.
            return_dict: an output object instead of a tuple.

        Returns:
            The velocity of the full noisy frames, None after a cache step; with a cache also the cache.

        Raises:
            ValueError: on shapes that do not fit, or chunks that do not continue the cache.
        """
        prompt = (encoder_hidden_states, encoder_hidden_states_image)
        check_video(self.config, hidden_states, timestep, r_timestep, *prompt)
        check_parallel(self, hidden_states)
        partition = tuple(chunk_partition)
        expect(len(partition) > 0, "chunk_partition", partition, "at least one chunk")
        if kv_cache is None:
            clean = (clean_hidden_states, clean_timestep)
            velocity = self._train(hidden_states, timestep, r_timestep, prompt, partition, *clean)
            return output(TransformerOutput, sample=velocity) if return_dict else (velocity,)

        expect(clean_hidden_states is None, "clean_hidden_states", "a tensor with kv_cache", "None outside training")
        flag, (height, width) = kv_cache_flag or {}, hidden_states.shape[-2:]
        cache = adopt_reference_cache(kv_cache, self, partition, height, width, flag.get("num_cached_chunks", 0))
        check_cache(self, cache, hidden_states)
        sample: Tensor | None = None
        if flag.get("is_cache_step"):
            self._keep_pending(cache, hidden_states, torch.stack([timestep, r_timestep]), prompt, partition)
            if cache is kv_cache:
                self.encode_pending(cache)
        else:
            sample = self._query(hidden_states, timestep, r_timestep, prompt, partition, cache)
        if not return_dict:
            return sample, kv_cache
        return output(AnyFlowFARTransformerOutput, sample=sample, kv_cache=kv_cache)

    def prefill(
        self,
        cache: FarCache,
        latents: Tensor | Sequence[Tensor],
        chunk_partition: Sequence[int],
        encoder_hidden_states: Tensor,
        encoder_hidden_states_image: Tensor | None = None,
        timestep: Tensor | None = None,
    ) -> None:
        """Make finished chunks the context of the next one, encoding only what the cache does not hold.

        Args:
            latents: all finished chunks from the first frame on: a tensor each, (B, F_i, C, H, W), of which those that
                are still the tensors of the prefill before are known without being read; or one (B, F, C, H, W), which
                is compared with what the cache holds, for which the host waits for the device.
            chunk_partition: their frames, summing to F.
            timestep: (B, F), t and r of each frame, 0..1000; None where they are clean.

        Raises:
            ValueError: on shapes that do not fit.
        """
        chunks = None if isinstance(latents, Tensor) else tuple(latents)
        video = latents if isinstance(latents, Tensor) else torch.cat(tuple(latents), dim=1)
        if timestep is None:
            timestep = torch.zeros(video.shape[:2], device="cpu")  # where it is embedded once per rollout
        prompt = (encoder_hidden_states, encoder_hidden_states_image)
        check_video(self.config, video, timestep, timestep, *prompt)
        check_parallel(self, video)
        check_cache(self, cache, video)
        self._keep_pending(cache, video, torch.stack([timestep] * 2), prompt, tuple(chunk_partition), chunks)
        with onloaded(self):  # its hooks stand around `forward`, which this is not
            self.encode_pending(cache)

    def _keep_pending(
        self,
        cache: FarCache,
        latents: Tensor,
        times: Tensor,
        prompt: tuple[Tensor, Tensor | None],
        partition: tuple[int, ...],
        chunks: tuple[Tensor, ...] | None = None,
    ) -> None:
        """Finished chunks, (B, F, C, H, W) at times (2, B, F), are what `encode_pending` will make context."""
        keys, latents = cache.prompt(self.condition_embedder, *prompt), latents.clone() if chunks is None else latents
        context = Context(partition, latents, times, keys, None if chunks is None else tuple(map(Seen, chunks)))
        check_context(self, cache, context)
        cache.pending = context

    @torch.no_grad()
    def encode_pending(self, cache: FarCache) -> None:
        """Encode the cache's pending chunks, if any, in one pass; the last block stops after its keys and values."""
        context = cache.pending
        if context is None or context.latents is None:
            return
        cached = cache.reusable_chunks(context)
        if cached == len(context.partition):
            cache.end_write(context)
            return
        layout = cache.layout("prefill", context.partition, cached)
        first = sum(context.partition[:cached])
        latents, (t, r) = context.latents[:, first:], context.times[:, :, first:]
        num_compressed = max(0, layout.num_compressed_frames - first)
        _, times = embed_times(self.condition_embedder, self.config, self.ops, t, r, cache.times)
        slabs, held = cache.begin_write(layout), cache.held

        def encode(prompt: CrossAttentionKeys, rope: Rope, latents: Tensor, times: Tensor) -> None:
            x = self._tokens(layout, latents[:, :num_compressed], latents[:, num_compressed:])
            self._run_blocks(x, self._inputs(layout, times, prompt, rope, slabs, held), keys_only=True)

        if layout.num_query_tokens:
            self._captured(encode, layout, cache, context.prompt, slabs, latents, times)
        cache.end_write(context)

    def _query(
        self,
        latents: Tensor,
        t: Tensor,
        r: Tensor,
        prompt: tuple[Tensor, Tensor | None],
        partition: tuple[int, ...],
        cache: FarCache,
    ) -> Tensor:
        """The velocity of the newest chunk, which sees the cache and itself."""
        frames = partition[-1]
        check_frame_count(latents, t, frames, f"the newest of {list(partition)}")
        size = tuple(latents.shape[3:])
        expect(size == cache.latent_size, "hidden_states", f"(H, W) = {size}", f"the cache's {cache.latent_size}")
        self.encode_pending(cache)
        cached = cache.context.partition if cache.context else ()
        expect(cached == partition[:-1], "chunk_partition", [*partition], f"{[*cached]} (cached) and one more chunk")
        layout = cache.layout("inference", partition)
        if torch.is_grad_enabled():  # keys of its own: kept ones have no graph, or one that another backward frees
            keys = PromptKeys(self.condition_embedder, *prompt)
        else:
            keys = cache.prompt(self.condition_embedder, *prompt)
        slabs, held = cache.slabs_for(layout), cache.held

        rt, times = embed_times(self.condition_embedder, self.config, self.ops, t, r, cache.times)

        def step(prompt: CrossAttentionKeys, rope: Rope, latents: Tensor, rt: Tensor, times: Tensor) -> Tensor:
            inputs = self._inputs(layout, times, prompt, rope, slabs, held, self.phantom_padding)
            x = self._tokens(layout, latents[:, :0], latents)
            return self._head(self._run_blocks(x, inputs), rt, (frames, *layout.full_grid))

        return self._captured(step, layout, cache, keys, slabs, latents, rt, times)

    def _captured(
        self,
        step: Callable[..., Tensor | None],
        layout: FarLayout,
        cache: FarCache,
        prompt: PromptKeys,
        slabs: Slabs,
        *inputs: Tensor,
    ) -> Any:
        """`step(prompt, rope, *inputs)`, as a CUDA graph where steps are captured and no gradient is wanted."""
        device = inputs[0].device
        rope = self.rotary(layout.query_segments, device)
        weights = None if torch.is_grad_enabled() else self._captured_weights(device)
        if weights is None:
            return step(prompt, rope, *inputs)
        present = cache.workspace.hold_prompt(prompt, self.blocks, self.ops)
        # The layout names the kernels' shapes, the rest the memory they touch.
        key = (layout, present, weights, slabs[0][0].data_ptr(), self.ops.backend, self.phantom_padding)
        return cache.graphs.run(key, partial(step, present, rope), *inputs, reads=(slabs, rope))

    def _train(
        self,
        latents: Tensor,
        t: Tensor,
        r: Tensor,
        prompt: tuple[Tensor, Tensor | None],
        partition: tuple[int, ...],
        clean: Tensor | None,
        clean_t: Tensor | None,
    ) -> Tensor:
        """The velocity of the full noisy frames; compressed context and clean copy are cut off before the head."""
        if self.parallel is not None:
            raise ValueError(
                f"kv_cache: got None on {self.parallel.world} processes, expected a FarCache: context parallelism does "
                "not cover the training path"
            )
        layout = self.layout("train", partition, latents.shape[3], latents.shape[4], clean is not None)
        frames, num_compressed = sum(partition), layout.num_compressed_frames
        check_frame_count(latents, t, frames, f"chunks {list(partition)}")
        together = (clean is None) == (clean_t is None)
        expect(together, "clean_timestep", clean_t, "both it and clean_hidden_states, or none")
        if clean is not None and clean_t is not None:
            expected = (latents.shape[0], layout.num_full_frames, *latents.shape[2:])
            expect(tuple(clean.shape) == expected, "clean_hidden_states", tuple(clean.shape), expected)
            expect(tuple(clean_t.shape) == expected[:2], "clean_timestep", tuple(clean_t.shape), expected[:2])
            # The reference gives clean_timestep to the delta embedder under both delta types.
            clean_r = clean_t if self.config.deltatime_type == "r" else torch.zeros_like(clean_t)
            t, r = torch.cat([t, clean_t.to(t)], dim=1), torch.cat([r, clean_r.to(r)], dim=1)
        x = self._tokens(layout, latents[:, :num_compressed], latents[:, num_compressed:], clean)
        rt, times = embed_times(self.condition_embedder, self.config, self.ops, t, r)
        rope, keys = self.rotary(layout.query_segments, times.device), PromptKeys(self.condition_embedder, *prompt)
        inputs = self._inputs(layout, times, keys, rope)
        x, branch, gate = self._run_blocks(x, inputs)
        noisy = [s for s in layout.segments if s.kind == "full"]
        tokens = slice(noisy[0].offset, noisy[-1].end)
        rows = slice(num_compressed, num_compressed + layout.num_full_frames)
        assert branch is not None and gate is not None  # only a prefill stops before they are there
        return self._head(
            (x[:, tokens], branch[:, tokens], gate[:, rows]), rt[:, rows], (layout.num_full_frames, *layout.full_grid)
        )

    def _tokens(self, layout: FarLayout, compressed: Tensor, full: Tensor, clean: Tensor | None = None) -> Tensor:
        """All query tokens in one slab, (B, Lq, D): compressed frames, full frames, clean frames."""
        parts = [(self.far_patch_embedding, compressed), (self.patch_embedding, full), (self.patch_embedding, clean)]
        present = [(module, x) for module, x in parts if x is not None and x.shape[1]]
        if len(present) == 1:
            return self._patchify(*present[0])
        if torch.is_grad_enabled():
            return torch.cat([self._patchify(module, x) for module, x in present], dim=1)
        dim = self.config.num_attention_heads * self.config.attention_head_dim
        slab = torch.empty(full.shape[0], layout.num_query_tokens, dim, dtype=self.dtype, device=full.device)
        offset = 0
        for module, latents in present:
            offset += self._patchify(module, latents, slab, offset).shape[1]
        return slab

    def _inputs(
        self,
        layout: FarLayout,
        times: Tensor,
        prompt: CrossAttentionKeys,
        rope: Rope,
        slabs: Slabs | None = None,
        held: HeldKeys | None = None,
        phantom: bool = False,
    ) -> BlockInputs:
        """What the blocks share; `times` is (B, frames of the queries, 6, D)."""
        plan = AttentionPlan.from_layout(layout, -layout.num_query_tokens % PHANTOM_BLOCK if phantom else 0)
        offset = 0 if slabs is None else layout.cache_offset
        return BlockInputs(self.ops, layout.frame_map, times, rope, plan, prompt, slabs, offset, held=held)
