"""Decode chunk i while chunk i + 1 is being denoised.

On CUDA the decoder runs on a stream of its own, ordered after the work that made the latents, and frames for the host
leave on a third, into pinned memory: behind chunk i + 1, which the decoder has got by then, they would come a chunk
late. Elsewhere the decoder has a thread of its own, which takes its cores from the denoiser.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import torch
from torch import Tensor

from ..errors import noting


@dataclass(frozen=True)
class _Decoded:
    """Frames, when their decoding began and ended, and the stream that takes them to the host: seconds and None but on
    CUDA. There `copy` is the frames in host memory and when they are there, once they are on their way.
    """

    frames: Tensor
    begin: Any
    end: Any
    copier: torch.cuda.Stream | None = None
    copy: tuple[Tensor, Any] | None = None

    def leaving(self) -> _Decoded:
        """With the frames on their way to the host.

        The memory is that of PyTorch's pool of pinned memory, which gives none of it away before its copy is done.
        """
        if self.copier is None or self.copy is not None:
            return self
        self.copier.wait_event(self.end)
        with torch.cuda.stream(self.copier):
            host = torch.empty(self.frames.shape, dtype=self.frames.dtype, pin_memory=True)
            host.copy_(self.frames, non_blocking=True)
            there = torch.cuda.Event()
            there.record(self.copier)
        self.frames.record_stream(self.copier)
        return replace(self, copy=(host, there))


class PendingFrames:
    """Frames that may still be in the making. What decoding raised is raised by whatever asks for them."""

    def __init__(self, decoded: Future[_Decoded]) -> None:
        self._decoded = decoded

    def ready(self) -> bool:
        """Whether `wait` would return without keeping the GPU or the caller waiting."""
        if not self._decoded.done():
            return False
        decoded = self._decoded.result()
        return decoded.copier is None or decoded.end.query()

    def wait(self) -> Tensor:
        """The frames.  The current CUDA stream is made to wait for them, the host is not."""
        decoded = self._decoded.result()
        if decoded.copier is not None:
            current = torch.cuda.current_stream(decoded.frames.device)
            current.wait_event(decoded.end)
            # Their memory belongs to the decoder's stream; it must not be reused while this one still reads it.
            decoded.frames.record_stream(current)
        return decoded.frames

    def on_host(self) -> Tensor:
        """The frames in host memory, on CUDA pinned.  It waits for them alone, not for what streams have got since."""
        decoded = self._decoded.result().leaving()
        if decoded.copy is None:
            return decoded.frames
        frames, there = decoded.copy
        there.synchronize()
        return frames

    def seconds(self) -> float:
        """How long decoding took, once it is done.  Work that ran beside it has slowed it down."""
        decoded = self._decoded.result()
        if decoded.copier is None:
            return decoded.end - decoded.begin
        decoded.end.synchronize()
        return decoded.begin.elapsed_time(decoded.end) / 1e3


class AsyncDecoder:
    """Submits chunks to a streaming decoder; chunks are decoded in the order they are submitted.

    A context manager: leaving it waits for what is under way and drops what has not begun.

    Args:
        decoder: any `StreamingDecoder`, or a function with its keywords.  While chunks are pending, nothing else may
            use the cache given with them.
        overlap: decode beside what the caller does next, on a CUDA stream or in a thread; else at once.
        on_host: the frames will be wanted in host memory, and leave as soon as they are decoded.
    """

    def __init__(self, decoder: Callable[..., Tensor], overlap: bool = True, on_host: bool = False) -> None:
        self.decoder, self.overlap, self.on_host = decoder, overlap, on_host
        self._streams: dict[torch.device, tuple[torch.cuda.Stream, torch.cuda.Stream]] = {}  # to decode and to copy on
        self._worker: ThreadPoolExecutor | None = None
        self._latest: Future[_Decoded] | None = None

    def submit(self, input: Tensor, autoregressive_index: int = 0, cache: Any = None) -> PendingFrames:
        """Start decoding a chunk; arguments and errors are those of the decoder, the chunk named in a note.

        Errors are raised here, those of the thread by what is returned.  The latents may be dropped at once, but must
        not be written to before the frames are ready.
        """
        if input.is_cuda:
            return _finished(self._on_stream(input, autoregressive_index, cache))
        if not self.overlap:
            return _finished(self._timed(input, autoregressive_index, cache))
        if self._worker is None:
            self._worker = ThreadPoolExecutor(1, thread_name_prefix="anyflow-decoder")
        self._latest = self._worker.submit(self._timed, input, autoregressive_index, cache)
        return PendingFrames(self._latest)

    def drain(self) -> None:
        """Wait, on the host, until nothing is being decoded."""
        if self._latest is not None:
            wait([self._latest])
        for stream, _ in self._streams.values():
            stream.synchronize()

    def close(self) -> None:
        """Wait for the chunk under way and drop those behind it; on CUDA the current stream waits, not the host."""
        if self._worker is not None:
            self._worker.shutdown(wait=True, cancel_futures=True)
        for device, streams in self._streams.items():
            for stream in streams:
                torch.cuda.current_stream(device).wait_stream(stream)

    def __enter__(self) -> AsyncDecoder:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def _on_stream(self, input: Tensor, index: int, cache: Any) -> _Decoded:
        current = torch.cuda.current_stream(input.device)
        if input.device not in self._streams:
            decoding = torch.cuda.Stream(input.device) if self.overlap else current
            self._streams[input.device] = decoding, torch.cuda.Stream(input.device)
        stream, copier = self._streams[input.device]
        stream.wait_stream(current)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        try:
            with torch.cuda.stream(stream):
                begin.record(stream)
                frames = self._decode(input, index, cache)
                end.record(stream)
        finally:
            input.record_stream(stream)
        decoded = _Decoded(frames, begin, end, copier)
        return decoded.leaving() if self.on_host else decoded

    def _timed(self, input: Tensor, index: int, cache: Any) -> _Decoded:
        begin = time.perf_counter()
        frames = self._decode(input, index, cache)
        return _Decoded(frames, begin, time.perf_counter())

    def _decode(self, input: Tensor, index: int, cache: Any) -> Tensor:
        with noting(f"while decoding chunk {index}"):
            return self.decoder(input=input, autoregressive_index=index, cache=cache)


def decode_behind(
    chunks: Generator[Tensor, Any, None],
    submit: Callable[[Tensor, int], PendingFrames],
    *,
    behind: int = 1,
    after: type[BaseException] = Exception,
) -> Generator[PendingFrames, Any, None]:
    """The frames of chunks of latents, in order, each handed over when `behind` later chunks have been submitted; the
    first is handed over at once, so that a picture is there early.

    If making or submitting a chunk fails, the frames of those before it still come first.

    Args:
        chunks: makes the latents; what is sent to this generator is sent on to it.
        submit: of an `AsyncDecoder`; given the latents and the index.
        behind: 0 hands every chunk over before the next is made.
        after: errors that the frames under way come before; others are raised at once. With BaseException a caller
            that stops at those frames never hears of Ctrl-C.
    """
    pending: deque[PendingFrames] = deque()
    failure: BaseException | None = None
    sent = None
    for index in count():
        try:
            pending.append(submit(chunks.send(sent), index))
        except StopIteration:
            break
        except after as error:
            failure = error
            break
        sent = None
        if len(pending) > behind or index == 0:
            sent = yield pending.popleft()
    while pending:
        yield pending.popleft()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # with its traceback it is a cycle, which would keep the rollout's memory


def _finished(decoded: _Decoded) -> PendingFrames:
    future: Future[_Decoded] = Future()
    future.set_result(decoded)
    return PendingFrames(future)
