"""Keys and values of a fixed-chunk autoregressive network: the first tokens of the video and its latest ones.

The slab is `[sink | window]`. While it fills, chunks are appended; then every new chunk pushes the oldest one out of
the window and the sink stays. One chunk:

    cache.before_update(i)                 # make room, once
    cache.update(k, v)                     # every denoising step writes the chunk's keys and values anew
    cache.cached_k(), cache.cached_v()     # everything visible, the chunk included: no mask, no copy
    cache.after_update(i)                  # commit

Source: the KV cache of the streaming Wan integrations; attention sinks, arXiv 2309.17453.
"""

from __future__ import annotations

import torch
from torch import Tensor

from anyflow_kernels.formulas import rotate

from ..errors import LifecycleError


class RollingKVCache:
    """Rolling keys and values of one attention layer.

    Args:
        batch_size, num_heads, head_dim: of the keys, (B, T, H, d).
        sink, window: tokens kept from the start and from the end; the window holds the newest chunk.
        chunk: tokens per chunk, the same for all; divides sink + window.
        device, dtype: of the slab.
        rope: (cos, sin), each (sink + window, d/2): keys come unrotated, and are rotated by their slot on every read,
            so positions never leave the table. Queries of the newest chunk then take the rows `slots`. None: keys come
            rotated, by absolute positions, and reads are views.

    Raises:
        ValueError: on sizes that do not fit.
    """

    def __init__(
        self,
        batch_size: int,
        num_heads: int,
        head_dim: int,
        *,
        sink: int,
        window: int,
        chunk: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        rope: tuple[Tensor, Tensor] | None = None,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("num_heads", num_heads), ("head_dim", head_dim)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, expected >= 1")
        if sink < 0 or chunk < 1 or window < chunk or (sink + window) % chunk:
            raise ValueError(
                f"sink, window, chunk: got {sink}, {window}, {chunk}, expected sink >= 0, window >= chunk >= 1 and "
                "sink + window a multiple of chunk"
            )
        self.sink, self.window, self.chunk = sink, window, chunk
        self._k, self._v = torch.empty(
            2, batch_size, sink + window, num_heads, head_dim, device=device, dtype=dtype
        ).unbind(0)
        if rope is not None and any(tuple(table.shape) != (sink + window, head_dim // 2) for table in rope):
            shapes = [tuple(table.shape) for table in rope]
            raise ValueError(
                f"rope: got tables {shapes}, expected (sink + window, d/2) = {(sink + window, head_dim // 2)}"
            )
        self._rope = rope
        self.reset()

    def reset(self) -> None:
        """Empty the cache for a new rollout; an update that was under way is dropped."""
        self._index: int | None = None  # of the chunk in the last slot
        self._end = 0
        self._open = self._written = False

    @property
    def capacity(self) -> int:
        """Tokens the slab holds."""
        return self.sink + self.window

    @property
    def is_full(self) -> bool:
        """Whether the shape of what is read has stopped growing: from here on a graph may be captured."""
        return self._end == self.capacity

    @property
    def slots(self) -> slice:
        """Rows of the newest chunk in the slab."""
        return slice(self._end - self.chunk, self._end)

    @property
    def nbytes(self) -> int:
        """Memory of the slab."""
        return self._k.nbytes + self._v.nbytes

    def before_update(self, autoregressive_index: int) -> None:
        """Open a chunk for writing: the next one, or once more the latest.

        Raises:
            LifecycleError: (also an AssertionError) for any other index, or if the latest chunk was never committed.
        """
        expected = 0 if self._index is None else self._index + 1
        if autoregressive_index == self._index:
            self._open = True
            return
        if autoregressive_index != expected:
            allowed = f"{expected}" if self._index is None else f"{self._index} or {expected}"
            raise LifecycleError(f"autoregressive_index: got {autoregressive_index}, expected {allowed}")
        if self._open:
            raise LifecycleError(
                f"autoregressive_index: got {autoregressive_index}, but {self._index} is not committed"
            )
        if self.is_full:
            self._roll()
        else:
            self._end += self.chunk
        self._index, self._open, self._written = autoregressive_index, True, False

    def update(self, k: Tensor, v: Tensor) -> None:
        """Write the open chunk's keys and values, (B, chunk, H, d) each; may be repeated.

        Raises:
            LifecycleError: if no chunk is open.
            ValueError: on another shape.
        """
        self._expect_open("update")
        expected = (self._k.shape[0], self.chunk, *self._k.shape[2:])
        for name, x in (("k", k), ("v", v)):
            if tuple(x.shape) != expected:
                raise ValueError(f"{name}: got {tuple(x.shape)}, expected (B, chunk, H, d) = {expected}")
        self._k[:, self.slots], self._v[:, self.slots] = k, v
        self._written = True

    def cached_k(self) -> Tensor:
        """(B, T, H, d) keys of everything visible: a view, or with `rope` a rotated copy.

        Raises:
            LifecycleError: outside an update, or before the open chunk is written.
        """
        self._expect_written()
        k = self._k[:, : self._end]
        if self._rope is None:
            return k
        cos, sin = (table[: self._end] for table in self._rope)
        return rotate(k, (cos, sin))

    def cached_v(self) -> Tensor:
        """(B, T, H, d) values of everything visible, a view. Raises as `cached_k`."""
        self._expect_written()
        return self._v[:, : self._end]

    def after_update(self, autoregressive_index: int) -> None:
        """Commit the open chunk.

        Raises:
            LifecycleError: if that chunk is not open, or was not written.
        """
        self._expect_written()
        if autoregressive_index != self._index:
            raise LifecycleError(f"autoregressive_index: got {autoregressive_index}, expected {self._index}")
        self._open = False

    def _roll(self) -> None:
        """Move the window left by a chunk; block by block, as source and destination overlap."""
        for start in range(self.sink, self.capacity - self.chunk, self.chunk):
            stop = min(start + self.chunk, self.capacity - self.chunk)
            for slab in (self._k, self._v):
                slab[:, start:stop] = slab[:, start + self.chunk : stop + self.chunk]

    def _expect_open(self, what: str) -> None:
        if not self._open:
            raise LifecycleError(f"{what}: no chunk is open, call before_update first")

    def _expect_written(self) -> None:
        self._expect_open("read")
        if not self._written:
            raise LifecycleError(f"read: chunk {self._index} is not written yet, call update first")
