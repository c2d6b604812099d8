"""FAR token sequences and who attends to whom, from integers alone.

A FAR video is a list of chunks. Older chunks are *compressed* context (large patches), recent ones are *full*
resolution, and training may add a *clean* copy of the full ones. `FarLayout` says where each of these segments stands
in the token sequence; `AttentionPlan` keeps only what an attention kernel needs: for every run of queries, at most
three contiguous key ranges. Neither imports torch.

Source: FAR (arXiv 2503.19325) and AnyFlow (arXiv 2605.13724); the masks of diffusers' `AnyFlowFARTransformer3DModel`.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path

KeyRanges = tuple[tuple[int, int], ...]
MODES = ("train", "prefill", "inference")


@dataclass(frozen=True)
class Segment:
    """One chunk at one resolution: `frames * tokens_per_frame` consecutive tokens of the key sequence."""

    kind: str  # "compressed" | "full" | "clean"
    chunk: int
    first_frame: int  # absolute index in the video
    frames: int
    rows: int  # token grid of one frame
    columns: int
    offset: int  # first token, in key order
    cached: bool  # its keys are in the cache already: no queries

    @property
    def tokens_per_frame(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.frames * self.tokens_per_frame

    @property
    def end(self) -> int:
        return self.offset + self.tokens


@dataclass(frozen=True)
class FarLayout:
    """A FAR token sequence: segments, key ranges, modulation rows and cache positions.

    Args:
        chunk_partition: latent frames per chunk, oldest first; each at least 1.
        height, width: latent size; what fills no whole patch is dropped, as a strided Conv3d does.
        patch_size, compressed_patch_size: `(1, rows, columns)` of a full and of a compressed token.
        full_chunk_limit: chunks at full resolution, the one being generated included.
        mode: which chunks are full (n chunks in all):
            "train": the last min(n, limit); every token is a query.
            "prefill": the last min(n, limit - 1); every token that is not cached is a query.
            "inference": the last min(n, limit); only the newest chunk is a query, all others are cached.
        clean: append a clean copy of the full chunks ("train" only).
        cached: leading chunks whose keys and values are in the cache already ("prefill" only).

    Raises:
        ValueError: naming the argument, on any other value.
    """

    chunk_partition: tuple[int, ...]
    height: int
    width: int
    patch_size: tuple[int, int, int] = (1, 2, 2)
    compressed_patch_size: tuple[int, int, int] = (1, 4, 4)
    full_chunk_limit: int = 3
    mode: str = "train"
    clean: bool = False
    cached: int = 0

    def __post_init__(self) -> None:
        for name in ("chunk_partition", "patch_size", "compressed_patch_size"):
            object.__setattr__(self, name, tuple(_integer(name, n) for n in getattr(self, name)))
        for name in ("height", "width", "full_chunk_limit", "cached"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        if not self.chunk_partition or min(self.chunk_partition) < 1:
            raise ValueError(f"chunk_partition: got {self.chunk_partition}, expected at least one chunk of >= 1 frames")
        for name in ("height", "width", "full_chunk_limit"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}, expected >= 1")
        for name in ("patch_size", "compressed_patch_size"):
            patch = getattr(self, name)
            if len(patch) != 3 or patch[0] != 1 or min(patch) < 1:
                raise ValueError(f"{name}: got {patch}, expected (1, rows, columns): a chunk may hold a single frame")
        if self.mode not in MODES:
            raise ValueError(f"mode: got {self.mode!r}, expected one of {MODES}")
        if self.clean and self.mode != "train":
            raise ValueError(f"clean: got True with mode={self.mode!r}, expected mode='train'")
        if self.cached and self.mode != "prefill":
            raise ValueError(f"cached: got {self.cached} with mode={self.mode!r}, expected 0 outside mode='prefill'")
        if not 0 <= self.cached < len(self.chunk_partition):
            raise ValueError(f"cached: got {self.cached}, expected 0 <= cached < {len(self.chunk_partition)} chunks")

    @property
    def num_chunks(self) -> int:
        return len(self.chunk_partition)

    @property
    def num_compressed_chunks(self) -> int:
        limit = self.full_chunk_limit - (self.mode == "prefill")
        return max(0, self.num_chunks - limit)

    @property
    def num_compressed_frames(self) -> int:
        return sum(self.chunk_partition[: self.num_compressed_chunks])

    @property
    def num_full_frames(self) -> int:
        return sum(self.chunk_partition[self.num_compressed_chunks :])

    @property
    def full_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a full frame."""
        return self.height // self.patch_size[1], self.width // self.patch_size[2]

    @property
    def compressed_grid(self) -> tuple[int, int]:
        """Rows and columns of tokens in a compressed frame."""
        return self.height // self.compressed_patch_size[1], self.width // self.compressed_patch_size[2]

    @cached_property
    def segments(self) -> tuple[Segment, ...]:
        """All segments in key order: compressed chunks, full chunks, clean copies."""
        chunks = range(self.num_chunks)
        kinds = ["compressed" if i < self.num_compressed_chunks else "full" for i in chunks]
        order = list(zip(kinds, chunks, strict=True))
        if self.clean:
            order += [("clean", i) for i in chunks if kinds[i] == "full"]
        num_cached = self.num_chunks - 1 if self.mode == "inference" else self.cached
        segments: list[Segment] = []
        offset = 0
        for kind, chunk in order:
            rows, columns = self.compressed_grid if kind == "compressed" else self.full_grid
            frames, first = self.chunk_partition[chunk], sum(self.chunk_partition[:chunk])
            segments.append(Segment(kind, chunk, first, frames, rows, columns, offset, cached=chunk < num_cached))
            offset += frames * rows * columns
        return tuple(segments)

    @cached_property
    def query_segments(self) -> tuple[Segment, ...]:
        """The segments that are computed: a tail of `segments`."""
        return tuple(s for s in self.segments if not s.cached)

    @property
    def num_key_tokens(self) -> int:
        full = self.num_full_frames * self.full_grid[0] * self.full_grid[1]
        return self.num_compressed_frames * self.compressed_grid[0] * self.compressed_grid[1] + full * (1 + self.clean)

    @property
    def num_query_tokens(self) -> int:
        return self.num_key_tokens - self.cache_offset

    @property
    def cache_offset(self) -> int:
        """Key position of the first query, where its keys and values land in the cache: query i is key offset + i."""
        return self.query_segments[0].offset

    @cached_property
    def frame_map(self) -> tuple[tuple[int, int], ...]:
        """Runs `(frames, tokens_per_frame)` of the queries in token order; frame f takes modulation row f."""
        runs = groupby(self.query_segments, key=lambda s: s.tokens_per_frame)
        return tuple((sum(s.frames for s in run), tokens) for tokens, run in runs)

    @cached_property
    def key_ranges(self) -> tuple[tuple[int, int, KeyRanges], ...]:
        """Per query segment `(q_start, q_end, ((k_start, k_end), ...))`: 1 to 3 ascending ranges that do not touch.

        Compressed chunk i sees compressed chunks <= i. Without a clean copy full chunk j sees all compressed and full
        chunks <= j. With one, noisy chunk j sees all compressed chunks, itself, and clean chunks < j; clean chunk j
        sees all compressed chunks and clean chunks <= j. Left out: segments without tokens (frames under a patch).
        """
        compressed = [s for s in self.segments if s.kind == "compressed"]
        clean = [s for s in self.segments if s.kind == "clean"]
        context = (0, compressed[-1].end if compressed else 0)
        result = []
        for segment in self.query_segments:
            if segment.kind == "clean":
                visible = [context, (clean[0].offset, segment.end)]
            elif segment.kind == "full" and clean:
                earlier_clean = clean[segment.chunk - clean[0].chunk].offset
                visible = [context, (segment.offset, segment.end), (clean[0].offset, earlier_clean)]
            else:
                visible = [(0, segment.end)]
            if segment.tokens:
                start = segment.offset - self.cache_offset
                result.append((start, start + segment.tokens, _merge(visible)))
        return tuple(result)

    def __str__(self) -> str:
        cached = f", {self.cached} cached" if self.cached else ""
        lines = [
            f"FarLayout {self.mode}{' + clean' if self.clean else ''}: chunks {list(self.chunk_partition)}{cached}, "
            f"latent {self.height}x{self.width}, limit {self.full_chunk_limit}, "
            f"{self.num_query_tokens} queries, {self.num_key_tokens} keys",
            f"{'segment':<12}{'chunk':>6}{'frames':>10}{'tok/frame':>11}{'keys':>16}  sees keys",
        ]
        ranges = {q_start + self.cache_offset: keys for q_start, _, keys in self.key_ranges}
        for s in self.segments:
            frames = f"{s.first_frame}-{s.first_frame + s.frames - 1}"
            sees = "(cached)" if s.cached else " ".join(f"{a}-{b}" for a, b in ranges.get(s.offset, ()) if s.tokens)
            lines.append(
                f"{s.kind:<12}{s.chunk:>6}{frames:>10}{s.tokens_per_frame:>11}{f'{s.offset}-{s.end}':>16}  {sees}"
            )
        return "\n".join(lines)

    def draw(self, path: str | Path, size: int = 768) -> None:
        """Write the attention mask as a PNG: queries down, keys across, one colour per kind of key. Needs pillow."""
        from PIL import Image, ImageDraw

        colours = {"compressed": (70, 120, 190), "full": (225, 145, 50), "clean": (95, 165, 95)}
        columns = max(1, size)
        scale = columns / max(1, self.num_key_tokens)
        rows = max(1, round(self.num_query_tokens * scale))
        image = Image.new("RGB", (columns, rows), (245, 245, 245))
        canvas = ImageDraw.Draw(image)

        def box(k: tuple[int, int], q: tuple[int, int]) -> tuple[int, int, int, int]:
            left, top = round(k[0] * scale), round(q[0] * scale)
            return left, top, max(left, round(k[1] * scale) - 1), max(top, round(q[1] * scale) - 1)

        for q_start, q_end, keys in self.key_ranges:
            for k_start, k_end in keys:
                for s in self.segments:
                    seen = (max(k_start, s.offset), min(k_end, s.end))
                    if seen[0] < seen[1]:
                        canvas.rectangle(box(seen, (q_start, q_end)), fill=colours[s.kind])
        for s in self.segments:
            x = round(s.offset * scale)
            canvas.line((x, 0, x, rows), fill=(120, 120, 120))
            if not s.cached:
                y = round((s.offset - self.cache_offset) * scale)
                canvas.line((0, y, columns, y), fill=(120, 120, 120))
        image.save(path, format="PNG")


