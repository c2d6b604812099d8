"""What a browser may ask for. Everything it sends is checked here, before it reaches a queue or a model."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from ..causal_time import context_lengths, partition_for, total_latent_frames, total_pixel_frames
from ..streaming import Change
from .errors import RequestError

if TYPE_CHECKING:
    from .uploads import Upload

MAX_SEED = 2**53 - 1  # the largest integer that JavaScript holds exactly


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Largest values, and those that stand in the page at first.

    Args:
        max_height, max_width: of the frames in pixels.
        max_frames: of a video.
        max_steps: denoising steps per chunk.
        max_prompt: characters.
        max_waiting: rollouts in the queue, beside the one that runs.
        max_guidance: scale of classifier-free guidance.
        max_upload: bytes of a picture or clip to begin with.
        height, width, frames, steps, guidance: defaults.
        fps: of the page and of the file.
        temporal_ratio: frames per latent frame of the model, after the first.
        size_multiple: what its height and width are multiples of: the VAE's 8 and a patch of 2.
    Raises:
        ValueError: at construction, unless the defaults are within the limits and of the form these demand.
    """

    max_height: int = 480
    max_width: int = 832
    max_frames: int = 241
    max_steps: int = 16
    max_prompt: int = 2000
    max_waiting: int = 8
    max_guidance: float = 20.0
    max_upload: int = 32 * 2**20
    height: int = 480
    width: int = 832
    frames: int = 81
    steps: int = 4
    guidance: float = 1.0
    fps: int = 16
    temporal_ratio: int = 4
    size_multiple: int = 16

    def __post_init__(self) -> None:
        for name in ("max_prompt", "max_upload", "fps", "temporal_ratio", "size_multiple"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected at least 1")
        if self.max_waiting < 0:
            raise ValueError(f"max_waiting: got {self.max_waiting}, expected at least 0")
        check_start({"prompt": "x"}, self, (1,))

    def hello(self) -> dict[str, Any]:
        """The first message to the browser."""
        return {"type": "hello", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class RolloutRequest:
    """A video to make.

    Attributes:
        prompt: what it shows.
        steps: denoising steps per chunk.
        seed: of the noise.
        chunks: latent frames per chunk; one chunk, the whole video, for a bidirectional model.
        height, width: in pixels.
        temporal_ratio: see `Limits`.
        guidance: scale; 1 is none.
        negative_prompt: with guidance; None is the empty text.
        context: what the video begins with, or None.
        context_frames: how many frames of it.
    """

    prompt: str
    steps: int
    seed: int
    chunks: tuple[int, ...]
    height: int
    width: int
    temporal_ratio: int = 4
    guidance: float = 1.0
    negative_prompt: str | None = None
    context: Upload | None = None
    context_frames: int = 0

    @property
    def frames(self) -> int:
        return total_pixel_frames(sum(self.chunks), self.temporal_ratio)


def check_start(
    message: Mapping[str, Any],
    limits: Limits,
    partition: Sequence[int] | None,
    uploads: Callable[[str], Upload | None] = lambda token: None,
) -> RolloutRequest:
    """The rollout that a "start" message asks for.

    Args:
        message: what the browser sent; everything but the prompt may be left out.
        limits: see `Limits`.
        partition: latent frames per chunk that the model was trained with; None for a bidirectional one.
        uploads: finds what was uploaded under a token.
    Raises:
        RequestError: naming the field, what came and what was expected.
    """
    frames = _whole(message, "frames", 1, limits.max_frames, limits.frames)
    ratio, multiple = limits.temporal_ratio, limits.size_multiple
    try:
        latent_frames = total_latent_frames(frames, ratio)
    except ValueError as error:
        raise RequestError(str(error)) from error
    sides = {}
    for name, limit, default in (
        ("height", limits.max_height, limits.height),
        ("width", limits.max_width, limits.width),
    ):
        sides[name] = _whole(message, name, multiple, limit, default)
        if sides[name] % multiple:
            raise RequestError(f"{name}: got {sides[name]}, expected a multiple of {multiple}")
    guidance = _guidance(message, limits, limits.guidance)
    negative = None if message.get("negative_prompt") in (None, "") else _text(message, "negative_prompt", limits)
    if negative is not None and guidance == 1:
        raise RequestError("negative_prompt: has no effect at guidance 1, expected guidance above 1")
    chunks = (latent_frames,) if partition is None else partition_for(latent_frames, partition)
    allowed = context_lengths(latent_frames, None if partition is None else chunks, ratio)
    context, context_frames = _context(message, allowed, uploads)
    return RolloutRequest(
        prompt=_text(message, "prompt", limits),
        steps=_whole(message, "steps", 1, limits.max_steps, limits.steps),
        seed=_whole(message, "seed", 0, MAX_SEED, secrets.randbelow(2**31)),
        chunks=chunks,
        height=sides["height"],
        width=sides["width"],
        temporal_ratio=ratio,
        guidance=guidance,
        negative_prompt=negative,
        context=context,
        context_frames=context_frames,
    )


def check_change(message: Mapping[str, Any], limits: Limits, request: RolloutRequest) -> Change:
    """The change that a "change" message asks for.

    Args:
        message, limits: as in `check_start`.
        request: what the video began with.
    Raises:
        RequestError: as `check_start`, if nothing is changed, or if guidance is to begin or to end.
    """
    prompt = None if message.get("prompt") is None else _text(message, "prompt", limits)
    steps = None if message.get("steps") is None else _whole(message, "steps", 1, limits.max_steps, 1)
    guidance = None if message.get("guidance") is None else _guidance(message, limits, 1.0)
    if prompt is None and steps is None and guidance is None:
        raise RequestError("change: got neither prompt nor steps nor guidance, expected at least one")
    if guidance is not None and (guidance > 1) != (request.guidance > 1):
        expected = "above 1, as the video began with guidance" if request.guidance > 1 else "1, as the video began"
        raise RequestError(f"guidance: got {guidance:g}, expected {expected}")
    return Change(prompt=prompt, steps=steps, guidance_scale=guidance if request.guidance > 1 else None)


def _context(
    message: Mapping[str, Any], allowed: Sequence[int], uploads: Callable[[str], Upload | None]
) -> tuple[Upload | None, int]:
    """What a video begins with, and how many frames of it: what is asked for, else as many as there are and may be."""
    token, wanted = message.get("context"), message.get("context_frames")
    if token is None:
        if wanted is not None:
            raise RequestError("context_frames: got without context, of which it takes the first frames")
        return None, 0
    upload = uploads(token) if isinstance(token, str) else None
    if upload is None:
        raise RequestError("context: no such upload, or it has made way for newer ones; send the file again")
    lengths = f"one of: {', '.join(map(str, allowed)) or 'none, the video is too short'}"
    if wanted is None:
        fitting = [frames for frames in allowed if frames <= upload.frames]
        if not fitting:
            raise RequestError(f"context: got {upload.frames} frames to begin with, expected {lengths}")
        return upload, fitting[-1]
    if isinstance(wanted, bool) or wanted not in allowed:
        raise RequestError(f"context_frames: got {str(wanted)[:40]}, expected {lengths}")
    if wanted > upload.frames:
        raise RequestError(f"context_frames: got {wanted}, but the upload has {upload.frames} frames")
    return upload, int(wanted)


def _text(message: Mapping[str, Any], name: str, limits: Limits) -> str:
    text = message.get(name)
    if not isinstance(text, str) or not text.strip():
        raise RequestError(f"{name}: expected some text")
    if len(text) > limits.max_prompt:
        raise RequestError(f"{name}: got {len(text)} characters, expected at most {limits.max_prompt}")
    return text.strip()


def _guidance(message: Mapping[str, Any], limits: Limits, default: float) -> float:
    value = message.get("guidance")
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1 <= value <= limits.max_guidance:
        raise RequestError(f"guidance: got {str(value)[:40]!r}, expected a number from 1 to {limits.max_guidance:g}")
    return float(value)


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
