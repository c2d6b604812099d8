"""The command `anyflow`: bad input is one line and exit code 2; `generate` makes the pipeline's video."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_runtime import accelerate
from anyflow_runtime.cli import build_parser, main
from anyflow_runtime.commands.generate_request import GenerateRequest, check_request
from anyflow_runtime.video_io import VideoWriter, read_image, read_video
from bench.tiny_pipeline import tiny_pipeline

diffusers = pytest.importorskip("diffusers")
SIZE = ["--size", "32x48"]
CHUNKS = [1, 2, 1, 1]  # 17 frames
VIDEO = [*SIZE, "--frames", "17", "--steps", "2", "--seed", "7", "--device", "cpu"]
FAR_VIDEO = [*VIDEO, "--chunks", "1,2,1,1"]
CALL = {"height": 32, "width": 48, "num_frames": 17, "num_inference_steps": 2, "output_type": "latent"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, far and bidirectional; clips of 9 and 40 frames, a picture, prompts, embeddings, and damaged ones."""
    root = tmp_path_factory.mktemp("cli")
    for name, causal in (("far", True), ("bidirectional", False)):
        pipe = tiny_pipeline(causal, heads=2, head_dim=16, layers=2, text_dim=16, vae_dim=4)
        pipe.save_pretrained(root / name)
    pixels = torch.rand(40, 3, 40, 64, generator=torch.Generator().manual_seed(0))
    for name, frames in (("9.mp4", 9), ("40.mp4", 40), ("picture.png", 1)):
        with VideoWriter(root / name) as writer:
            writer.write(pixels[:frames])
    (root / "broken.mp4").write_bytes((root / "40.mp4").read_bytes()[:900])
    (root / "prompt.txt").write_text("a cat\n")
    (root / "binary.txt").write_bytes(b"\xff\xfe\xfa")
    (root / "empty.txt").write_text(" \n")
    (root / "not_a_model").mkdir()
    (root / "other").mkdir()
    (root / "other" / "model_index.json").write_text('{"_class_name": "WanPipeline"}')
    (root / "garbled").mkdir()
    (root / "garbled" / "model_index.json").write_text("{")
    shutil.copytree(root / "far", root / "no_vae", ignore=shutil.ignore_patterns("vae"))
    generator = torch.Generator().manual_seed(1)
    embeds = {"prompt_embeds": torch.randn(1, 6, 16, generator=generator)}
    save_file(embeds, root / "positive.safetensors")
    embeds["negative_prompt_embeds"] = torch.randn(1, 6, 16, generator=generator)
    save_file(embeds, root / "embeds.safetensors")
    save_file({"prompt_embeds": torch.zeros(6, 17)}, root / "wide.safetensors")
    save_file({"prompt_embeds": torch.zeros(6, 16, dtype=torch.int32)}, root / "integers.safetensors")
    (root / "torn.safetensors").write_bytes(b"\x08\x00\x00")
    return root


def generate(files: Path, out: Path, *arguments: str, model: str = "far") -> dict[str, Any]:
    """Run `anyflow generate`, which must succeed: its latents and stats."""
    latents, stats = out.with_suffix(".safetensors"), out.with_suffix(".json")
    extra = ["--save-latents", str(latents), "--stats", str(stats)]
    assert main(["generate", "--model", str(files / model), "--out", str(out), *arguments, *extra]) == 0
    return {"latents": load_file(latents)["latents"], **json.loads(stats.read_text())}


def request(files: Path, *arguments: str, model: str = "far") -> GenerateRequest:
    """What `anyflow generate` understands."""
    required = ["--model", str(files / model), "--out", str(files / "unwritten.png")]
    return check_request(build_parser().parse_args(["generate", *arguments, *required]))


def in_python(files: Path, model: str = "far", match_diffusers_padding: bool = False, **call: Any) -> Tensor:
    """The latents of the accelerated diffusers pipeline."""
    pipe = getattr(diffusers, "AnyFlowFARPipeline" if model == "far" else "AnyFlowPipeline").from_pretrained(
        files / model
    )
    pipe.set_progress_bar_config(disable=True)
    call = {**CALL, "prompt": "a cat", "generator": torch.Generator().manual_seed(7), **call}
    if model == "far":
        call.setdefault("chunk_partition", CHUNKS)
    return accelerate(pipe, match_diffusers_padding=match_diffusers_padding)(**call).frames


