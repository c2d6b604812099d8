"""The one way to a pipeline: from a directory, a preset's name, the bundled demo, or models that are loaded already."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from anyflow_kernels import load_ops

from ..acceleration import accelerate
from ..config import derive_config
from ..encoders.text import UMT5TextEncoder, UMT5TextEncoderConfig
from ..models import AnyFlowFARTransformer3DModel
from ..models.base import AnyFlowModel
from ..models.loading import read_config
from ..optional import optional
from ..schedulers.flow_map_stream import FlowMapEulerSchedulerConfig
from ..wan_vae import WanVAEEncoder, WanVAEEncoderConfig, WanVAEStreamDecoder, WanVAEStreamDecoderConfig
from ..wan_vae.weights import wan_vae
from .adapters import diffusers_transformer, load_lora
from .bidirectional_stream import AnyFlowBidirectionalStreamConfig
from .diffusion_model import DiffusionModelConfig
from .far_stream import AnyFlowFARStreamConfig
from .model_directory import SCHEDULE, ModelDirectory, read_model_directory
from .offload import OnTurn, Turns
from .pipeline import StreamInferencePipeline, StreamInferencePipelineConfig
from .pixel_model import pixel_pipeline
from .presets import released_pipeline


def open_model(
    source: str | os.PathLike[str] | ModelDirectory | nn.Module | Any,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
    steps: int = 4,
    text: bool = True,
    decode: bool = True,
    offload: bool | str = False,
    compile: bool | dict[str, Any] = False,
    match_diffusers_padding: bool | None = None,
    check_finite: bool = False,
    lora: Mapping[str, str | os.PathLike[str]] | None = None,
    lora_weights: Mapping[str, float] | None = None,
    fuse_lora: bool = False,
    vae_tile_size: int | None = None,
) -> StreamInferencePipeline:
    """A pipeline that `stream` makes videos with.

    Weights go straight to the device. Frames that a video begins with (`context_video`) are taken in [0, 1].

    Args:
        source: a directory in diffusers' format or of a pixel model, the name of a preset (`PRESETS`) or of a hub
            repository (downloaded where it is not in the hub's cache), "demo", or what is loaded already: a diffusers
            `AnyFlowPipeline` or `AnyFlowFARPipeline`, which is accelerated and shares its weights, or an AnyFlow
            transformer, for a pipeline of embeddings and latents.
        device: of the work; None: the GPU if there is one, or where the models of a loaded source lie.
        dtype: of all weights, save those that stay fp32; None: bf16 on a GPU and fp32 on a CPU, or as loaded.
        backend: see `anyflow_kernels.load_ops`; None: "auto", or that of a transformer of ours that is loaded.
        steps: denoising steps per chunk, where `stream` is not told another number.
        text: False leaves the text encoder out: prompts are embeddings then.
        decode: False leaves the decoder out: `stream` gives latents then.
        offload: True, or "model", keeps on the device only the models that are running; "group" brings the blocks of
            the transformer there one after the other, on CUDA each while the one before it runs: the least memory.
        compile: compile the transformer's blocks; True, or keywords of `torch.compile`.
        match_diffusers_padding: reproduce the zero keys that diffusers' FAR inference lets into every softmax; None
            is False, or as a transformer of ours has it.
        check_finite: stop at the first weight, embedding, latent or frame that is NaN or infinite; slower.
        lora: adapters to load, by a name of your own: a file, a directory or a hub id each. The transformer is then
            diffusers' class, accelerated; `Change(lora=...)` sets their weights between chunks.
        lora_weights: of the adapters by name; None: 1 each.
        fuse_lora: add the adapters to the weights, once and for all.
        vae_tile_size: side in pixels of the tiles that the VAE takes larger frames in; None takes them whole.

    Raises:
        FileNotFoundError: without such a directory, or one of its parts.
        ValueError: for a directory that does not load, or options that do not fit the source.
        ImportError: without the packages that read the text encoder or the VAE.
        RuntimeError: for a backend that cannot run here.
    """
    load_ops(backend or "auto")  # raises, with the reason, if it cannot run here
    where = None if device is None else torch.device(device)
    if where is not None and where.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device: got {device}, expected cpu: torch {torch.__version__} sees no GPU here")
    options = (match_diffusers_padding, compile, backend)
    if offload not in (False, True, "model", "group"):
        raise ValueError(f"offload: got {offload!r}, expected False, True, 'model' or 'group'")
    if not isinstance(source, (str, os.PathLike, ModelDirectory)):
        if offload or lora or vae_tile_size:
            name = "offload" if offload else "lora" if lora else "vae_tile_size"
            raise ValueError(f"{name}: got it with a loaded source, expected it to be set on that: it is kept")
        return _around(source, where, dtype, steps, text, decode, check_finite, *options)
    where = where or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if where.type == "cuda" else torch.float32)
    config = pipeline_config(source, steps, dtype, text, decode)
    config = derive_config(config, diffusion_model={"check_finite": check_finite})
    if vae_tile_size is not None:
        config = _tiled(config, vae_tile_size)
    stream: Any = config.diffusion_model.transformer
    _check_padding(match_diffusers_padding, isinstance(stream, AnyFlowFARStreamConfig))
    try:
        pipeline = _loaded(config, where, dtype, offload, bool(lora))
    except (torch.OutOfMemoryError, ImportError):
        raise
    except Exception as error:  # whatever a library makes of a damaged file
        kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
        raise kind(f"model: {stream.path} does not load: {type(error).__name__}: {error}") from error
    model = accelerated(pipeline.diffusion_model.transformer.model, *options)
    if lora:
        load_lora(model, lora, lora_weights, fuse_lora)
    if offload == "group":
        _offload_blocks(model, where)
    return pipeline


def pipeline_config(
    source: str | os.PathLike[str] | ModelDirectory,
    steps: int,
    dtype: torch.dtype,
    text: bool = True,
    decode: bool = True,
) -> StreamInferencePipelineConfig:
    """The config of a directory's or a preset's pipeline; the arguments are those of `open_model`."""
    config = _config(source, steps, dtype, text, decode)
    changes: dict[str, Any] = {}
    if not text:
        changes["diffusion_model"] = {"transformer": {"context_encoder": None}}
    if not decode:
        changes["decoder"] = None
    return derive_config(config, **changes)


def _config(source: Any, steps: int, dtype: torch.dtype, text: bool, decode: bool) -> StreamInferencePipelineConfig:
    model = source if isinstance(source, ModelDirectory) else read_model_directory(source, text=text, decode=decode)
    name, path = model.path.name, str(model.path)
    if model.pixels is not None:
        return pixel_pipeline(path, name=name, steps=steps, dtype=dtype)
    sampling: dict[str, Any] = {"chunk_partition": model.chunk_partition or None, **model.schedule}
    return released_pipeline(name, path, causal=model.causal, steps=steps, dtype=dtype, **sampling)


def accelerated(
    source: Any, match_diffusers_padding: bool | None, compile: bool | dict[str, Any], backend: str | None
) -> AnyFlowModel:
    """The transformer of a source, on our kernels with these options; one that is ours keeps what None leaves open."""
    model: Any = source if isinstance(source, nn.Module) else getattr(source, "transformer", None)
    if not isinstance(model, AnyFlowModel):
        accelerate(source, backend=backend or "auto")
    elif backend is not None:
        model.set_backend(backend)
    if match_diffusers_padding is not None:
        model.phantom_padding = match_diffusers_padding
    if compile:
        for block in model.blocks:
            block.compile(**({} if compile is True else compile))
    return model


def _tiled(config: StreamInferencePipelineConfig, size: int) -> StreamInferencePipelineConfig:
    if not isinstance(config.decoder, WanVAEStreamDecoderConfig):
        raise ValueError(f"vae_tile_size: got {size} for a model without a VAE, expected None")
    tiles = {"tile_size": size, "tile_stride": size * 3 // 4}
    return derive_config(config, decoder=tiles, video_encoder=tiles)


def _offload_blocks(model: Any, device: torch.device) -> None:
    """The blocks come to the device one by one, the rest of the transformer for each of its calls."""
    hooks = optional("diffusers.hooks", "offloading by groups", "diffusers")
    hooks.apply_group_offloading(
        model, device, offload_type="block_level", num_blocks_per_group=1, use_stream=device.type == "cuda"
    )


def _loaded(
    config: StreamInferencePipelineConfig, device: torch.device, dtype: torch.dtype, offload: bool | str, lora: bool
) -> StreamInferencePipeline:
    place = torch.device("cpu") if offload else device
    stream: Any = config.diffusion_model.transformer
    bare = derive_config(stream, context_encoder=None)
    quantised = "quantization_config" in read_config(Path(stream.path) / stream.subfolder)
    if lora or quantised:
        causal = isinstance(stream, AnyFlowFARStreamConfig)
        model = diffusers_transformer(stream.path, causal, stream.dtype)
        transformer = derive_config(bare, path=None, dtype=None).setup(model=model if quantised else model.to(place))
    else:
        transformer = bare.setup(device=place)
    transformer.config = stream
    encoder = None if stream.context_encoder is None else stream.context_encoder.setup().to(place)
    if encoder is not None and not hasattr(encoder.config, "dtype"):
        encoder.to(dtype)
    decoder, video_encoder = _codec(config, place)
    if offload:
        streamed = [] if offload == "group" else [transformer.model]
        transformer.turns = Turns(device, [*streamed, *([] if decoder is None else [decoder])])
        encoder = None if encoder is None else OnTurn(encoder, transformer.turns)
    transformer.context_encoder = encoder
    parts = {"transformer": transformer, "decoder": decoder, "video_encoder": video_encoder}
    return StreamInferencePipeline(config, **parts).eval()


def _codec(config: StreamInferencePipelineConfig, place: torch.device) -> tuple[Any, Any]:
    """Decoder and encoder of video, on one VAE that is read once; the encoder comes later where there is no decoder."""
    halves: Any = (config.decoder, config.video_encoder)
    if config.decoder is None:
        return None, None
    if not isinstance(config.decoder, WanVAEStreamDecoderConfig):
        return tuple(half.setup().to(place) for half in halves)
    vae = wan_vae(None, config.decoder.path, config.decoder.subfolder, config.decoder.dtype)
    return tuple(derive_config(half, path=None).setup(vae=vae).to(place) for half in halves)


def _check_padding(wanted: bool | None, causal: bool) -> None:
    if wanted and not causal:
        raise ValueError("match_diffusers_padding: got True with a bidirectional model, expected a causal (FAR) one")


def _around(
    source: Any,
    device: torch.device | None,
    dtype: torch.dtype | None,
    steps: int,
    text: bool,
    decode: bool,
    check_finite: bool,
    match_diffusers_padding: bool | None,
    *options: Any,
) -> StreamInferencePipeline:
    """The pipeline around models that are loaded; `options` are those of `accelerated`."""
    given: Any = source if isinstance(source, nn.Module) else getattr(source, "transformer", None)
    if dtype not in (None, getattr(given, "dtype", None)):
        raise ValueError(f"dtype: got {dtype} for a source of {getattr(given, 'dtype', None)}, expected None")
    _check_padding(match_diffusers_padding, type(given).__name__ == AnyFlowFARTransformer3DModel.__name__)
    parts = {name: getattr(source, name, None) for name in ("text_encoder", "tokenizer", "vae", "scheduler")}
    encoder = None
    if text and parts["text_encoder"] is not None:
        encoder = UMT5TextEncoder(UMT5TextEncoderConfig(), parts["text_encoder"], parts["tokenizer"])
    if any(p.is_meta for part in (given, parts["vae"]) if isinstance(part, nn.Module) for p in part.parameters()):
        raise ValueError("source: got weights under sequential offload, expected model offload or none")
    model = accelerated(source, match_diffusers_padding, *options)
    if device is not None and not hasattr(model, "_hf_hook"):
        model.to(device)
    where = device or getattr(source, "_execution_device", model.device)
    decoder = video_encoder = None
    if parts["vae"] is not None:
        video_encoder = WanVAEEncoder(WanVAEEncoderConfig(pixel_range="unit"), parts["vae"]).to(where)
        if decode:
            decoder = WanVAEStreamDecoder(WanVAEStreamDecoderConfig(), parts["vae"]).to(where)
    said = getattr(parts["scheduler"], "config", {})
    schedule = {name: said.get(name, default) for name, default in SCHEDULE.items()}
    causal = isinstance(model, AnyFlowFARTransformer3DModel)
    stream = AnyFlowFARStreamConfig() if causal else AnyFlowBidirectionalStreamConfig()
    config = StreamInferencePipelineConfig(
        name="loaded",
        diffusion_model=DiffusionModelConfig(
            transformer=stream,
            scheduler=FlowMapEulerSchedulerConfig(num_inference_steps=steps, **schedule),
            check_finite=check_finite,
        ),
    )
    transformer = stream.setup(model=model, context_encoder=encoder)
    return StreamInferencePipeline(config, transformer=transformer, decoder=decoder, video_encoder=video_encoder)
