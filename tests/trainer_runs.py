"""Tiny configs, data and models for the tests of training, its oracle, and ways to look into a run."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.training.config import config_from_dict, merged
from anyflow_runtime.training.trainer.checkpoint import RUN, load_tensors

ORACLE = json.loads((Path(__file__).parent / "data" / "training.json").read_text())
SIZES = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 3, "out_channels": 3, "text_dim": 6,
    "freq_dim": 16, "ffn_dim": 24, "num_layers": 2,
}  # fmt: skip
TINY = SIZES | {
    "attention_head_dim": 12, "text_dim": 8, "num_layers": 1, "full_chunk_limit": 2, "chunk_partition": [1, 1, 1]
}  # fmt: skip
DEMO = {
    "name": "tiny",
    "seed": 5,
    "model": {"kind": "demo", "config": TINY},
    "data": {"kind": "shapes", "frames": 3, "height": 8, "width": 8},
    "far": {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2, "bidirectional_probability": 0.5},
    "flow_map": {"guidance": None, "shift": 2.0},
    "phases": [
        {"objective": "flow_matching", "iterations": 4, "lr": 0.002, "warmup": 2},
        {"objective": "flow_map", "iterations": 4, "lr": 0.001},
    ],
    "ema": {"decay": 0.9, "warmup": 1},
    "batch_size": 4,
    "precision": "fp32",
    "log_every": 1,
    "checkpoint_every": 2,
}
FAR_ONLY = ("full_chunk_limit", "chunk_partition", "compressed_patch_size")
FAR = {
    "model": {"kind": "far", "config": TINY | {"patch_size": [1, 2, 2], "compressed_patch_size": [1, 4, 4]}},
    "far": {"chunk_partition": [1, 1, 1], "full_chunk_limit": 2, "bidirectional_probability": 0.5},
    "phases": [{"objective": "flow_map", "iterations": 2, "lr": 0.001}],
    "ema": {"decay": 0.9, "warmup": 0},
    "batch_size": 2,
    "precision": "fp32",
    "log_every": 1,
}


def double(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


class Killed(BaseException):
    """Stands for a death of the process: nothing catches it."""


def tiny(base: dict = DEMO, **changes):
    return config_from_dict(merged(base, changes))


def checkpoint(out: Path, step: int) -> dict:
    """What a checkpoint holds: `run.json`, and under "networks" its tensors, nested by network and kind."""
    directory = out / "checkpoints" / f"step-{step:08}"
    found = dcp.FileSystemReader(directory).read_metadata().state_dict_metadata
    tensors = {name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in found.items()}
    load_tensors(directory, tensors)
    networks: dict = {}
    for name, tensor in tensors.items():
        network, kind, entry = name.split("/", 2)
        kinds = networks.setdefault(network, {"weights": {}, "frozen": {}, "optimiser": {}, "average": {}})
        if kind == "optimiser":
            moment, parameter = entry.split("/", 1)
            kinds[kind].setdefault(parameter, {})[moment] = tensor
        else:
            kinds[kind][entry] = tensor
    return {**json.loads((directory / RUN).read_text()), "networks": networks}


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same_bits(a, b) -> None:
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same_bits(a[key], b[key])
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
    else:
        assert a == b


def write_shards(directory: Path, counts=(3, 2), frames: int = 3, dim: int = 8) -> None:
    generator = torch.Generator().manual_seed(1)
    for i, count in enumerate(counts):
        latents = torch.randn(count, frames, 3, 8, 8, generator=generator)
        text = torch.randn(count, 5, dim, generator=generator)
        save_file({"latents": latents, "prompt_embeds": text}, directory / f"{i:03}.safetensors")
    save_file({"prompt_embeds": torch.randn(5, dim, generator=generator)}, directory / "negative.safetensors")


def write_tar(directory: Path, shards: Path, drop: str | None = None) -> None:
    """The samples of shards as one tar."""
    index = 0
    with tarfile.open(directory / "000.tar", "w") as tar:
        for file in sorted(shards.glob("[0-9]*.safetensors")):
            tensors = load_file(file)
            for row in range(len(tensors["latents"])):
                for part in ("latents", "prompt_embeds"):
                    name = f"{index:04}.{part}.npy"
                    if name == drop:
                        continue
                    buffer = io.BytesIO()
                    np.save(buffer, tensors[part][row].numpy())
                    info = tarfile.TarInfo(name)
                    info.size = buffer.tell()
                    buffer.seek(0)
                    tar.addfile(info, buffer)
                index += 1
    save_file(load_file(shards / "negative.safetensors"), directory / "negative.safetensors")


def write_on_policy_inputs(directory: Path) -> None:
    """Shards, a FAR student, and a bidirectional teacher."""
    write_shards(directory)
    config = FAR["model"]["config"]
    torch.manual_seed(0)
    AnyFlowFARTransformer3DModel.from_config(config).save_pretrained(directory / "student")
    plain = {key: value for key, value in config.items() if key not in FAR_ONLY}
    AnyFlowTransformer3DModel.from_config(plain).save_pretrained(directory / "teacher")


def on_policy_config(directory: Path, **changes):
    config = tiny(
        merged(FAR, {"on_policy": {"step_choices": [2, 4], "student_every": 2}}),
        data={"path": str(directory)},
        phases=[{"objective": "on_policy", "iterations": 3, "lr": 0.001}],
        model={"path": str(directory / "student"), "teacher": str(directory / "teacher")},
        global_batch=4,
        checkpoint_every=1,
        keep_checkpoints=5,
        **changes,
    )
    return replace(config, model=replace(config.model, config={}))


def write_video_model(directory: Path) -> None:
    """A model directory with a Wan VAE of 3 latent channels, a UMT5 text encoder of width 8, and its tokenizer."""
    from diffusers import AutoencoderKLWan
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    torch.manual_seed(0)
    sizes = {"base_dim": 4, "z_dim": 3, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    vae = AutoencoderKLWan(**sizes, latents_mean=[0.1, -0.2, 0.3], latents_std=[1.0, 0.5, 2.0])
    vae.save_pretrained(directory / "vae")
    config = UMT5Config(vocab_size=8, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    UMT5EncoderModel(config).save_pretrained(directory / "text_encoder")
    words = {word: i for i, word in enumerate(["<pad>", "</s>", "<unk>", "a", "red", "blue", "ball"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    fast.save_pretrained(directory / "tokenizer")
