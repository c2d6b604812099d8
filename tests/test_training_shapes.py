"""The demo's data and its measurements. Witness: the exact scene from which each video was rendered."""

from __future__ import annotations

import pytest
import torch

from anyflow_runtime.training.demo.demo_model import demo_text_encoder
from anyflow_runtime.training.demo.shapes import (
    AMPLITUDE,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    RADIUS,
    SHAPES,
    SPEEDS,
    VOCABULARY,
    MovingShape,
    Scene,
    ShapesDataset,
    coverage,
    parse_caption,
    render,
)
from anyflow_runtime.training.demo.shapes_measure import continuation_error, energy_distance, measure


def test_batches_depend_on_seed_and_index_alone() -> None:
    first, again = (ShapesDataset(seed=3).batch(5, 8) for _ in range(2))
    assert torch.equal(first.videos, again.videos) and first.captions == again.captions
    assert not torch.equal(first.videos, ShapesDataset(seed=4).batch(5, 8).videos)
    assert not torch.equal(first.videos, ShapesDataset(seed=3).batch(6, 8).videos)


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_splits_share_no_caption(split: str) -> None:
    scenes = ShapesDataset(split=split).batch(0, 300).scenes
    assert {scene.held_out for scene in scenes} == {split == "held_out"}


def test_training_captions_cover_every_word() -> None:
    words = {word for caption in ShapesDataset().batch(0, 400).captions for word in caption.split()}
    assert words == set(VOCABULARY[1:])


def test_a_ninth_of_the_scenes_is_held_out() -> None:
    scenes = [
        Scene((MovingShape(colour, shape, direction),), background)
        for colour in COLOURS
        for shape in SHAPES
        for direction in DIRECTIONS
        for background in BACKGROUNDS
    ]
    assert sum(scene.held_out for scene in scenes) == 20 and len(scenes) == 180


def test_captions_parse_back() -> None:
    encoder = demo_text_encoder()
    for scene in ShapesDataset(split="all", two_objects=0.5).batch(0, 100).scenes:
        assert parse_caption(scene.caption) == scene
        assert [VOCABULARY[i] for i in encoder.tokens(scene.caption) if i] == scene.caption.split()


