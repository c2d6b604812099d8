"""`stream(..., overlap=True)`: a chunk is decoded while the next one is denoised, and nothing else changes."""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from anyflow_runtime.decoders import DecoderConfig, StreamingDecoder, StreamingDecoderCache
from anyflow_runtime.streaming import (
    AsyncDecoder,
    Change,
    StreamInferencePipeline,
    decode_behind,
    derive_config,
    library,
    stream,
)

from .test_streaming_library import CHANNELS, PARTITION, noise_of, pixel_pipeline

WAIT = 20.0  # seconds until a test that would hang fails


@dataclass
class Past(StreamingDecoderCache):
    """The sum of all frames so far: a chunk out of order, or decoded twice, shows in the frames."""

    total: Tensor | None = None


class Running(StreamingDecoder[Past]):
    """A decoder with a past; `before(index)` is called before every chunk."""

    def __init__(self) -> None:
        super().__init__(DecoderConfig())
        weight = torch.randn(3, CHANNELS, generator=torch.Generator().manual_seed(4))
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        self.before: Any = lambda index: None
        self.threads: set[int] = set()

    def initialize_autoregressive_cache(self, *_: Any, **__: Any) -> Past:
        return Past()

    @torch.no_grad()
    def forward(self, input: Tensor, autoregressive_index: int = 0, cache: Past | None = None) -> Tensor:
        self.before(autoregressive_index)
        self.threads.add(threading.get_ident())
        assert cache is not None
        frames = F.linear(input.movedim(2, -1), self.weight).movedim(-1, 2)
        total = frames.sum(1, keepdim=True)
        cache.total = total if cache.total is None else cache.total + total
        return frames + cache.total


def running_pipeline(profile: bool = False) -> StreamInferencePipeline:
    pipeline = pixel_pipeline(profile=profile)
    pipeline.decoder = Running()
    return pipeline


@pytest.fixture
def pipeline() -> StreamInferencePipeline:
    return running_pipeline()


def video(pipeline: StreamInferencePipeline, prompt: Any = "a fox", **settings: Any) -> list[Tensor]:
    return [*stream(pipeline, prompt, noise=noise_of(), **settings)]


