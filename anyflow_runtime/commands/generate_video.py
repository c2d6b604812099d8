"""What `anyflow generate` does once its arguments are checked: the video into the file, chunk by chunk."""

from __future__ import annotations

import sys
from contextlib import ExitStack, closing, suppress
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from anyflow_kernels import load_ops

from ..errors import NonFiniteError, check_finite
from ..files import whole_file, write_json
from ..parallel import context_parallel
from ..streaming import Decoded, Denoised, Step, stream, video_noise
from ..video_io import VideoWriter
from .arguments import open_pipeline
from .clock import Clock
from .generate_processes import Processes
from .generate_request import GenerateRequest

OPTIONS = ("device", "dtype", "backend", "steps", "compile", "match_diffusers_padding", "check_finite")


class GeneratedVideo:
    """The video of a request. What is finished is kept whatever happens.

    Attributes:
        chunks: what the stats say of each that is in the file, given ones excepted.
    """

    def __init__(self, request: GenerateRequest, together: Processes) -> None:
        self.chunks: list[dict[str, Any]] = []
        self._request, self._together = request, together
        self._clock = Clock(request.device)
        self._latents: list[Tensor] = []
        self._events: dict[tuple[type, int], Denoised | Decoded] = {}  # of the chunks that are not written yet

    def make(self) -> None:
        """Load the model, then denoise, decode and write the chunks in order; other processes than the first only
        denoise, in step with it."""
        request = self._request
        with self._clock("load"):
            if request.model.pixels is None and not sys.stderr.isatty():
                _hide_loading_bars()
            pipeline: Any = open_pipeline(
                request.model,
                request.size,
                text=request.prompt is not None,
                decode=self._together.first,
                **{name: getattr(request, name) for name in OPTIONS},
                **request.options,
            )
            if self._together.mesh is not None:
                context_parallel(pipeline.diffusion_model.transformer.model, self._together.mesh, self._together.mode)
        if request.check_finite:
            for name, tensor in request.embeds.items():
                check_finite(name, tensor)
        context = None
        if request.context is not None:
            with self._clock("context"):
                context = pipeline.encode_video(request.context)
        scale = request.model.spatial_ratio if pipeline.decoder is None else 1
        height, width = (side // scale for side in request.size)
        with self._clock("text"):
            made = stream(
                pipeline,
                request.prompt if request.prompt is not None else request.embeds["prompt_embeds"],
                negative_prompt=request.embeds.get("negative_prompt_embeds", request.negative_prompt),
                guidance_scale=request.guidance,
                chunk_partition=request.chunks or (request.latent_frames,),
                noise=video_noise(pipeline, request.latent_frames, height, width, request.seed),
                height=height,
                width=width,
                context_latents=context,
                on_event=self._tell if self._together.first else None,
                overlap=request.overlap and self._together.first,
                on_host=True,
                frames_before_interrupt=True,
            )
        if not self._together.first:
            for _ in made:
                pass
            return
        given = 0 if context is None else context.shape[1]
        try:
            with closing(made), ExitStack() as shown:
                writer = shown.enter_context(
                    VideoWriter(request.out, request.fps, pixel_range="signed", zoom=request.zoom)
                )
                total = request.steps * request.generated_chunks(given)
                self._bar = shown.enter_context(tqdm(total=total, unit="step", disable=None))
                self._write_all(made, writer, given)
        except BaseException:
            with suppress(Exception):  # what stopped it matters more, and may be a full disk
                self._save_latents()
            raise
        self._save_latents()

    def _write_all(self, made: Any, writer: VideoWriter, given: int) -> None:
        begin, latent_frames = self._clock.now(wait=False), 0
        for index, frames in enumerate(made):
            if not frames.isfinite().all():
                raise NonFiniteError(
                    f"chunk {index}: its frames hold NaN or infinite values; --check-finite finds out where they begin"
                )
            denoise, decode = (self._events.pop((kind, index)).seconds for kind in (Denoised, Decoded))
            self._clock.add("denoise", denoise)
            self._clock.add("decode", decode)
            before = self._clock.seconds.get("write", 0.0)
            with self._clock("write", wait=False):
                writer.write(frames[0])
            count = self._latents[index].shape[1]
            latent_frames += count
            if latent_frames > given:
                self.chunks.append(
                    {
                        "chunk": index,
                        "latent_frames": count,
                        "frames": frames.shape[1],
                        "seconds": denoise,
                        "decode_seconds": decode,
                        "write_seconds": self._clock.seconds["write"] - before,
                        "written_after_seconds": self._clock.now(wait=False) - begin,
                    }
                )
        with self._clock("write"):
            writer.close()

    def _tell(self, event: Step | Denoised | Decoded) -> None:
        if isinstance(event, Step):
            self._bar.update()
            return
        if isinstance(event, Denoised):
            self._latents.append(event.latents)
        self._events[type(event), event.index] = event  # its seconds are read when its frames are there

    def _save_latents(self) -> None:
        """Write (1, F, C, h, w) latents of all chunks that are denoised as one (1, C, F, h, w)."""
        if self._request.save_latents is None or not self._latents:
            return
        latents = torch.cat(self._latents, dim=1).transpose(1, 2).cpu().contiguous()
        with whole_file(self._request.save_latents) as partial:
            try:
                save_file({"latents": latents}, partial)
            except SafetensorError as error:  # a full disk
                raise OSError(f"{self._request.save_latents}: {error}") from error

    def summary(self) -> str:
        """What was made, and the seconds and memory it took."""
        request = self._request
        height, width = request.size
        chunks = f", chunks {','.join(map(str, request.chunks))}" if request.chunks else ""
        context = f", {request.context.shape[1]} of them given" if request.context is not None else ""
        sampling = f"{request.steps} steps, seed {request.seed}"
        lines = [f"{request.out}: {request.frames} frames{context}, {height}x{width}{chunks}, {sampling}"]
        if request.model.licence is not None:
            lines.append(f"  weights' licence: {request.model.licence}")
        seconds = {**self._clock.seconds, "total": self._clock.elapsed()}
        lines += [f"  {stage:12}{value:9.2f} s" for stage, value in seconds.items()]
        lines += [
            f"  peak memory {size / 2**30:9.2f} GiB ({where})" for where, size in self._clock.peak_memory().items()
        ]
        return "\n".join(lines)

    def write_stats(self, complete: bool) -> None:
        """Settings, seconds, memory and chunks as JSON, if that is asked for."""
        request = self._request
        if request.stats is None:
            return
        settings = {
            "model": str(request.model.path),
            "prompt": request.prompt,
            "negative_prompt": request.negative_prompt,
            "chunks": request.chunks,
            "fps": request.fps,
            "zoom": request.zoom,
            "frames": request.frames,
            "context_frames": 0 if request.context is None else request.context.shape[1],
            "size": list(request.size),
            "steps": request.steps,
            "seed": request.seed,
            "guidance": request.guidance,
            "dtype": str(request.dtype).removeprefix("torch."),
            "device": str(request.device),
            "backend": load_ops(request.backend).backend,
            "lora": request.options["lora_weights"],
            "processes": self._together.count,
            "overlap": request.overlap,
            "torch": torch.__version__,
        }
        stats = {
            "settings": settings,
            "complete": complete,
            "seconds": self._clock.seconds,
            "peak_memory_bytes": self._clock.peak_memory(),
            "chunks": self.chunks,
        }
        write_json(request.stats, stats, indent=1)


def _hide_loading_bars() -> None:
    with suppress(ImportError):
        import diffusers.utils.logging
        import transformers.utils.logging

        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
