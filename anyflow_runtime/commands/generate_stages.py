"""The stages of `anyflow generate`: load, encode the prompt, encode the context, denoise, decode.

Each takes the pipeline and the request. Denoising and decoding here are those of a whole video; a causal model does
both chunk by chunk (`generate_stream`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..acceleration import accelerate
from ..errors import check_finite, check_finite_weights
from ..models import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from . import UsageError
from .generate_request import GenerateRequest
from .model_directory import TEXT_COMPONENTS, ModelDirectory
from .pixel_pipe import PixelPipe

MAX_PROMPT_TOKENS = 512  # of the released models


def load(request: GenerateRequest) -> Any:
    """The diffusers pipeline of the request; without a text encoder if there are embeddings.

    Raises:
        UsageError: see `load_pipeline`.
    """
    return load_pipeline(
        request.model,
        device=request.device,
        dtype=request.dtype,
        backend=request.backend,
        text=request.prompt is not None,
        match_diffusers_padding=request.match_diffusers_padding,
        compile=request.compile,
        offload=request.offload,
    )


def load_pipeline(
    model: ModelDirectory,
    *,
    device: torch.device,
    dtype: torch.dtype,
    backend: str,
    text: bool = True,
    match_diffusers_padding: bool = False,
    compile: bool = False,
    offload: bool = False,
) -> Any:
    """The diffusers pipeline of a directory on our transformer, whose weights go straight to the device; for a pixel
    model, which is none of diffusers' own, a `PixelPipe`.

    Args:
        model: the directory.
        device, dtype: of all components.
        backend: see `anyflow_kernels.load_ops`.
        text: False leaves tokenizer and text encoder out.
        match_diffusers_padding, compile: see `accelerate`.
        offload: bring each component to the device when it is its turn.
    Raises:
        UsageError: if diffusers is missing or the directory does not load.
    """
    if model.pixels is not None:
        if offload:
            raise UsageError(f"--offload: got with {model.path}, expected a model in diffusers' format")
        try:
            small = PixelPipe(model.path, device, dtype, backend)
        except Exception as error:  # whatever a library makes of a damaged file
            raise UsageError(f"--model: {model.path} does not load: {type(error).__name__}: {error}") from error
        accelerate(small.transformer, match_diffusers_padding=match_diffusers_padding, compile=compile)
        return small
    try:
        import diffusers
    except ImportError as error:
        raise UsageError(f"this needs diffusers: pip install 'anyflow-kernels[diffusers]' ({error})") from error
    if not sys.stderr.isatty():
        _hide_loading_bars()
    transformer_class = AnyFlowFARTransformer3DModel if model.causal else AnyFlowTransformer3DModel
    absent = {} if text else dict.fromkeys(TEXT_COMPONENTS)
    try:
        transformer = transformer_class.from_pretrained(
            model.path,
            subfolder="transformer",
            dtype=dtype,
            device=torch.device("cpu") if offload else device,
            backend=backend,
        )
        pipe = getattr(diffusers, model.pipeline).from_pretrained(
            model.path, dtype=dtype, local_files_only=True, use_safetensors=True, transformer=None, **absent
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a library makes of a damaged file
        raise UsageError(f"--model: {model.path} does not load: {type(error).__name__}: {error}") from error
    pipe.register_modules(transformer=transformer)  # `from_pretrained` takes no class but diffusers' own
    accelerate(pipe, backend=backend, match_diffusers_padding=match_diffusers_padding, compile=compile)
    pipe.set_progress_bar_config(disable=None)  # on a terminal only
    if offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def _hide_loading_bars() -> None:
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@torch.no_grad()
def encode_text(pipe: Any, request: GenerateRequest) -> tuple[Tensor, Tensor | None]:
    """Embeddings of the prompt and, under guidance, of the negative prompt, (1, S, text_dim)."""
    if request.embeds:
        embeds = {name: tensor.to(request.device, request.dtype) for name, tensor in request.embeds.items()}
        return embeds["prompt_embeds"], embeds.get("negative_prompt_embeds")
    return pipe.encode_prompt(
        prompt=request.prompt,
        negative_prompt=request.negative_prompt,
        do_classifier_free_guidance=request.guidance > 1,
        max_sequence_length=MAX_PROMPT_TOKENS,
        device=request.device,
    )


def check_text(pipe: Any, prompt_embeds: Tensor, negative_prompt_embeds: Tensor | None) -> None:
    """Raise NonFiniteError, naming the first weight of the text encoder or embedding that is not finite."""
    if pipe.text_encoder is not None:  # embeddings were given
        check_finite_weights("text_encoder", pipe.text_encoder)
    check_finite("prompt_embeds", prompt_embeds)
    if negative_prompt_embeds is not None:
        check_finite("negative_prompt_embeds", negative_prompt_embeds)


@torch.no_grad()
def encode_context(pipe: Any, request: GenerateRequest) -> Tensor:
    """Latents of the given frames, (1, F, C, H/8, W/8)."""
    height, width = request.size
    hook = getattr(pipe.vae, "_hf_hook", None)
    if hook is not None:  # the pipeline calls a part of the VAE, which offloading does not notice
        hook.pre_forward(pipe.vae)
    return pipe.encode_video(request.context, height=height, width=width)


def denoise(
    pipe: Any,
    request: GenerateRequest,
    prompt_embeds: Tensor,
    negative_prompt_embeds: Tensor | None,
    context_latents: Tensor | None,
    on_step: Callable[[], None],
) -> Tensor:
    """Latents of the video, (1, C, F, H/8, W/8), normalised; `on_step` is called after every denoising step."""

    def after_step(*_: Any) -> dict[str, Any]:
        on_step()
        return {}

    height, width = request.size
    result = pipe(
        prompt_embeds=prompt_embeds,
        negative_prompt_embeds=negative_prompt_embeds,
        video_latents=context_latents,
        height=height,
        width=width,
        num_frames=request.frames,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        generator=torch.Generator().manual_seed(request.seed),  # of the CPU: the same video on every device
        output_type="latent",
        callback_on_step_end=after_step,
        **({"chunk_partition": list(request.chunks)} if request.chunks else {}),
    )
    return result.frames


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Iterator[Tensor]:
    """Frames of latents (1, C, F, h, w): one or several parts (T, 3, H, W) in [-1, 1]."""
    vae = pipe.vae
    mean, std = (
        torch.tensor(values, device=latents.device).view(1, -1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    video = vae.decode((latents.float() * std + mean).to(vae.dtype), return_dict=False)[0]
    yield video[0].transpose(0, 1)
