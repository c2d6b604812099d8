"""Pictures and videos in and out: `read_image`, `read_video`, and `VideoWriter`, which writes while frames arrive.

Frames are RGB, `(C, H, W)` or `(T, C, H, W)`; floats in [0, 1] unless stated. PyAV and Pillow are imported on first
use (`pip install 'anyflow-kernels[video]'`). Reading and writing are one room: they share formats, colours and errors,
and the writer tests what it has written by reading it.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .optional import optional

_media = partial(optional, purpose="reading and writing media", extra="video")
PIXEL_RANGES = ("unit", "signed")
MAX_CROP = 32  # a picture scaled to cover the video may be so much larger than it
SHEET_TILES = 64  # a contact sheet shows at most this many frames, evenly spaced


class VideoReadError(OSError, ValueError):
    """A file that is no readable picture or video, or is damaged."""


def read_image(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Tensor:
    """Read a picture, upright as its EXIF tag says.

    Args:
        path: any format Pillow reads.
        size: (height, width) to scale to; what sticks out is cropped evenly, so that nothing is distorted.
    Returns:
        (3, H, W) fp32 in [0, 1].
    Raises:
        FileNotFoundError: if there is no such file.
        VideoReadError: (an OSError and ValueError) if it is no readable picture.
    """
    image_module, ops = _media("PIL.Image"), _media("PIL.ImageOps")
    _check_size(size)
    path = _existing(path)
    try:
        with image_module.open(path) as image:
            pixels = np.array(ops.exif_transpose(image).convert("RGB"))
    except (OSError, SyntaxError, ValueError, image_module.DecompressionBombError) as error:
        raise VideoReadError(f"{path}: not a readable picture ({error})") from error
    return fitted(unit(pixels), size)


def read_video(
    path: str | os.PathLike[str], num_frames: int | None = None, size: tuple[int, int] | None = None
) -> Tensor:
    """Read a video, or its beginning.

    Args:
        path: any format FFmpeg reads; of several video streams the first.
        num_frames: how many frames to read; None reads all.
        size: (height, width) to scale to; what sticks out is cropped evenly, so that nothing is distorted.
    Returns:
        (T, 3, H, W) fp32 in [0, 1].
    Raises:
        FileNotFoundError: if there is no such file.
        VideoReadError: (an OSError and ValueError) if it is no video, or is damaged before the last frame asked for;
            it says how many frames could be decoded.
        ValueError: if the video is shorter than `num_frames`.
    """
    _check_size(size)
    if num_frames is not None and num_frames < 1:
        raise ValueError(f"num_frames: got {num_frames}, expected at least 1")
    path = _existing(path)
    frames: list[Tensor] = []
    for pixels in decoded(str(path)):
        frames.append(fitted(unit(pixels), size))
        if len(frames) == num_frames:
            break
    if num_frames is not None and len(frames) < num_frames:
        raise ValueError(f"num_frames: got {num_frames}, expected at most {len(frames)}, the frames of {path}")
    return torch.stack(frames)


def _existing(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if not path.is_file():
        raise VideoReadError(f"{path}: not a file")
    return path


def _check_size(size: Any) -> None:
    if size is not None and (len(size) != 2 or any(not isinstance(side, int) or side < 1 for side in size)):
        raise ValueError(f"size: got {size!r}, expected (height, width) of at least 1 pixel each")


def decoded(
    file: Any, name: str | None = None, demuxer: str | None = None, check: Callable[[int, int], None] | None = None
) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 frames of the first video stream of a path or file object, in messages its path or `name`.

    Only `demuxer` is tried, if given. `check` may refuse width and height, those of the header, then of every frame.

    Raises:
        VideoReadError: (an OSError and ValueError) where it ends early or is damaged.
    """
    av, name, count = _media("av"), name or file, 0
    check = check or (lambda width, height: None)
    try:
        with av.open(file, format=demuxer) as container:
            if not container.streams.video:
                raise VideoReadError(f"{name}: has no video stream")
            stream = container.streams.video[0]
            check(stream.codec_context.width, stream.codec_context.height)
            end = 0
            for packet in container.demux(stream):
                if packet.is_corrupt:
                    raise _damaged(name, count, "a packet is cut short")
                if packet.pts is not None:
                    end = max(end, packet.pts + (packet.duration or 0))
                for frame in packet.decode():
                    check(frame.width, frame.height)
                    # Asked for BT.709 where the stream says so; swscale would otherwise assume BT.601.
                    colorspace = "ITU709" if frame.colorspace == 1 else None
                    yield frame.to_ndarray(format="rgb24", src_colorspace=colorspace)
                    count += 1
            # A file cut between two packets decodes without an error, but ends before its header says.
            if stream.duration and stream.average_rate and stream.time_base:
                missing = ((stream.start_time or 0) + stream.duration - end) * stream.time_base * stream.average_rate
                if missing > 2:
                    raise _damaged(name, count, f"about {round(missing)} frames are missing")
    except av.error.FFmpegError as error:
        raise _damaged(name, count, error.strerror or str(error)) from error
    if count == 0:
        raise _damaged(name, 0, "it is empty")


