"""`anyflow convert`: every layout there and back, what it reports, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from anyflow_runtime.cli import main
from anyflow_runtime.streaming.pixel_model import DEMO_MODEL

from .tiny import tiny_model

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(directory)
    return directory


def same_tensors(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("layout", ["fastgen", "fastgen_old", "fastvideo"])
def test_there_and_back_without_loss(layout, source, tmp_path, capsys) -> None:
    """The config travels in the file, so the way back needs nothing else."""
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--to", layout]) == 0
    assert not same_tensors(load_file(tmp_path / "x.safetensors"), load_file(source / WEIGHTS))
    assert main(["convert", str(tmp_path / "x.safetensors"), str(tmp_path / "back"), "--to", "diffusers"]) == 0
    assert same_tensors(load_file(tmp_path / "back" / WEIGHTS), load_file(source / WEIGHTS))
    assert json.loads((tmp_path / "back" / "config.json").read_text()) == json.loads(
        (source / "config.json").read_text()
    )


def test_research_there_and_back_with_the_config(source, tmp_path, capsys) -> None:
    assert main(["convert", str(source), str(tmp_path / "x.pt"), "--to", "research"]) == 0
    content = torch.load(tmp_path / "x.pt", weights_only=True)
    assert same_tensors(content["ema"], load_file(source / WEIGHTS))
    back = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "back"), "--to", "diffusers"]
    assert main(back) == 2
    assert "config" in capsys.readouterr().err and not (tmp_path / "back").exists()
    assert main([*back, "--config", str(source / "config.json")]) == 0
    assert same_tensors(load_file(tmp_path / "back" / WEIGHTS), load_file(source / WEIGHTS))


def test_it_lists_every_rename_and_counts_them(source, tmp_path, capsys) -> None:
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--to", "fastgen_old"]) == 0
    lines = capsys.readouterr().out.splitlines()
    moved = "condition_embedder.delta_embedder.linear_1.weight -> r_embedder.time_embedder.linear_1.weight"
    assert f"renamed {moved}" in lines and "added r_embedder.time_proj.weight" in lines
    assert lines[-1].endswith("fastgen_old; 4 renamed, 2 added, 0 dropped, 0 notes")


def test_quiet_prints_the_counts_alone(source, tmp_path, capsys) -> None:
    assert main(["convert", str(source), str(tmp_path / "x.safetensors"), "--to", "fastvideo", "--quiet"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_adapters_are_merged_with_the_alpha_of_the_config(source, tmp_path, capsys) -> None:
    state = load_file(source / WEIGHTS)
    layer = "blocks.0.attn1.to_q"
    a, b = torch.randn(2, 32), torch.randn(32, 2)
    adapters = {f"base_model.model.{layer}.lora_A.real.weight": a, f"base_model.model.{layer}.lora_B.real.weight": b}
    torch.save({"ema": adapters}, tmp_path / "lora.pt")
    command = ["convert", str(tmp_path / "lora.pt"), str(tmp_path / "out"), "--to", "diffusers"]
    command += ["--config", str(source / "config.json"), "--base", str(source)]
    assert main(command) == 2 and "alpha" in capsys.readouterr().err
    assert main([*command, "--alpha", "4"]) == 0
    assert "merged LoRA of rank 2, alpha 4" in capsys.readouterr().out
    merged = load_file(tmp_path / "out" / WEIGHTS)
    assert torch.allclose(merged[f"{layer}.weight"], state[f"{layer}.weight"] + 2 * b @ a, atol=1e-6)
    del merged[f"{layer}.weight"], state[f"{layer}.weight"]
    assert same_tensors(merged, state)


def test_an_existing_target_stays_without_overwrite(source, tmp_path, capsys) -> None:
    target = tmp_path / "x.safetensors"
    target.write_bytes(b"precious")
    assert main(["convert", str(source), str(target), "--to", "fastgen"]) == 2
    assert target.read_bytes() == b"precious" and "--overwrite" in capsys.readouterr().err
    assert main(["convert", str(source), str(target), "--to", "fastgen", "--overwrite"]) == 0


def test_research_takes_the_weights_that_were_asked_for(source, tmp_path, capsys) -> None:
    state = load_file(source / WEIGHTS)
    other = {key: value + 1 for key, value in state.items()}
    torch.save({"ema": state, "model_state_dict_g": other}, tmp_path / "x.pt")
    command = ["convert", str(tmp_path / "x.pt"), str(tmp_path / "y.safetensors"), "--to", "fastvideo"]
    assert main([*command, "--weights", "student"]) == 0
    converted = load_file(tmp_path / "y.safetensors")
    assert torch.equal(converted["patch_embedding.proj.weight"], other["patch_embedding.weight"])


def test_a_pipeline_directory_is_taken_by_its_transformer(tmp_path) -> None:
    assert main(["convert", str(DEMO_MODEL), str(tmp_path / "demo.safetensors"), "--to", "fastvideo", "--quiet"]) == 0
    assert "patch_embedding.proj.weight" in load_file(tmp_path / "demo.safetensors")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["VAE", "x.pt", "--to", "research"], "which holds AutoencoderKLWan, expected one of AnyFlowFAR"),
        (["FILE", "x", "--to", "diffusers"], "--config: got None, expected the model's config"),
        (["absent", "x.safetensors", "--to", "fastgen"], "SRC: no file or directory"),
        (["SRC", "x.bin", "--to", "fastgen"], "expected a .safetensors file"),
        (["SRC", "x.safetensors", "--to", "research"], "expected a .pt file"),
        (["SRC", "SRC", "--to", "diffusers", "--overwrite"], "got the source"),
        (["SRC", "x.safetensors", "--to", "fastgen", "--base", "absent"], "--base: no file"),
        (["SRC", "x.safetensors", "--to", "onnx"], "invalid choice"),
        (["MIXED", "x.safetensors", "--to", "fastvideo"], "expected one layout"),
    ],
)
def test_bad_input_is_named_and_writes_nothing(arguments, message, source, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    state = load_file(source / WEIGHTS)
    save_file(state | {"r_embedder.time_embedder.linear_1.weight": torch.zeros(1)}, tmp_path / "mixed.safetensors")
    vae = tmp_path.parent / "vae"
    vae.mkdir(exist_ok=True)
    (vae / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKLWan"}))
    places = {"SRC": str(source), "MIXED": "mixed.safetensors", "VAE": str(vae), "FILE": str(source / WEIGHTS)}
    assert main(["convert", *(places.get(argument, argument) for argument in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["mixed.safetensors"]
