"""The bundled demo model and pixel models in general: files, pipeline, `anyflow generate --model demo`, any-step claim.

Witness: the pixels, measured against what the captions say.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from anyflow_runtime.cli import main
from anyflow_runtime.streaming import PrintableConfig, preset, stream
from anyflow_runtime.streaming.pixel_model import DEMO_MODEL, PixelModelIndex, pixel_pipeline, read_index
from anyflow_runtime.training.demo import any_step
from anyflow_runtime.training.demo.demo_model import DemoModel
from anyflow_runtime.training.demo.shapes import AMPLITUDE, parse_caption
from anyflow_runtime.training.objectives.rollout import far_rollout
from anyflow_runtime.training.objectives.timesteps import schedule
from anyflow_runtime.video_io import read_video
from bench.demo import CAPTIONS

CAPTION = "a red circle moves right over black"
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "ffn_dim": 32, "num_layers": 1, "text_dim": 8}


@pytest.fixture(scope="module")
def demo():
    return any_step.load()


@pytest.fixture(scope="module")
def held_out():
    return any_step.HeldOut.draw(24)


@pytest.fixture(scope="module")
def at_steps(demo, held_out):
    return any_step.evaluate(demo, held_out, (1, 2, 8))


@pytest.mark.parametrize("steps", [1, 2, 8])
def test_demo_shows_what_unseen_captions_say(at_steps, steps: int) -> None:
    """Weights that do not fit this code, or another normalisation or schedule, would show noise."""
    row = at_steps[steps]
    assert row["found"] > 0.8 and row["colour_right"] > 0.9 and row["direction_right"] > 0.85


def test_one_step_is_close_to_eight(at_steps) -> None:
    """The any-step property: a velocity model's one-step videos are blurs."""
    assert at_steps[1]["shape_right"] > at_steps[8]["shape_right"] - 0.25
    assert at_steps[1]["residual"] < 2 * at_steps[8]["residual"]


def test_one_step_keeps_the_variety_of_starts(demo) -> None:
    """One step of a velocity averages over them: plain flow matching of the same budget has 0.27, this model 0.75."""
    assert any_step.spread(demo, steps=1, captions=4, noises=24) > 0.5


def test_demo_goes_on_from_given_frames(demo, held_out) -> None:
    row = any_step.continuation(demo, held_out, given_frames=3, steps=2)
    assert row["error"] < 0.6 * row["standing_still"] and row["shape_right"] > 0.8


def test_stream_makes_the_video_of_the_training_rollout(tmp_path: Path) -> None:
    """Training's samples and the released pipeline are one model: same noise, same video."""
    torch.manual_seed(0)
    model = DemoModel(**TINY, chunk_partition=(1, 2), backend="torch")
    model.save(tmp_path)
    noise = torch.randn(2, 3, 3, 16, 16)  # (B, C, F, H, W)
    captions = [CAPTION, "a blue square moves up over navy"]
    pipeline = pixel_pipeline(tmp_path, backend="torch").setup()
    frames = torch.cat(list(stream(pipeline, captions, steps=2, noise=noise)), dim=1)
    segments = list(zip(schedule(2, 2.0)[:-1], schedule(2, 2.0)[1:], strict=True))
    with torch.no_grad():
        text = model.text_encoder(captions)
        latents = far_rollout(model.transformer, noise.transpose(1, 2), text, (1, 2), segments)
    expected = (latents / AMPLITUDE * 2 - 1).clamp(-1, 1)
    assert (frames - expected).norm() / expected.norm() < 2e-5


def test_given_pixels_come_back(demo) -> None:
    """Encoder and decoder agree on the range of latents: the first frame of image-to-video is the image."""
    image = torch.rand(1, 1, 3, 16, 16)
    latents = demo.encode_video(image)
    assert torch.allclose(latents, image * AMPLITUDE, atol=1e-6)
    frames = next(stream(demo, CAPTION, steps=1, seed=0, context_latents=latents))
    assert torch.allclose((frames + 1) / 2, image, atol=1e-6)


