"""What the host does beside a GPU, on fake CUDA tensors: no wait in a step or prefill, chunks decoded beside the next.

Tensors mixed from two devices, and streams that touch the same memory in no order, raise in `FakeCuda`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from anyflow_kernels import AttentionPlan
from anyflow_kernels.launch_tables import to_device
from anyflow_kernels.triton_ops.tile_schedule import encode, query_schedule
from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, FarCache
from anyflow_runtime.decoders import PixelDecoderConfig
from anyflow_runtime.models import cuda_graphs, parameters
from anyflow_runtime.models.cuda_graphs import StepGraphs
from anyflow_runtime.schedulers import (
    EulerDiscreteSchedulerConfig,
    FlowMapEulerSchedulerConfig,
    FlowMatchSchedulerConfig,
    FlowMatchUniPCSchedulerConfig,
)
from anyflow_runtime.streaming import (
    AnyFlowBidirectionalStreamConfig,
    AnyFlowFARStreamConfig,
    Decoded,
    Denoised,
    DiffusionModelConfig,
    Step,
    StreamInferencePipelineConfig,
    stream,
)
from emulator.fake_cuda import DEVICE, FakeCuda, Logged, Stream, UnorderedAccess

from .tiny import TINY

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="fake CUDA tensors stand in for those of a GPU")
PARTITION, SIDE, STEPS = (1, 2, 2, 1), 8, 3


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCuda]:
    monkeypatch.setattr(parameters, "_is_ordinary", lambda weight: True)  # the class of a fake weight is FakeTensor
    cuda_graphs._capture_stream.cache_clear()
    with FakeCuda() as cuda, torch.no_grad():
        yield cuda
    cuda_graphs._capture_stream.cache_clear()


def model_on_cuda(model_class: Any, **config: Any) -> Any:
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return model_class(**(TINY | config), backend="triton").eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)


def latents(frames: int, channels: int = 4) -> Tensor:
    return torch.randn(1, frames, channels, SIDE, SIDE, device=DEVICE, dtype=torch.bfloat16)


def prompt() -> Tensor:
    return torch.randn(1, 5, TINY["text_dim"], device=DEVICE, dtype=torch.bfloat16)


@pytest.mark.parametrize("times_on", ["cpu", "cuda"])
def test_the_host_waits_in_no_step_and_no_prefill(times_on: str, cuda: FakeCuda) -> None:
    """From the first step on: tables are made on the device or go there from pinned memory."""
    model, text = model_on_cuda(AnyFlowFARTransformer3DModel), prompt()
    counts = []
    for _ in range(3):
        cache = FarCache.for_model(model, PARTITION, SIDE, SIDE)
        chunks: list[Tensor] = []
        for i, frames in enumerate(PARTITION):
            x = latents(frames)
            for k in range(STEPS):
                t, r = (torch.full((1, frames), 900.0 - 300 * j, device=times_on) for j in (k, k + 1))
                u = model(x, t, r, text, PARTITION[: i + 1], kv_cache=cache).sample
                x = model.ops.flow_map_step(x, u, 0.9, 0.6)
            chunks.append(x)
            if i + 1 < len(PARTITION):
                model.prefill(cache, chunks, PARTITION[: i + 1], text)
        counts.append((cache.graphs.captures, cache.graphs.replays))
        del cache
    assert not cuda.waits
    # Steps are captured in the first rollout, prefills, one after each chunk but the last, in the second.
    chunks_, prefills = len(PARTITION), len(PARTITION) - 1
    assert counts == [
        (chunks_, chunks_ * (STEPS - 1)),
        (chunks_ + prefills, chunks_ * (2 * STEPS - 1) + prefills),
        (chunks_ + prefills, chunks_ * (3 * STEPS - 1) + 2 * prefills),
    ]


def test_a_replayed_step_is_few_launches(cuda: FakeCuda) -> None:
    """Its times, already embedded, put together, its inputs copied in, the graph, the result copied out."""
    model, text, x = model_on_cuda(AnyFlowFARTransformer3DModel), prompt(), latents(1)
    cache, t = FarCache.for_model(model, [1], SIDE, SIDE), torch.full((1, 1), 900.0)
    for _ in range(3):
        begin = len(cuda.log)
        model(x, t, t, text, [1], kv_cache=cache)
    names = [entry.name for entry in cuda.log[begin:]]
    assert names == ["stack", "stack", "copy_", "copy_", "copy_", "graph", "clone"]


def test_one_tensor_of_all_chunks_is_compared_on_the_device(cuda: FakeCuda) -> None:
    """The one wait there is, once per prefill, and who it belongs to."""
    model, text, video = model_on_cuda(AnyFlowFARTransformer3DModel), prompt(), latents(3)
    cache = FarCache.for_model(model, PARTITION, SIDE, SIDE)
    model.prefill(cache, video[:, :1], PARTITION[:1], text)
    assert not cuda.waits
    model.prefill(cache, video, PARTITION[:2], text)
    (wait,) = cuda.waits
    assert wait.name == "equal" and wait.where[-1].startswith("cache.py")


@pytest.mark.parametrize("times_on", ["cpu", "cuda"])
def test_the_host_waits_in_no_bidirectional_step(times_on: str, cuda: FakeCuda) -> None:
    model, text, x = model_on_cuda(AnyFlowTransformer3DModel), prompt(), latents(3)
    for k in range(4):
        t, r = (torch.full((1, 3), 900.0 - 300 * j, device=times_on) for j in (k, k + 1))
        x = model.ops.flow_map_step(x, model(x, t, r, text).sample, 0.9, 0.6)
    assert not cuda.waits and cuda.captures == 1
    assert [entry.kind for entry in cuda.log].count("replay") == 3


def test_schedules_of_attention_go_to_the_device_without_a_wait(cuda: FakeCuda) -> None:
    query_schedule.__wrapped__.cache_clear()  # type: ignore[attr-defined]
    runs = tuple(encode(AttentionPlan.dense(37, 41).ranges))
    assert query_schedule(runs, 2, 16, 16, 7, None, 0, DEVICE).items.is_cuda
    query_schedule.__wrapped__.cache_clear()  # type: ignore[attr-defined]
    assert not cuda.waits


def test_no_table_is_copied_in_a_capture(cuda: FakeCuda) -> None:
    """A replay would read the host memory once more, which is another's by then."""
    graphs, x = StepGraphs(), torch.ones(3, device=DEVICE)

    def step(x: Tensor) -> Tensor:
        return x + to_device(torch.ones(3), DEVICE)

    graphs.run("key", step, x)
    with pytest.raises(RuntimeError, match="from the first run"):
        graphs.run("key", step, x)


