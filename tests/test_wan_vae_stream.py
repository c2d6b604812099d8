"""The streaming Wan VAE against diffusers' one-shot encode and decode, for both generations of the VAE."""

from __future__ import annotations

import builtins
import copy
import gc
import itertools
from typing import Any

import pytest
import torch

from anyflow_runtime.streaming import AsyncDecoder
from anyflow_runtime.wan_vae import WanVAEEncoderConfig, WanVAEStreamDecoderConfig
from anyflow_runtime.wan_vae.decoder_layers import UpsampleConv

diffusers = pytest.importorskip("diffusers")

MEAN, STD = [0.1, -0.2, 0.3, 0.5], [1.0, 0.5, 2.0, 1.3]
WAN22 = {"is_residual": True, "patch_size": 2, "in_channels": 12, "out_channels": 12, "scale_factor_spatial": 16}
KINDS = {"wan21": {}, "wan22": {**WAN22, "decoder_base_dim": 8}}
LENGTH = 5


def make_vae(kind, **changes):
    torch.manual_seed(0)
    dims = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}
    vae = diffusers.AutoencoderKLWan(**dims, latents_mean=MEAN, latents_std=STD, **KINDS[kind], **changes).eval()
    with torch.no_grad():
        for parameter in vae.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return vae.requires_grad_(False)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Convolutions as small as these spend more time waking threads than computing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=list(KINDS))
def vae(request):
    return make_vae(request.param)


@pytest.fixture(scope="module")
def decoder(vae):
    return WanVAEStreamDecoderConfig().setup(vae=vae)


@pytest.fixture(scope="module")
def encoder(vae):
    return WanVAEEncoderConfig().setup(vae=vae)


def latents(frames=LENGTH, batch=2, height=2, width=3, seed=1):
    return torch.randn(batch, frames, 4, height, width, generator=torch.Generator().manual_seed(seed))


def statistics(like):
    return [torch.tensor(values).view(4, 1, 1).to(like) for values in (MEAN, STD)]


def diffusers_decode(vae, z):
    mean, std = statistics(z)
    return vae.decode((z * std + mean).transpose(1, 2)).sample.transpose(1, 2)


def diffusers_encode(vae, video):
    mu = vae.encode(video.transpose(1, 2)).latent_dist.mode().transpose(1, 2)
    mean, std = statistics(mu)
    return (mu - mean) / std


def stream(module, chunks, cache=None):
    cache = cache or module.initialize_autoregressive_cache()
    return torch.cat([module(chunk, i, cache) for i, chunk in enumerate(chunks)], dim=-4)


