"""anyflow_runtime/causal_time.py: frame counts of chunks and videos; the expected numbers are worked out by hand."""

from __future__ import annotations

import pytest

from anyflow_runtime.causal_time import (
    TemporalSizeError,
    context_lengths,
    latent_frames,
    partition_for,
    partition_of,
    pixel_frames,
    total_latent_frames,
    total_pixel_frames,
)

RELEASED = (1, 3, 3, 3, 3, 3, 3, 2)  # of the released FAR models, 21 latent frames


@pytest.mark.parametrize("latents, pixels", [(1, 1), (2, 5), (3, 9), (21, 81)])
def test_the_first_frame_of_a_video_has_a_latent_frame_of_its_own(latents, pixels):
    assert total_pixel_frames(latents, 4) == pixels and total_latent_frames(pixels, 4) == latents


def test_a_video_has_as_many_frames_as_its_chunks():
    chunks = [pixel_frames(index, frames, 4) for index, frames in enumerate(RELEASED)]
    assert sum(chunks) == total_pixel_frames(sum(RELEASED), 4) == 81


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: latent_frames(0, 8, 4), r"pixel frames: got 8, expected 1 \+ 4k in the chunk"),
        (lambda: latent_frames(2, 9, 4), "pixel frames: got 9, expected 4k in the chunk at autoregressive_index 2"),
        (lambda: pixel_frames(-1, 3, 4), "autoregressive_index: got -1, expected 0 or more"),
        (lambda: pixel_frames(0, 0, 4), "latent frames: got 0, expected at least 1"),
        (lambda: total_latent_frames(80, 4), r"frames: got 80, expected 4n \+ 1, such as 77"),
        (lambda: total_latent_frames(0, 4), "frames: got 0, expected at least 1"),
        (lambda: total_pixel_frames(0, 4), "latent frames: got 0, expected at least 1"),
    ],
)
def test_a_count_that_cannot_be_is_named_with_one_that_can(call, message):
    with pytest.raises(TemporalSizeError, match=message):
        call()


@pytest.mark.parametrize("chunks, expected", [(1, (1,)), (3, (1, 3, 3)), (8, RELEASED), (9, (1,) + (3,) * 8)])
def test_more_chunks_than_the_partition_have_its_largest_size(chunks, expected):
    assert partition_of(chunks, RELEASED) == expected


@pytest.mark.parametrize(
    "frames, partition, expected",
    [
        (21, RELEASED, RELEASED),
        (1, RELEASED, (1,)),
        (6, RELEASED, (1, 3, 2)),
        (24, RELEASED, (1,) + (3,) * 7 + (2,)),
        (5, (1, 2, 4), (1, 2, 2)),  # the partition's own chunks, not its largest, as far as it goes
        (10, (1, 2, 4), (1, 4, 4, 1)),
        (3, (1,), (1, 1, 1)),
        (2, (5,), (2,)),
    ],
)
def test_a_video_is_cut_as_the_partition_says_and_the_last_chunk_to_fit(frames, partition, expected):
    assert partition_for(frames, partition) == expected and sum(expected) == frames


def test_context_ends_with_a_chunk_before_the_end_of_the_video():
    assert context_lengths(6, (1, 3, 2), 4) == [1, 13]
    assert context_lengths(4, None, 4) == [1, 5, 9]  # without chunks, with any latent frame
    assert context_lengths(1, (1,), 4) == context_lengths(1, None, 4) == []
