"""Clips with captions as training samples: everything is encoded before training starts, once.

A data set is a directory of video files, also in subdirectories. Captions are lines `{"file_name": ..., "text": ...}`
of `captions.jsonl` or `metadata.jsonl` in it, as in the videofolder format of Hugging Face's datasets, or stand in
`NAME.txt` beside `NAME.mp4`.

Encoded clips stay on disk, a file each, named by the content of clip and caption, in a directory named by the settings
and the model. That directory is itself a data set of the kind "safetensors".
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import torch
from safetensors.torch import save_file
from torch import Tensor

from ...causal_time import total_latent_frames
from ...files import whole_file
from ...optional import optional
from ...video_io import VideoReadError, read_video
from .. import distributed
from ..config import DataSettings
from ..distributed import barrier
from ..progress import duration
from .files import NEGATIVE, SafetensorsSource

SUFFIXES = (".avi", ".m4v", ".mkv", ".mov", ".mp4", ".webm")
CAPTION_FILES = ("captions.jsonl", "metadata.jsonl")
CACHE = ".encoded"
MODEL_PARTS = ("vae/config.json", "text_encoder/config.json", "tokenizer/tokenizer_config.json")
REPORT_SECONDS = 10.0
# sample_neg_prompt of Wan's published inference config.
WAN_NEGATIVE_PROMPT = "\uff0c".join(
    "色调艳丽 过曝 静态 细节模糊不清 字幕 风格 作品 画作 画面 静止 整体发灰 最差质量 低质量 JPEG压缩残留 丑陋的 残缺的 "
    "多余的手指 画得不好的手部 画得不好的脸部 畸形的 毁容的 形态畸形的肢体 手指融合 静止不动的画面 杂乱的背景 三条腿 "
    "背景人很多 倒着走".split()
)


@dataclass(frozen=True)
class Clip:
    """A video file and what is seen in it."""

    path: Path
    caption: str


def open_videos(
    settings: DataSettings, seed: int, device: torch.device | None = None, stream: TextIO | None = None
) -> SafetensorsSource:
    """Encode what is not encoded yet, each process its share, and open it; a collective.

    Latents are (F, C, H, W) fp32, the mean of the VAE's posterior normalised as the released models expect; prompt
    embeddings are zero past the prompt.

    Args:
        device: of the encoders; the CPU if None.
        stream: for progress lines; stderr if None.

    Raises:
        FileNotFoundError: if there is no video, a caption's file is missing, or the model lacks a part.
        ValueError: naming the clip that has no caption, too few frames, or is damaged (then also an OSError).
        ImportError: without diffusers, transformers or PyAV.
    """
    assert settings.path is not None and settings.model is not None
    clips = find_clips(settings.path)
    for clip in clips:
        frame_indices(clip.path, settings.frames, settings.fps)
    model = Path(settings.model)
    absent = [part for part in MODEL_PARTS if not (model / part).is_file()]
    if absent:
        raise FileNotFoundError(f"data.model: {model} lacks {absent}, expected a model directory in diffusers' format")
    directory = Path(settings.cache or Path(settings.path) / CACHE) / _settings_key(settings, model)
    files = [directory / f"{clip.path.stem[:80]}-{_clip_key(clip)}.safetensors" for clip in clips]
    rank, world = distributed.rank(), distributed.world_size()
    own = list(zip(files, clips, strict=True))[rank::world]
    todo = {file: clip for file, clip in own if not file.is_file()}
    negative = directory / NEGATIVE
    if todo or (rank == 0 and not negative.is_file()):
        directory.mkdir(parents=True, exist_ok=True)
        encoders = _Encoders(settings, device or torch.device("cpu"))
        if rank == 0 and not negative.is_file():
            prompt = WAN_NEGATIVE_PROMPT if settings.negative_prompt is None else settings.negative_prompt
            _write({"prompt_embeds": encoders.text(prompt)}, negative)
        _encode(todo, encoders, stream or sys.stderr)
    barrier()
    return SafetensorsSource(directory, seed, files)


def find_clips(path: str | Path) -> list[Clip]:
    """The clips of a data set, by name.

    Raises:
        FileNotFoundError: if there is no video, or none where a caption's `file_name` says.
        ValueError: naming a video without a caption, or a line that is no caption.
    """
    root = Path(path)
    if not root.is_dir():
        raise FileNotFoundError(f"data.path: no directory {root}")
    videos = sorted(file for file in root.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    if not videos:
        raise FileNotFoundError(f"data.path: no video in {root}, expected files ending in {', '.join(SUFFIXES)}")
    captions: dict[Path, str] = {}
    for name in CAPTION_FILES:
        if (root / name).is_file():
            captions |= _captions(root / name)
    clips = []
    for video in videos:
        beside = video.with_suffix(".txt")
        if video not in captions and beside.is_file():
            captions[video] = beside.read_text(encoding="utf-8")
        caption = captions.get(video, "").strip()
        if not caption:
            raise ValueError(
                f"{video}: missing caption: expected a line of {' or '.join(CAPTION_FILES)}, or {beside.name}"
            )
        clips.append(Clip(video, caption))
    return clips


def frame_indices(path: Path, frames: int, fps: float | None) -> list[int]:
    """Which frames of a video make a sample, from its header alone: the first ones, at `fps` frames per second.

    Raises:
        VideoReadError: (an OSError and ValueError) if the file is no video.
        ValueError: if it has too few frames, or fewer per second than asked for.
    """
    av: Any = optional("av", "reading videos", "video")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise VideoReadError(f"{path}: has no video stream")
            video = container.streams.video[0]
            count, rate = video.frames, float(video.average_rate or 0)
    except av.error.FFmpegError as error:
        raise VideoReadError(f"{path}: not a video, truncated or damaged ({error.strerror or error})") from error
    indices = list(range(frames))
    if fps is not None:
        # 30000/1001 and such are not worth refusing: a frame is then taken twice now and then.
        if rate < 0.95 * fps:
            raise ValueError(f"{path}: has {rate:g} frames per second, expected at least data.fps = {fps:g}")
        indices = [int(i * rate / fps + 0.5) for i in indices]
    if 0 < count <= indices[-1]:
        raise ValueError(f"{path}: has {count} frames, expected at least {indices[-1] + 1} for data.frames = {frames}")
    return indices


def read_clip(path: Path, frames: int, size: tuple[int, int], fps: float | None = None) -> Tensor:
    """(frames, 3, H, W) fp32 in [0, 1]: scaled to cover `size` (H, W), its middle cropped.

    Raises:
        VideoReadError, ValueError: naming the file, if it is damaged before the last frame needed, or too short.
    """
    indices = frame_indices(path, frames, fps)
    return read_video(path, indices[-1] + 1, size)[indices]


class _Encoders:
    """The VAE's encoder and the text encoder, for one sample at a time."""

    def __init__(self, settings: DataSettings, device: torch.device) -> None:
        from ...encoders.text import UMT5TextEncoderConfig
        from ...wan_vae.encoder import WanVAEEncoderConfig

        self.settings, self.device = settings, device
        path, length = settings.model, settings.text_length
        self._vae: Any = WanVAEEncoderConfig(path=path, dtype=torch.float32, pixel_range="unit").setup().to(device)
        ratio, block = self._vae.temporal_compression_ratio, self._vae.spatial_compression_ratio
        try:
            total_latent_frames(settings.frames, ratio)
        except ValueError as error:
            raise ValueError(f"data.{error}: whole latent frames") from error
        if settings.height % block or settings.width % block:
            got = f"got {settings.height} x {settings.width}"
            raise ValueError(f"data.height, data.width: {got}, expected multiples of {block}")
        self._text: Any = UMT5TextEncoderConfig(path=path, max_length=length).setup().to(device)

    def text(self, caption: str) -> Tensor:
        """(S, D) in the dtype of the text encoder, on the CPU."""
        return self._text(caption)[0].cpu()

    def video(self, path: Path) -> Tensor:
        """(F, C, H, W) fp32 on the CPU."""
        settings = self.settings
        video = read_clip(path, settings.frames, (settings.height, settings.width), settings.fps)
        return self._vae(video.to(self.device)).cpu()