def test_preset_is_printable_and_builds_offline() -> None:
    config = preset("anyflow-demo")
    assert PrintableConfig.from_dict(config.to_dict()) == config
    assert "WordEncoderConfig" in str(config) and "PixelDecoderConfig" in str(config)
    config.setup()


def test_captions_of_the_contact_sheet_were_never_trained_on() -> None:
    assert all(parse_caption(caption).held_out for caption in CAPTIONS)


def test_the_card_names_data_recipe_and_seed() -> None:
    card = (DEMO_MODEL / "README.md").read_text()
    assert all(word in card for word in ("scripts/train_demo.sh", "seed 0", "held-out"))
    size = sum(path.stat().st_size for path in DEMO_MODEL.rglob("*") if path.is_file())
    assert size < 8 * 2**20


def generate(out: Path, *arguments: str) -> int:
    return main(["generate", "--model", "demo", "--steps", "2", "--seed", "0", "--out", str(out), *arguments])


def test_generate_writes_a_gif(tmp_path: Path) -> None:
    out = tmp_path / "x.gif"
    assert generate(out, "--prompt", CAPTION, "--stats", str(tmp_path / "s.json")) == 0
    video = read_video(out)
    assert video.shape == (7, 3, 256, 256)  # every pixel as 16 x 16
    settings = json.loads((tmp_path / "s.json").read_text())["settings"]
    assert settings["size"] == [16, 16] and settings["frames"] == 7
    red = video.mean((0, 2, 3))
    assert red[0] > 3 * red[1] and red[0] > 3 * red[2]


def test_generate_depends_on_seed_and_prompt(tmp_path: Path) -> None:
    videos = []
    for name, extra in (("a", []), ("b", []), ("c", ["--seed", "1"])):
        assert generate(tmp_path / f"{name}.gif", "--prompt", CAPTION, *extra) == 0
        videos.append(read_video(tmp_path / f"{name}.gif"))
    assert torch.equal(videos[0], videos[1]) and not torch.equal(videos[0], videos[2])


def test_generate_goes_on_from_a_clip(tmp_path: Path) -> None:
    """Video-to-video of what it wrote itself, longer than the model's own partition."""
    assert generate(tmp_path / "x.gif", "--prompt", CAPTION) == 0
    more = ["--video", str(tmp_path / "x.gif"), "--context-frames", "5", "--frames", "9", "--chunks", "1,2,2,2,2"]
    assert generate(tmp_path / "y.gif", "--prompt", CAPTION, *more) == 0
    first, second = read_video(tmp_path / "x.gif"), read_video(tmp_path / "y.gif")
    assert second.shape[0] == 9 and (first[:5] - second[:5]).abs().mean() < 0.02  # a GIF has 256 colours


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "a purple circle moves right over black"], r"unknown words \['purple'\]"),
        (["--prompt", CAPTION, "--size", "18x16"], "expected multiples of 4"),
        (["--prompt", CAPTION, "--frames", "9"], "cover 7 of the 9"),
    ],
)
def test_generate_explains_what_does_not_fit(tmp_path: Path, capsys, arguments, message: str) -> None:
    assert generate(tmp_path / "x.gif", *arguments) == 2
    assert list(tmp_path.iterdir()) == []
    assert re.search(message, capsys.readouterr().err)


def test_index_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model_index\.json"):
        read_index(tmp_path)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AnyFlowFARPipeline"}')
    with pytest.raises(ValueError, match="names AnyFlowFARPipeline"):
        read_index(tmp_path)
    index = PixelModelIndex(16, 16, 2.0, (0.0, 1.0))
    index.save(tmp_path)
    assert read_index(tmp_path) == index
    content = json.loads((tmp_path / "model_index.json").read_text())
    del content["shift"]
    (tmp_path / "model_index.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match="shift"):
        read_index(tmp_path)
