"""Makes the video of a rollout with a streaming pipeline: frames to the browser, and into a file to download."""

from __future__ import annotations

import io
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from ..streaming import AnyFlowFARStream, StreamInferencePipeline, stream
from ..video_io import VideoWriter
from .limits import Limits
from .rollouts import Rollout
from .videos import VideoStore

JPEG_QUALITY = 88


class StreamEngine:
    """Runs rollouts, one at a time.

    Args:
        pipeline: with an AnyFlow transformer, a text encoder in it, and a decoder.
        videos: keeps the files.
        limits: for the frame rate.
        zoom: side of the square that shows a pixel.
    """

    def __init__(
        self,
        pipeline: StreamInferencePipeline,
        videos: VideoStore,
        limits: Limits,
        zoom: int = 1,
    ) -> None:
        self._pipeline: Any = pipeline
        self._videos = videos
        self._fps, self._zoom = limits.fps, zoom

    @property
    def partition(self) -> tuple[int, ...] | None:
        """Latent frames per chunk that the model was trained with; None for a bidirectional one."""
        transformer = self._pipeline.diffusion_model.transformer
        return transformer.default_partition if isinstance(transformer, AnyFlowFARStream) else None

    def run(self, rollout: Rollout) -> None:
        """Make the video, telling the browser of every chunk; returns when it is finished, stopped or has failed.

        What is finished when something fails can still be downloaded.
        """
        path = self._videos.new_path()
        writer = VideoWriter(path, self._fps)
        failure: str | None = None
        try:
            with writer:
                self._make(rollout, writer)
        except OSError as error:
            # Its message names files of the server.
            failure = f"the video could not be written: {error.strerror or type(error).__name__}"
        except torch.OutOfMemoryError:
            failure = "out of memory: try a smaller size or fewer frames"
        except ValueError as error:
            failure = str(error)
        token = self._videos.add(path) if path.exists() else None
        if failure is not None:
            rollout.emit({"type": "error", "message": failure, "video": token})
            return
        wanted, made = rollout.request.frames, writer.frames_written
        rollout.emit({"type": "done", "frames": made, "stopped": made < wanted, "video": token})

    def _make(self, rollout: Rollout, writer: VideoWriter) -> None:
        request = rollout.request
        device = self._pipeline.diffusion_model.transformer.device
        # The current GPU is a property of the thread.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext(), ThreadPoolExecutor(1) as publisher:
            wish = rollout.take_change()  # made while it waited
            prompt, steps = wish.prompt or request.prompt, wish.steps or request.steps
            context = None
            if request.context is not None:
                context = request.context.read(request.context_frames, (request.height, request.width))[None].to(device)
            chunks = stream(
                self._pipeline,
                prompt,
                negative_prompt=request.negative_prompt,
                guidance_scale=wish.guidance_scale or request.guidance,
                chunk_partition=request.chunks,
                steps=steps,
                seed=request.seed,
                height=request.height,
                width=request.width,
                context_video=context,
                overlap=False,  # a change is to show in the very next chunk
            )
            rollout.emit(
                {
                    "type": "started",
                    "chunks": len(request.chunks),
                    "frames": request.frames,
                    "seed": request.seed,
                    "fps": self._fps,
                }
            )
            # Pictures are compressed while the next chunk is made, one chunk at a time.
            published: Future[None] | None = None
            for index in range(len(request.chunks)):
                if rollout.stopping:
                    break
                begin = time.perf_counter()
                change = rollout.take_change() if index > 0 else None
                try:
                    frames = chunks.send(change)
                    if change is not None:
                        prompt, steps = change.prompt or prompt, change.steps or steps
                except ValueError as error:
                    if change is None:
                        raise
                    rollout.emit({"type": "refused", "message": str(error), "busy": True})
                    frames = next(chunks)  # the video goes on under the old settings
                pixels = _pixels(frames, self._zoom)
                message = {
                    "type": "chunk",
                    "index": index,
                    "frames": len(pixels),
                    "prompt": prompt,
                    "steps": steps,
                    "seconds": time.perf_counter() - begin,
                }
                if published is not None:
                    published.result()
                published = publisher.submit(_publish, rollout, writer, message, pixels)
            if published is not None:
                published.result()


def _pixels(frames: Tensor, zoom: int = 1) -> Tensor:
    """(1, T, 3, H, W) in [-1, 1] as (T, 3, zoom * H, zoom * W) uint8 on the host."""
    pixels = ((frames[0].float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()
    return pixels if zoom == 1 else pixels.repeat_interleave(zoom, -1).repeat_interleave(zoom, -2)


def _publish(rollout: Rollout, writer: VideoWriter, message: dict[str, Any], pixels: Tensor) -> None:
    pictures = [_jpeg(frame) for frame in pixels]
    rollout.emit(message)
    for picture in pictures:
        rollout.emit(picture)
    writer.write(pixels)


def _jpeg(frame: Tensor) -> bytes:
    from PIL import Image

    out = io.BytesIO()
    Image.fromarray(frame.permute(1, 2, 0).contiguous().numpy()).save(out, format="JPEG", quality=JPEG_QUALITY)
    return out.getvalue()