def _encode(todo: dict[Path, Clip], encoders: _Encoders, stream: TextIO) -> None:
    start = reported = time.monotonic()
    for done, (file, clip) in enumerate(todo.items(), 1):
        tensors = {"latents": encoders.video(clip.path)[None], "prompt_embeds": encoders.text(clip.caption)[None]}
        _write(tensors, file)
        now = time.monotonic()
        if distributed.rank() == 0 and (now - reported > REPORT_SECONDS or done == len(todo)):
            left = duration((now - start) / done * (len(todo) - done))
            print(f"encoded {done}/{len(todo)} clips  {left} left", file=stream, flush=True)
            reported = now


def _write(tensors: dict[str, Tensor], file: Path) -> None:
    with whole_file(file) as partial:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, partial)


def _captions(file: Path) -> dict[Path, str]:
    found: dict[Path, str] = {}
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file}:{number}: got {line!r}, expected JSON with file_name and text") from error
        video = file.parent / name
        if not video.is_file():
            raise FileNotFoundError(f"{file}:{number}: no file {video}")
        found[video] = text if isinstance(text, str) else ""
    return found


def _settings_key(settings: DataSettings, model: Path) -> str:
    """Digest of everything but the clip that an encoded sample depends on."""
    size = [settings.frames, settings.height, settings.width, settings.fps, settings.text_length]
    parts = [json.dumps([*size, settings.negative_prompt]).encode()]
    for folder in ("vae", "text_encoder", "tokenizer"):
        for file in sorted(path for path in (model / folder).rglob("*") if path.is_file()):
            parts += [file.relative_to(model).as_posix().encode(), *_excerpts(file)]
    return _digest(parts)


def _excerpts(file: Path) -> Iterable[bytes]:
    """Size and evenly spread pieces of a file, all of a small one: weights of gigabytes are not read in full."""
    size = file.stat().st_size
    yield str(size).encode()
    with file.open("rb") as stream:
        for offset in range(0, size, max(2**16, size // 64)):
            stream.seek(offset)
            yield stream.read(2**16)


def _clip_key(clip: Clip) -> str:
    content = hashlib.sha256()
    with clip.path.open("rb") as stream:
        while block := stream.read(2**20):
            content.update(block)
    return _digest([content.digest(), clip.caption.encode()])


def _digest(parts: Iterable[bytes]) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(len(part).to_bytes(8, "big") + part)
    return whole.hexdigest()[:16]
