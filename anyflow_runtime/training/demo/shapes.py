"""The demo's data: short videos of coloured shapes that move, with captions, made on the fly and exactly known.

"a red circle moves right over black", "a green square moves slowly up and a white triangle moves left over navy".
Videos are (T, 3, H, W), RGB in [0, 1] times `AMPLITUDE`, so that black is 0 and the data has about unit mean square.
Edges are anti-aliased, motion is exact to a fraction of a pixel. Everything follows from (seed, index).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0), "white": (1, 1, 1)}
SHAPES = ("circle", "square", "triangle")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # (x, y), y downwards
BACKGROUNDS = {"black": (0, 0, 0), "grey": (0.25, 0.25, 0.25), "navy": (0, 0, 0.3)}
SPEEDS = {"": (0.13, 0.47), "slowly": (0.13, 0.22), "quickly": (0.34, 0.47)}  # frame widths per clip
AMPLITUDE = 3.2
RADIUS = 3.5 / 16  # of the circle, in frame widths
MARGIN = 2.5 / 16  # centres keep this far from the border
MAX_OBJECTS = 2
SPLITS = ("train", "held_out", "all")

WORDS = ("a", "and", "moves", "over", *COLOURS, *SHAPES, *DIRECTIONS, *BACKGROUNDS, "slowly", "quickly")
VOCABULARY = ("", *WORDS)  # index 0 pads
CAPTION_LENGTH = 16
_TABLES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS), "speed": tuple(SPEEDS)}


@dataclass(frozen=True)
class MovingShape:
    """One object of a caption; `speed` is "", "slowly" or "quickly"."""

    colour: str
    shape: str
    direction: str
    speed: str = ""

    def __post_init__(self) -> None:
        for name, table in _TABLES.items():
            if getattr(self, name) not in table:
                raise ValueError(f"{name}: got {getattr(self, name)!r}, expected one of {table}")

    def __str__(self) -> str:
        words = ("a", self.colour, self.shape, "moves", self.speed, self.direction)
        return " ".join(word for word in words if word)


@dataclass(frozen=True)
class Scene:
    """What a caption says: one or two objects, the later one in front, over a background."""

    objects: tuple[MovingShape, ...]
    background: str

    def __post_init__(self) -> None:
        if not 1 <= len(self.objects) <= MAX_OBJECTS:
            raise ValueError(f"objects: got {len(self.objects)}, expected 1 to {MAX_OBJECTS}")
        if self.background not in BACKGROUNDS:
            raise ValueError(f"background: got {self.background!r}, expected one of {tuple(BACKGROUNDS)}")
        if len({o.colour for o in self.objects}) < len(self.objects):
            raise ValueError(f"objects: got the colour {self.objects[0].colour!r} twice, expected different colours")

    @property
    def caption(self) -> str:
        """The caption in its usual order."""
        return f"{' and '.join(map(str, self.objects))} over {self.background}"

    @property
    def held_out(self) -> bool:
        """True for a ninth of the one-object scenes, and for two-object scenes that contain such an object."""
        background = tuple(BACKGROUNDS).index(self.background)
        for o in self.objects:
            colour, direction = tuple(COLOURS).index(o.colour), tuple(DIRECTIONS).index(o.direction)
            if (colour + 2 * SHAPES.index(o.shape) + 4 * direction + 5 * background) % 9 == 0:
                return True
        return False


def parse_caption(caption: str) -> Scene:
    """The scene of a caption; the adverb may stand anywhere in its clause.

    Raises:
        ValueError: naming an unknown word, or what a clause lacks or has twice.
    """
    words = caption.lower().replace(",", " ").rstrip(" .").split()
    unknown = [word for word in words if word not in WORDS]
    if unknown:
        raise ValueError(f"caption: got unknown words {unknown}, expected only {list(WORDS)}")
    if words.count("over") != 1 or words[-2:-1] != ["over"] or words[-1] not in BACKGROUNDS:
        raise ValueError(f"caption: got {caption!r}, expected it to end in 'over' and one of {tuple(BACKGROUNDS)}")
    objects = []
    for clause in " ".join(words[:-2]).split(" and "):
        found = {name: [word for word in clause.split() if word in table and word] for name, table in _TABLES.items()}
        for name, matches in found.items():
            if len(matches) > 1 or (not matches and name != "speed"):
                raise ValueError(f"caption: got {matches} as {name} in {clause!r}, expected exactly one")
        objects.append(MovingShape(**{name: matches[0] if matches else "" for name, matches in found.items()}))
    return Scene(tuple(objects), words[-1])


@dataclass(frozen=True)
class ShapesBatch:
    """Videos and their exact truth.

    Attributes:
        videos: (B, T, 3, H, W) float32, RGB times `AMPLITUDE`.
        scenes: what each shows.
        centres: (B, MAX_OBJECTS, T, 2) in pixels (x, y), NaN where there is no such object.
    """

    videos: torch.Tensor
    scenes: tuple[Scene, ...]
    centres: torch.Tensor

    @property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]


class ShapesDataset:
    """Batches that depend on (seed, index) alone.

    Args:
        frames, height, width: of the videos; at least 2 frames of 8 x 8.
        split: "train" | "held_out" | "all": captions never seen in training are those with `Scene.held_out`.
        two_objects: share of scenes with two objects.
    """

    def __init__(
        self,
        frames: int = 7,
        height: int = 16,
        width: int = 16,
        seed: int = 0,
        split: str = "train",
        two_objects: float = 0.25,
    ) -> None:
        if frames < 2 or min(height, width) < 8:
            raise ValueError(f"frames: got {frames} of {height} x {width}, expected at least 2 of 8 x 8")
        if split not in SPLITS:
            raise ValueError(f"split: got {split!r}, expected one of {SPLITS}")
        if not 0 <= two_objects <= 1:
            raise ValueError(f"two_objects: got {two_objects}, expected 0 <= two_objects <= 1")
        self.frames, self.height, self.width = frames, height, width
        self.seed, self.split, self.two_objects = seed, split, two_objects

    def batch(self, index: int, size: int) -> ShapesBatch:
        """Batch `index` of `size` random scenes of the split."""
        generator = self._generator(index)
        scenes = _draw_scenes(size, self.split, self.two_objects, generator)
        return self._render(scenes, generator)

    def of_captions(self, captions: Sequence[str], index: int = 0) -> ShapesBatch:
        """Videos for given captions: start and exact speed random."""
        return self._render([parse_caption(caption) for caption in captions], self._generator(index))

    def _generator(self, index: int) -> torch.Generator:
        if index < 0:
            raise ValueError(f"index: got {index}, expected >= 0")
        # A prime stride keeps the streams of neighbouring seeds apart; torch mixes the bits further.
        return torch.Generator().manual_seed(self.seed * 1_000_003 + index)

    def _render(self, scenes: Sequence[Scene], generator: torch.Generator) -> ShapesBatch:
        centres = _draw_motion(scenes, self.frames, self.height, self.width, generator)
        videos = AMPLITUDE * render(scenes, centres, self.height, self.width)
        return ShapesBatch(videos, tuple(scenes), centres)


def coverage(shape: torch.Tensor, centres: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Share of each pixel inside a shape, (..., H, W) float32.

    Args:
        shape: (...) index into `SHAPES`.  centres: (..., 2) in pixels; pixel (0, 0) is centred on 0, 0.
    """
    x = torch.arange(width, dtype=torch.float32) - centres[..., 0, None]
    y = torch.arange(height, dtype=torch.float32) - centres[..., 1, None]
    x, y = x[..., None, :], y[..., :, None]
    radius = RADIUS * width
    half = 0.886 * radius  # the area of the circle
    top, slope = 1.4 * radius, 3**0.5 / 2  # an equilateral triangle about its centroid, pointing up
    circle = torch.sqrt(x * x + y * y) - radius
    square = torch.maximum(x.abs() - half, y.abs() - half)
    triangle = torch.maximum(slope * x.abs() - 0.5 * (y + top), y - top / 2)
    index = shape[..., None, None]
    distance = torch.where(index == 0, circle, torch.where(index == 1, square, triangle))
    return (0.5 - distance).clamp(0, 1)


