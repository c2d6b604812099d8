"""What the streaming adapters of both AnyFlow models share: the model, the prompt, guidance."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..encoders.base import EncoderConfig
from ..errors import LifecycleError
from ..hub import model_files
from ..models.base import AnyFlowModel
from ..schedulers.base import GuidedFlow
from .offload import OnTurn
from .transformer import Transformer, TransformerCacheT, TransformerConfig


@dataclass(frozen=True, kw_only=True)
class AnyFlowStreamConfig(TransformerConfig):
    """What the configs of both adapters share.

    Args:
        path: diffusers directory or hub id to load from; None if the model is given to `setup(model=...)`.
        subfolder: of `path`, where the transformer lies.
        dtype: of the weights; None keeps what is stored.
        backend: see `anyflow_kernels.load_ops`; None keeps that of a given model, and is "auto" for one that is loaded.
        context_encoder: makes text embeddings of prompts; None if embeddings are given.
        chunk_partition: latent frames per chunk; None is the default of the model.
        height, width: default latent size.
    Raises:
        ValueError: at construction, for sizes below one.
    """

    path: str | None = None
    subfolder: str | None = "transformer"
    dtype: torch.dtype | None = None
    backend: str | None = None
    context_encoder: EncoderConfig | None = None
    chunk_partition: Sequence[int] | None = None
    height: int = 60
    width: int = 104

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.chunk_partition is not None:
            check_partition(self.chunk_partition)
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")


@dataclass(frozen=True, eq=False)
class Condition:
    """A prompt as the model takes it; a changed prompt is another object.

    Attributes:
        text: (B, S, text_dim), with guidance (2B, S, text_dim), the negative prompts first.
        image: (B or 2B, S_image, image_dim), or None.
        batch: B.
        guidance_scale: s in u + s (c - u), or None without guidance.
    """

    text: Tensor
    image: Tensor | None
    batch: int
    guidance_scale: float | None

    @property
    def guided(self) -> bool:
        return self.guidance_scale is not None

    def rows(self, x: Tensor) -> Tensor:
        """`x` (B, ...) once per row of `text`."""
        return torch.cat([x, x]) if self.guided else x


def check_condition(old: Condition, new: Condition) -> None:
    """Raise ValueError unless a rollout may go on under another condition: its caches have rows for the first one."""
    if (new.batch, new.guided) != (old.batch, old.guided):
        raise ValueError(
            f"condition: got batch {new.batch}, guidance {new.guided}, expected those the rollout began with: "
            f"{old.batch}, {old.guided}"
        )


class AnyFlowStream(Transformer[TransformerCacheT]):
    """Base of the adapters. Latents are (B, T, C, H, W) throughout: the model patchifies for itself.

    Guidance is one pass over a doubled batch, the negative prompt first, as in diffusers: a single cache of 2B rows
    instead of two, and larger GEMMs.

    Args:
        config: an `AnyFlowStreamConfig`.
        model: the model, instead of loading `config.path`.
        context_encoder: instead of building that of the config.
        device: to load the model to.
    Raises:
        ValueError: if not exactly one of `model` and `config.path` is given.
        TypeError: for a model of another class.
    """

    model_class: ClassVar[type[AnyFlowModel]]
    host_times = True  # a time known on the host is embedded once per rollout

    def __init__(
        self,
        config: Any,
        model: AnyFlowModel | None = None,
        context_encoder: torch.nn.Module | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(config)
        if (model is None) == (config.path is None):
            given = "neither" if model is None else "both"
            raise ValueError(f"model, path: got {given}, expected exactly one of setup(model=...) and config.path")
        if model is not None and not isinstance(model, self.model_class):
            raise TypeError(f"model: got {type(model).__name__}, expected {self.model_class.__name__}")
        self.model: Any = self._load(config, device) if model is None else model
        if model is not None and config.dtype is not None and config.dtype != self.model.dtype:
            raise ValueError(f"dtype: got {config.dtype} for a given model of {self.model.dtype}")
        if config.backend is not None:
            self.model.set_backend(config.backend)
        if context_encoder is None and config.context_encoder is not None:
            context_encoder = config.context_encoder.setup()
        self.context_encoder: Any = context_encoder
        self._latest: weakref.ref[TransformerCacheT] | None = None

    def _load(self, config: Any, device: torch.device | str | None) -> AnyFlowModel:
        directory = model_files(config.path, [f"{config.subfolder}/*"] if config.subfolder else None)
        return self.model_class.from_pretrained(directory, config.subfolder, config.dtype, device)

    @property
    def device(self) -> torch.device:
        if self.turns is not None:
            return self.turns.device
        hook = getattr(self.model, "_hf_hook", None)
        return getattr(hook, "execution_device", None) or self.model.device

    def settle(self) -> None:
        """Have the model on the device, where offloading may have taken it away."""
        super().settle()
        hook = getattr(self.model, "_hf_hook", None)
        if hook is not None:  # caches are made where the weights are, and prefilling is not a call that a hook notices
            hook.pre_forward(self.model)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype; some weights stay fp32 in a bf16 model."""
        return self.model.dtype

    @property
    def num_processes(self) -> int:
        """Those that run the model together; see `anyflow_runtime.parallel`."""
        return 1 if self.model.parallel is None else self.model.parallel.world

    @property
    def default_partition(self) -> tuple[int, ...]:
        """Latent frames per chunk of a rollout that names no others."""
        return tuple(self.config.chunk_partition or self.model.config.chunk_partition)

    def remembered(self, cache: TransformerCacheT) -> TransformerCacheT:
        """`cache`, as that of the rollout that was initialised last."""
        self._latest = weakref.ref(cache)
        return cache

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(B, F, C, H, W) of the next chunk of the rollout that was initialised last."""
        cache = None if self._latest is None else self._latest()
        if cache is None:
            raise LifecycleError("latent_shape: no rollout has been initialised, call initialize_autoregressive_cache")
        return self.chunk_latent_shape(getattr(cache, "num_finished", 0), cache)

    def patchify_and_maybe_split_cp(self, x: Any) -> Any:
        """`x`: the model works on latents."""
        return x

    def unpatchify_and_maybe_gather_cp(self, x: Tensor) -> Tensor:
        """`x`: the model returns latents."""
        return x

    @torch.no_grad()
    def make_condition(
        self,
        prompt: Any = None,
        text_embeddings: Tensor | None = None,
        negative_prompt: Any = None,
        negative_text_embeddings: Tensor | None = None,
        image_embeddings: Tensor | None = None,
        guidance_scale: float = 1.0,
    ) -> Condition:
        """The condition of these prompts.

        Args:
            prompt: what the context encoder takes: a string or several, with a `NullEncoder` embeddings.
            text_embeddings: (B, S, text_dim) instead of `prompt`.
            negative_prompt, negative_text_embeddings: likewise; used with guidance only. With a text prompt the empty
                string is the default.
            image_embeddings: (B, S_image, image_dim), for models with `image_dim`.
            guidance_scale: above 1 classifier-free guidance is on.
        Raises:
            ValueError: if both or neither of a pair is given, or on shapes that do not fit.
        """
        guided = guidance_scale > 1.0
        if guided and negative_prompt is None and negative_text_embeddings is None:
            negative_prompt = "" if isinstance(prompt, (str, list, tuple)) else None
        with self.context_encoder.turn() if isinstance(self.context_encoder, OnTurn) else nullcontext():
            text = self._embeddings("prompt", prompt, "text_embeddings", text_embeddings)
            negative = None
            if guided:
                names = "negative_prompt", "negative_text_embeddings"
                negative = self._embeddings(names[0], negative_prompt, names[1], negative_text_embeddings)
        self.settle()
        batch = text.shape[0]
        if image_embeddings is not None:
            expected = (batch, self.model.config.image_dim)
            if image_embeddings.ndim != 3 or (image_embeddings.shape[0], image_embeddings.shape[2]) != expected:
                raise ValueError(
                    f"image_embeddings: got {tuple(image_embeddings.shape)}, expected (B={batch}, S, {expected[1]})"
                )
            image_embeddings = image_embeddings.to(self.device, self.dtype)
        if negative is None:
            return Condition(text, image_embeddings, batch, None)
        if negative.shape[0] == 1:
            negative = negative.expand(batch, -1, -1)
        if negative.shape != text.shape:
            raise ValueError(
                f"negative_text_embeddings: got {tuple(negative.shape)}, expected those of the prompt, "
                f"{tuple(text.shape)}"
            )
        image = None if image_embeddings is None else torch.cat([image_embeddings, image_embeddings])
        return Condition(torch.cat([negative, text]), image, batch, float(guidance_scale))

    def _embeddings(self, prompt_name: str, prompt: Any, name: str, embeddings: Tensor | None) -> Tensor:
        if (prompt is None) == (embeddings is None):
            given = "neither" if prompt is None else "both"
            raise ValueError(f"{prompt_name}, {name}: got {given}, expected exactly one of them")
        if embeddings is None:
            if self.context_encoder is None:
                raise ValueError(f"{prompt_name}: got one, but there is no context_encoder; give {name}")
            embeddings = self.context_encoder(prompt)
        text_dim = self.model.config.text_dim
        if not isinstance(embeddings, Tensor) or embeddings.ndim != 3 or embeddings.shape[2] != text_dim:
            got = tuple(embeddings.shape) if isinstance(embeddings, Tensor) else type(embeddings).__name__
            raise ValueError(f"{name}: got {got}, expected (B, S, {text_dim})")
        return embeddings.to(self.device, self.dtype)

    def predict_flow(
        self,
        noisy_latent: Tensor,
        timestep: Tensor,
        cache: TransformerCacheT,
        input: Any = None,
        r_timestep: Tensor | None = None,
    ) -> Tensor:
        """The average velocity from `timestep` to `r_timestep` (None: instantaneous), guided.

        Raises:
            ValueError: for an input; the models take none.
        """
        return self.guided_flow(noisy_latent, timestep, cache, input, r_timestep).combined()

    def step_flow(self, *arguments: Any, **keywords: Any) -> Tensor | GuidedFlow:
        """`guided_flow`, but for a subclass that predicts in another way."""
        own = type(self).predict_flow is AnyFlowStream.predict_flow and "predict_flow" not in vars(self)
        return (self.guided_flow if own else self.predict_flow)(*arguments, **keywords)

    def guided_flow(
        self,
        noisy_latent: Tensor,
        timestep: Tensor,
        cache: TransformerCacheT,
        input: Any = None,
        r_timestep: Tensor | None = None,
    ) -> GuidedFlow:
        """As `predict_flow`, with the guidance left to the sampler's step."""
        self.no_input(input)
        t = per_frame(timestep, noisy_latent)
        r = t if r_timestep is None else per_frame(r_timestep, noisy_latent)
        return self.flow_of_frames(noisy_latent, t, r, cache)

    def flow_of_frames(self, x: Tensor, t: Tensor, r: Tensor, cache: TransformerCacheT) -> GuidedFlow:
        """`guided_flow` from t to r, (B, T) each in fp32, in host memory where the scheduler knows them."""
        raise NotImplementedError(f"{type(self).__name__} has neither guided_flow nor a predict_flow of its own")

    def guided_velocity(self, network: Callable[..., Tensor], condition: Condition, *inputs: Tensor) -> Tensor:
        """`network(x, t, r)` on one row per prompt, the pair of guided rows combined to u + s (c - u)."""
        return self._on_rows(network, condition, *inputs).combined()

    def _on_rows(
        self, network: Callable[..., Tensor], condition: Condition, x: Tensor, t: Tensor, r: Tensor
    ) -> GuidedFlow:
        """`network(x, t, r)` on one row per prompt; with guidance the negative ones come first."""
        velocity = network(*(condition.rows(tensor) for tensor in (x, t, r)))
        if condition.guidance_scale is None:
            return GuidedFlow(velocity, None, 1.0, self.model.ops)
        unconditional, conditional = velocity.chunk(2)
        return GuidedFlow(conditional, unconditional, condition.guidance_scale, self.model.ops)

    def latent_size(self, height: int | None, width: int | None, given: Tensor | None) -> tuple[int, int]:
        """Height and width of a rollout: what is asked for, else what is given, else the config's.

        Raises:
            ValueError: if they are no multiples of the patch, or contradict the given latents.
        """
        defaults = (self.config.height, self.config.width) if given is None else tuple(given.shape[-2:])
        size = (defaults[0] if height is None else height, defaults[1] if width is None else width)
        for name, side, patch in zip(("height", "width"), size, self.model.config.patch_size[1:], strict=True):
            if side < patch or side % patch:
                raise ValueError(f"{name}: got {side}, expected a positive multiple of the patch, {patch}")
        return size

    def given_latents(self, latents: Tensor | None, condition: Condition, size: tuple[int, int]) -> Tensor | None:
        """Context latents checked, one row per prompt, on the model's device and in its dtype."""
        if latents is None:
            return None
        expected = (condition.batch, self.model.config.in_channels, *size)
        shape = tuple(latents.shape)
        if len(shape) != 5 or shape[0] not in (1, expected[0]) or shape[2:] != expected[1:] or shape[1] < 1:
            raise ValueError(
                f"context_latents: got {shape}, expected (B={expected[0]}, F, {expected[1]}, {size[0]}, {size[1]})"
            )
        return latents.to(self.device, self.dtype).expand(expected[0], *shape[1:])

    def no_input(self, input: Any) -> None:
        """Raise ValueError for a per-chunk input: these models take none."""
        if input is not None:
            raise ValueError(f"input: got {type(input).__name__}, expected None: AnyFlow takes no input per chunk")


def per_frame(timestep: Tensor, latents: Tensor) -> Tensor:
    """A timestep in fp32 for each frame of latents (B, T, C, H, W)."""
    return timestep.float().expand(latents.shape[:2])


def check_partition(partition: Any) -> tuple[int, ...]:
    """Frames per chunk as a tuple of ints.

    Raises:
        ValueError: unless it holds at least one chunk, each of at least one frame.
    """
    frames = tuple(partition)
    if not frames or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in frames):
        raise ValueError(f"chunk_partition: got {partition!r}, expected frames per chunk, each an integer >= 1")
    return frames
