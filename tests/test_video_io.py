"""Reading and writing pictures and videos, and what happens to them when something goes wrong."""

from __future__ import annotations

import importlib
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from anyflow_runtime import video_io
from anyflow_runtime.video_io import VideoReadError, VideoWriter, fitted, read_image, read_video

pytest.importorskip("av")
Image = pytest.importorskip("PIL.Image")

DATA = Path(__file__).parent / "data"
CLIP, PICTURE = DATA / "clip.mp4", DATA / "picture.jpg"


def smooth_video(frames=20, height=48, width=64):
    """Slow colour gradients, which H.264 keeps within a few grey levels."""
    t = torch.linspace(0, 1, frames).view(-1, 1, 1)
    y, x = torch.linspace(0, 1, height).view(1, -1, 1), torch.linspace(0, 1, width).view(1, 1, -1)
    ones = torch.ones(frames, height, width)
    return torch.stack([(x + 0 * y + 0 * t) * ones, (y * (1 - t / 2)) * ones, t * ones], dim=1)


def test_reads_a_real_clip():
    video = read_video(CLIP)
    assert video.shape == (33, 3, 90, 160) and video.dtype == torch.float32
    assert 0 <= video.min() < 0.2 and 0.8 < video.max() <= 1


def test_reads_the_beginning_and_fits_the_size():
    video = read_video(CLIP, num_frames=5, size=(48, 48))
    assert video.shape == (5, 3, 48, 48)
    assert video.min() >= 0 and video.max() <= 1


def test_fitting_crops_the_middle_instead_of_distorting(tmp_path):
    """A disc must stay round: stretching 2:1 to 1:1 would halve its width."""
    y, x = torch.meshgrid(torch.arange(64), torch.arange(128), indexing="ij")
    disc = ((y - 32) ** 2 + (x - 64) ** 2 < 20**2).to(torch.uint8) * 255
    Image.fromarray(disc.numpy()).convert("RGB").save(tmp_path / "disc.png")
    fitted = read_image(tmp_path / "disc.png", size=(32, 32))[0] > 0.5
    assert abs(int(fitted.any(0).sum()) - int(fitted.any(1).sum())) <= 1 and fitted[16, 16]


def test_a_thin_strip_is_refused_before_it_takes_gigabytes():
    with pytest.raises(ValueError, match=r"picture: got 2x4000, expected sides nearer to 480x832"):
        fitted(torch.zeros(3, 2, 4000), (480, 832))


def test_reads_a_picture_upright(tmp_path):
    image = read_image(PICTURE)
    assert image.shape == (3, 184, 320)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    with Image.open(PICTURE) as picture:
        picture.save(tmp_path / "turned.jpg", exif=exif)
    assert read_image(tmp_path / "turned.jpg").shape == (3, 320, 184)


def test_asking_for_more_frames_than_there_are_says_how_many():
    with pytest.raises(ValueError, match=r"got 81, expected at most 33, the frames of .*clip\.mp4"):
        read_video(CLIP, num_frames=81)


