"""Sources of training samples: order, shards, tars, and what is wrong with them."""

from __future__ import annotations

import io

import pytest
import torch
from safetensors.torch import save_file

from anyflow_runtime.training import GlobalBatch
from anyflow_runtime.training.config import DataSettings
from anyflow_runtime.training.data.files import SafetensorsSource, TarSource
from anyflow_runtime.training.data.open import open_source
from anyflow_runtime.training.data.source import EpochOrder
from anyflow_runtime.training.trainer.trainer import train

from .trainer_runs import FAR, tiny, write_shards, write_tar


def test_an_epoch_holds_every_sample_once_in_a_new_order() -> None:
    order = EpochOrder(7, seed=1)
    epochs = [[order[7 * e + i] for i in range(7)] for e in range(3)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and epochs[0] != epochs[1]


@pytest.mark.parametrize("kind", ["safetensors", "tar", "shapes"])
def test_processes_share_out_the_samples_of_one(kind, tmp_path) -> None:
    """Micro-steps of one process and ranks of several take the same samples in the same places."""
    write_shards(tmp_path)
    write_tar(tmp_path, tmp_path)
    source = open_source(DataSettings(kind=kind, path=str(tmp_path), frames=3, height=8, width=8), seed=2)
    alone = source.samples(4, GlobalBatch(4))
    parts = [source.samples(4, GlobalBatch(2, rank, 2)) for rank in range(2)]
    parts_accumulated = [source.samples(4, GlobalBatch(2, 0, 1, micro, 2)) for micro in range(2)]
    for split in (parts, parts_accumulated):
        assert sum((p.names for p in split), ()) == alone.names
        assert torch.equal(torch.cat([p.latents for p in split]), alone.latents)


def test_tars_and_shards_give_the_same_samples(tmp_path) -> None:
    write_shards(tmp_path)
    write_tar(tmp_path, tmp_path)
    a, b = (kind(tmp_path, seed=0).samples(0, GlobalBatch(5)) for kind in (SafetensorsSource, TarSource))
    assert a.text is not None and b.text is not None
    assert torch.equal(a.latents, b.latents) and torch.equal(a.text, b.text)


def test_a_tar_sample_without_caption_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    write_tar(tmp_path, tmp_path, drop="0002.prompt_embeds.npy")
    with pytest.raises(
        ValueError, match=r"000.tar: sample '0002' lacks \['0002.prompt_embeds.npy'\] \(missing caption\)"
    ):
        TarSource(tmp_path, 0)


def test_a_shard_without_captions_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    save_file({"latents": torch.zeros(1, 3, 3, 8, 8)}, tmp_path / "002.safetensors")
    with pytest.raises(ValueError, match=r"002.safetensors: has \['latents'\], lacks.*missing captions"):
        SafetensorsSource(tmp_path, 0)


@pytest.mark.parametrize(
    ("latents", "text", "message"),
    [
        ((1, 4, 3, 8, 8), (1, 5, 8), r"001.*got latents \(4, 3, 8, 8\), expected \(3, 3, 8, 8\)"),
        ((1, 3, 3, 8, 8), (1, 5, 9), r"001.*got prompt_embeds \(5, 9\), expected \(5, 8\)"),
        ((2, 3, 3, 8, 8), (1, 5, 8), r"001.*got \[2\] latents with \[1\] prompt_embeds"),
        ((1, 3, 8, 8), (1, 5, 8), r"001.*expected \(F, C, H, W\) and \(S, D\)"),
    ],
)
def test_mismatched_shards_are_named(latents, text, message, tmp_path) -> None:
    write_shards(tmp_path, counts=(2,))
    save_file({"latents": torch.zeros(latents), "prompt_embeds": torch.zeros(text)}, tmp_path / "001.safetensors")
    with pytest.raises(ValueError, match=message):
        SafetensorsSource(tmp_path, 0)


def test_a_missing_negative_prompt_or_directory_is_named(tmp_path) -> None:
    write_shards(tmp_path)
    (tmp_path / "negative.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"negative\.safetensors"):
        SafetensorsSource(tmp_path, 0)
    with pytest.raises(FileNotFoundError, match="no directory"):
        TarSource(tmp_path / "absent", 0)
    with pytest.raises(ValueError, match=r"data.path: got None"):
        open_source(DataSettings(kind="tar"), 0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"far": {"chunk_partition": [1, 1, 2]}},
            r"got latents with 3 frames, expected sum\(far.chunk_partition\) = 4",
        ),
        (
            {"model": {"config": {"in_channels": 4, "out_channels": 4}}},
            r"latents with 3 channels, expected the model's 4",
        ),
        ({"model": {"config": {"text_dim": 6}}}, r"prompt embeddings of 8 values, expected the model's 6"),
    ],
)
def test_samples_that_the_model_does_not_take_are_refused_before_training(changes, message, tmp_path) -> None:
    write_shards(tmp_path)
    with pytest.raises(ValueError, match=message):
        train(tiny(FAR, data={"path": str(tmp_path)}, **changes), tmp_path / "run", io.StringIO())
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
