"""What a generated shapes video shows, measured from its pixels, against its caption.

Every frame is matched with rendered templates of all shapes at all half-pixel positions, refined to a tenth of a
pixel; the colours of objects and background are then fitted to the whole video by least squares. Nothing of the
caption but the number of objects, and which colour belongs to which, enters the fit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch

from .shapes import AMPLITUDE, BACKGROUNDS, COLOURS, DIRECTIONS, MAX_OBJECTS, SHAPES, SPEEDS, Scene, coverage

CONTRAST = 0.3  # RGB distance from the background that an object needs in every frame to count as found
EXPLAINED = 0.5  # share of the video's variance that the fit must explain


@dataclass(frozen=True)
class Measurement:
    """Per video (B,) or per object (B, MAX_OBJECTS); NaN (or False) where a scene has no such object.

    Attributes:
        found: (B, K) bool: visible in every frame, and the fit explains the video.
        residual: (B,) RMS of video minus best rendered fit, RGB units.
        background_error: (B,) RMS of the fitted background against the caption's.
        shape_right: (B, K) 1 where the best-fitting shape is the caption's.
        colour_error: (B, K) RMS over channels against the caption's colour.  colour_right: (B, K) nearest one is it.
        centres: (B, K, T, 2) pixels.
        start, velocity: (B, K, 2) of the straight line through the centres, in frame widths and frame widths per clip.
        direction_right: (B, K) 1 where the velocity lies within 45 degrees of the caption's direction.
        direction_error: (B, K) degrees.
        speed_error: (B, K) distance of the speed along the direction from the caption's interval, widths per clip.
        wobble: (B, K) RMS distance of the centres from that line, pixels.
    """

    found: torch.Tensor
    residual: torch.Tensor
    background_error: torch.Tensor
    shape_right: torch.Tensor
    colour_error: torch.Tensor
    colour_right: torch.Tensor
    centres: torch.Tensor
    start: torch.Tensor
    velocity: torch.Tensor
    direction_right: torch.Tensor
    direction_error: torch.Tensor
    speed_error: torch.Tensor
    wobble: torch.Tensor

    @property
    def motion_features(self) -> torch.Tensor:
        """(N, 4) start and velocity of every object: what `energy_distance` compares."""
        rows = torch.cat([self.start, self.velocity], dim=-1).flatten(0, 1)
        return rows[rows.isfinite().all(-1)]

    def summary(self, reference: Measurement | None = None) -> dict[str, float]:
        """Means over videos and objects; with a reference (real data) also the energy distance of the motion."""
        names = (
            "residual", "background_error", "shape_right", "colour_error", "colour_right",
            "direction_right", "direction_error", "speed_error", "wobble",
        )  # fmt: skip
        numbers = {name: getattr(self, name).float().nanmean().item() for name in names}
        present = self.shape_right.isfinite()
        numbers["found"] = self.found[present].float().mean().item()
        if reference is not None:
            numbers["energy"] = energy_distance(self.motion_features, reference.motion_features)
        return numbers


@torch.no_grad()
def measure(videos: torch.Tensor, scenes: Sequence[Scene]) -> Measurement:
    """Measure videos (B, T, 3, H, W), values as in `ShapesBatch.videos`, against their scenes.

    Raises:
        ValueError: on another shape, or another number of scenes.
    """
    if videos.dim() != 5 or videos.shape[2] != 3 or videos.shape[1] < 2:
        raise ValueError(f"videos: got shape {tuple(videos.shape)}, expected (B, T >= 2, 3, H, W)")
    if len(scenes) != videos.shape[0]:
        raise ValueError(f"scenes: got {len(scenes)}, expected one for each of {videos.shape[0]} videos")
    rgb = (videos.detach().float().cpu() / AMPLITUDE).nan_to_num(0.0, 0.0, 0.0).clamp(-4, 4)
    counts = torch.tensor([len(scene.objects) for scene in scenes])
    bank = _TemplateBank(*videos.shape[3:])
    parts: list[tuple[torch.Tensor, Measurement]] = []
    for count in range(1, MAX_OBJECTS + 1):
        rows = (counts == count).nonzero().flatten()
        for some in rows.split(64):
            if some.numel():
                parts.append((some, _measure_equal(rgb[some], [scenes[i] for i in some.tolist()], bank)))
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return Measurement(*(torch.cat([getattr(part, f.name) for _, part in parts])[order] for f in fields(Measurement)))


def energy_distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """2 E|a - b| - E|a - a'| - E|b - b'| of two samples (N, D) and (M, D): 0 for equal distributions, else positive.

    Estimated without bias, so that of two finite samples of one distribution it scatters about 0.
    """
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"b: got shapes {tuple(a.shape)} and {tuple(b.shape)}, expected (N, D) and (M, D), N, M >= 2")
    a, b = a.double(), b.double()
    within = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (a, b)]
    return (2 * torch.cdist(a, b).mean() - within[0] - within[1]).item()


def continuation_error(measured: torch.Tensor, truth: torch.Tensor, given_frames: int) -> torch.Tensor:
    """(B, K) RMS distance in pixels of measured centres from the true ones (B, K, T, 2), over the frames not given."""
    if measured.shape != truth.shape or not 0 <= given_frames < truth.shape[2]:
        raise ValueError(
            f"given_frames: got {given_frames} for centres {tuple(measured.shape)} and {tuple(truth.shape)}"
        )
    return (measured - truth)[:, :, given_frames:].square().sum(-1).mean(-1).sqrt()


class _TemplateBank:
    """Rendered shapes at all half-pixel positions, as unit vectors, and renderings at any other."""

    def __init__(self, height: int, width: int) -> None:
        self.height, self.width = height, width
        y, x = torch.meshgrid(torch.arange(0, height - 0.5, 0.5), torch.arange(0, width - 0.5, 0.5), indexing="ij")
        self.positions = torch.stack([x.flatten(), y.flatten()], dim=-1)  # (P, 2)
        shapes = torch.arange(len(SHAPES))[:, None].expand(-1, len(self.positions))
        masks = self.masks(shapes, self.positions.expand(len(SHAPES), -1, -1))
        self.unit = masks / masks.norm(dim=-1, keepdim=True)  # (S, P, pixels)

    def masks(self, shape: torch.Tensor, centres: torch.Tensor) -> torch.Tensor:
        """(..., pixels) coverage."""
        return coverage(shape, centres, self.height, self.width).flatten(-2)

    def best(self, contrast: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy (..., S) that each shape explains at its best position, and that position (..., S, 2).

        Args:
            contrast: (..., 3, pixels) image minus background.
        """
        shape = contrast.shape[:-2]
        flat = contrast.reshape(-1, 3, contrast.shape[-1])
        energies, positions = [], []
        for unit in self.unit:
            energy, index = (flat @ unit.T).square().sum(1).max(-1)
            energies.append(energy)
            positions.append(self.positions[index])
        return torch.stack(energies, -1).view(*shape, -1), torch.stack(positions, -2).view(*shape, -1, 2)

    def refine(
        self, contrast: torch.Tensor, shape: torch.Tensor, centres: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Energy (...) and position (..., 2) of the best centre near `centres`, by two shrinking 5 x 5 searches."""
        energy = torch.zeros(shape.shape)
        for step in (0.2, 0.08):
            energy, centres = self.search(contrast, shape, centres, step * torch.arange(-2.0, 3))
        return energy, centres

    def search(
        self, contrast: torch.Tensor, shape: torch.Tensor, centres: torch.Tensor, steps: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same of the square grid around `centres` whose x and y are off by `steps` (n,) pixels."""
        tried = centres[..., None, :] + torch.cartesian_prod(steps, steps)
        masks = self.masks(shape[..., None].expand(tried.shape[:-1]), tried)  # (..., n * n, pixels)
        norms = masks.square().sum(-1).clamp_min(1e-6)
        energy, index = ((masks @ contrast.transpose(-1, -2)).square().sum(-1) / norms).max(-1)
        return energy, _take(tried, index)


def _measure_equal(rgb: torch.Tensor, scenes: Sequence[Scene], bank: _TemplateBank) -> Measurement:
    """Videos whose scenes have equally many objects; rgb (B, T, 3, H, W)."""
    batch, frames = rgb.shape[:2]
    count = len(scenes[0].objects)
    pixels = rgb.flatten(3)  # (B, T, 3, P)
    palette = torch.tensor([[COLOURS[o.colour] for o in s.objects] for s in scenes], dtype=torch.float32)
    background = pixels.transpose(1, 2).flatten(2).median(-1).values  # (B, 3): objects cover less than half
    contrast = pixels - background[:, None, :, None]

    tracks = _assign(*_pursue(contrast, count, bank), palette - background[:, None])  # (B, K, T, 2)
    shape, tracks = _classify(contrast, tracks, bank)
    masks = bank.masks(shape[..., None].expand(-1, -1, frames), tracks)  # (B, K, T, P)
    residual, colour, back = _fit_colours(pixels, masks)
    visible = _contrast_per_frame(contrast, masks)
    variance = (pixels - pixels.mean(dim=(1, 3), keepdim=True)).square().mean(dim=(1, 2, 3))
    explained = 1 - residual.square() / variance.clamp_min(1e-12)
    found = (visible > CONTRAST).all(-1) & (explained > EXPLAINED)[:, None]

    truth_shape = torch.tensor([[SHAPES.index(o.shape) for o in s.objects] for s in scenes])
    truth_back = torch.tensor([BACKGROUNDS[s.background] for s in scenes], dtype=torch.float32)
    table = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    nearest = table[torch.cdist(colour, table).argmin(-1)]
    motion = _motion(tracks, scenes, rgb.shape[4])
    per_object = {
        "shape_right": (shape == truth_shape).float(),
        "colour_error": (colour - palette).square().mean(-1).sqrt(),
        "colour_right": (nearest == palette).all(-1).float(),
        "centres": tracks,
        **motion,
    }
    padded = {name: _pad(value, count) for name, value in per_object.items()}
    seen = torch.zeros(batch, MAX_OBJECTS, dtype=torch.bool)
    seen[:, :count] = found
    background_error = (back - truth_back).square().mean(-1).sqrt()
    return Measurement(found=seen, residual=residual, background_error=background_error, **padded)


def _pursue(contrast: torch.Tensor, count: int, bank: _TemplateBank) -> tuple[torch.Tensor, torch.Tensor]:
    """The `count` best explanations of each frame, one after the other: positions and colours (B, T, count, .)."""
    rest, positions, colours = contrast, [], []
    for _ in range(count):
        energy, where = bank.best(rest)
        shape = energy.argmax(-1)  # (B, T)
        centre = _take(where, shape)
        mask = bank.masks(shape, centre)  # (B, T, P)
        colour = (rest @ mask[..., None]).squeeze(-1) / mask.square().sum(-1, keepdim=True).clamp_min(1e-6)
        rest = rest - colour[..., None] * mask[..., None, :]
        positions.append(centre)
        colours.append(colour)
    return torch.stack(positions, 2), torch.stack(colours, 2)


def _assign(positions: torch.Tensor, colours: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """Tracks (B, K, T, 2): in each frame the explanation nearest in colour to each object's `wanted` (B, K, 3)."""
    if positions.shape[2] == 1:
        return positions.transpose(1, 2)
    cost = torch.cdist(wanted[:, None].expand(-1, colours.shape[1], -1, -1), colours)  # (B, T, object, explanation)
    crossed = cost[..., 0, 1] + cost[..., 1, 0] < cost[..., 0, 0] + cost[..., 1, 1]
    order = torch.where(crossed[..., None], torch.tensor([1, 0]), torch.tensor([0, 1]))
    return positions.gather(2, order[..., None].expand(*order.shape, 2)).transpose(1, 2)


def _classify(contrast: torch.Tensor, tracks: torch.Tensor, bank: _TemplateBank) -> tuple[torch.Tensor, torch.Tensor]:
    """Shape (B, K) that explains most of the video near each track, and tracks (B, K, T, 2) refined for it."""
    shapes, refined = [], []
    for k in range(tracks.shape[1]):
        energies, centres = [], []
        for index in range(len(SHAPES)):
            shape = torch.full(tracks.shape[:1] + tracks.shape[2:3], index)
            # A wrong first guess of the shape shifts its centre: start from a wider search.
            _, coarse = bank.search(contrast, shape, tracks[:, k], torch.arange(-3.0, 4) / 2)
            energy, centre = bank.refine(contrast, shape, coarse)
            energies.append(energy.sum(-1))
            centres.append(centre)
        best = torch.stack(energies, -1).argmax(-1)  # (B,)
        shapes.append(best)
        refined.append(torch.stack(centres, 1)[torch.arange(len(best)), best])
    return torch.stack(shapes, 1), torch.stack(refined, 1)


def _take(points: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """(..., 2): of points (..., n, 2) those at `index` (...)."""
    return points.gather(-2, index[..., None, None].expand(*index.shape, 1, 2)).squeeze(-2)


def _fit_colours(pixels: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Least squares over the video, later objects in front: residual (B,), colours (B, K, 3), background (B, 3)."""
    weights, uncovered = [], torch.ones_like(masks[:, 0])
    for mask in reversed(masks.unbind(1)):
        weights.append(mask * uncovered)
        uncovered = uncovered * (1 - mask)
    design = torch.stack([*reversed(weights), uncovered], -1).flatten(1, 2)  # (B, T*P, K+1)
    values = pixels.transpose(2, 3).flatten(1, 2)  # (B, T*P, 3)
    gram = design.transpose(1, 2) @ design + 1e-4 * torch.eye(design.shape[-1])
    solution = torch.linalg.solve(gram, design.transpose(1, 2) @ values)  # (B, K+1, 3)
    residual = (values - design @ solution).square().mean(dim=(1, 2)).sqrt()
    return residual, solution[:, :-1], solution[:, -1]


def _contrast_per_frame(contrast: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """(B, K, T) length of the RGB contrast that each mask finds in its frame."""
    found = torch.einsum("btcp,bktp->bktc", contrast, masks)
    return (found / masks.square().sum(-1, keepdim=True).clamp_min(1e-6)).norm(dim=-1)


def _motion(tracks: torch.Tensor, scenes: Sequence[Scene], width: int) -> dict[str, torch.Tensor]:
    """The straight line through tracks (B, K, T, 2) and its errors against the captions."""
    time = torch.linspace(-0.5, 0.5, tracks.shape[2])[:, None]
    centre = tracks.mean(2)
    slope = (tracks * time).sum(2) / time.square().sum()  # pixels per clip
    line = centre[:, :, None] + slope[:, :, None] * time
    velocity = slope / width
    heading = torch.tensor([[DIRECTIONS[o.direction] for o in s.objects] for s in scenes], dtype=torch.float32)
    bounds = torch.tensor([[SPEEDS[o.speed] for o in s.objects] for s in scenes])
    along = (velocity * heading).sum(-1)
    cosine = along / velocity.norm(dim=-1).clamp_min(1e-6)
    return {
        "start": (centre - slope / 2) / width,
        "velocity": velocity,
        "direction_right": (cosine > math.sqrt(0.5)).float(),
        "direction_error": torch.rad2deg(torch.acos(cosine.clamp(-1, 1))),
        "speed_error": (bounds[..., 0] - along).clamp_min(0) + (along - bounds[..., 1]).clamp_min(0),
        "wobble": (tracks - line).square().sum(-1).mean(-1).sqrt(),
    }


def _pad(value: torch.Tensor, count: int) -> torch.Tensor:
    """(B, count, ...) to (B, MAX_OBJECTS, ...) with NaN."""
    missing = value.new_full((value.shape[0], MAX_OBJECTS - count, *value.shape[2:]), float("nan"))
    return torch.cat([value, missing], dim=1)