def partitions(total):
    """All ways to write `total` as an ordered sum."""
    for cuts in itertools.product([False, True], repeat=total - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [total]
        yield [end - start for start, end in zip([0, *ends], ends, strict=False)]


def error(out, ref):
    assert out.shape == ref.shape
    return float((out.double() - ref.double()).norm() / ref.double().norm())


@pytest.mark.parametrize("per_pass", [1, LENGTH], ids=["by one", "whole chunks"])
def test_every_partition_decodes_to_the_one_shot_video(vae, per_pass):
    """Single latents in mid-stream included, which lose their left context in other streaming decoders."""
    decoder = WanVAEStreamDecoderConfig(latent_frames_per_pass=per_pass).setup(vae=vae)
    z = latents()
    ref = diffusers_decode(vae, z)
    for part in partitions(LENGTH):
        out = stream(decoder, z.split(part, dim=1))
        assert error(out, ref) < 2e-5, part
        assert (out - ref).abs().max() < 1e-4, part


@pytest.mark.parametrize("per_pass", [2, 3])
def test_passes_within_a_chunk_do_not_show(vae, per_pass):
    decoder = WanVAEStreamDecoderConfig(latent_frames_per_pass=per_pass).setup(vae=vae)
    assert error(decoder(latents()), diffusers_decode(vae, latents())) < 2e-5


def test_chunk_sizes_are_those_of_the_size_map(decoder):
    cache = decoder.initialize_autoregressive_cache()
    side = decoder.spatial_compression_ratio
    for i, n in enumerate((1, 3, 1, 2)):
        video = decoder(latents(n), i, cache)
        assert video.shape == (2, decoder.get_output_temporal_size(i, n), 3, 2 * side, 3 * side)
        assert video.abs().max() <= 1


def test_a_chunk_without_cache_has_the_size_of_its_index(decoder):
    assert decoder(latents(2), 0).shape[1] == 5
    assert decoder(latents(2), 3).shape[1] == 8


def test_interleaved_rollouts_do_not_touch_each_other(vae, decoder):
    """State kept on the module, as in diffusers, would mix the two videos."""
    a, b = latents(seed=3), latents(seed=4)
    caches = [decoder.initialize_autoregressive_cache() for _ in range(2)]
    frames: list[list[torch.Tensor]] = [[], []]
    for i in range(LENGTH):
        for k, z in enumerate((a, b)):
            frames[k].append(decoder(z[:, i : i + 1], i, caches[k]))
        vae.decode(torch.randn(1, 4, 1, 2, 2))
    for z, got in ((a, frames[0]), (b, frames[1])):
        assert error(torch.cat(got, dim=1), diffusers_decode(vae, z)) < 2e-5


def test_a_copied_cache_is_a_branch(decoder):
    z = latents()
    cache = decoder.initialize_autoregressive_cache()
    decoder(z[:, :2], 0, cache)
    branch = copy.copy(cache)
    decoder(latents(1, seed=9), 1, branch)
    assert error(decoder(z[:, 2:], 1, cache), decoder(z)[:, 5:]) < 2e-5


def test_leading_dimensions_are_kept(decoder):
    z = latents(3)
    out = decoder(z[None])
    assert torch.equal(out[0], decoder(z))
    torch.testing.assert_close(decoder(z[0]), decoder(z)[0], rtol=1e-5, atol=1e-5)


def test_failure_leaves_the_cache_usable(decoder, monkeypatch):
    """A chunk that fails half way (here for memory, in its second pass) can be decoded again."""
    z = latents(6)
    cache = decoder.initialize_autoregressive_cache()
    head = decoder(z[:, :1], 0, cache)
    real: Any = decoder._pass
    calls: list[None] = []

    def fails_at_second_pass(*args):
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("simulated")
        return real(*args)

    monkeypatch.setattr(decoder, "_pass", fails_at_second_pass)
    with pytest.raises(torch.OutOfMemoryError):
        decoder(z[:, 1:], 1, cache)
    assert len(calls) == 2
    monkeypatch.undo()
    assert error(torch.cat([head, decoder(z[:, 1:], 1, cache)], dim=1), decoder(z)) < 2e-5


@pytest.mark.parametrize("index", [0, 2])
def test_wrong_order_raises_and_leaves_the_cache_usable(decoder, index):
    z = latents(2)
    cache = decoder.initialize_autoregressive_cache()
    decoder(z[:, :1], 0, cache)
    for kind in (ValueError, AssertionError):
        with pytest.raises(kind, match=f"got {index}, expected 1"):
            decoder(z[:, 1:], index, cache)
    assert decoder(z[:, 1:], 1, cache).shape[1] == 4


@pytest.mark.parametrize(
    "bad, kind",
    [
        (torch.zeros(1, 2, 5, 2, 3), ValueError),
        (torch.zeros(4, 2, 3), ValueError),
        (torch.zeros(1, 0, 4, 2, 3), ValueError),
        (torch.zeros(1, 2, 4, 2, 3, dtype=torch.int64), TypeError),
        ([1.0], TypeError),
    ],
)
def test_bad_latents_are_named(decoder, bad, kind):
    with pytest.raises(kind, match=r"input: got .*, expected"):
        decoder(bad)


def test_a_chunk_of_another_size_is_refused(decoder):
    cache = decoder.initialize_autoregressive_cache()
    decoder(latents(1), 0, cache)
    with pytest.raises(ValueError, match=r"got \(B, C, height, width\) = \(1, 4, 2, 3\), expected \(2, 4, 2, 3\)"):
        decoder(latents(1, batch=1), 1, cache)


def live_tensor_bytes():
    gc.collect()
    return sum(t.untyped_storage().nbytes() for t in gc.get_objects() if type(t) is torch.Tensor)


def test_memory_does_not_grow_with_the_video(decoder):
    cache = decoder.initialize_autoregressive_cache()
    sizes = []
    for i in range(20):
        decoder(latents(1, batch=1), i, cache)
        if i in (2, 19):
            sizes.append((cache.nbytes, live_tensor_bytes()))
    assert sizes[0] == sizes[1]


def test_history_does_not_keep_whole_chunks_alive(decoder):
    cache = decoder.initialize_autoregressive_cache()
    decoder(latents(4), 0, cache)
    for tensor in cache.history[0]:
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("kind", list(KINDS))
def test_bf16_is_no_less_accurate_than_diffusers(kind):
    """Budget: error against fp64 <= 2 x diffusers' own in bf16 + one rounding step."""
    z = latents()
    exact = diffusers_decode(make_vae(kind).double(), z.double())
    low = diffusers_decode(make_vae(kind).bfloat16(), z.bfloat16())
    out = WanVAEStreamDecoderConfig(dtype=torch.bfloat16).setup(vae=make_vae(kind))(z)
    assert out.dtype == torch.bfloat16
    assert error(out, exact) <= 2 * error(low, exact) + 2**-8


def test_another_dtype_leaves_the_given_vae_alone(vae):
    decoder = WanVAEStreamDecoderConfig(dtype=torch.bfloat16).setup(vae=vae)
    assert decoder.dtype == torch.bfloat16 and vae.dtype == torch.float32


def test_weights_are_shared_not_copied(vae, decoder, encoder):
    assert decoder.decoder.conv_in.weight.data_ptr() == vae.decoder.conv_in.weight.data_ptr()
    assert encoder.encoder.conv_in.weight.data_ptr() == vae.encoder.conv_in.weight.data_ptr()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("height, width", [(1, 1), (3, 5)])
def test_folded_upsampling_equals_upsample_then_convolve(height, width, bias):
    """Witness: fp64. Odd sizes and borders, where the phases read the padding."""
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(6, 4, 3, padding=1, bias=bias).double()
    x = torch.randn(2, 6, height, width, dtype=torch.float64)
    ref = conv(torch.nn.functional.interpolate(x, scale_factor=2, mode="nearest-exact"))
    torch.testing.assert_close(UpsampleConv(conv)(x), ref.detach(), rtol=1e-12, atol=1e-12)


def test_one_pass_compiles_without_a_graph_break(vae):
    decoder = WanVAEStreamDecoderConfig().setup(vae=vae)
    ref = decoder(latents(3))
    torch.compiler.reset()
    decoder._pass = torch.compile(decoder._decode_pass, backend="eager", fullgraph=True, dynamic=False)
    assert error(stream(decoder, latents(3).split((1, 2), dim=1)), ref) < 2e-5


def test_async_decoder_gives_the_same_frames(decoder):
    z = latents()
    cache, background = decoder.initialize_autoregressive_cache(), AsyncDecoder(decoder, overlap=False)
    pending = [background.submit(chunk, i, cache) for i, chunk in enumerate(z.split((1, 3, 1), dim=1))]
    assert all(frames.ready() for frames in pending)
    assert error(torch.cat([frames.wait() for frames in pending], dim=1), decoder(z)) < 2e-5


@pytest.mark.gpu
def test_async_decoder_overlaps_safely_on_cuda():
    """Latents freed and overwritten by the main stream right after submission must not change the frames."""
    if not torch.cuda.is_available():
        pytest.skip("needs CUDA")
    decoder = WanVAEStreamDecoderConfig().setup(vae=make_vae("wan21").cuda())
    z = latents()
    ref = decoder(z.cuda())
    cache, background, pending = decoder.initialize_autoregressive_cache(), AsyncDecoder(decoder), []
    for i, chunk in enumerate(z.split((1, 3, 1), dim=1)):
        pending.append(background.submit(chunk.cuda(), i, cache))
        torch.randn(chunk.shape, device="cuda")
    assert error(torch.cat([frames.wait() for frames in pending], dim=1), ref) < 1e-3


# Encoder ----------------------------------------------------------------------------------------------------------


def pixels(encoder, frames=17, batch=2):
    side = encoder.spatial_compression_ratio
    return torch.rand(batch, frames, 3, 2 * side, 3 * side, generator=torch.Generator().manual_seed(5)) * 2 - 1


@pytest.mark.parametrize("part", [(17,), (1, 4, 4, 8), (5, 12), (9, 4, 4)])
def test_streamed_encoding_equals_one_shot(vae, encoder, part):
    video = pixels(encoder)
    assert error(stream(encoder, video.split(part, dim=1)), diffusers_encode(vae, video)) < 2e-5


@pytest.mark.parametrize("per_pass", [2, 5])
def test_encoder_passes_do_not_show(vae, per_pass):
    encoder = WanVAEEncoderConfig(latent_frames_per_pass=per_pass).setup(vae=vae)
    video = pixels(encoder)
    assert error(encoder.encode(video), diffusers_encode(vae, video)) < 2e-5


def test_unit_range_is_scaled(vae, encoder):
    video = pixels(encoder, 5)
    unit = WanVAEEncoderConfig(pixel_range="unit").setup(vae=vae)
    assert error(unit.encode((video + 1) / 2), encoder.encode(video)) < 2e-5


def test_encoder_rejects_frame_counts_no_chunk_has(encoder):
    with pytest.raises(ValueError, match=r"expected 1 \+ 4k"):
        encoder(pixels(encoder, 8))
    cache = encoder.initialize_autoregressive_cache()
    encoder(pixels(encoder, 5), 0, cache)
    with pytest.raises(AssertionError, match="expected 4k"):
        encoder(pixels(encoder, 9), 1, cache)
    assert encoder(pixels(encoder, 4), 1, cache).shape[1] == 1


def test_encoder_rejects_sides_off_the_grid(encoder):
    with pytest.raises(ValueError, match=r"got height and width .*, expected multiples"):
        encoder(torch.zeros(1, 1, 3, 20, 33))


def test_encoder_rejects_wrong_order_and_size(encoder):
    cache = encoder.initialize_autoregressive_cache()
    with pytest.raises(ValueError, match="got 1, expected 0"):
        encoder(pixels(encoder, 4), 1, cache)
    encoder(pixels(encoder, 1), 0, cache)
    with pytest.raises(ValueError, match=r"input: got \(B, C, height, width\)"):
        encoder(pixels(encoder, 4, batch=1), 1, cache)


# Loading ----------------------------------------------------------------------------------------------------------


def test_loads_a_diffusers_directory(tmp_path):
    vae = make_vae("wan21")
    vae.save_pretrained(tmp_path / "vae")
    decoder = WanVAEStreamDecoderConfig(path=str(tmp_path)).setup()
    encoder = WanVAEEncoderConfig(path=str(tmp_path), dtype=torch.float64).setup()
    assert error(decoder(latents()), diffusers_decode(vae, latents())) < 2e-5
    assert encoder.dtype == torch.float64


def test_needs_exactly_one_source(vae):
    with pytest.raises(ValueError, match="got neither"):
        WanVAEStreamDecoderConfig().setup()
    with pytest.raises(ValueError, match="got both"):
        WanVAEEncoderConfig(path="x").setup(vae=vae)
    with pytest.raises(TypeError, match="got Linear, expected a diffusers AutoencoderKLWan"):
        WanVAEEncoderConfig().setup(vae=torch.nn.Linear(1, 1))


def test_missing_diffusers_names_the_extra(monkeypatch):
    real = builtins.__import__

    def without_diffusers(name, *args, **kwargs):
        if name == "diffusers":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_diffusers)
    with pytest.raises(ImportError, match=r"anyflow-kernels\[diffusers\]"):
        WanVAEStreamDecoderConfig(path="x").setup()


@pytest.mark.parametrize(
    "changes", [{"latent_frames_per_pass": 0}, {"compile_mode": "reduce-overhead"}, {"tile_size": 64, "tile_stride": 0}]
)
def test_bad_decoder_settings_are_refused(changes):
    with pytest.raises(ValueError, match=next(reversed(changes))):
        WanVAEStreamDecoderConfig(**changes)


def test_bad_encoder_settings_are_refused():
    with pytest.raises(ValueError, match="pixel_range"):
        WanVAEEncoderConfig(pixel_range="bytes")
