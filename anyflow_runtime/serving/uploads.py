"""Pictures and clips a video is to begin with. A browser sends bytes, which are decoded in memory; never a path.

Only formats that browsers make are read, each by a decoder chosen from the first bytes: formats that name other files
or addresses (playlists), or that run programs, are never tried.
"""

from __future__ import annotations

import io
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from ..video_io import VideoReadError, decoded, fitted, unit
from .errors import RequestError

MAX_PIXELS = 2**25  # of a picture or frame: 8K and a little more
MAX_RATIO = 16  # of the sides: scaling a thin strip to cover a video asks for gigabytes
_PICTURES = ("PNG", "JPEG", "WEBP", "GIF", "BMP")  # as Pillow calls them
_FORMATS = "PNG, JPEG, WebP, GIF or BMP; mp4, mov, webm or mkv"


@dataclass(frozen=True, eq=False)
class Upload:
    """A picture or clip that has been decoded once, so that it can be again.

    Attributes:
        data: the file.
        demuxer: of FFmpeg; None for a picture.
        frames: 1 for a picture, moving ones included; of a clip as many as a video may have at most.
    """

    data: bytes
    demuxer: str | None
    frames: int

    def read(self, count: int, size: tuple[int, int]) -> Tensor:
        """The first frames, (count, 3, H, W) fp32 in [0, 1], scaled to cover `size` and cropped evenly.

        Raises:
            RequestError: if it has fewer.
        """
        pictures = iter([_picture(self.data)]) if self.demuxer is None else _clip(self.data, self.demuxer)
        frames = [fitted(unit(pixels), size) for pixels in islice(pictures, count)]
        if len(frames) < count:
            raise RequestError(f"upload: got {len(frames)} frames, expected {count}")
        return torch.stack(frames)


def check_upload(data: bytes, max_frames: int) -> Upload:
    """Decode what a browser has sent, up to `max_frames` frames.

    Raises:
        RequestError: if it is empty, in another format, too large in pixels, or damaged.
    """
    if not data:
        raise RequestError("upload: got no bytes, expected a picture or a clip")
    demuxer = _demuxer(data)
    if demuxer is None:
        _picture(data)
        return Upload(data, None, 1)
    return Upload(data, demuxer, sum(1 for _ in islice(_clip(data, demuxer), max_frames)))


class UploadStore:
    """Uploads until newer ones take their place, under tokens that cannot be guessed.

    Args:
        keep: how many; a rollout that has begun or waits holds on to its own.
    """

    def __init__(self, keep: int = 8) -> None:
        self._keep = keep
        self._lock = threading.Lock()
        self._uploads: dict[str, Upload] = {}

    def add(self, upload: Upload) -> str:
        """Keep an upload: its token."""
        token = secrets.token_urlsafe(16)
        with self._lock:
            self._uploads[token] = upload
            while len(self._uploads) > self._keep:
                self._uploads.pop(next(iter(self._uploads)))
        return token

    def get(self, token: str) -> Upload | None:
        """The upload of a token, if there is one."""
        with self._lock:
            return self._uploads.get(token)


def _demuxer(data: bytes) -> str | None:
    if data[4:8] in (b"ftyp", b"moov", b"mdat", b"wide"):
        return "mov"
    return "matroska" if data[:4] == b"\x1aE\xdf\xa3" else None


def _picture(data: bytes) -> np.ndarray:
    """(H, W, 3) uint8, upright."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(data), formats=_PICTURES) as image:
            _check_pixels(image.width, image.height)
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except RequestError:
        raise
    except UnidentifiedImageError as error:
        raise RequestError(f"upload: not a picture or clip in a known format, expected {_FORMATS}") from error
    except Exception as error:  # a crafted file makes Pillow raise whatever its parser trips over
        raise RequestError(f"upload: the picture is damaged ({error or type(error).__name__})") from error


def _clip(data: bytes, demuxer: str) -> Iterator[np.ndarray]:
    """(H, W, 3) uint8 frames of the first video stream."""
    try:
        # The format is given: FFmpeg does not look for another one in the bytes.
        yield from decoded(io.BytesIO(data), "upload", demuxer, _check_pixels)
    except RequestError:
        raise
    except VideoReadError as error:
        raise RequestError(str(error)) from error
    except Exception as error:  # PyAV's own slips over a crafted file
        raise RequestError(f"upload: the clip is damaged ({error or type(error).__name__})") from error


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RequestError(f"upload: got {width} x {height} pixels, expected at most {MAX_PIXELS} in a frame")
    if max(width, height) > MAX_RATIO * min(width, height):
        raise RequestError(f"upload: got {width} x {height} pixels, expected sides of at most {MAX_RATIO} to 1")
