"""What the bidirectional and the FAR model share."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from anyflow_kernels import load_ops
from anyflow_kernels.operations import FrameMap

from .blocks import AnyFlowTransformerBlock, BlockInputs, Pending
from .conditioning import ConditionEmbedder
from .config import ModelConfig, constructor_arguments
from .layers import FP32LayerNorm
from .loading import CheckpointMixin
from .parameters import apply_linear, in_place, onloaded, weight_addresses
from .rotary import RotaryTables
from .token_shards import TokenSharing, take
from .workspaces import IdleWorkspaces


class AnyFlowModel(CheckpointMixin, nn.Module):
    """Parameters, runtime state and shared steps of both AnyFlow models.

    Runtime state is no part of the config or the state dict.
    """

    runtime_state = ("ops", "phantom_padding", "cuda_graphs", "idle_workspaces", "parallel", "_rotary")
    keep_in_fp32 = ("time_embedder", "scale_shift_table", "norm1", "norm2", "norm3")
    config: Any
    parallel: TokenSharing | None  # the processes that share the tokens; see `anyflow_runtime.parallel`
    # Modules are Any: their parameters are used directly, and `accelerate` puts diffusers' modules in their place.
    patch_embedding: Any
    condition_embedder: Any
    blocks: Any
    norm_out: Any
    proj_out: Any

    def _build(self, arguments: Mapping[str, Any]) -> None:
        """The weights, fresh. Takes the `locals()` of a constructor, and the place of `nn.Module.__init__`.

        Not called as `super().__init__`: in a class that `accelerate` merges, that is where diffusers' comes out.
        """
        nn.Module.__init__(self)
        config = ModelConfig(constructor_arguments(arguments, excluded=("backend", "phantom_padding")))
        for name in ("num_attention_heads", "attention_head_dim", "in_channels", "num_layers", "ffn_dim", "text_dim"):
            if config[name] < 1:
                raise ValueError(f"{name}: got {config[name]}, expected >= 1")
        if config.freq_dim % 2:
            raise ValueError(f"freq_dim: got {config.freq_dim}, expected an even number")
        object.__setattr__(self, "config", config)
        dim = config.num_attention_heads * config.attention_head_dim
        self.patch_embedding = nn.Conv3d(config.in_channels, dim, config.patch_size, config.patch_size)
        self.condition_embedder = ConditionEmbedder(
            dim, config.freq_dim, config.text_dim, config.image_dim, config.gate_value, config.deltatime_type
        )
        self.blocks = nn.ModuleList(
            AnyFlowTransformerBlock(dim, config.ffn_dim, config.num_attention_heads, config.cross_attn_norm, config.eps)
            for _ in range(config.num_layers)
        )
        self.norm_out = FP32LayerNorm(dim, config.eps, elementwise_affine=False)
        self.proj_out = nn.Linear(dim, (config.out_channels or config.in_channels) * math.prod(config.patch_size))
        self.scale_shift_table = nn.Parameter(torch.randn(1, 2, dim) / dim**0.5)

    def _init_runtime(self, backend: str, phantom_padding: bool = False, cuda_graphs: bool = True) -> None:
        """Set `runtime_state`; `accelerate` calls this on a diffusers module it has adopted."""
        self.ops = load_ops(backend)
        self.phantom_padding = phantom_padding
        self.cuda_graphs = cuda_graphs
        self.idle_workspaces = IdleWorkspaces()
        self.parallel = getattr(self, "parallel", None)
        self.gradient_checkpointing = getattr(self, "gradient_checkpointing", False)
        self._rotary = RotaryTables(
            self.config.attention_head_dim, self.config.patch_size, self.config.get("compressed_patch_size")
        )
        self.fuse_projections()

    def set_backend(self, backend: str) -> None:
        """Run on another backend from the next forward on; see `anyflow_kernels.load_ops`."""
        self.ops = load_ops(backend)

    def fuse_projections(self) -> None:
        """Give each block's q, k and v one storage, so that they are one GEMM; parameters keep names and shapes."""
        for block in self.blocks:
            block.fuse_projections()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AnyFlowModel:
        super()._apply(fn, recurse)
        self.fuse_projections()  # `.to()` moves each parameter to a storage of its own
        self.idle_workspaces.clear()  # moved weights make captured steps worthless
        return self

    def captures(self, device: torch.device) -> bool:
        """Whether denoising steps on this device are captured as CUDA graphs, as long as no gradient is wanted."""
        return self._captured_weights(device) is not None

    def _captured_weights(self, device: torch.device) -> Hashable | None:
        """What stands for the weights in the key of a captured step; None where steps are not captured: off CUDA, with
        collectives in the step, and where weights change or move within it (autocast, adapters, hooks that offload or
        cast).
        """
        if not self.cuda_graphs or device.type != "cuda" or self.parallel is not None:
            return None
        if torch.is_autocast_enabled("cuda") or getattr(self, "peft_config", None):
            return None
        addresses = weight_addresses(self)
        return None if addresses is None else (addresses, self.dtype)

    def release_memory(self) -> None:
        """Let go of the memory and captured steps that the latest rollout has left for the next one."""
        self.idle_workspaces.clear()

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype: that of the patch embedding."""
        return self.patch_embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        """That of the work: of the weights, or where diffusers' group offloading brings them."""
        registry = vars(self).get("_diffusers_hook")
        group = None if registry is None else registry.get_hook("group_offloading")
        return self.patch_embedding.weight.device if group is None else group.config.onload_device

    def enable_gradient_checkpointing(self) -> None:
        """Recompute each block in backward instead of keeping its activations."""
        self.gradient_checkpointing = True

    def disable_gradient_checkpointing(self) -> None:
        """Keep all activations for backward."""
        self.gradient_checkpointing = False

    def _patchify(self, module: Any, latents: Tensor, out: Tensor | None = None, offset: int = 0) -> Tensor:
        """Tokens of latents (B, F, C, H, W) by a patch embedding, into a slab if given."""
        with onloaded(module):
            return self.ops.patch_embed(latents, module.weight, module.bias, tuple(module.kernel_size), out, offset)

    def _run_blocks(self, x: Tensor, inputs: BlockInputs, keys_only: bool = False) -> Pending:
        """All blocks; with `keys_only` the last one stops once its keys and values are cached.

        With context parallelism the result is that of this process's tokens.
        """
        if self.parallel is not None:
            x, inputs = self.parallel.split(x, inputs)
        if torch.is_grad_enabled():
            inputs.prompt.tokens()  # outside any checkpointed block, which must not create what its recomputation finds
        if all(map(in_place, self.blocks)):  # a table that is offloaded is only there inside its block
            tables = [block.scale_shift_table for block in self.blocks]
            if len({table.device for table in tables}) == 1:  # `device_map` may spread the blocks
                inputs.modulation = torch.stack(tables).unsqueeze(1) + inputs.times
        pending: Pending = (x, None, None)
        for layer, block in enumerate(self.blocks):
            last = keys_only and layer == len(self.blocks) - 1
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                pending = checkpoint(block.call, pending, inputs, layer, last, use_reentrant=False)
            else:
                pending = block.call(pending, inputs, layer, last)
        return pending

    def _head(self, pending: Pending, rt: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """Tokens of `grid` = (frames, rows, columns) to the velocity, (B, frames, C, rows*ph, columns*pw).

        `rt` is (B, frames, D). Any leading or trailing tokens of the sequence have been cut off by the caller.
        """
        frame_map: FrameMap = ((grid[0], grid[1] * grid[2]),)
        shards = None if self.parallel is None else self.parallel.shards(frame_map)
        if self.parallel is not None and shards is not None:
            rows, frame_map = shards.frames(self.parallel.rank)
            rt = take(rt, rows, dim=1)
        shift, scale = (self.scale_shift_table.unsqueeze(1) + rt.unsqueeze(2)).unbind(2)
        _, y = self.ops.gated_residual_layer_norm(
            pending[0], frame_map, pending[1], pending[2], shift, scale, eps=self.norm_out.eps
        )
        y = apply_linear(self.ops, self.proj_out, y)
        if self.parallel is not None and shards is not None:
            y = self.parallel.gather(y, shards)
        channels = self.config.out_channels or self.config.in_channels
        return self.ops.unpatchify(y, grid, tuple(self.config.patch_size), channels)
