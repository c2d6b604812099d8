"""Frame counts of a causal video codec: pixel frames of a chunk and of a video, its chunks, and where context ends.

A causal codec compresses time r-fold, except that the very first pixel frame has a latent frame of its own:

    chunk 0         n latent frames  <->  1 + (n - 1) * r  pixel frames
    chunks 1, 2...  n latent frames  <->  n * r            pixel frames

With r = 4, latents 1 / 2 / 3 / 21 are 1 / 5 / 9 / 81 frames in chunk 0 and 4 / 8 / 12 / 84 later. A whole video counts
as one chunk 0, however it is cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate


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
            f"pixel frames: got {pixel_frames}, expected {fits} in the chunk at autoregressive_index "
            f"{autoregressive_index} (temporal compression {ratio})"
        )
    return groups + head


def total_pixel_frames(latent_frames: int, ratio: int) -> int:
    """Pixel frames of a whole video of `latent_frames` latent frames."""
    return pixel_frames(0, latent_frames, ratio)


def total_latent_frames(pixel_frames: int, ratio: int) -> int:
    """Latent frames of a whole video of `pixel_frames` pixel frames.

    Raises:
        TemporalSizeError: ("frames: got ...") with the next lower count that a video can have.
    """
    _check(0, "frames", pixel_frames)
    groups, rest = divmod(pixel_frames - 1, ratio)
    if rest:
        raise TemporalSizeError(f"frames: got {pixel_frames}, expected {ratio}n + 1, such as {pixel_frames - rest}")
    return groups + 1


def frames_of_chunk(index: int, partition: Sequence[int]) -> int:
    """Latent frames of a chunk of a video that goes on after its `partition`: the largest chunk, again and again."""
    return partition[index] if index < len(partition) else max(partition)


def partition_of(chunks: int, partition: Sequence[int]) -> tuple[int, ...]:
    """Latent frames of each of `chunks` chunks, for a model with a default `partition`.

    A longer video has the first chunk and then the largest: the default may end in a short one, which belongs at the
    end of a video only.
    """
    if chunks <= len(partition):
        return tuple(partition[:chunks])
    return (partition[0],) + (max(partition),) * (chunks - 1)


def partition_for(frames: int, partition: Sequence[int]) -> tuple[int, ...]:
    """The chunks of a video of `frames` latent frames, for a model with a default `partition`.

    They are the first of the partition, or of its extension (`partition_of`), and the last one is cut to fit.
    """
    chunks: list[int] = []
    for chunk in partition_of(len(partition) if frames <= sum(partition) else frames, partition):
        if (left := frames - sum(chunks)) > 0:
            chunks.append(min(chunk, left))
    return tuple(chunks)


def context_lengths(frames: int, partition: Sequence[int] | None, ratio: int) -> list[int]:
    """Pixel frames that a video of `frames` latent frames may begin with, fewer than it has.

    They end where a chunk of `partition` does; with None, for a model without chunks, where a latent frame does.
    """
    ends = range(1, frames) if partition is None else accumulate(partition)
    return [total_pixel_frames(end, ratio) for end in ends if end < frames]


def _check(autoregressive_index: int, what: str, count: int) -> None:
    if autoregressive_index < 0:
        raise TemporalSizeError(f"autoregressive_index: got {autoregressive_index}, expected 0 or more")
    if count < 1:
        raise TemporalSizeError(f"{what}: got {count}, expected at least 1")
