"""What a browser may ask for. Everything it sends is checked here, before it reaches a queue or a model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

TEMPORAL_RATIO = 4  # frames per latent frame, after the first
SIZE_MULTIPLE = 16  # of the VAE (8) and a patch (2)
MAX_SEED = 2**53 - 1  # the largest integer that JavaScript holds exactly


class RequestError(ValueError):
    """A message of the browser that asks for something that cannot be; the text is shown to the user."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest values, and those that stand in the page at first.

    Args:
        max_height, max_width: of the frames in pixels.
        max_frames: of a video.
        max_steps: denoising steps per chunk.
        max_prompt: characters.
        max_waiting: rollouts in the queue, beside the one that runs.
        height, width, frames, steps: defaults.
        fps: of the page and of the file.
    Raises:
        ValueError: at construction, unless the defaults are within the limits and of the form these demand.
    """

    max_height: int = 480
    max_width: int = 832
    max_frames: int = 241
    max_steps: int = 16
    max_prompt: int = 2000
    max_waiting: int = 8
    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 4
    fps: int = 16

    def __post_init__(self) -> None:
        for name in ("max_prompt", "fps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting: got {self.max_waiting}, expected at least 0")
        check_start({"prompt": "x"}, self, (1,))

    def hello(self) -> dict[str, Any]:
        """The first message to the browser."""
        return {"type": "hello", "size_multiple": SIZE_MULTIPLE, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """A video to make.

    Attributes:
        prompt: what it shows.
        steps: denoising steps per chunk.
        seed: of the noise.
        chunks: latent frames per chunk.
        height, width: in pixels.
    """

    prompt: str
    steps: int
    seed: int
    chunks: tuple[int, ...]
    height: int
    width: int

    @property
    def frames(self) -> int:
        return (sum(self.chunks) - 1) * TEMPORAL_RATIO + 1


@dataclass(frozen=True, kw_only=True)
class Change:
    """What is different from the next chunk on; None leaves it as it is."""

    prompt: str | None = None
    steps: int | None = None


def check_start(message: Mapping[str, Any], limits: Limits, partition: Sequence[int]) -> RolloutRequest:
    """The rollout that a "start" message asks for.

    Args:
        message: what the browser sent; everything but the prompt may be left out.
        limits: see `Limits`.
        partition: latent frames per chunk that the model was trained with.
    Raises:
        RequestError: naming the field, what came and what was expected.
    """
    frames = _whole(message, "frames", 1, limits.max_frames, limits.frames)
    if (frames - 1) % TEMPORAL_RATIO:
        raise RequestError(f"frames: got {frames}, expected 4n + 1, such as {frames - (frames - 1) % TEMPORAL_RATIO}")
    sides = {}
    for name, limit, default in (
        ("height", limits.max_height, limits.height),
        ("width", limits.max_width, limits.width),
    ):
        sides[name] = _whole(message, name, SIZE_MULTIPLE, limit, default)
        if sides[name] % SIZE_MULTIPLE:
            raise RequestError(f"{name}: got {sides[name]}, expected a multiple of {SIZE_MULTIPLE}")
    return RolloutRequest(
        prompt=_prompt(message, limits),
        steps=_whole(message, "steps", 1, limits.max_steps, limits.steps),
        seed=_whole(message, "seed", 0, MAX_SEED, secrets.randbelow(2**31)),
        chunks=chunks_of(frames, partition),
        height=sides["height"],
        width=sides["width"],
    )


def check_change(message: Mapping[str, Any], limits: Limits) -> Change:
    """The change that a "change" message asks for.

    Raises:
        RequestError: as `check_start`, and if nothing is changed.
    """
    prompt = None if message.get("prompt") is None else _prompt(message, limits)
    steps = None if message.get("steps") is None else _whole(message, "steps", 1, limits.max_steps, 1)
    if prompt is None and steps is None:
        raise RequestError("change: got neither prompt nor steps, expected at least one")
    return Change(prompt=prompt, steps=steps)


def chunks_of(frames: int, partition: Sequence[int]) -> tuple[int, ...]:
    """Latent frames per chunk of a video: the model's first chunk, then its largest, and what is left at the end."""
    left = (frames - 1) // TEMPORAL_RATIO + 1
    chunks: list[int] = []
    while left:
        chunks.append(min(left, max(partition) if chunks else partition[0]))
        left -= chunks[-1]
    return tuple(chunks)


def _prompt(message: Mapping[str, Any], limits: Limits) -> str:
    prompt = message.get("prompt")
    if not isinstance(prompt, str) or not prompt.strip():
        raise RequestError("prompt: expected some text")
    if len(prompt) > limits.max_prompt:
        raise RequestError(f"prompt: got {len(prompt)} characters, expected at most {limits.max_prompt}")
    return prompt.strip()


def _whole(message: Mapping[str, Any], name: str, least: int, most: int, default: int) -> int:
    value = message.get(name)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        shown = repr(value)
        raise RequestError(
            f"{name}: got {shown[:40]}{'...' if len(shown) > 40 else ''}, expected a whole number from {least} to "
            f"{most}"
        )
    return value
