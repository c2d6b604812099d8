"""Timing on a machine that drifts: contestants take turns, and only ratios of their medians are compared."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Call = Callable[[], Any]


def interleaved_medians(calls: Mapping[str, Call], repeats: int = 20, warmup: int = 3) -> dict[str, float]:
    """Median seconds of each call. They take turns, so that a drift of the machine meets all of them alike.

    Args:
        calls: by name; on CUDA timed with events, to the end of their kernels.
        repeats: timed rounds.
        warmup: rounds before them.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for round_ in range(warmup + repeats):
        for name, call in calls.items():
            elapsed = _time_once(call)
            if round_ >= warmup:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def graphed(call: Call, device: str, name: str = "", pool: Any = None) -> tuple[Call, bool]:
    """On CUDA a graph of the call, so that what is timed is the GPU and not Python, and whether there is one.

    What cannot be captured, because it synchronises, stays as it is, and is printed. Graphs whose results nobody reads
    may share the memory of a pool.
    """
    if device != "cuda":
        return call, True
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            call()
    except RuntimeError as error:
        print(f"not captured: {name} ({str(error).strip().splitlines()[0]})")
        return call, False
    return graph.replay, True


def graphed_medians(calls: Mapping[str, Call]) -> dict[str, float]:
    """The timer of `anyflow tune`: `interleaved_medians` of CUDA graphs."""
    pool = torch.cuda.graph_pool_handle()
    return interleaved_medians({name: graphed(call, "cuda", name, pool)[0] for name, call in calls.items()})


def _time_once(call: Call) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    start_event, end_event = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start_event.record()
    call()
    end_event.record()
    torch.cuda.synchronize()
    return start_event.elapsed_time(end_event) / 1e3