SCHEDULERS = {
    "flow map": FlowMapEulerSchedulerConfig(num_inference_steps=STEPS),
    "euler": EulerDiscreteSchedulerConfig(num_inference_steps=STEPS),
    "unipc": FlowMatchUniPCSchedulerConfig(num_inference_steps=STEPS),
    "renoising": FlowMatchSchedulerConfig(num_inference_steps=STEPS, denoising_timesteps=(1000, 750, 500)),
}


def pipeline_on_cuda(causal: bool = True, scheduler: str = "flow map") -> Any:
    model_class = AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel
    stream_class = AnyFlowFARStreamConfig if causal else AnyFlowBidirectionalStreamConfig
    partition = PARTITION if causal else (sum(PARTITION),)
    transformer = stream_class(height=SIDE, width=SIDE, chunk_partition=partition)
    config = StreamInferencePipelineConfig(
        name="fake",
        diffusion_model=DiffusionModelConfig(transformer=transformer, scheduler=SCHEDULERS[scheduler]),
        decoder=PixelDecoderConfig(block=2),
    )
    pipeline = config.setup(
        transformer=transformer.setup(model=model_on_cuda(model_class, in_channels=12, out_channels=12))
    )
    for table, values in pipeline.diffusion_model.scheduler.named_buffers():
        setattr(pipeline.diffusion_model.scheduler, table, values.to(DEVICE))
    return pipeline


def video(pipeline: Any, cuda: FakeCuda, idle: list[bool] | None = None, **settings: Any) -> list[Logged]:
    """What happened while a video was made, from its first chunk on; whether the denoiser's stream was out of work
    when the frames of a chunk were there goes to `idle`.
    """
    noise = torch.randn(1, 12, sum(PARTITION), SIDE, SIDE)
    chunks = stream(pipeline, prompt(), noise=noise, on_host=True, **settings)
    begin = len(cuda.log)
    for frames in chunks:
        assert frames.device.type == "cpu" and frames.is_pinned()
        frames.sum()  # raises where they may not be there yet
        if idle is not None:
            idle.append(cuda.is_done(torch.cuda.current_stream().clock))  # type: ignore[attr-defined]
    return cuda.log[begin:]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("causal", [True, False])
def test_a_streamed_video_waits_for_the_frames_alone(causal: bool, scheduler: str, cuda: FakeCuda) -> None:
    """Once per chunk, and in a later video too; each time of the schedule is embedded once."""
    pipeline = pipeline_on_cuda(causal, scheduler)
    for _ in range(3):
        log = video(pipeline, cuda)
        waits = [entry.name for entry in log if entry.kind == "wait"]
        assert waits == ["event.synchronize"] * (len(PARTITION) if causal else 1)
    if causal:
        embedded = sum(entry.name == "dual_timestep_embedding" for entry in log)
        assert embedded == STEPS + 1  # and the clean context


@pytest.mark.parametrize("told", [False, True])
def test_the_next_chunk_is_queued_before_the_host_waits(told: bool, cuda: FakeCuda) -> None:
    """For every chunk but the first, which is handed over at once, and the last; telling of events costs no wait."""
    pipeline, events, idle = pipeline_on_cuda(), [], []
    log = video(pipeline, cuda, idle, **({"on_event": events.append} if told else {}))
    order = [entry.kind if entry.kind == "wait" else "denoised" for entry in log if _ends_a_chunk(entry)]
    middle = ["denoised", "wait"] * (len(PARTITION) - 2)
    assert order == ["denoised", "wait", "denoised", *middle, "wait"]
    assert idle == [True, *[False] * (len(PARTITION) - 2), True]
    if told:
        kinds = [type(event) for event in events]
        assert [kinds.count(kind) for kind in (Step, Denoised, Decoded)] == [
            STEPS * len(PARTITION),
            *[len(PARTITION)] * 2,
        ]
        assert all(event.seconds > 0 for event in events if not isinstance(event, Step))


def test_decoding_in_no_order_with_denoising_is_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """The witness of the two tests above: without its waits between streams the decoder's work is refused."""
    for wait in ("wait_event", "wait_stream"):
        with monkeypatch.context() as patch, pytest.raises(UnorderedAccess):
            patch.setattr(Stream, wait, lambda *_: None)
            video(pipeline_on_cuda(), cuda)


def _ends_a_chunk(entry: Logged) -> bool:
    """A wait, or the decoder's launch on a stream of its own, which follows the last step of a chunk at once."""
    return entry.kind == "wait" or entry.name == "pixel_shuffle"
