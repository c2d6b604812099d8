"""Decode chunk i while chunk i + 1 is being denoised.

On CUDA the decoder runs on a stream of its own, ordered after the work that made the latents.  Elsewhere it runs at
once: a worker thread would take its cores from the denoiser.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .base import StreamingDecoder


class PendingFrames:
    """Frames that may still be in the making."""

    def __init__(self, frames: Tensor, done: torch.cuda.Event | None) -> None:
        self._frames = frames
        self._done = done

    def ready(self) -> bool:
        """Whether `wait` would return without keeping the GPU waiting."""
        return self._done is None or self._done.query()

    def wait(self) -> Tensor:
        """The frames.  The current CUDA stream is made to wait for them, the host is not."""
        if self._done is not None:
            current = torch.cuda.current_stream(self._frames.device)
            current.wait_event(self._done)
            # Their memory belongs to the decoder's stream; it must not be reused while this one still reads it.
            self._frames.record_stream(current)
        return self._frames


class AsyncDecoder:
    """Submits chunks to a streaming decoder; chunks are decoded in the order they are submitted.

    Args:
        decoder: any `StreamingDecoder`.  While chunks are pending, nothing else may use the cache given with them.
    """

    def __init__(self, decoder: StreamingDecoder) -> None:
        self.decoder = decoder
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def submit(self, input: Tensor, autoregressive_index: int = 0, cache: Any = None) -> PendingFrames:
        """Start decoding a chunk; arguments, and errors raised here, are those of the decoder.

        The latents may be dropped at once, but must not be written to before the frames are ready.
        """
        if not input.is_cuda:
            return PendingFrames(self._decode(input, autoregressive_index, cache), None)
        if input.device not in self._streams:
            self._streams[input.device] = torch.cuda.Stream(input.device)
        stream = self._streams[input.device]
        stream.wait_stream(torch.cuda.current_stream(input.device))
        with torch.cuda.stream(stream):
            frames = self._decode(input, autoregressive_index, cache)
            done = torch.cuda.Event()
            done.record(stream)
        input.record_stream(stream)
        return PendingFrames(frames, done)

    def _decode(self, input: Tensor, autoregressive_index: int, cache: Any) -> Tensor:
        return self.decoder(input=input, autoregressive_index=autoregressive_index, cache=cache)