def _damaged(name: str, count: int, why: str) -> VideoReadError:
    return VideoReadError(f"{name}: not a video, truncated or damaged ({why}); {count} frames were decoded")


def unit(pixels: np.ndarray) -> Tensor:
    """(3, H, W) fp32 in [0, 1] of (H, W, 3) uint8."""
    return torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1).float() / 255


def fitted(image: Tensor, size: tuple[int, int] | None) -> Tensor:
    """Scale a picture (C, H, W) in [0, 1] to cover `size`, (height, width), and crop its middle; None leaves it.

    Raises:
        ValueError: for a strip so thin that covering the size would take gigabytes.
    """
    if size is None or tuple(image.shape[1:]) == size:
        return image.contiguous()
    height, width = image.shape[1:]
    scale = max(size[0] / height, size[1] / width)
    cover = (max(size[0], round(height * scale)), max(size[1], round(width * scale)))
    if cover[0] * cover[1] > MAX_CROP * size[0] * size[1]:
        raise ValueError(
            f"picture: got {height}x{width}, expected sides nearer to {size[0]}x{size[1]}: a {MAX_CROP}th would be seen"
        )
    image = F.interpolate(image[None], size=cover, mode="bicubic", antialias=True, align_corners=False)[0]
    top, left = (cover[0] - size[0]) // 2, (cover[1] - size[1]) // 2
    return image[:, top : top + size[0], left : left + size[1]].clamp(0, 1).contiguous()