@pytest.mark.parametrize("read", [read_video, read_image])
def test_missing_file_and_directory(read, tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read(tmp_path / "nothing.mp4")
    with pytest.raises(VideoReadError, match="not a file"):
        read(tmp_path)


@pytest.mark.parametrize("read", [read_video, read_image])
def test_garbage_is_no_video_and_no_picture(read, tmp_path):
    (tmp_path / "x.mp4").write_bytes(b"hello, world" * 50)
    for kind in (OSError, ValueError):
        with pytest.raises(kind, match=r"x\.mp4: not a"):
            read(tmp_path / "x.mp4")


def test_truncated_picture_is_refused(tmp_path):
    (tmp_path / "cut.jpg").write_bytes(PICTURE.read_bytes()[:4000])
    with pytest.raises(VideoReadError, match="not a readable picture"):
        read_image(tmp_path / "cut.jpg")


def test_truncated_video_says_how_many_frames_were_decoded(tmp_path):
    data = CLIP.read_bytes()
    (tmp_path / "cut.mp4").write_bytes(data[: len(data) * 6 // 10])
    with pytest.raises(VideoReadError, match=r"truncated or damaged .*; (\d+) frames were decoded") as error:
        read_video(tmp_path / "cut.mp4")
    count = int(str(error.value).split("; ")[1].split()[0])
    assert 5 < count < 33
    # What comes before the damage can still be read.
    assert len(read_video(tmp_path / "cut.mp4", num_frames=count - 1)) == count - 1


def test_video_cut_between_two_packets_is_noticed(tmp_path):
    """Such a file decodes without any error of FFmpeg; only its header tells that frames are missing."""
    import av

    with av.open(str(CLIP)) as container:
        ends = sorted((p.pos or 0) + p.size for p in container.demux(video=0) if p.size)
    (tmp_path / "cut.mp4").write_bytes(CLIP.read_bytes()[: ends[15]])
    with pytest.raises(VideoReadError, match=r"frames are missing\); \d+ frames were decoded"):
        read_video(tmp_path / "cut.mp4")


def test_sound_is_no_video(tmp_path):
    import av

    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype=np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(VideoReadError, match="has no video stream"):
        read_video(tmp_path / "sound.mp4")


@pytest.mark.parametrize("size", [(0, 4), (4,), (4.0, 4)])
def test_bad_size_is_named(size):
    with pytest.raises(ValueError, match=r"size: got .*, expected"):
        read_video(CLIP, size=size)


def test_mp4_comes_back_with_its_colours(tmp_path):
    """Untagged or wrongly converted colours would be off by 10 grey levels and more."""
    video = smooth_video()
    with VideoWriter(tmp_path / "a.mp4") as writer:
        for chunk in video.split(7):
            writer.write(chunk)
    back = read_video(tmp_path / "a.mp4")
    assert back.shape == video.shape
    assert (back - video).abs().mean() < 0.01
    assert [p.name for p in tmp_path.iterdir()] == ["a.mp4"]


def test_signed_float_and_uint8_frames_are_the_same_video(tmp_path):
    as_bytes = (smooth_video(4) * 255).round().to(torch.uint8)
    video = as_bytes / 255
    for name, frames, kind in (("s", video * 2 - 1, "signed"), ("u", video, "unit"), ("b", as_bytes, "unit")):
        with VideoWriter(tmp_path / f"{name}.png", pixel_range=kind) as writer:
            writer.write(frames)
    signed, unit, whole = ((tmp_path / f"{name}.png").read_bytes() for name in "sub")
    assert signed == unit == whole


def test_out_of_range_values_are_clamped(tmp_path):
    with VideoWriter(tmp_path / "x.png") as writer:
        writer.write(torch.tensor([-3.0, 0.5, 3.0]).view(3, 1, 1).expand(3, 2, 2))
    assert read_image(tmp_path / "x.png")[:, 0, 0].tolist() == [0.0, pytest.approx(128 / 255), 1.0]


def test_final_name_appears_only_when_the_file_is_whole(tmp_path):
    writer = VideoWriter(tmp_path / "a.mp4")
    writer.write(smooth_video())
    assert not writer.path.exists() and writer.partial_path.exists()
    assert writer.close() == writer.path and writer.close() == writer.path
    assert not writer.partial_path.exists()
    with pytest.raises(ValueError, match="closed"):
        writer.write(smooth_video(1))


def test_an_old_file_survives_until_the_new_one_is_whole(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"old")
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(smooth_video(3))
        assert (tmp_path / "a.mp4").read_bytes() == b"old"
    assert len(read_video(tmp_path / "a.mp4")) == 3


def test_no_frames_no_file(tmp_path):
    with VideoWriter(tmp_path / "a.mp4") as writer:
        pass
    assert writer.close() is None and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", ["mp4", "gif", "png"])
def test_an_exception_keeps_what_was_written(tmp_path, suffix):
    with pytest.raises(KeyboardInterrupt), VideoWriter(tmp_path / f"a.{suffix}") as writer:
        writer.write(smooth_video(9))
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == [f"a.{suffix}"]
    if suffix == "mp4":
        assert len(read_video(tmp_path / "a.mp4")) == 9


WRITER_PROCESS = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
import sys, time, torch
from anyflow_runtime.video_io import VideoWriter
with VideoWriter(sys.argv[1], fps=8) as writer:
    while True:
        writer.write(torch.rand(8, 3, 48, 64))
        print(writer.frames_written, flush=True)
        time.sleep(0.01)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL], ids=["ctrl-c", "killed"])
def test_a_stopped_process_leaves_a_playable_file(tmp_path, sent):
    root = Path(video_io.__file__).parents[1]
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER_PROCESS, str(tmp_path / "a.mp4")],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        cwd=root,
        text=True,
    )
    assert process.stdout is not None
    while int(process.stdout.readline()) < 96:
        pass
    process.send_signal(sent)
    rest = process.stdout.read().split()
    process.wait(timeout=20)
    written = int(rest[-1]) if rest else 96
    name = "a.mp4" if sent == signal.SIGINT else "a.partial.mp4"
    assert [p.name for p in tmp_path.iterdir()] == [name]
    if sent == signal.SIGINT:
        assert len(read_video(tmp_path / name)) >= written
    else:
        # Killed outright: all but the last seconds, which had not left the encoder.
        assert len(read_video(tmp_path / name, num_frames=32)) == 32


