"""Frames in overlapping spatial tiles that are blended, for encoder and decoder of the Wan VAE.

Each tile has a causal history of its own. The tiles, their order and the linear blend are those of diffusers'
`AutoencoderKLWan.tiled_encode` and `tiled_decode`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

History = list[Tensor]


@dataclass(frozen=True)
class Tiling:
    """Side of a tile and distance between tiles, of what goes in and of what comes out.

    Sides of the whole picture that go in are multiples of `stride / out_stride`, as are `size` and `stride`.
    """

    size: int
    stride: int
    out_size: int
    out_stride: int

    @property
    def inverse(self) -> Tiling:
        """For the network that goes the other way."""
        return Tiling(self.out_size, self.out_stride, self.size, self.stride)

    def covers(self, height: int, width: int) -> bool:
        """Whether a picture of this size is a single tile."""
        return height <= self.size and width <= self.size

    def run(
        self,
        network: Callable[[Tensor, History | None, bool], tuple[Tensor, History]],
        x: Tensor,
        history: list[History] | None,
        first: bool,
    ) -> tuple[Tensor, list[History]]:
        """`network` on every tile of a chunk.

        Args:
            network: `(tile, past, first)` to what it makes of a tile, and the past of the next chunk.
            x: (B, C, T, H, W).
            history: the past of every tile, row by row; None for zeros.
            first: whether the chunk is the first of its video.
        Returns:
            (B, C', T', H', W') and the history for the next chunk.
        """
        height, width = x.shape[-2:]
        overlap, step = self.out_size - self.out_stride, self.out_stride
        out: Tensor | None = None
        kept: list[History] = []
        above: dict[int, Tensor] = {}  # bottom edges of the row of tiles above, by column
        beside: Tensor | None = None  # right edge of the tile to the left
        for row, top in enumerate(range(0, height, self.stride)):
            for column, left in enumerate(range(0, width, self.stride)):
                part = x[..., top : top + self.size, left : left + self.size]
                tile, past = network(part, None if history is None else history[len(kept)], first)
                kept.append(past)
                if out is None:
                    sides = (side * self.out_stride // self.stride for side in (height, width))
                    out = tile.new_empty((*tile.shape[:3], *sides))
                if column in above:
                    _blend(above[column], tile, dim=-2)
                if beside is not None and column:
                    _blend(beside, tile, dim=-1)
                if overlap:
                    # Copies of the edges, so that the tiles themselves can be freed.
                    above[column], beside = tile[..., -overlap:, :].clone(), tile[..., -overlap:].clone()
                kept_part = tile[..., :step, :step]
                out[..., row * step : (row + 1) * step, column * step : (column + 1) * step] = kept_part
        assert out is not None
        return out, kept


def latent_tiling(tile_size: int | None, tile_stride: int, ratio: int, patch: int) -> Tiling | None:
    """Tiles of latents and of what is decoded from them, which is unpatchified later; None without a tile size.

    Args:
        tile_size, tile_stride: in pixels.
        ratio, patch: pixels of a latent, and of a patch, along a side.
    Raises:
        ValueError: if they do not fit the latent grid.
    """
    if tile_size is None:
        return None
    for name, value in (("tile_size", tile_size), ("tile_stride", tile_stride)):
        if value % ratio:
            raise ValueError(f"{name}: got {value}, expected a multiple of {ratio} pixels")
    return Tiling(tile_size // ratio, tile_stride // ratio, tile_size // patch, tile_stride // patch)


def _blend(before: Tensor, tile: Tensor, dim: int) -> None:
    """Fade from the last rows (or columns) of the neighbour into the first of `tile`, in place."""
    extent = min(before.shape[dim], tile.shape[dim])
    wide = torch.promote_types(tile.dtype, torch.float32)
    ramp = torch.arange(extent, device=tile.device, dtype=wide) / extent
    ramp = ramp.view(-1, 1) if dim == -2 else ramp
    edge = tile.narrow(dim, 0, extent)
    edge.copy_(torch.lerp(before.narrow(dim, before.shape[dim] - extent, extent).to(wide), edge.to(wide), ramp))