class VideoWriter:
    """Writes frames to a file as they come.

    The suffix of `path` chooses the format: `.mp4` (H.264; every second of video is playable as soon as it is
    written), `.gif`, or `.png` for a contact sheet of up to 64 evenly spaced frames. Frames go to
    `<name>.partial.<suffix>` beside it, which takes the final name when the writer closes, so a file under the final
    name is always whole. Leaving a `with` block closes it, by an exception or Ctrl-C too: what was written is kept.

    Args:
        path: of the file; its directory must exist, an old file is replaced.
        fps: frames per second.
        pixel_range: of float frames, "unit" for [0, 1] or "signed" for [-1, 1]; what lies outside is clamped.
        crf: quality of H.264, 0 (lossless) to 51.
        zoom: side of the square that shows a pixel, for videos too small to see.
    Raises:
        ValueError: for an unknown suffix, range, rate, quality or zoom.
        FileNotFoundError: if the directory does not exist.
    """

    def __init__(
        self, path: str | os.PathLike[str], fps: int = 16, *, pixel_range: str = "unit", crf: int = 18, zoom: int = 1
    ) -> None:
        self.path = Path(path)
        suffix = self.path.suffix.lower()
        if suffix not in (".mp4", ".gif", ".png"):
            raise ValueError(f"path: got {str(path)!r}, expected a name ending in .mp4, .gif or .png")
        if pixel_range not in PIXEL_RANGES:
            raise ValueError(f"pixel_range: got {pixel_range!r}, expected one of {PIXEL_RANGES}")
        if fps < 1 or not 0 <= crf <= 51:
            raise ValueError(f"fps, crf: got {fps}, {crf}, expected fps of at least 1 and crf from 0 to 51")
        if zoom < 1:
            raise ValueError(f"zoom: got {zoom}, expected at least 1")
        if not self.path.parent.is_dir():
            raise FileNotFoundError(errno.ENOENT, "no such directory", str(self.path.parent))
        _media("av") if suffix == ".mp4" else _media("PIL.Image")
        self.partial_path = self.path.with_name(f"{self.path.stem}.partial{self.path.suffix}")
        self.fps = fps
        self.frames_written = 0
        self._signed = pixel_range == "signed"
        self._crf, self._zoom = crf, zoom
        self._size: tuple[int, int] | None = None
        self._sink: _Mp4Sink | _GifSink | _SheetSink | None = None
        self._closed = False

    def write(self, frames: Tensor) -> None:
        """Append frames.

        Args:
            frames: (T, 3, H, W) or (3, H, W), float in the range given or uint8, on any device.
        Raises:
            ValueError: for another shape or size than the first frames', odd sides with H.264, or after `close`.
            OSError: if the file cannot be written, for instance on a full disk; it says what was saved and where.
        """
        if self._closed:
            raise ValueError(f"{self.path}: the writer is closed")
        for frame in self._pixels(frames):
            try:
                if self._sink is None:
                    self._sink = self._open()
                self._sink.add(frame)
            except OSError as error:
                raise self._failed(error) from error
            self.frames_written += 1

    def close(self) -> Path | None:
        """Finish the file and give it its name; harmless when already closed.

        Returns:
            The path, or None if no frame was ever written, in which case there is no file.
        Raises:
            OSError: as `write`.
        """
        if self._closed:
            return self.path if self.path.exists() else None
        self._closed = True
        if self._sink is None:
            return None
        try:
            self._sink.close()
            os.replace(self.partial_path, self.path)
        except OSError as error:
            raise self._failed(error) from error
        return self.path

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if error is None:
            self.close()
        else:
            # The error under way matters more than one from closing.
            with contextlib.suppress(OSError):
                self.close()

    def _pixels(self, frames: Tensor) -> np.ndarray:
        """Checked (T, H, W, 3) uint8 frames on the host."""
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames: got {type(frames).__name__}, expected a tensor")
        if frames.ndim not in (3, 4) or frames.shape[-3] != 3 or 0 in frames.shape:
            raise ValueError(f"frames: got {tuple(frames.shape)}, expected shape (T, 3, H, W) or (3, H, W)")
        if frames.dtype != torch.uint8 and not frames.is_floating_point():
            raise TypeError(f"frames: got {frames.dtype}, expected uint8 or a floating-point dtype")
        if self._zoom > 1:
            frames = frames.repeat_interleave(self._zoom, -1).repeat_interleave(self._zoom, -2)
        size = (frames.shape[-2], frames.shape[-1])
        if self._size is not None and size != self._size:
            raise ValueError(f"frames: got {size[0]} x {size[1]}, expected {self._size[0]} x {self._size[1]} as before")
        if self.path.suffix.lower() == ".mp4" and (size[0] % 2 or size[1] % 2):
            raise ValueError(f"frames: got {size[0]} x {size[1]}, expected an even height and width for H.264")
        self._size = size
        frames = frames.detach().reshape(-1, *frames.shape[-3:])
        if frames.dtype != torch.uint8:
            frames = frames.float()
            frames = (frames + 1) * 127.5 if self._signed else frames * 255
            frames = frames.round().clamp(0, 255).to(torch.uint8)
        return frames.permute(0, 2, 3, 1).contiguous().cpu().numpy()

    def _open(self) -> _Mp4Sink | _GifSink | _SheetSink:
        assert self._size is not None
        suffix = self.path.suffix.lower()
        if suffix == ".mp4":
            return _Mp4Sink(self.partial_path, self._size, self.fps, self._crf)
        return _GifSink(self.partial_path, self.fps) if suffix == ".gif" else _SheetSink(self.partial_path)

    def _failed(self, error: OSError) -> OSError:
        """Close what there is and describe what is left of the file."""
        if not self._closed and self._sink is not None:
            with contextlib.suppress(OSError):
                self._sink.close()
        self._closed = True
        readable = 0
        if self.path.suffix.lower() == ".mp4" and self.partial_path.exists():
            with contextlib.suppress(VideoReadError):
                for _ in decoded(str(self.partial_path)):
                    readable += 1
        saved = f"the first {readable} can be played from {self.partial_path}" if readable else "none could be saved"
        why = error.strerror or str(error)
        return OSError(
            error.errno or errno.EIO, f"{self.path}: {why}; of {self.frames_written} frames written, {saved}"
        )