@dataclass(frozen=True)
class AttentionPlan:
    """Which keys each query sees, as key ranges per run of queries: all that an attention kernel has to know.

    Args:
        num_queries, num_keys: lengths of the sequences the plan is for.
        ranges: `(q_start, q_end, ((k_start, k_end), ...))`, covering all queries in order; per run at most three key
            ranges, ascending and disjoint, at least one key in all.
        phantom_keys: zero keys with zero values in every softmax: they add `phantom_keys * exp(0)` to the denominator.
            diffusers' FAR inference has them: it does not mask its padding, a defect. 0 is the correct softmax.

    Raises:
        ValueError: if the runs do not tile the queries or a range leaves the keys.
    """

    num_queries: int
    num_keys: int
    ranges: tuple[tuple[int, int, KeyRanges], ...]
    phantom_keys: int = 0

    MAX_RANGES = 3

    def __post_init__(self) -> None:
        if self.phantom_keys < 0:
            raise ValueError(f"phantom_keys: got {self.phantom_keys}, expected >= 0")
        expected = 0
        for q_start, q_end, keys in self.ranges:
            if q_start != expected or q_end <= q_start:
                raise ValueError(f"ranges: got queries {q_start}-{q_end}, expected a run that starts at {expected}")
            if not 1 <= len(keys) <= self.MAX_RANGES:
                raise ValueError(f"ranges: got {len(keys)} key ranges for queries {q_start}-{q_end}, expected 1 to 3")
            last = 0
            for k_start, k_end in keys:
                if k_start < last or k_end <= k_start or k_end > self.num_keys:
                    raise ValueError(
                        f"ranges: got keys {k_start}-{k_end} for queries {q_start}-{q_end}, expected ascending "
                        f"non-empty ranges within 0-{self.num_keys}"
                    )
                last = k_end
            expected = q_end
        if expected != self.num_queries:
            raise ValueError(f"ranges: got runs for {expected} queries, expected num_queries={self.num_queries}")

    @classmethod
    def from_layout(cls, layout: FarLayout, phantom_keys: int = 0) -> AttentionPlan:
        """The plan of a FAR sequence."""
        return cls(layout.num_query_tokens, layout.num_key_tokens, layout.key_ranges, phantom_keys)

    @classmethod
    def dense(cls, num_queries: int, num_keys: int, phantom_keys: int = 0) -> AttentionPlan:
        """Every query sees every key."""
        return cls(num_queries, num_keys, ((0, num_queries, ((0, num_keys),)),), phantom_keys)

    @property
    def num_pairs(self) -> int:
        """Visible (query, key) pairs: the work of attention is 4 * num_pairs * head_dim FLOPs per head."""
        return sum((q_end - q_start) * sum(b - a for a, b in keys) for q_start, q_end, keys in self.ranges)

    def __str__(self) -> str:
        share = self.num_pairs / max(1, self.num_queries * self.num_keys)
        lines = [f"AttentionPlan: {self.num_queries} queries, {self.num_keys} keys, {share:.1%} of the pairs visible"]
        for q_start, q_end, keys in self.ranges:
            lines.append(f"  queries {q_start}-{q_end}: keys " + ", ".join(f"{a}-{b}" for a, b in keys))
        if self.phantom_keys:
            lines.append(f"  plus {self.phantom_keys} phantom zero keys in every denominator")
        return "\n".join(lines)


def _integer(name: str, value: object) -> int:
    try:
        return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        raise TypeError(f"{name}: got {value!r}, expected an integer") from None


def _merge(ranges: list[tuple[int, int]]) -> KeyRanges:
    """Ascending ranges with empty ones dropped and adjacent ones joined."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if start == end:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return tuple(merged)