def render(scenes: Sequence[Scene], centres: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """(B, T, 3, H, W) RGB in [0, 1] of scenes with centres (B, MAX_OBJECTS, T, 2)."""
    objects = [[s.objects[k] if k < len(s.objects) else s.objects[0] for k in range(MAX_OBJECTS)] for s in scenes]
    shape = torch.tensor([[SHAPES.index(o.shape) for o in row] for row in objects])
    colour = torch.tensor([[COLOURS[o.colour] for o in row] for row in objects], dtype=torch.float32)
    background = torch.tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.float32)
    frames = centres.shape[2]
    covered = coverage(shape[:, :, None].expand(-1, -1, frames), centres.nan_to_num(-1e3), height, width)
    image = background[:, None, :, None, None].expand(-1, frames, -1, height, width)
    for k in range(MAX_OBJECTS):
        mask = covered[:, k, :, None]  # (B, T, 1, H, W)
        image = image + mask * (colour[:, k, None, :, None, None] - image)
    return image


def _draw_scenes(size: int, split: str, two_objects: float, generator: torch.Generator) -> list[Scene]:
    if size < 1:
        raise ValueError(f"size: got {size}, expected >= 1")
    colours, directions, backgrounds, speeds = tuple(COLOURS), tuple(DIRECTIONS), tuple(BACKGROUNDS), tuple(SPEEDS)
    scenes: list[Scene] = []
    while len(scenes) < size:
        rows = torch.rand(2 * size, 10, generator=generator).tolist()
        for u in rows:
            count = 2 if u[0] < two_objects else 1
            first = int(u[1] * 5)
            second = (first + 1 + int(u[5] * 4)) % 5  # another colour
            objects = tuple(
                MovingShape(colours[c], SHAPES[int(v[0] * 3)], directions[int(v[1] * 4)], speeds[int(v[2] * 3)])
                for c, v in ((first, u[2:5]), (second, u[6:9]))
            )
            scene = Scene(objects[:count], backgrounds[int(u[9] * 3)])
            if split == "all" or scene.held_out == (split == "held_out"):
                scenes.append(scene)
    return scenes[:size]


