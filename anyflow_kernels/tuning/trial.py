"""A subject decided by evidence: every candidate is judged on this machine; what passed is timed beside the default.

A candidate runs as a launch would run it, through the operation, with the choice forced. One that raises, runs out of
memory or breaks the error law against float64 never counts; the reason is kept. Every shape of the subject has to be
right, and the geometric mean of their times decides.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from statistics import geometric_mean
from typing import Any

import torch

from .. import load_ops
from ..launch_configs.tuned import Choice, Key, forced
from ..testing.budget import map_tensors
from ..testing.cases import OperationCase, Random
from ..testing.runs import Results, gradients_of, judge_results, run_case
from .subjects import Shape, Subject
from .timing import Call

Timer = Callable[[Mapping[str, Call]], Mapping[str, float]]
Before = Callable[[Key, Choice], str]
WORTH = 1.02  # times faster than the default: less is within what two runs differ by
ROTATED_BYTES = 256 * 2**20  # of inputs in turn, several times the L2 of any GPU here
MOST_ROTATED = 8


class DeviceLostError(RuntimeError):
    """A candidate left the GPU's context unusable: this process can try nothing more."""


@dataclass
class Try:
    """What became of a candidate: seconds by shape, its largest error beside its budget, why it does not count."""

    choice: Choice
    seconds: list[float] = field(default_factory=list)
    error: float = 0.0
    budget: float = 0.0
    rejected: str = ""

    def reject(self, error: Exception) -> None:
        memory = "out of memory: " if isinstance(error, torch.OutOfMemoryError) else ""
        first = (str(error).strip().splitlines() or [""])[0][:300]
        self.rejected = f"{memory}{type(error).__name__}: {first}"


def try_candidates(
    subject: Subject,
    arch: int,
    device: torch.device,
    timer: Timer,
    before: Before = lambda key, choice: "",
) -> dict[str, Any]:
    """An entry of the tuning table.

    Args:
        timer: seconds of each call, by name.
        before: told of a candidate whenever it is about to run; what it returns, if anything, is why it shall not.

    Raises:
        DeviceLostError: if a candidate broke the CUDA context.
    """
    tries = [Try(choice) for choice in subject.candidates]
    for shape in subject.shapes:
        _judge(subject, shape, tries, arch, device, before)
        _time(subject, shape, tries, arch, device, timer, before)
    return _entry(subject, tries)


def _judge(subject: Subject, shape: Shape, tries: list[Try], arch: int, device: torch.device, before: Before) -> None:
    ops, reference = load_ops("triton"), load_ops("reference")
    run = (subject.key.dtype, device, subject.backward)
    low, exact = run_case(shape.judged, reference, *run), run_case(shape.judged, reference, *run, wide=True)
    for own in tries:
        own.rejected = own.rejected or before(subject.key, own.choice)
        if own.rejected:
            continue
        try:
            with forced(arch, {**subject.beside, subject.key: own.choice}):
                got = run_case(shape.judged, ops, *run)
            _compare(own, got, low, exact, subject.key.dtype, shape.judged)
        except Exception as error:  # whatever a candidate does wrong is a finding, and the others are still wanted
            own.reject(error)
            _check_device(device, subject, own)


def _compare(own: Try, got: Results, low: Results, exact: Results, dtype: torch.dtype, case: OperationCase) -> None:
    for name, found in judge_results(got, low, exact, dtype).items():
        errors, budget = found.errors, found.budget
        if not found.ok and not own.rejected:
            over = f"{name} {errors.whole:.1e}, worst row {errors.row:.1e}"
            allowed = f"over the budget of {budget.whole:.1e}, worst row {budget.row:.1e}"
            own.rejected = f"parity: {found.problem or f'{over}, {allowed}'} ({case.shape})"
        if errors.whole * (own.budget or 1) >= own.error * budget.whole:  # the largest part of its budget
            own.error, own.budget = errors.whole, budget.whole


def _time(
    subject: Subject, shape: Shape, tries: list[Try], arch: int, device: torch.device, timer: Timer, before: Before
) -> None:
    alive = {str(i): own for i, own in enumerate(tries) if not own.rejected}
    if not alive:
        return
    work = _prepared(subject, shape.timed, device)
    calls: dict[str, Call] = {}
    for name, own in alive.items():
        calls[name] = _with_choice(work, arch, {**subject.beside, subject.key: own.choice})
        before(subject.key, own.choice)
        try:
            calls[name]()  # compiles; at this shape it may not fit
        except Exception as error:
            del calls[name]
            own.reject(error)
            _check_device(device, subject, own)
    for name, seconds in timer(calls).items():
        alive[name].seconds.append(seconds)


def _prepared(subject: Subject, case: OperationCase, device: torch.device) -> Call:
    """The operation, or its backward alone, on inputs that together do not fit the L2."""
    ops, dtype = load_ops("triton"), subject.key.dtype
    calls: list[Call] = []
    copies = 1
    while len(calls) < copies:
        random = Random(len(calls), dtype, device)
        inputs = case.make(random)
        if device.type == "cuda":
            copies = min(MOST_ROTATED, max(1, ROTATED_BYTES // max(1, _bytes(inputs))))
        if subject.backward:
            calls.append(gradients_of(case, ops, inputs, random))
        else:
            calls.append(partial(getattr(ops, case.operation), **inputs))

    def work() -> None:
        with torch.set_grad_enabled(False):
            for call in calls:
                call()

    return work


def _bytes(inputs: dict[str, Any]) -> int:
    sizes: list[int] = []
    map_tensors(lambda x: sizes.append(x.numel() * x.element_size()), inputs)
    return sum(sizes)


def _with_choice(work: Call, arch: int, choices: Mapping[Key, Choice]) -> Call:
    def call() -> None:
        with forced(arch, choices):
            work()

    return call


def _check_device(device: torch.device, subject: Subject, own: Try) -> None:
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except RuntimeError as error:
        raise DeviceLostError(f"{subject.key}: {own.choice.way} {dict(own.choice.fields)}: {own.rejected}") from error


def _entry(subject: Subject, tries: list[Try]) -> dict[str, Any]:
    default, passed = tries[0], [own for own in tries if not own.rejected]
    means = {id(own): geometric_mean(own.seconds) for own in passed}
    best = min(passed, key=lambda own: means[id(own)], default=None)
    if best is None:
        reason = f"no candidate passed; the default serves, which was rejected: {default.rejected}"
    elif default.rejected:
        reason = f"the default was rejected: {default.rejected}"
    elif means[id(default)] < WORTH * means[id(best)]:
        best, reason = default, f"no candidate is {WORTH - 1:.0%} faster than the default"
    else:
        reason = f"{means[id(default)] / means[id(best)]:.2f}x over the default"
    dtype = str(subject.key.dtype).removeprefix("torch.")
    return {
        "operation": subject.key.operation,
        "dtype": dtype,
        "size": subject.key.size,
        "shape": subject.key.shape,
        "winner": None if best is None else _described(best.choice),
        "reason": reason,
        "shapes": [shape.timed.shape for shape in subject.shapes],
        "trials": [
            {
                **_described(own.choice),
                "from": own.choice.reason,
                "seconds": own.seconds,
                "error": own.error,
                "budget": own.budget,
                "rejected": own.rejected,
            }
            for own in tries
        ],
    }


def _described(choice: Choice) -> dict[str, Any]:
    return {"way": choice.way, "fields": dict(choice.fields)}
