"""Contracts, size maps, identity and pixel codecs, and the UMT5 text encoder."""

from __future__ import annotations

import builtins

import pytest
import torch

from anyflow_runtime.decoders import DecoderConfig, PixelDecoderConfig
from anyflow_runtime.decoders.base import StreamingVideoDecoder
from anyflow_runtime.encoders import (
    Encoder,
    EncoderConfig,
    NullEncoder,
    NullEncoderConfig,
    PixelEncoderConfig,
    StreamingEncoder,
    StreamingVideoEncoder,
    UMT5TextEncoderConfig,
)
from anyflow_runtime.encoders.text import clean_prompt


class RatioFourEncoder(StreamingVideoEncoder):
    spatial_compression_ratio = 8
    temporal_compression_ratio = 4

    def initialize_autoregressive_cache(self):
        raise NotImplementedError


class RatioFourDecoder(StreamingVideoDecoder):
    spatial_compression_ratio = 8
    temporal_compression_ratio = 4

    def initialize_autoregressive_cache(self):
        raise NotImplementedError


encoder, decoder = RatioFourEncoder(EncoderConfig()), RatioFourDecoder(DecoderConfig())


@pytest.mark.parametrize("latents, first, later", [(1, 1, 4), (2, 5, 8), (3, 9, 12), (21, 81, 84)])
def test_size_maps_have_the_numbers_of_the_wan_vae(latents, first, later):
    for index, pixels in ((0, first), (1, later), (7, later)):
        assert decoder.get_output_temporal_size(index, latents) == pixels
        assert decoder.get_input_temporal_size(index, pixels) == latents
        assert encoder.get_output_temporal_size(index, pixels) == latents
        assert encoder.get_input_temporal_size(index, latents) == pixels


def test_size_maps_add_up_over_a_far_rollout():
    """Chunks of 1, 3 x 6 and 2 latents are 81 frames: a lost causal first frame would make it 84."""
    chunks = [1, 3, 3, 3, 3, 3, 3, 2]
    assert sum(decoder.get_output_temporal_size(i, n) for i, n in enumerate(chunks)) == 81


@pytest.mark.parametrize("error", [ValueError, AssertionError])
@pytest.mark.parametrize("index, pixels", [(0, 8), (1, 9), (0, 0), (1, 0), (2, -4), (-1, 4)])
def test_unreachable_pixel_counts_raise(index, pixels, error):
    with pytest.raises(error, match=r"autoregressive_index|pixel frames"):
        decoder.get_input_temporal_size(index, pixels)
    with pytest.raises(error, match=r"autoregressive_index|pixel frames"):
        encoder.get_output_temporal_size(index, pixels)


@pytest.mark.parametrize("latents", [0, -1])
def test_fewer_than_one_latent_raises(latents):
    """0 latents at chunk 0 must not become -3 frames."""
    with pytest.raises(ValueError, match=r"latent frames: got .*, expected at least 1"):
        decoder.get_output_temporal_size(0, latents)
    with pytest.raises(AssertionError):
        encoder.get_input_temporal_size(0, latents)


def test_plain_encoder_builds_but_abstract_categories_do_not():
    assert type(EncoderConfig().setup()) is Encoder
    with pytest.raises(TypeError, match="abstract"):
        DecoderConfig().setup()
    with pytest.raises(TypeError, match="abstract"):
        StreamingEncoder(EncoderConfig())


def test_null_encoder_fits_the_context_slot_and_the_pipeline_slot():
    null = NullEncoderConfig().setup()
    payload = object()
    assert isinstance(null, (Encoder, StreamingEncoder)) and isinstance(null, NullEncoder)
    assert null(payload) is payload
    assert null(payload, autoregressive_index=3, cache=null.initialize_autoregressive_cache()) is payload


def test_null_encoder_refuses_a_context_it_would_ignore():
    with pytest.raises(TypeError, match="text"):
        NullEncoderConfig().setup().initialize_autoregressive_cache(text="x")


@pytest.mark.parametrize("block", [1, 2])
def test_pixel_codec_is_lossless(block):
    video = torch.rand(2, 5, 3, 4, 6)
    latents = PixelEncoderConfig(block=block, pixel_range="unit").setup()(video, 1)
    assert latents.shape == (2, 5, 3 * block**2, 4 // block, 6 // block)
    back = PixelDecoderConfig(block=block).setup()(latents, 1)
    torch.testing.assert_close(back, video * 2 - 1)


def test_pixel_decoder_clamps():
    assert PixelDecoderConfig().setup()(torch.full((1, 3, 2, 2), 7.0)).max() == 1


@pytest.mark.parametrize("shape", [(5, 4, 2, 2), (3, 2, 2), (0, 3, 2, 2)])
def test_pixel_decoder_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"input: got .*, expected shape"):
        PixelDecoderConfig().setup()(torch.zeros(shape))