def test_full_disk_says_what_was_saved(tmp_path):
    """A limit on the size of files stands for the full disk: writes fail the same way."""
    writer = VideoWriter(tmp_path / "a.mp4", fps=4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    old = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, limits[1]))
        with pytest.raises(OSError, match=r"the first (\d+) can be played from .*a\.partial\.mp4") as error:
            for _ in range(100):
                writer.write(torch.rand(4, 3, 64, 64))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, old)
    assert error.value.errno is not None and not writer.path.exists()
    count = int(str(error.value).split("the first ")[1].split()[0])
    assert count > 0
    assert len(read_video(writer.partial_path, num_frames=count)) == count
    with pytest.raises(ValueError, match="closed"):
        writer.write(torch.rand(4, 3, 64, 64))


@pytest.mark.parametrize(
    "frames, kind, message",
    [
        (torch.zeros(2, 3, 8, 10), ValueError, "got 8 x 10, expected 8 x 8"),
        (torch.zeros(2, 4, 8, 8), ValueError, "expected shape"),
        (torch.zeros(8, 8), ValueError, "expected shape"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.int32), TypeError, "expected uint8 or"),
        (np.zeros((3, 8, 8)), TypeError, "got ndarray, expected a tensor"),
    ],
)
def test_wrong_frames_are_refused_and_the_video_goes_on(tmp_path, frames, kind, message):
    with VideoWriter(tmp_path / "a.mp4") as writer:
        writer.write(torch.zeros(2, 3, 8, 8))
        with pytest.raises(kind, match=message):
            writer.write(frames)
        writer.write(torch.zeros(3, 8, 8))
    assert len(read_video(tmp_path / "a.mp4")) == 3


def test_odd_sides_are_refused_for_h264_only(tmp_path):
    with pytest.raises(ValueError, match="got 7 x 8, expected an even height and width"):
        VideoWriter(tmp_path / "a.mp4").write(torch.zeros(1, 3, 7, 8))
    with VideoWriter(tmp_path / "a.gif") as writer:
        writer.write(torch.zeros(1, 3, 7, 8))
    assert (tmp_path / "a.gif").exists()


@pytest.mark.parametrize("kwargs", [{"fps": 0}, {"crf": 60}, {"pixel_range": "bytes"}])
def test_bad_writer_settings_are_named(tmp_path, kwargs):
    with pytest.raises(ValueError, match=next(iter(kwargs))):
        VideoWriter(tmp_path / "a.mp4", **kwargs)


def test_bad_paths_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"\.mp4, \.gif or \.png"):
        VideoWriter(tmp_path / "a.avi")
    with pytest.raises(FileNotFoundError, match="no such directory"):
        VideoWriter(tmp_path / "missing" / "a.mp4")


def test_gif_has_all_frames_and_their_time(tmp_path):
    with VideoWriter(tmp_path / "a.gif", fps=10) as writer:
        writer.write(smooth_video(6))
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 6 and gif.info["duration"] == 100
        gif.seek(5)
        last = torch.from_numpy(np.array(gif.convert("RGB"))).permute(2, 0, 1) / 255
    assert (last - smooth_video(6)[5]).abs().mean() < 0.05


@pytest.mark.parametrize("count, tiles, grid", [(5, 5, (2, 3)), (64, 64, (8, 8)), (200, 50, (7, 8))])
def test_contact_sheet_shows_evenly_spaced_frames(tmp_path, count, tiles, grid):
    """Frame i is grey level i; of 200 frames every 4th is shown."""
    with VideoWriter(tmp_path / "a.png") as writer:
        for i in range(count):
            writer.write(torch.full((3, 2, 4), i, dtype=torch.uint8))
    with Image.open(tmp_path / "a.png") as image:
        sheet = np.array(image)
    assert sheet.shape == (grid[0] * 2, grid[1] * 4, 3)
    shown = sheet[::2, ::4, 0].flatten()[:tiles]
    assert shown.tolist() == list(range(0, count, count // tiles))


@pytest.mark.parametrize("module", ["av", "PIL.Image"])
def test_missing_package_names_the_extra(monkeypatch, module):
    real = importlib.import_module

    def without(name, *args):
        if name == module:
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", without)
    with pytest.raises(ImportError, match=r"anyflow-kernels\[video\]"):
        read_video(CLIP) if module == "av" else read_image(PICTURE)


def test_importing_the_module_needs_neither_package():
    """The command line must start without the video extra."""
    code = "import sys; sys.modules['av'] = sys.modules['PIL'] = None; import anyflow_runtime.video_io"
    subprocess.run([sys.executable, "-c", code], cwd=Path(video_io.__file__).parents[1], check=True, timeout=120)
