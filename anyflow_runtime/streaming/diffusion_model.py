"""A transformer and a scheduler as one thing that makes clean latents, chunk by chunk.

Draws per chunk, all from one generator: the initial noise, what the scheduler draws while sampling, and at the end one
more if the context is kept noisy.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, Generic

import torch
from torch import Tensor, nn

from ..config import InstantiateConfig, derive_config
from ..errors import check_finite, check_finite_weights
from ..schedulers.base import GuidedFlow, Scheduler, SchedulerConfig
from ..schedulers.flow_map_stream import FlowMapEulerScheduler
from .transformer import Transformer, TransformerCacheT, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class DiffusionModelConfig(InstantiateConfig):
    """Config of `DiffusionModel`.

    Args:
        transformer: the network.
        scheduler: the denoising loop.
        seed: of the model's generator; None uses torch's global one.
        context_noise: timestep at which a finished chunk enters the cache; 0 is clean and draws nothing.
        noise_in_unpatchified_shape: draw noise and run the scheduler on (..., T, C, H, W) latents, for the random
            numbers of another implementation. Slower.
        check_finite: raise NonFiniteError at the first weight or latent that is not finite. Waits for the device after
            every network call.
    Raises:
        ValueError: at construction, if `context_noise` is negative.
    """

    _target: type[DiffusionModel] = field(default_factory=lambda: DiffusionModel)
    transformer: TransformerConfig
    scheduler: SchedulerConfig
    seed: int | None = None
    context_noise: int = 0
    noise_in_unpatchified_shape: bool = False
    check_finite: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context_noise < 0:
            raise ValueError(f"context_noise: got {self.context_noise}, expected a timestep >= 0")


@dataclass(kw_only=True)
class FinalState(Generic[TransformerCacheT]):
    """What `DiffusionModel.generate` hands to `finalize`.

    Attributes:
        clean_latent: patchified, postprocessed.
        autoregressive_index: of the chunk.
        cache: of the rollout.
        input: the chunk's patchified encoder output, or None.
        rng: the generator the chunk was drawn from; None is torch's global one.
    """

    clean_latent: Tensor
    autoregressive_index: int
    cache: TransformerCacheT
    input: Any = None
    rng: torch.Generator | None = None


class DiffusionModel(nn.Module, Generic[TransformerCacheT]):
    """Noise in, clean latent out; network calls and the loop around them stay inside.

    Args:
        config: a `DiffusionModelConfig`.
        transformer: a network to use instead of building `config.transformer`.
    """

    def __init__(self, config: DiffusionModelConfig, transformer: Transformer | None = None) -> None:
        super().__init__()
        self.config = config
        self.transformer: Transformer = config.transformer.setup() if transformer is None else transformer
        self.scheduler: Scheduler = config.scheduler.setup()
        self._other_step_counts = nn.ModuleDict()
        self._takes_r = "r_timestep" in inspect.signature(self.transformer.predict_flow).parameters
        self._seed = config.seed
        self._rng: torch.Generator | None = None

    @property
    def rng(self) -> torch.Generator | None:
        """The model's generator, None without a seed. A rollout continues the stream where the last one left it.

        It is made at first use on the device of the parameters; moving the model to another device restarts it.
        """
        if self._seed is None:
            return None
        device = self.transformer.device
        if self._rng is None or self._rng.device != device:
            self._rng = self.new_rng(self._seed)
        return self._rng

    def reset_rng(self, seed: int | None = None) -> None:
        """Restart the model's stream, at `seed` or, if None, at the seed it last started from."""
        self._seed = self._seed if seed is None else seed
        self._rng = None

    def new_rng(self, seed: int) -> torch.Generator:
        """A generator of its own for one rollout, on the device of the parameters."""
        return torch.Generator(device=self.transformer.device).manual_seed(seed)

    def scheduler_for(self, steps: int | None) -> Scheduler:
        """The configured scheduler, or for a step count the same with that many steps.

        Raises:
            ValueError: if the scheduler has no step count to change, or other settings contradict this one.
        """
        config = self.config.scheduler
        if steps is None or steps == getattr(config, "num_inference_steps", None):
            return self.scheduler
        if str(steps) not in self._other_step_counts:
            if "num_inference_steps" not in {f.name for f in fields(config)}:
                raise ValueError(f"steps: got {steps}, but {type(config).__name__} has no num_inference_steps")
            scheduler = derive_config(config, num_inference_steps=steps).setup()
            self._other_step_counts[str(steps)] = scheduler.to(self.transformer.device)
        return self._other_step_counts[str(steps)]  # type: ignore[return-value]

    def check_weights(self) -> None:
        """Raise NonFiniteError if a weight is not finite."""
        check_finite_weights("transformer", self.transformer)

    @torch.no_grad()
    def generate(
        self,
        autoregressive_index: int,
        cache: TransformerCacheT,
        input: Any = None,
        *,
        noise: Tensor | None = None,
        rng: torch.Generator | None = None,
        steps: int | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> tuple[Tensor, FinalState[TransformerCacheT]]:
        """Denoise one chunk.

        Args:
            autoregressive_index: of the chunk.
            cache: of the rollout.
            input: unpatchified encoder output, None without an encoder.
            noise: the initial noise, unpatchified (..., T, C, H, W), instead of a draw.
            rng: generator to draw from instead of the model's.
            steps: denoising steps, for schedulers that can change them; None as configured.
            on_step: called after each call of the network, with its number from 1.
        Returns:
            The clean latent, unpatchified, and what `finalize` needs.
        Raises:
            ValueError: for noise of another shape than the chunk, steps that cannot be, or several processes that
                would each draw noise of its own.
        """
        transformer, scheduler = self.transformer, self.scheduler_for(steps)
        rng = self.rng if rng is None else rng
        if rng is None and noise is None and transformer.num_processes > 1:
            raise ValueError(f"seed: got None on {transformer.num_processes} processes, expected the same for all")
        if input is not None:
            input = transformer.patchify_and_maybe_split_cp(input)
        transformer.settle()
        cache.start(autoregressive_index)
        clean = transformer.known_latent(autoregressive_index, cache)
        if clean is None:
            x = self._initial_noise(autoregressive_index, cache, noise, rng)
            predict = self._predictor(scheduler, autoregressive_index, cache, input, on_step)
            clean = scheduler.sample(x, predict, rng)
            if self.config.noise_in_unpatchified_shape:
                clean = transformer.patchify_and_maybe_split_cp(clean)
        clean = transformer.postprocess_clean_latent(clean, cache, input)
        self._check(f"clean latent of chunk {autoregressive_index}", clean)
        state = FinalState(
            clean_latent=clean, autoregressive_index=autoregressive_index, cache=cache, input=input, rng=rng
        )
        return transformer.unpatchify_and_maybe_gather_cp(clean), state

    @torch.no_grad()
    def finalize(self, final_state: FinalState[TransformerCacheT]) -> None:
        """Advance the cache past a generated chunk. May be repeated if it fails."""
        state, transformer = final_state, self.transformer
        transformer.settle()
        latent = state.clean_latent
        # fp32 whatever the model's dtype: in bf16 a timestep of 999 would be 1000.
        known: dict[str, Any] = {"size": (), "fill_value": self.config.context_noise, "dtype": torch.float32}
        timestep = torch.full(**known, device="cpu" if transformer.host_times else latent.device)
        if self.config.context_noise > 0:
            if self.config.noise_in_unpatchified_shape:
                latent = transformer.unpatchify_and_maybe_gather_cp(latent)
            latent = self.scheduler.add_noise(latent, torch.full(**known, device=latent.device), state.rng)
            if self.config.noise_in_unpatchified_shape:
                latent = transformer.patchify_and_maybe_split_cp(latent)
        transformer.finalize_kv_cache(latent, timestep, state.cache, state.input)
        state.cache.finalize(state.autoregressive_index)

    def _initial_noise(
        self, index: int, cache: TransformerCacheT, noise: Tensor | None, rng: torch.Generator | None
    ) -> Tensor:
        transformer = self.transformer
        device, dtype = transformer.device, transformer.dtype
        shape = tuple(transformer.chunk_latent_shape(index, cache))
        unpatchified = self.config.noise_in_unpatchified_shape
        if noise is None:
            if unpatchified:
                # Only unpatchifying tells the shape; the values are not read.
                probe = torch.empty(shape, dtype=dtype, device=device)
                shape = tuple(transformer.unpatchify_and_maybe_gather_cp(probe).shape)
            return torch.randn(shape, generator=rng, dtype=dtype, device=device)
        given = tuple(noise.shape)
        noise = noise.to(device, dtype)
        try:
            patchified = transformer.patchify_and_maybe_split_cp(noise)
        except (ValueError, RuntimeError, IndexError) as error:
            raise ValueError(f"noise: got shape {given}, which does not patchify ({error})") from error
        if tuple(patchified.shape) != shape:
            raise ValueError(
                f"noise: got shape {given}, patchified {tuple(patchified.shape)}, expected {shape} for chunk {index}"
            )
        self._check(f"noise of chunk {index}", noise)
        return noise if unpatchified else patchified

    def _predictor(
        self,
        scheduler: Scheduler,
        index: int,
        cache: TransformerCacheT,
        input: Any,
        on_step: Callable[[int], None] | None,
    ) -> Callable[..., Any]:
        """What the scheduler calls: `(x, t)`, or `(x, t, r_timestep)` for a flow map. Guidance is left to a scheduler
        that can do it in its step."""
        transformer, unpatchified = self.transformer, self.config.noise_in_unpatchified_shape
        fused = isinstance(scheduler, FlowMapEulerScheduler) and not unpatchified
        predict: Callable[..., Any] = transformer.step_flow if fused else transformer.predict_flow
        calls = 0

        def call(x: Tensor, timestep: Tensor, **target: Tensor) -> Any:
            nonlocal calls
            if unpatchified:
                x = transformer.patchify_and_maybe_split_cp(x)
            flow = predict(x, timestep, cache=cache, input=input, **target)
            parts = (flow.flow, flow.unconditional) if isinstance(flow, GuidedFlow) else (flow,)
            for part in parts:
                if part is not None:
                    self._check(f"flow of chunk {index}, network call {calls}", part)
            calls += 1
            if on_step is not None:
                on_step(calls)
            return transformer.unpatchify_and_maybe_gather_cp(flow) if unpatchified else flow

        def flow(x: Tensor, timestep: Tensor) -> Any:
            return call(x, timestep)

        def flow_map(x: Tensor, timestep: Tensor, r_timestep: Tensor) -> Any:
            return call(x, timestep, r_timestep=r_timestep)

        chosen: Any = flow_map if self._takes_r else flow
        chosen.host_times = transformer.host_times
        return chosen

    def _check(self, name: str, x: Tensor) -> None:
        if self.config.check_finite:
            check_finite(name, x)


DiffusionModel.FinalState = FinalState  # type: ignore[attr-defined]  # by both names, as documented