@pytest.mark.parametrize(
    "config", [NullEncoderConfig(), PixelEncoderConfig(block=2), PixelDecoderConfig(), UMT5TextEncoderConfig(path="x")]
)
def test_configs_hash_and_print(config):
    assert hash(config) == hash(type(config)(**{k: v for k, v in vars(config).items() if k != "_target"}))
    assert str(config).startswith(type(config).__name__ + ":")


# Text -------------------------------------------------------------------------------------------------------------

PROMPTS = ["a  red fox &amp;amp; a hare\n run", "fog", "", "a " * 40]


@pytest.fixture(scope="module")
def text_parts():
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "</s>", "<unk>", "a", "red", "fox", "&", "hare", "run", "fog"]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", words.index("</s>"))]
    )
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = transformers.UMT5Config(
        vocab_size=len(words), d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4, dropout_rate=0.0
    )
    return transformers.UMT5EncoderModel(config).eval(), fast


def test_text_embeddings_equal_the_diffusers_pipeline(text_parts):
    """Witness: diffusers. Cleaning, truncation, mask, and zeros past the prompt, for prompts of unequal length."""
    diffusers = pytest.importorskip("diffusers")
    model, tokenizer = text_parts
    pipeline = diffusers.AnyFlowFARPipeline(
        tokenizer=tokenizer, text_encoder=model, vae=None, transformer=None, scheduler=None
    )
    with torch.no_grad():
        ref, _ = pipeline.encode_prompt(
            PROMPTS, do_classifier_free_guidance=False, max_sequence_length=32, device=torch.device("cpu")
        )
    out = UMT5TextEncoderConfig(max_length=32).setup(text_encoder=model, tokenizer=tokenizer)(PROMPTS)
    assert out.shape == ref.shape == (4, 32, 16)
    torch.testing.assert_close(out, ref, rtol=1e-5, atol=1e-6)
    assert torch.equal(out == 0, ref == 0)


def test_one_prompt_is_a_batch_of_one_padded_to_512(text_parts):
    model, tokenizer = text_parts
    encoder = UMT5TextEncoderConfig().setup(text_encoder=model, tokenizer=tokenizer)
    out = encoder("a red fox")
    assert out.shape == (1, 512, 16)
    assert out[:, :4].abs().amin() > 0 and out[:, 4:].abs().amax() == 0


def test_text_encoder_loads_a_diffusers_directory(text_parts, tmp_path):
    model, tokenizer = text_parts
    model.save_pretrained(tmp_path / "text_encoder")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    loaded = UMT5TextEncoderConfig(path=str(tmp_path), max_length=16).setup()
    given = UMT5TextEncoderConfig(max_length=16).setup(text_encoder=model, tokenizer=tokenizer)
    torch.testing.assert_close(loaded("a red fox"), given("a red fox"))


@pytest.mark.parametrize("prompts, error", [([], ValueError), ([3], TypeError), (["a", None], TypeError)])
def test_text_encoder_refuses_what_is_no_prompt(text_parts, prompts, error):
    model, tokenizer = text_parts
    encoder = UMT5TextEncoderConfig().setup(text_encoder=model, tokenizer=tokenizer)
    with pytest.raises(error, match=r"input: got .*, expected"):
        encoder(prompts)


def test_text_encoder_needs_a_path_or_both_parts(text_parts):
    with pytest.raises(ValueError, match="path, text_encoder, tokenizer"):
        UMT5TextEncoderConfig().setup(text_encoder=text_parts[0])
    with pytest.raises(ValueError, match="path, text_encoder, tokenizer"):
        UMT5TextEncoderConfig(path="x").setup(tokenizer=text_parts[1])


def test_prompt_cleaning_equals_diffusers():
    pytest.importorskip("ftfy")
    wan = pytest.importorskip("diffusers.pipelines.wan.pipeline_wan")
    for text in [*PROMPTS, "âœ” doubly &lt;b&gt; \t spaced\u00a0out ", "&amp;lt;", "\u3000x\u2028y"]:
        assert clean_prompt(text) == wan.prompt_clean(text)


def test_missing_package_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_transformers(name, *args, **kwargs):
        if name == "transformers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_transformers)
    with pytest.raises(ImportError, match=r"anyflow-kernels\[diffusers\]"):
        UMT5TextEncoderConfig(path="x").setup()
