"""Frame counts of a causal video codec: how many pixel frames a chunk of latent frames stands for.

A causal codec compresses time r-fold, except that the very first pixel frame has a latent frame of its own:

    chunk 0         n latent frames  <->  1 + (n - 1) * r  pixel frames
    chunks 1, 2...  n latent frames  <->  n * r            pixel frames

With r = 4, latents 1 / 2 / 3 / 21 are 1 / 5 / 9 / 81 frames in chunk 0 and 4 / 8 / 12 / 84 later.
"""

from __future__ import annotations


class TemporalSizeError(ValueError, AssertionError):
    """A frame count that no chunk can have.

    Also an AssertionError, which is what programs written for other streaming runtimes catch here.
    """


class StreamOrderError(ValueError, AssertionError):
    """A chunk that does not follow the one the cache saw last."""


def pixel_frames(autoregressive_index: int, latent_frames: int, ratio: int) -> int:
    """Pixel frames of a chunk of `latent_frames` latent frames.

    Raises:
        TemporalSizeError: for a negative index or fewer than one latent frame.
    """
    _check(autoregressive_index, "latent frames", latent_frames)
    return 1 + (latent_frames - 1) * ratio if autoregressive_index == 0 else latent_frames * ratio


def latent_frames(autoregressive_index: int, pixel_frames: int, ratio: int) -> int:
    """Latent frames of a chunk of `pixel_frames` pixel frames, the inverse of `pixel_frames`.

    Raises:
        TemporalSizeError: for a negative index, or a count that no number of latent frames gives.
    """
    _check(autoregressive_index, "pixel frames", pixel_frames)
    head = 1 if autoregressive_index == 0 else 0
    groups, rest = divmod(pixel_frames - head, ratio)
    if rest:
        fits = f"1 + {ratio}k" if head else f"{ratio}k"
        raise TemporalSizeError(
            f"pixel frames: a chunk at autoregressive_index {autoregressive_index} has {fits} frames "
            f"(temporal compression {ratio}), got {pixel_frames}"
        )
    return groups + head


def _check(autoregressive_index: int, what: str, count: int) -> None:
    if autoregressive_index < 0:
        raise TemporalSizeError(f"autoregressive_index: expected 0 or more, got {autoregressive_index}")
    if count < 1:
        raise TemporalSizeError(f"{what}: expected at least 1, got {count}")
