"""Both models at a small depth, on the paths of inference and training, for `anyflow verify` and for tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from anyflow_kernels import Ops, load_ops
from anyflow_kernels.testing.cases import Random, Sizes

from ..models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from ..models.cache import FarCache

CHANNELS = 16


@dataclass(frozen=True)
class ModelCase:
    """One model on one path.

    Args:
        model: its class.
        path: for people.
        run: the model and a source of random tensors to the predicted velocity.
        sizes: of the model and the video.
    """

    model: type[AnyFlowTransformer3DModel] | type[AnyFlowFARTransformer3DModel]
    path: str
    run: Callable[[Any, Random], Tensor]
    sizes: Sizes

    def velocity(self, ops: Ops | None, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The velocity on a backend, or, for None, that of the same weights and inputs in float64."""
        model = self._new()
        for name, parameter in model.named_parameters():  # fp32 stays where a loaded checkpoint has it
            if set(name.split(".")).isdisjoint(model.keep_in_fp32):
                parameter.data = parameter.data.to(dtype)
        model = model.to(device).eval()
        if ops is not None:
            model.ops, random = ops, Random(1, dtype, device)
        else:
            rounded = {name: tensor.double() for name, tensor in model.state_dict().items()}
            model = self._new().to(device, torch.float64).eval()
            model.load_state_dict(rounded)
            model.ops, random = load_ops("reference"), _Widened(1, dtype, device)
        with torch.no_grad():
            return self.run(model, random)

    def _new(self) -> AnyFlowTransformer3DModel | AnyFlowFARTransformer3DModel:
        """Two layers of seeded weights."""
        s = self.sizes
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.model(
                num_attention_heads=s.heads,
                attention_head_dim=s.head_dim,
                in_channels=CHANNELS,
                out_channels=CHANNELS,
                text_dim=s.text_dim,
                freq_dim=s.freq_dim,
                ffn_dim=s.ffn_dim,
                num_layers=2,
                backend="torch",
            )


class _Widened(Random):
    """The tensors of `Random`, rounded to its dtype, in float64."""

    def __call__(self, *shape: int, dtype: torch.dtype | None = None, scale: float = 1.0) -> Tensor:
        return super().__call__(*shape, dtype=dtype, scale=scale).double()


def model_cases(sizes: Sizes) -> Iterator[ModelCase]:
    """The cases of both models; the latents are a quarter as high and wide as the operations', at least 4 x 6."""
    height, width = max(4, sizes.height // 4), max(6, sizes.width // 4)
    frames = sum(sizes.chunks)

    def inputs(random: Random) -> tuple[Tensor, Tensor]:
        latents = random(sizes.batch, frames, CHANNELS, height, width)
        return latents, random(sizes.batch, sizes.text_tokens, sizes.text_dim)

    def times(value: float, count: int, random: Random) -> Tensor:
        return torch.full((sizes.batch, count), value, device=random.device)

    def bidirectional(model: AnyFlowTransformer3DModel, random: Random) -> Tensor:
        latents, text = inputs(random)
        t, r = times(937.5, frames, random), times(500.0, frames, random)
        t[:, :1] = 0.0  # a conditioning frame
        return model(latents, t, r, text, return_dict=False)[0]

    def training(model: AnyFlowFARTransformer3DModel, random: Random) -> Tensor:
        latents, text = inputs(random)
        layout = model.layout("train", sizes.chunks, height, width)
        clean = random(sizes.batch, layout.num_full_frames, CHANNELS, height, width)
        t, r = times(937.5, frames, random), times(500.0, frames, random)
        clean_t = times(0.0, layout.num_full_frames, random)
        copy = {"clean_hidden_states": clean, "clean_timestep": clean_t}
        return model(latents, t, r, text, sizes.chunks, **copy, return_dict=False)[0]

    def rollout(model: AnyFlowFARTransformer3DModel, random: Random) -> Tensor:
        latents, text = inputs(random)
        cache = FarCache.for_model(model, sizes.chunks, height, width, sizes.batch)
        done = 0
        for finished in range(1, len(sizes.chunks)):  # chunk by chunk: each demotes one to compressed context
            done = sum(sizes.chunks[:finished])
            model.prefill(cache, latents[:, :done], sizes.chunks[:finished], text)
        newest = sizes.chunks[-1]
        t, r = times(937.5, newest, random), times(500.0, newest, random)
        return model(latents[:, done:], t, r, text, sizes.chunks, kv_cache=cache, return_dict=False)[0]

    size = f"{frames} x {height} x {width}, 2 layers, {sizes.heads} x {sizes.head_dim}"
    yield ModelCase(AnyFlowTransformer3DModel, f"{size}", bidirectional, sizes)
    yield ModelCase(AnyFlowFARTransformer3DModel, f"train, clean copy: {size}", training, sizes)
    yield ModelCase(AnyFlowFARTransformer3DModel, f"rollout of {list(sizes.chunks)}: {size}", rollout, sizes)