def _draw_motion(
    scenes: Sequence[Scene], frames: int, height: int, width: int, generator: torch.Generator, tries: int = 24
) -> torch.Tensor:
    """Centres (B, MAX_OBJECTS, T, 2): straight, constant speed, inside the margins.

    For two objects, of several tries the one in which they stay farthest apart.
    """
    batch = len(scenes)
    present = torch.tensor([[k < len(s.objects) for k in range(MAX_OBJECTS)] for s in scenes])
    objects = [[s.objects[k] if k < len(s.objects) else s.objects[0] for k in range(MAX_OBJECTS)] for s in scenes]
    heading = torch.tensor([[DIRECTIONS[o.direction] for o in row] for row in objects], dtype=torch.float32)
    bounds = torch.tensor([[SPEEDS[o.speed] for o in row] for row in objects])  # (B, K, 2)
    u = torch.rand(tries, batch, MAX_OBJECTS, 3, generator=generator)
    extent = torch.tensor([width, height], dtype=torch.float32)
    travel = (bounds[..., 0] + (bounds[..., 1] - bounds[..., 0]) * u[..., 0])[..., None] * width * heading
    low, high = MARGIN * width - travel.clamp(max=0), extent - 1 - MARGIN * width - travel.clamp(min=0)
    start = low + (high - low).clamp_min(0) * u[..., 1:]
    steps = torch.linspace(0, 1, frames)[:, None]
    centres = start[..., None, :] + travel[..., None, :] * steps  # (tries, B, K, T, 2)
    apart = (centres[:, :, 0] - centres[:, :, 1]).norm(dim=-1).amin(-1)  # (tries, B)
    chosen = torch.where(present[:, 1], apart.argmax(0), torch.zeros(batch, dtype=torch.int64))
    centres = centres[chosen, torch.arange(batch)]
    return torch.where(present[:, :, None, None], centres, torch.full_like(centres, float("nan")))