class _Mp4Sink:
    """H.264 in a fragmented mp4: each fragment, a second of video, is whole on disk; `close` makes a plain mp4."""

    def __init__(self, path: Path, size: tuple[int, int], fps: int, crf: int) -> None:
        self._av = _media("av")
        self._path = path
        self._fps = fps
        self._count = 0
        options = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}
        self._container = self._av.open(str(path), "w", format="mp4", options=options)
        try:
            # A short lookahead, so that frames do not wait long in the encoder.
            options = {"crf": str(crf), "preset": "medium", "g": str(fps), "x264-params": f"rc-lookahead={fps}"}
            self._stream = self._container.add_stream("libx264", rate=fps, options=options)
        except ValueError as error:
            self._container.close()
            raise OSError(errno.ENOSYS, "this build of PyAV has no H.264 encoder (libx264)") from error
        self._stream.height, self._stream.width = size
        self._stream.pix_fmt = "yuv420p"
        # BT.709, and said so: without the tags players guess by the size of the picture.
        for tag in ("colorspace", "color_primaries", "color_trc"):
            setattr(self._stream.codec_context, tag, 1)

    def add(self, frame: np.ndarray) -> None:
        picture = self._av.VideoFrame.from_ndarray(frame, format="rgb24")
        picture = picture.reformat(format="yuv420p", dst_colorspace="ITU709")
        picture.pts, picture.time_base = self._count, Fraction(1, self._fps)
        self._count += 1
        self._container.mux(self._stream.encode(picture))

    def close(self) -> None:
        try:
            self._container.mux(self._stream.encode(None))
        finally:
            self._container.close()
        # A plain mp4 seeks faster and is read by more players; if there is no room for it, the fragments stay.
        plain = self._path.with_name(self._path.name + ".tmp")
        try:
            with self._av.open(str(self._path)) as source:
                options = {"movflags": "faststart"}
                with self._av.open(str(plain), "w", format="mp4", options=options) as target:
                    track = source.streams.video[0]
                    copy = target.add_stream_from_template(track)
                    for packet in source.demux(track):
                        if packet.dts is not None:
                            packet.stream = copy
                            target.mux(packet)
            os.replace(plain, self._path)
        except OSError:
            plain.unlink(missing_ok=True)


class _GifSink:
    """Animated GIF: frames wait as palette images, one byte a pixel, since the format is written in one go."""

    def __init__(self, path: Path, fps: int) -> None:
        self._image = _media("PIL.Image")
        self._path = path
        # The format counts in hundredths of a second, and players slow down below two of them.
        self._milliseconds = max(20, 10 * round(100 / fps))
        self._frames: list[Any] = []

    def add(self, frame: np.ndarray) -> None:
        self._frames.append(self._image.fromarray(frame).quantize())

    def close(self) -> None:
        first, *rest = self._frames
        first.save(
            self._path, format="GIF", save_all=True, append_images=rest, duration=self._milliseconds, loop=0, disposal=1
        )


class _SheetSink:
    """Contact sheet of evenly spaced frames; of a long video every 2nd, 4th, 8th... is kept, so memory is bounded."""

    def __init__(self, path: Path) -> None:
        self._image = _media("PIL.Image")
        self._path = path
        self._tiles: list[np.ndarray] = []
        self._every = 1
        self._seen = 0

    def add(self, frame: np.ndarray) -> None:
        if self._seen % self._every == 0 and len(self._tiles) == SHEET_TILES:
            self._tiles, self._every = self._tiles[::2], 2 * self._every
        if self._seen % self._every == 0:
            self._tiles.append(frame)
        self._seen += 1

    def close(self) -> None:
        height, width, _ = self._tiles[0].shape
        columns = int(np.ceil(np.sqrt(len(self._tiles))))
        rows = -(-len(self._tiles) // columns)
        sheet = np.zeros((rows * height, columns * width, 3), dtype=np.uint8)
        for i, tile in enumerate(self._tiles):
            row, column = divmod(i, columns)
            sheet[row * height : (row + 1) * height, column * width : (column + 1) * width] = tile
        self._image.fromarray(sheet).save(self._path, format="PNG")