def equal(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(torch.equal(*pair) for pair in zip(got, expected, strict=True))


@pytest.mark.parametrize("prompt", ["a fox", lambda i: {0: "a fox", 2: "a dog"}.get(i)], ids=["text", "function"])
def test_frames_and_their_order_are_those_without_overlap(pipeline, prompt):
    """The first chunks decode slowest, so that a race would bring later ones forward."""
    expected = video(pipeline, prompt)
    pipeline.decoder.before = lambda index: time.sleep(0.02 * (len(PARTITION) - index))
    pipeline.decoder.threads.clear()
    assert equal(video(pipeline, prompt, overlap=True), expected)
    assert pipeline.decoder.threads and threading.get_ident() not in pipeline.decoder.threads


def test_a_chunk_is_decoded_while_the_next_is_denoised(pipeline, monkeypatch):
    """Chunk i only gets decoded once chunk i + 1 is being denoised, which in turn lasts until that is done."""
    denoise, last = pipeline.denoise, len(PARTITION) - 1
    begun, decoded = ([threading.Event() for _ in PARTITION] for _ in range(2))

    def watched(index: int, *arguments: Any, **keywords: Any) -> Tensor:
        begun[index].set()
        if index > 1:
            assert decoded[index - 1].wait(WAIT)
        return denoise(index, *arguments, **keywords)

    def before(index: int) -> None:
        if 0 < index < last:
            assert begun[index + 1].wait(WAIT)
        decoded[index].set()

    monkeypatch.setattr(pipeline, "denoise", watched)
    pipeline.decoder.before = before
    assert len(video(pipeline, overlap=True)) == len(PARTITION)


@pytest.mark.parametrize(("sent_with", "applies_to"), [(0, 1), (1, 3)])
def test_a_change_is_for_the_next_chunk_that_has_not_begun(pipeline, sent_with, applies_to):
    """The first chunk comes before the next one is begun, chunk 1 after chunk 2 has been."""
    generator = stream(pipeline, "a fox", noise=noise_of(), overlap=True)
    frames = [next(generator) for _ in range(sent_with + 1)]
    frames.append(generator.send(Change(prompt="a dog")))
    frames.extend(generator)
    expected = video(pipeline, lambda i: {0: "a fox", applies_to: "a dog"}.get(i))
    assert equal(frames, expected) and not equal(frames, video(pipeline))


def test_an_error_in_decoding_names_the_chunk_and_comes_after_the_frames_before(pipeline):
    def before(index: int) -> None:
        if index == 2:
            raise torch.OutOfMemoryError("simulated")

    expected = video(pipeline)
    pipeline.decoder.before = before
    frames: list[Tensor] = []
    with pytest.raises(torch.OutOfMemoryError, match="simulated") as caught:
        for part in stream(pipeline, "a fox", noise=noise_of(), overlap=True):
            frames.append(part)
    assert caught.value.__notes__ == ["while decoding chunk 2"]
    assert equal(frames, expected[:2])
    with pytest.raises(torch.OutOfMemoryError) as caught:
        video(pipeline)
    assert caught.value.__notes__ == ["while decoding chunk 2"]


def test_an_error_in_denoising_comes_after_the_frames_that_were_under_way(pipeline, monkeypatch):
    expected, denoise, frames = video(pipeline), pipeline.denoise, []

    def failing(index: int, *arguments: Any, **keywords: Any) -> Tensor:
        if index == 3:
            raise RuntimeError("no more")
        return denoise(index, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "denoise", failing)
    with pytest.raises(RuntimeError, match="no more"):
        for part in stream(pipeline, "a fox", noise=noise_of(), overlap=True):
            frames.append(part)
    assert equal(frames, expected[:3])


def test_stopping_early_waits_for_the_decoder_and_leaves_the_pipeline_ready(pipeline):
    expected = video(pipeline)
    decoding: list[int] = []

    def before(index: int) -> None:
        decoding.append(index)
        time.sleep(0.05)
        decoding.pop()

    pipeline.decoder.before = before
    generator = stream(pipeline, "a fox", noise=noise_of(), overlap=True)
    next(generator), next(generator)
    threads = threading.active_count()
    generator.close()
    assert decoding == [] and threading.active_count() == threads - 1
    assert equal(video(pipeline, overlap=True), expected)


def test_frames_that_are_not_finite_are_found(pipeline):
    pipeline.config = derive_config(pipeline.config, diffusion_model={"check_finite": True})

    def before(index: int) -> None:
        if index == 2:
            pipeline.decoder.weight[0, 0] = float("nan")

    pipeline.decoder.before = before
    with pytest.raises(ValueError, match=r"output of chunk 2: .* NaN"):
        video(pipeline, overlap=True)


@pytest.mark.parametrize(
    ("device", "decoder", "profiling", "expected"),
    [
        ("cuda", True, False, True),
        ("cuda", True, True, False),
        ("cuda", False, False, False),
        ("cpu", True, False, False),
    ],
)
def test_only_a_gpu_overlaps_unasked(device, decoder, profiling, expected):
    """A profiling pipeline waits for every stage, and two parts on one CPU fight for its cores."""
    transformer = SimpleNamespace(device=torch.device(device))
    stand_in: Any = SimpleNamespace(
        config=SimpleNamespace(enable_sync_and_profile=profiling),
        diffusion_model=SimpleNamespace(transformer=transformer),
        decoder=Running() if decoder else None,
    )
    assert library._overlap(stand_in, None) is expected
    assert library._overlap(stand_in, False) is False


def test_overlap_that_cannot_be_is_refused(pipeline):
    with pytest.raises(ValueError, match="overlap: got True with a profiling pipeline"):
        stream(running_pipeline(profile=True), "a fox", overlap=True)
    pipeline.decoder = None
    with pytest.raises(ValueError, match="overlap: got True without a decoder"):
        stream(pipeline, "a fox", overlap=True)


def test_seconds_are_those_of_decoding():
    def decode(input: Tensor, **_: Any) -> Tensor:
        time.sleep(0.05)
        return input

    for overlap in (False, True):
        with AsyncDecoder(decode, overlap) as background:
            begin = time.perf_counter()
            pending = background.submit(torch.zeros(1))
            assert pending.ready() is not overlap
            pending.wait()
            assert 0.05 <= pending.seconds() <= time.perf_counter() - begin and pending.ready()


def test_frames_under_way_come_before_an_interruption_if_asked():
    """As `anyflow generate` asks: Ctrl-C while denoising still writes what was being decoded."""

    def chunks() -> Any:
        yield torch.zeros(1)
        yield torch.ones(1)
        raise KeyboardInterrupt

    def decode(input: Tensor, **_: Any) -> Tensor:
        return input

    for after, count in ((Exception, 1), (BaseException, 2)):
        frames = []
        with AsyncDecoder(decode) as background, pytest.raises(KeyboardInterrupt):
            for pending in decode_behind(chunks(), background.submit, after=after):
                frames.append(float(pending.on_host()))
        assert frames == [0.0, 1.0][:count]


def test_ctrl_c_reaches_a_caller_that_stops_there(pipeline, monkeypatch):
    """The next `next` raises it: it is not kept for one that may never come."""
    denoise = pipeline.denoise

    def interrupted(index: int, *arguments: Any, **keywords: Any) -> Tensor:
        if index == 2:
            raise KeyboardInterrupt
        return denoise(index, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "denoise", interrupted)
    frames = stream(pipeline, "a fox", noise=noise_of(), overlap=True)
    next(frames)
    with pytest.raises(KeyboardInterrupt):
        next(frames)


@pytest.mark.parametrize("overlap", [False, True])
def test_an_error_keeps_no_rollout_alive(overlap, pipeline, monkeypatch):
    """Its traceback and the frame that holds it would be a cycle, and slabs would wait for the garbage collector."""
    caches: list[Any] = []
    initialize, denoise = pipeline.initialize_cache, pipeline.denoise

    def kept(*arguments: Any, **keywords: Any) -> Any:
        cache = initialize(*arguments, **keywords)
        caches.append(weakref.ref(cache))
        return cache

    def failing(index: int, *arguments: Any, **keywords: Any) -> Tensor:
        if index == 2:
            raise RuntimeError("no more")
        return denoise(index, *arguments, **keywords)

    monkeypatch.setattr(pipeline, "initialize_cache", kept)
    monkeypatch.setattr(pipeline, "denoise", failing)
    gc.disable()
    try:
        with pytest.raises(RuntimeError, match="no more"):
            video(pipeline, overlap=overlap)
        assert caches[0]() is None
    finally:
        gc.enable()


@pytest.mark.gpu
def test_frames_on_cuda_are_those_without_overlap():
    pipeline = running_pipeline().cuda()
    expected = video(pipeline, overlap=False)
    for got, want in zip(video(pipeline), expected, strict=True):
        torch.testing.assert_close(got, want)
