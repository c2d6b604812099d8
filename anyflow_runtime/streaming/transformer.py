"""The contract of a flow-prediction network and of the cache that carries it through a rollout.

One chunk of a rollout, as the diffusion model drives it:

    cache.start(i)                                   # make room once
    flow = transformer.predict_flow(x, t, cache)     # once per denoising step, overwrites the chunk's keys and values
    transformer.finalize_kv_cache(clean, 0, cache)   # the same with the clean chunk
    cache.finalize(i)                                # commit
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from ..config import InstantiateConfig
from .offload import Turns


class TransformerAutoregressiveCache:
    """State of one rollout; empty, and enough as it is for a network without memory.

    Attributes:
        num_chunks: how many chunks the rollout has, None if there is no end.
    """

    num_chunks: int | None = None

    def start(self, autoregressive_index: int) -> None:
        """Prepare for a chunk. Called again with the same index if an attempt to generate the chunk has failed."""

    def finalize(self, autoregressive_index: int) -> None:
        """Commit a chunk, after `Transformer.finalize_kv_cache` has seen it clean."""


TransformerCacheT = TypeVar("TransformerCacheT", bound=TransformerAutoregressiveCache)


@dataclass(frozen=True, kw_only=True)
class TransformerConfig(InstantiateConfig):
    """Base of the transformer configs; it declares no settings of its own."""

    _target: type[Transformer] = field(default_factory=lambda: Transformer)  # type: ignore[type-abstract]


class Transformer(nn.Module, ABC, Generic[TransformerCacheT]):
    """A flow-prediction network. Subclasses say how it predicts, and how latents become what it works on.

    Unpatchified latents are (..., T, C, H, W). Patchified is whatever `patchify_and_maybe_split_cp` makes of them.
    """

    turns: Turns | None = None  # with offloading: who has the device
    host_times = False  # whether timesteps come in host memory, where the scheduler knows them, or on the device

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config

    @property
    def device(self) -> torch.device:
        """That of the first parameter; the CPU if there is none."""
        if self.turns is not None:
            return self.turns.device
        first = next(self.parameters(), None)
        return torch.device("cpu") if first is None else first.device

    def settle(self) -> None:
        """Have the weights on the device, where offloading may have taken them away."""
        if self.turns is not None:
            self.turns.settle()

    def step_flow(self, *arguments: Any, **keywords: Any) -> Any:
        """What a flow-map sampler is given: `predict_flow`, or a flow whose guidance is left to the sampler's step."""
        return self.predict_flow(*arguments, **keywords)

    @property
    def dtype(self) -> torch.dtype:
        """That of the first parameter; torch's default if there is none."""
        first = next(self.parameters(), None)
        return torch.get_default_dtype() if first is None else first.dtype

    @property
    def num_processes(self) -> int:
        """Processes that run the network together and must draw the same noise."""
        return 1

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, ...]:
        """Shape of this rank's patchified latent, batch included; known once a rollout has been initialised."""

    def chunk_latent_shape(self, autoregressive_index: int, cache: TransformerCacheT) -> tuple[int, ...]:
        """`latent_shape` of one chunk of one rollout; override it where chunks or rollouts differ in size."""
        return self.latent_shape

    @abstractmethod
    def predict_flow(
        self, noisy_latent: Tensor, timestep: Tensor, cache: TransformerCacheT, input: Any = None
    ) -> Tensor:
        """The flow at a timestep.

        A flow map declares a further parameter `r_timestep`: it then receives the timestep the flow is used to reach.

        Args:
            noisy_latent: patchified.
            timestep: 0-d tensor, on the device unless `host_times`.
            cache: of this rollout.
            input: the chunk's patchified encoder output, None without an encoder.
        Returns:
            The flow, shape of `noisy_latent`.
        """

    def finalize_kv_cache(
        self, noisy_latent: Tensor, timestep: Tensor, cache: TransformerCacheT, input: Any = None
    ) -> None:
        """Bring the cache to the state the next chunk needs, from the finished chunk; one discarded `predict_flow`.

        Override it for several networks that share a rollout. It may be repeated if it fails.
        """
        self.predict_flow(noisy_latent, timestep, cache=cache, input=input)

    def initialize_autoregressive_cache(self, **context: Any) -> TransformerCacheT:
        """A fresh cache for a new rollout; by default an empty one.

        Raises:
            TypeError: if a context is given to a transformer that takes none.
        """
        if context:
            raise TypeError(f"{type(self).__name__} takes no context, got {', '.join(sorted(context))}")
        return TransformerAutoregressiveCache()  # type: ignore[return-value]

    def known_latent(self, autoregressive_index: int, cache: TransformerCacheT) -> Tensor | None:
        """The clean patchified latent of a chunk that is given and not to be generated; None for all others."""
        return None

    def postprocess_clean_latent(self, clean_latent: Tensor, cache: TransformerCacheT, input: Any = None) -> Tensor:
        """Last word on the clean patchified latent, for regions known a priori; by default no change."""
        return clean_latent

    @abstractmethod
    def patchify_and_maybe_split_cp(self, x: Any) -> Any:
        """Latent, or struct of tensors, to what the network works on: same type, this rank's share."""

    @abstractmethod
    def unpatchify_and_maybe_gather_cp(self, x: Tensor) -> Tensor:
        """The inverse, for the network's output."""