BAD = {
    # name: (further arguments, with {} for the folder of the files; what the message says)
    "unknown option": ("x --stepz 4", "unrecognized arguments: --stepz 4"),
    "no model directory": ("x --model {}/nowhere", "no directory {}/nowhere"),
    "model is a file": ("x --model {}/9.mp4", "no directory {}/9.mp4"),
    "no model index": ("x --model {}/not_a_model", "no model_index.json"),
    "another pipeline": ("x --model {}/other", "holds WanPipeline, expected one of AnyFlowFARPipeline"),
    "garbled model index": ("x --model {}/garbled", "not valid JSON"),
    "no VAE": ("x --model {}/no_vae", "has no vae"),
    "no prompt": ("", "prompt: got 0 of them, expected one"),
    "two prompts": ("x --prompt y", "prompt: got 2 of them, expected one"),
    "no prompt file": ("nowhere.txt", "no file nowhere.txt"),
    "empty prompt file": ("--prompt {}/empty.txt", "empty.txt is empty"),
    "prompt file is no text": ("{}/binary.txt", "binary.txt is not UTF-8 text"),
    "odd size": ("x --size 33x48", "--size: got 33x48, expected multiples of 16"),
    "size is no size": ("x --size 32", "argument --size: got '32', expected HEIGHTxWIDTH"),
    "size zero": ("x --size 0x48", "argument --size: got '0x48'"),
    "frames": ("x --size 32x48 --frames 16", "--frames: got 16, expected 4n + 1, such as 13"),
    "no frames": ("x --frames 0", "argument --frames: got '0', expected a whole number >= 1"),
    "no steps": ("x --steps 0", "argument --steps"),
    "guidance": ("x --guidance 0.5", "argument --guidance: got '0.5', expected a number >= 1"),
    "guidance is no number": ("x --guidance nan", "argument --guidance: got 'nan'"),
    "chunks are no numbers": ("x --chunks 1,x", "argument --chunks: got '1,x'"),
    "an empty chunk": ("x --chunks 1,0,3", "argument --chunks: got '1,0,3'"),
    "chunks do not sum": (
        "x --size 32x48 --frames 17 --chunks 1,3",
        "--chunks: got [1, 3], which sums to 4, expected the 5 latent frames of 17 frames",
    ),
    "more frames than the model's chunks": (
        "x --size 32x48 --frames 85",
        "--chunks: needed, for the model's own [1, 3, 3, 3, 3, 3, 3, 2] cover 21 of the 22 latent frames",
    ),
    "chunks without a causal model": ("x --model {}/bidirectional --chunks 1,3", "--chunks: got with AnyFlowPipeline"),
    "padding without a causal model": (
        "x --model {}/bidirectional --match-diffusers-padding",
        "expected a causal (FAR) model",
    ),
    "no picture": ("x --image {}/nowhere.png", "--image: no file {}/nowhere.png"),
    "a picture that is none": ("x --image {}/prompt.txt", "prompt.txt: not a readable picture"),
    "no clip": ("x --video {}/nowhere.mp4", "--video: no file {}/nowhere.mp4"),
    "a broken clip": ("x --size 32x48 --video {}/broken.mp4", "broken.mp4: not a video, truncated"),
    "picture and clip": ("x --image {}/picture.png --video {}/9.mp4", "not allowed with"),
    "clip ends inside a chunk": (
        "x --size 32x48 --frames 17 --chunks 1,3,1 --video {}/9.mp4",
        "--video: got 9 frames as context of 17 frames in chunks [1, 3, 1], expected one of: 1, 13 ",
    ),
    "clip as long as the video": (
        "x --size 32x48 --chunks 1,2 --video {}/9.mp4",
        "--video: got 9 or more frames as context of 9 frames in chunks [1, 2], expected one of: 1 ",
    ),
    "clip of another length": (
        "x --model {}/bidirectional --size 32x48 --frames 81 --video {}/40.mp4",
        "--video: got 40 frames as context of 81 frames, expected one of: 1, 5, 9,",
    ),
    "clip shorter than asked": (
        "x --size 32x48 --video {}/9.mp4 --context-frames 13",
        "got 13, expected at most 9, the frames of {}/9.mp4",
    ),
    "context frames without a clip": ("x --context-frames 1", "--context-frames: got without --video"),
    "no chunk left for a picture": (
        "x --size 32x48 --chunks 2,1 --image {}/picture.png",
        "--image: got 1 frames as context of 9 frames in chunks [2, 1], expected one of: 5;",
    ),
    "no embeddings": ("--prompt-embeds {}/nowhere", "--prompt-embeds: no file {}/nowhere"),
    "torn embeddings": ("--prompt-embeds {}/torn.safetensors", "torn.safetensors is not a readable safetensors file"),
    "embeddings of another width": (
        "--prompt-embeds {}/wide.safetensors",
        "prompt_embeds is (6, 17), expected (tokens, 16) or (1, tokens, 16)",
    ),
    "integer embeddings": ("--prompt-embeds {}/integers.safetensors", "expected floating point"),
    "guidance without negative embeddings": (
        "--prompt-embeds {}/positive.safetensors --guidance 3",
        "holds prompt_embeds, expected prompt_embeds, negative_prompt_embeds",
    ),
    "negative prompt with embeddings": (
        "--prompt-embeds {}/embeds.safetensors --negative-prompt y --guidance 3",
        "--negative-prompt: got with --prompt-embeds",
    ),
    "negative prompt without guidance": ("x --negative-prompt y", "has no effect at --guidance 1"),
    "suffix": ("x --out {}/o.avi", "expected a name that ends in .mp4, .gif, .png"),
    "out in no directory": ("x --out {}/nowhere/o.mp4", "--out: no directory {}/nowhere"),
    "stats in no directory": ("x --stats {}/nowhere/s", "--stats: no directory {}/nowhere"),
    "stats is a directory": ("x --stats {}", "--stats: got the directory {}"),
    "stats over the video": ("x --stats {}/o.mp4", "--stats: got {}/o.mp4, the file of --out, expected another one"),
    "latents over the stats": ("x --stats {}/s --save-latents {}/s", "--save-latents: got {}/s, the file of --stats"),
    "video over its clip": ("x --video {}/9.mp4 --out {}/9.mp4", "--out: got {}/9.mp4, the file of --video"),
    "a seed that torch does not take": (
        "x --seed 99999999999999999999999",
        "argument --seed: got '99999999999999999999999'",
    ),
    "device": ("x --device abacus", "--device: got 'abacus', expected cpu, cuda or cuda:N"),
    "no such GPU": ("x --device cuda:77", "--device: got 'cuda:77', but torch"),
    "offload without a GPU": ("x --device cpu --offload", "--offload: got with --device cpu"),
    "dtype": ("x --dtype int8", "argument --dtype: got 'int8'"),
    "backend": ("x --backend cublas", "argument --backend: invalid choice: 'cublas'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line_and_exit_code_2(name, files, capfd, monkeypatch):
    """Before anything is loaded or written."""

    def load(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("anyflow_runtime.commands.generate_video.open_pipeline", load)
    arguments, expected = (text.replace("{}", str(files)) for text in BAD[name])
    required = ["--model", f"{files}/far", "--out", f"{files}/o.mp4"]  # of an option given twice the last one counts
    assert main(["generate", *required, *arguments.split()]) == 2
    error = capfd.readouterr().err
    assert error.startswith("anyflow generate: error: ") and error.count("\n") == 1
    assert expected in error
    assert not (files / "o.mp4").exists()


def test_arguments_left_out_are_one_line_and_exit_code_2(capfd):
    assert main(["generate"]) == 2
    assert capfd.readouterr().err.startswith("anyflow generate: error: the following arguments are required: --model, ")


def test_triton_without_a_gpu_is_refused_with_the_reason(files, capfd, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    arguments = ["x", "--model", str(files / "far"), "--out", str(tmp_path / "o.mp4"), "--backend", "triton"]
    assert main(["generate", *arguments]) == 2
    error = capfd.readouterr().err
    assert "backend 'triton' cannot run here: " in error and error.count("\n") == 1


@pytest.mark.parametrize("component", ["transformer", "vae", "text_encoder"])
def test_damaged_weights_are_an_error_not_a_traceback(component, files, tmp_path, capfd):
    shutil.copytree(files / "far", tmp_path / "far")
    [weights] = (tmp_path / "far" / component).glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    out = tmp_path / "o.mp4"
    assert main(["generate", "x", "--model", str(tmp_path / "far"), "--out", str(out), *FAR_VIDEO]) == 2
    error = capfd.readouterr().err
    assert f"{tmp_path / 'far'} does not load: " in error and "Traceback" not in error
    assert not out.exists()


def test_debug_shows_the_traceback(files, capfd):
    assert main(["generate", "x", "--model", str(files / "nowhere"), "--out", "o.mp4", "--debug"]) == 2
    error = capfd.readouterr().err
    assert "Traceback" in error and error.splitlines()[-1].startswith("anyflow generate: error: --model: no directory")


def test_interrupt_is_exit_code_130(files, tmp_path, capfd, monkeypatch):
    def load(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("anyflow_runtime.commands.generate_video.open_pipeline", load)
    assert main(["generate", "x", "--model", str(files / "far"), "--out", str(tmp_path / "o.mp4"), *FAR_VIDEO]) == 130
    assert capfd.readouterr().err == "anyflow generate: interrupted\n"


def test_a_defect_keeps_its_traceback(monkeypatch):
    """What no input can cause is not dressed up as bad input."""
    monkeypatch.setattr("anyflow_runtime.commands.info.run", lambda args: {}["missing"])
    with pytest.raises(KeyError):
        main(["info"])


@pytest.mark.parametrize(
    ("model", "task"),
    [
        *[("far", task) for task in ("text", "guidance", "image", "video", "video beginning")],
        *[("bidirectional", task) for task in ("text", "image", "video")],
    ],
)
def test_latents_are_those_of_the_pipeline_in_python(model, task, files, tmp_path):
    arguments = {
        "text": [],
        "guidance": ["--guidance", "3", "--negative-prompt", "blurry"],
        "image": ["--image", str(files / "picture.png")],
        "video": ["--video", str(files / "9.mp4")],
        "video beginning": ["--video", str(files / "40.mp4"), "--context-frames", "9"],
    }[task]
    call: dict[str, Any] = {}
    if task == "guidance":
        call = {"guidance_scale": 3.0, "negative_prompt": "blurry"}
    if task == "image":
        call = {"video": read_image(files / "picture.png", (32, 48))[None, None]}
    if task.startswith("video"):
        call = {"video": read_video(files / ("9.mp4" if task == "video" else "40.mp4"), 9, (32, 48))[None]}
    video = FAR_VIDEO if model == "far" else VIDEO
    out = tmp_path / "out.mp4"
    result = generate(files, out, "a cat", *video, *arguments, model=model)
    torch.testing.assert_close(result["latents"], in_python(files, model, **call), rtol=2e-5, atol=2e-5)
    assert read_video(out).shape == (17, 3, 32, 48)


def test_padding_of_diffusers_can_be_matched(files, tmp_path):
    latents = generate(files, tmp_path / "o.png", "a cat", *FAR_VIDEO, "--match-diffusers-padding")["latents"]
    torch.testing.assert_close(latents, in_python(files, match_diffusers_padding=True), rtol=2e-5, atol=2e-5)
    assert not torch.allclose(latents, in_python(files), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("guidance", ["1", "3"])
def test_prompt_embeddings_need_no_text_encoder(guidance, files, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(files / "far", model, ignore=shutil.ignore_patterns("text_encoder", "tokenizer"))
    arguments = ["--prompt-embeds", str(files / "embeds.safetensors"), "--guidance", guidance]
    result = generate(tmp_path, tmp_path / "o.gif", *FAR_VIDEO, *arguments, model="model")
    assert read_video(tmp_path / "o.gif").shape == (17, 3, 32, 48)
    embeds = load_file(files / "embeds.safetensors")
    if guidance == "1":
        embeds.pop("negative_prompt_embeds")
    expected = in_python(files, prompt=None, guidance_scale=float(guidance), **embeds)
    torch.testing.assert_close(result["latents"], expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    "arguments", [["--prompt", "{}/prompt.txt"], ["{}/prompt.txt"], ["--prompt", "a cat"]], ids=str
)
def test_prompt_from_a_file_is_its_text(arguments, files):
    assert request(files, *(argument.replace("{}", str(files)) for argument in arguments)).prompt == "a cat"


def test_file_holds_the_frames_the_pipeline_decodes(files, tmp_path):
    """Within what 8 bits and the palette of a contact sheet in PNG, which is lossless, leave."""
    generate(files, tmp_path / "o.png", "a cat", *FAR_VIDEO)
    sheet = read_image(tmp_path / "o.png")
    frames = in_python(files, output_type="pt")[0]
    columns = sheet.shape[2] // 48
    for i, frame in enumerate(frames):
        row, column = divmod(i, columns)
        tile = sheet[:, row * 32 : (row + 1) * 32, column * 48 : (column + 1) * 48]
        assert float((tile - frame).abs().max()) <= 1.5 / 255


def test_stats_tell_settings_stages_and_chunks(files, tmp_path, capsys):
    stats = generate(files, tmp_path / "o.mp4", "a cat", *FAR_VIDEO, "--image", str(files / "picture.png"))
    assert list(stats["seconds"]) == ["load", "context", "text", "denoise", "decode", "write"]
    assert stats["settings"]["frames"] == 17 and stats["settings"]["context_frames"] == 1
    assert [(c["chunk"], c["latent_frames"]) for c in stats["chunks"]] == [(1, 2), (2, 1), (3, 1)]
    assert 0 < sum(c["seconds"] for c in stats["chunks"]) <= stats["seconds"]["denoise"]
    assert stats["peak_memory_bytes"]["process"] > 2**20
    summary = capsys.readouterr().out
    assert all(stage in summary for stage in (*stats["seconds"], "total", "peak memory"))


def test_fewer_frames_take_the_first_chunks_of_the_model(files, tmp_path, capsys):
    """[1, 3, 3, ...] for 21 latent frames; of 6, the last chunk is cut."""
    arguments = [*SIZE, "--frames", "21", "--steps", "1", "--seed", "3"]
    latents = generate(files, tmp_path / "o.png", "a cat", *arguments)["latents"]
    call = {"num_frames": 21, "num_inference_steps": 1, "chunk_partition": [1, 3, 2]}
    expected = in_python(files, generator=torch.Generator().manual_seed(3), **call)
    torch.testing.assert_close(latents, expected, rtol=2e-5, atol=2e-5)
    assert "chunks 1,3,2" in capsys.readouterr().out


def test_chunks_alone_set_the_frames(files):
    assert request(files, "a cat", "--chunks", "1,3,1").frames == 17


@pytest.mark.parametrize(("model", "frames"), [("far", 81), ("bidirectional", 81)])
def test_default_is_the_video_of_the_released_models(model, frames, files):
    default = request(files, "a cat", model=model)
    assert (default.frames, default.size, default.steps, default.guidance) == (frames, (480, 832), 4, 1.0)
    assert default.chunks == ((1, 3, 3, 3, 3, 3, 3, 2) if model == "far" else None)


def test_help_is_quick():
    """It names every command and imports no torch."""
    code = "import sys; from anyflow_runtime.cli import main; main(['--help']); sys.exit('torch' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert all(command in result.stdout for command in ("generate", "verify", "info", "bench"))


@pytest.mark.parametrize("arguments", [[], ["--help"], ["generate", "--help"], ["--version"]], ids=str)
def test_help_and_version_are_exit_code_0(arguments, capsys):
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_unknown_command_is_one_line_and_exit_code_2(capsys):
    assert main(["generat"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
