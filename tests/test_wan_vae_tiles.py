"""Tiles of the streaming Wan VAE: diffusers' tiled encode and decode exactly, and how far from no tiles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from anyflow_runtime.wan_vae import WanVAEEncoderConfig, WanVAEStreamDecoderConfig

pytest.importorskip("diffusers")

from .test_wan_vae_stream import KINDS, diffusers_decode, diffusers_encode, error, latents, make_vae, stream

SIDE = {"wan21": 8, "wan22": 16}  # pixels of a latent


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("height, width", [(7, 9), (4, 8), (3, 3)])
def test_decoding_equals_diffusers_tiled_decode(kind, height, width):
    vae = make_vae(kind)
    side = SIDE[kind]
    tiling = {"tile_sample_min_height": 4 * side, "tile_sample_min_width": 4 * side}
    tiling |= {"tile_sample_stride_height": 3 * side, "tile_sample_stride_width": 3 * side}
    vae.enable_tiling(**tiling)
    z = latents(3, 1, height, width)
    ref = diffusers_decode(vae, z)
    config = WanVAEStreamDecoderConfig(tile_size=4 * side, tile_stride=3 * side, latent_frames_per_pass=2)
    decoder = config.setup(vae=vae)
    assert error(stream(decoder, z.split((1, 2), dim=1)), ref) < 2e-5


def picture(kind, side):
    """A smooth picture, so that a tile does not look alike wherever it lies; (1, 1, 3, H, W)."""
    coarse = torch.rand(1, 3, 5, 5, generator=torch.Generator().manual_seed(5)) * 2 - 1
    return F.interpolate(coarse, size=(side * SIDE[kind],) * 2, mode="bilinear")[:, None]


@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("height, width", [(7, 9), (4, 8), (3, 3)])
def test_encoding_equals_diffusers_tiled_encode(kind, height, width):
    """In two chunks of a stream; diffusers counts its encoder's tiles in pixels after Wan 2.2's patchify."""
    vae, side = make_vae(kind), SIDE[kind]
    size, stride = (n * side // (vae.config.patch_size or 1) for n in (4, 3))
    vae.enable_tiling(size, size, stride, stride)
    video = torch.rand(1, 9, 3, height * side, width * side, generator=torch.Generator().manual_seed(5)) * 2 - 1
    ref = diffusers_encode(vae, video)
    encoder = WanVAEEncoderConfig(tile_size=4 * side, tile_stride=3 * side).setup(vae=vae)
    assert error(stream(encoder, video.split((5, 4), dim=1)), ref) < 2e-5


@pytest.mark.parametrize(("kind", "bounds"), [("wan21", (0.40, 0.20, 0.15)), ("wan22", (0.20, 0.08, 0.072))])
def test_the_more_tiles_overlap_the_closer_to_no_tiles(kind, bounds):
    """Relative error with overlaps of 0, 4 and 8 of 16 latents: 1.5 x what was measured, and falling."""
    vae, side, video = make_vae(kind), SIDE[kind], picture(kind, 20)
    whole = WanVAEEncoderConfig().setup(vae=vae)(video)
    errors = []
    for stride, bound in zip((16, 12, 8), bounds, strict=True):
        encoder = WanVAEEncoderConfig(tile_size=16 * side, tile_stride=stride * side).setup(vae=vae)
        errors.append(error(encoder(video), whole))
        assert errors[-1] < bound
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("kind", list(KINDS))
def test_latents_far_from_the_edges_of_tiles_are_those_without_tiles(kind):
    """With the attention silenced, which sees all of a tile: the first four rows and columns of 16, before a seam."""
    vae, side, video = make_vae(kind), SIDE[kind], picture(kind, 20)
    for attention in vae.encoder.mid_block.attentions:
        attention.proj.weight.zero_()
        attention.proj.bias.zero_()
    whole = WanVAEEncoderConfig().setup(vae=vae)(video)
    tiled = WanVAEEncoderConfig(tile_size=16 * side, tile_stride=12 * side).setup(vae=vae)(video)
    torch.testing.assert_close(tiled[..., :5, :5], whole[..., :5, :5], rtol=1e-5, atol=1e-5)
    assert error(tiled[..., 14:], whole[..., 14:]) > 0.01


@pytest.mark.parametrize("config", [WanVAEStreamDecoderConfig, WanVAEEncoderConfig])
def test_tiles_that_do_not_fit_are_refused(config):
    with pytest.raises(ValueError, match="tile_size: got 100, expected a multiple of 8 pixels"):
        config(tile_size=100, tile_stride=50).setup(vae=make_vae("wan21"))
    with pytest.raises(ValueError, match="tile_stride: got 96, expected 1 to tile_size = 64"):
        config(tile_size=64, tile_stride=96)


def test_a_chunk_that_fails_in_a_later_tile_leaves_the_cache_usable(monkeypatch):
    vae = make_vae("wan21")
    encoder = WanVAEEncoderConfig(tile_size=32, tile_stride=24).setup(vae=vae)
    video = torch.rand(1, 9, 3, 40, 40, generator=torch.Generator().manual_seed(5)) * 2 - 1
    cache, calls, real = encoder.initialize_autoregressive_cache(), [], encoder._pass

    def fails_at_third_tile(*args):
        calls.append(None)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("simulated")
        return real(*args)

    first = encoder(video[:, :5], 0, cache)
    monkeypatch.setattr(encoder, "_pass", fails_at_third_tile)
    with pytest.raises(torch.OutOfMemoryError):
        encoder(video[:, 5:], 1, cache)
    monkeypatch.undo()
    got = torch.cat([first, encoder(video[:, 5:], 1, cache)], dim=1)
    assert error(got, encoder(video)) < 2e-5