@pytest.mark.parametrize(
    "caption",
    [
        "a red circle moves right slowly over black",
        "A red circle slowly moves right, over black.",
        "a red circle moves slowly right over black",
    ],
)
def test_adverb_may_stand_anywhere(caption: str) -> None:
    assert parse_caption(caption) == Scene((MovingShape("red", "circle", "right", "slowly"),), "black")


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a purple circle moves right over black", r"unknown words \['purple'\]"),
        ("a red circle moves right", "end in 'over'"),
        ("a red moves right over black", r"got \[\] as shape"),
        ("a red circle moves up right over black", r"as direction"),
        ("a red circle moves up and a red square moves up over black", "'red' twice"),
        ("", "end in 'over'"),
    ],
)
def test_wrong_captions_are_explained(caption: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_caption(caption)


def test_motion_is_straight_constant_and_as_captioned() -> None:
    batch = ShapesDataset(split="all", two_objects=0.5).batch(0, 200)
    steps = batch.centres.diff(dim=2)
    present = steps[..., 0, 0].isfinite()
    assert (steps - steps[:, :, :1])[present].abs().max() < 1e-4
    for scene, row in zip(batch.scenes, steps, strict=True):
        for o, step in zip(scene.objects, row, strict=False):
            travel = step.sum(0) / 16
            along = torch.tensor(DIRECTIONS[o.direction], dtype=torch.float32)
            low, high = SPEEDS[o.speed]
            assert low - 1e-5 <= (travel @ along).item() <= high + 1e-5
            assert (travel - (travel @ along) * along).abs().max() < 1e-5


def test_shapes_stay_in_the_picture() -> None:
    centres = ShapesDataset(split="all").batch(0, 200).centres
    centres = centres[centres.isfinite()]
    assert centres.min() >= 2.5 - 1e-4 and centres.max() <= 12.5 + 1e-4


def test_pixels_are_colours_and_scaled() -> None:
    scene = parse_caption("a yellow square moves left over navy")
    image = render([scene], torch.tensor([[[[8.0, 8.0]], [[float("nan")] * 2]]]), 16, 16)[0, 0]
    assert image[:, 8, 8].tolist() == pytest.approx(COLOURS["yellow"])
    assert image[:, 0, 0].tolist() == pytest.approx(BACKGROUNDS["navy"])
    videos = ShapesDataset().batch(0, 256).videos
    assert 0 <= videos.min() and videos.max() <= AMPLITUDE + 1e-5
    assert 0.8 < videos.square().mean() < 1.3  # about unit mean square, like the noise


def test_later_objects_are_in_front() -> None:
    scene = parse_caption("a red circle moves up and a blue square moves up over black")
    image = render([scene], torch.full((1, 2, 1, 2), 8.0), 16, 16)[0, 0]
    assert image[:, 8, 8].tolist() == [0, 0, 1]


@pytest.mark.parametrize("index", range(3), ids=SHAPES)
def test_rendered_area_and_centroid_are_those_of_the_shape(index: int) -> None:
    """Anti-aliased coverage integrates to the area wherever the centre is: motion is exact below a pixel."""
    radius = RADIUS * 64
    area = [torch.pi * radius**2, (2 * 0.886 * radius) ** 2, 3 * 3**0.5 / 4 * (1.4 * radius) ** 2][index]
    for centre in ([30.0, 31.0], [30.3, 31.7]):
        mask = coverage(torch.tensor(index), torch.tensor(centre), 64, 64)
        assert mask.sum().item() == pytest.approx(area, rel=0.02)
        y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
        centroid = [(mask * axis).sum().item() / mask.sum().item() for axis in (x, y)]
        assert centroid == pytest.approx(centre, abs=0.05)


@pytest.fixture(scope="module")
def real():
    batch = ShapesDataset(split="all", two_objects=0.3).batch(0, 48)
    return batch, measure(batch.videos, batch.scenes)


def test_real_videos_measure_as_right(real) -> None:
    """What the metrics can at best report: the floor under every claim made with them."""
    numbers = real[1].summary()
    assert numbers["found"] == numbers["direction_right"] == numbers["colour_right"] == 1
    assert numbers["shape_right"] > 0.95
    assert numbers["residual"] < 0.02 and numbers["colour_error"] < 0.02 and numbers["wobble"] < 0.1
    assert numbers["speed_error"] < 0.01 and numbers["direction_error"] < 2


def test_centres_are_found_to_a_tenth_of_a_pixel(real) -> None:
    batch, measured = real
    error = (measured.centres - batch.centres).norm(dim=-1)
    assert error[error.isfinite()].median() < 0.1
    single = torch.tensor([len(scene.objects) == 1 for scene in batch.scenes])
    assert error[single, 0].max() < 0.25
    assert torch.equal(error.isfinite(), batch.centres[..., 0].isfinite())


def test_wrong_captions_measure_as_wrong() -> None:
    """Each measure answers to its own word of the caption, and to no other."""
    video = ShapesDataset().of_captions(["a red circle moves quickly right over black"]).videos
    wrong = {
        "a green circle moves quickly right over black": "colour_right",
        "a red square moves quickly right over black": "shape_right",
        "a red circle moves quickly up over black": "direction_right",
    }
    for caption, name in wrong.items():
        numbers = measure(video, [parse_caption(caption)]).summary()
        rights = {key: numbers[key] for key in ("colour_right", "shape_right", "direction_right")}
        assert rights == {key: float(key != name) for key in rights}
    slow = measure(video, [parse_caption("a red circle moves slowly right over black")]).summary()
    assert slow["speed_error"] > 0.1 and slow["direction_right"] == 1
    grey = measure(video, [parse_caption("a red circle moves quickly right over grey")]).summary()
    assert grey["background_error"] > 0.2


@pytest.mark.parametrize(
    "video", [torch.zeros(2, 7, 3, 16, 16), torch.full((2, 7, 3, 16, 16), torch.nan)], ids=["empty", "nan"]
)
def test_nothing_is_found_where_nothing_is(video: torch.Tensor) -> None:
    scenes = [parse_caption("a red circle moves right over black")] * 2
    assert measure(video, scenes).summary()["found"] == 0


def test_nothing_is_found_in_noise() -> None:
    scenes = [parse_caption("a red circle moves right over black")] * 8
    noise = torch.randn(8, 7, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert measure(noise, scenes).summary()["found"] == 0


def test_residual_is_the_noise_that_was_added(real) -> None:
    batch, _ = real
    noise = 0.3 * torch.randn(batch.videos.shape, generator=torch.Generator().manual_seed(0))
    measured = measure(batch.videos + noise, batch.scenes)
    single = torch.tensor([len(scene.objects) == 1 for scene in batch.scenes])
    assert measured.residual[single].mean().item() == pytest.approx(0.3 / AMPLITUDE, rel=0.05)


def test_an_object_that_vanishes_is_not_found() -> None:
    batch = ShapesDataset().of_captions(["a white square moves left over black"])
    videos = batch.videos.clone()
    videos[:, 3] = 0
    assert not measure(videos, batch.scenes).found.any()


def test_energy_distance_tells_equal_from_shifted() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 400, 4, generator=generator)
    assert abs(energy_distance(a, b)) < 0.05
    assert energy_distance(a, b + 1) > 0.5


def test_continuation_error_counts_the_new_frames_only() -> None:
    truth = torch.zeros(1, 1, 4, 2)
    moved = truth.clone()
    moved[:, :, :2] = 100
    moved[:, :, 2:, 0] = 3
    assert continuation_error(moved, truth, 2).item() == pytest.approx(3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ShapesDataset(frames=1), "frames: got 1"),
        (lambda: ShapesDataset(split="test"), "split: got 'test'"),
        (lambda: ShapesDataset().batch(-1, 2), "index: got -1"),
        (lambda: ShapesDataset().batch(0, 0), "size: got 0"),
        (lambda: MovingShape("red", "star", "up"), "shape: got 'star'"),
        (lambda: measure(torch.zeros(2, 7, 1, 16, 16), []), "videos: got shape"),
        (lambda: measure(torch.zeros(2, 7, 3, 16, 16), []), "scenes: got 0"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
