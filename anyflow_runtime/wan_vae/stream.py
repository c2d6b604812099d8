"""What both halves of the Wan VAE share: their settings, and chunks in passes, whole or by tiles, with a history."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..causal_time import StreamOrderError
from ..config import InstantiateConfig
from .tiles import History, Tiling


@dataclass(frozen=True, kw_only=True)
class WanVAEConfig(InstantiateConfig):
    """Settings of the encoder and of the decoder.

    Args:
        path: diffusers directory or hub id to load from; None if the VAE is given to `setup(vae=...)`.
        subfolder: of `path`, where the VAE lies.
        dtype: of weights and results; None keeps that of the VAE. The layers' norms are fp32 inside in any case.
        latent_frames_per_pass: longer chunks take several passes. One latent frame at a time takes the least memory,
            has the same shapes whatever the chunk, and was the fastest to decode on a CPU (`bench/vae_decode.py`);
            more fill a large GPU better at small sizes.
        tile_size: side in pixels of the spatial tiles that larger frames are cut into; None takes them whole.
            Tiles save memory and change the result slightly, as the attention sees one tile at a time.
        tile_stride: distance in pixels between tiles; what overlaps is blended.
    Raises:
        ValueError: at construction, for a count below one or a stride beyond the tile.
    """

    path: str | None = None
    subfolder: str | None = "vae"
    dtype: torch.dtype | None = None
    latent_frames_per_pass: int = 1
    tile_size: int | None = None
    tile_stride: int = 192

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_frames_per_pass < 1:
            raise ValueError(f"latent_frames_per_pass: got {self.latent_frames_per_pass}, expected at least 1")
        if self.tile_size is not None and not 0 < self.tile_stride <= self.tile_size:
            raise ValueError(f"tile_stride: got {self.tile_stride}, expected 1 to tile_size = {self.tile_size}")


@dataclass
class WanVAECache:
    """The causal history of one rollout: two frames before every convolution, whatever the length of the video.

    It is replaced as a whole once a chunk is done, and its tensors are never written into; a copy of this object
    (`copy.copy`) is therefore a branch of the rollout.
    """

    history: tuple[tuple[Tensor, ...], ...] | None = None  # one per tile
    chunk_shape: tuple[int, ...] | None = None  # (B, C, height, width) of every chunk of this rollout
    autoregressive_index: int = -1  # of the last chunk

    @property
    def nbytes(self) -> int:
        """Bytes held by the history."""
        return sum(tensor.nbytes for tile in self.history or () for tensor in tile)


class WanVAEHalf:
    """An encoder or decoder that works through a chunk in passes."""

    config: Any
    _tiles: Tiling | None
    _pass: Callable[[Tensor, History | None, bool], tuple[Tensor, History]]

    def _measure(self, vae: Any) -> None:
        self._patch: int = vae.config.patch_size or 1
        self._spatial_ratio: int = 2 ** (len(vae.config.dim_mult) - 1) * self._patch
        self._temporal_ratio: int = 2 ** sum(vae.config.temperal_downsample)

    @property
    def spatial_compression_ratio(self) -> int:
        return self._spatial_ratio

    @property
    def temporal_compression_ratio(self) -> int:
        return self._temporal_ratio

    def _passes(
        self, chunk: Tensor, parts: Iterable[Tensor], index: int, cache: WanVAECache | None
    ) -> Iterator[Tensor]:
        """What is made of each part of a chunk (B, C, T, height, width); the cache moves on after the last.

        Raises:
            ValueError: if the chunk has another shape than the rollout's earlier ones.
            StreamOrderError: if the index does not follow the last one in `cache`.
        """
        shape = tuple(chunk.shape[:2] + chunk.shape[3:])
        if cache is not None:
            following = cache.autoregressive_index + 1
            if index != following:
                raise StreamOrderError(f"autoregressive_index: got {index}, expected {following} for this cache")
            if cache.chunk_shape not in (None, shape):
                raise ValueError(
                    f"input: got (B, C, height, width) = {shape}, expected {cache.chunk_shape}, that of this rollout"
                )
        # Lists that the passes empty: only the tensors of the last chunk, in the cache, outlive their use.
        past = None if cache is None else cache.history
        history = None if past is None else [list(tile) for tile in past]
        first = index == 0
        for part in parts:
            if self._tiles is not None and not self._tiles.covers(*part.shape[-2:]):
                out, history = self._tiles.run(self._pass, part, history, first)
            else:
                out, tile = self._pass(part, None if history is None else history[0], first)
                history = [tile]
            yield out
            first = False
        if cache is not None:
            cache.history, cache.chunk_shape = tuple(map(tuple, history or ())), shape
            cache.autoregressive_index = index
