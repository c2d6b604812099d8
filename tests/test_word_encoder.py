"""The text encoder with a vocabulary of its own: tokens, padding, files, training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from anyflow_runtime.encoders import WordEncoder, WordEncoderConfig

SETTINGS = {"vocabulary": ("", "a", "red", "circle", "moves"), "length": 6, "dim": 8, "heads": 2}


def encoder(**changes) -> WordEncoder:
    return WordEncoder(WordEncoderConfig(**(SETTINGS | changes)))


def test_captions_become_words_whatever_their_case_and_punctuation() -> None:
    assert encoder().tokens("A red, circle moves.") == encoder().tokens("a red circle moves") == [1, 2, 3, 4, 0, 0]


def test_the_empty_caption_is_padding_and_has_an_embedding() -> None:
    """It is the negative prompt of the demo."""
    assert encoder().tokens("") == [0] * 6
    assert encoder()("").shape == (1, 6, 8) and encoder()("").isfinite().all()


def test_a_caption_is_embedded_alike_alone_and_in_a_batch() -> None:
    network = encoder()
    together = network(["a red circle", "moves"])
    assert torch.allclose(network("moves")[0], together[1], atol=1e-6)
    assert not torch.allclose(together[0], together[1], atol=1e-3)


def test_word_order_matters() -> None:
    """Without positions "a moves left and b moves right" would be its own opposite."""
    network = encoder()
    assert not torch.allclose(network("red circle").sum(1), network("circle red").sum(1), atol=1e-4)


def test_saved_encoder_loads_the_same(tmp_path: Path) -> None:
    network = encoder()
    network.save(tmp_path / "text_encoder")
    loaded = WordEncoderConfig(path=str(tmp_path / "text_encoder")).setup()
    assert torch.equal(network("a red circle"), loaded("a red circle"))
    assert loaded.config.vocabulary == SETTINGS["vocabulary"]
    assert [path.name for path in sorted((tmp_path / "text_encoder").iterdir())] == ["config.json", "model.safetensors"]


def test_forward_keeps_a_graph_for_training() -> None:
    network = encoder()
    network("a red circle").square().sum().backward()
    assert all(p.grad is not None for p in network.parameters())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: encoder().tokens("a red star"), r"unknown words \['star'\], expected only: a red circle moves"),
        (lambda: encoder().tokens("a a a a a a a"), "got 7 words, expected at most 6"),
        (lambda: encoder()([]), "got no captions"),
        (lambda: encoder(vocabulary=("a", "b")), "after the empty one"),
        (lambda: encoder(vocabulary=("", "b", "b")), "expected different words"),
        (lambda: encoder(dim=9), "multiple of heads"),
        (lambda: encoder(length=0), "length: got 0"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    encoder().save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors"):
        WordEncoder(WordEncoderConfig(path=str(tmp_path)))
    assert json.loads((tmp_path / "config.json").read_text())["length"] == 6
