"""VAE decoding: diffusers' `AutoencoderKLWan.decode` and ours, speed and peak memory, on random weights.

    python -m bench.vae_decode [--base-dim 96] [--latents 4] [--height 160] [--width 64] [--dtype float32] [--json FILE]
    python -m bench.vae_decode --base-dim 16 --latents 3 --height 64 --width 64 --repeats 2  # a look, in half a minute

Contestants: diffusers and ours in one call, both one latent frame at a time inside; ours streamed in chunks of 1 and
then `--chunk` latents as the AnyFlow-FAR rollout makes them; the same with each chunk in a single pass.  They take
turns; every one must match diffusers first.  Peak memory is that of tensors beyond what was held before, as PyTorch's
allocator counts it (on the CPU without the scratch memory inside oneDNN).  Multiply-adds a latent frame are printed as
the scale.  Much smaller frames say little: below 20480 channels x frames x rows PyTorch runs fp32 convolutions on the
CPU through a slow path of its own, which no released size meets.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from anyflow_runtime.wan_vae import WanVAEStreamDecoderCache, WanVAEStreamDecoderConfig
from bench.common import add_json_argument, check_close, interleaved_medians, keep_row, machine_line, print_rows

TOLERANCE = {"float32": 1e-4, "bfloat16": 5e-2}


def make_contestants(args: argparse.Namespace) -> dict[str, Callable[[], Tensor]]:
    """Each returns the (1, T, 3, H, W) video on the host, where an application sends the frames of finished chunks."""
    from diffusers import AutoencoderKLWan

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    vae: Any = AutoencoderKLWan(base_dim=args.base_dim)
    # The plain method: diffusers' own logs a remark about modules to keep in fp32, of which there are none.
    nn.Module.to(vae.eval().requires_grad_(False), device, getattr(torch, args.dtype))
    # A copy, since ours gives shared weights its layout, from which diffusers would profit.
    shared = copy.deepcopy(vae)
    decoder = WanVAEStreamDecoderConfig().setup(vae=shared)
    whole_chunks = WanVAEStreamDecoderConfig(latent_frames_per_pass=args.chunk).setup(vae=shared)
    z = torch.randn(1, args.latents, 16, args.height // 8, args.width // 8, device=device, dtype=vae.dtype)
    mean, std = (
        torch.tensor(v, device=device).view(16, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std)
    )

    def streamed(decoder: nn.Module) -> Tensor:
        cache = WanVAEStreamDecoderCache()
        chunks = [z[:, :1], *z[:, 1:].split(args.chunk, dim=1)]
        return torch.cat([decoder(chunk, i, cache).cpu() for i, chunk in enumerate(chunks)], dim=1)

    def diffusers() -> Tensor:
        return vae.decode((z * std + mean).to(z.dtype).transpose(1, 2)).sample.transpose(1, 2).cpu()

    return {
        "diffusers": torch.no_grad()(diffusers),
        "one call": lambda: decoder(z).cpu(),
        "streamed": lambda: streamed(decoder),
        "whole chunks": lambda: streamed(whole_chunks),
    }


def multiply_adds(args: argparse.Namespace) -> int:
    """Multiply-adds of the convolutions of diffusers' decoder for one latent frame in mid-stream, counted by hooks."""
    from diffusers import AutoencoderKLWan

    with torch.device("meta"):
        vae: Any = AutoencoderKLWan(base_dim=args.base_dim)
    total = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal total
        weight: Any = module.weight
        total += output.numel() * weight[0].numel()

    for layer in vae.decoder.modules():
        if isinstance(layer, (nn.Conv2d, nn.Conv3d)):
            layer.register_forward_hook(count)
    cache: list[Any] = [None] * 100
    with torch.no_grad():
        for first in (True, False):
            total = 0
            latent = torch.empty(1, 16, 1, args.height // 8, args.width // 8, device="meta")
            vae.decoder(latent, feat_cache=cache, feat_idx=[0], first_chunk=first)
    return total


def peak_bytes(fn: Callable[[], Any]) -> int:
    """Most memory in use while `fn` runs, beyond what was in use before."""
    if torch.cuda.is_available():
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    assert profile.profiler is not None
    held = peak = 0
    changes = (event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]")
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-dim", type=int, default=96, help="channels of the last stage; 96 is the released VAE")
    parser.add_argument("--latents", type=int, default=4, help="latent frames")
    parser.add_argument("--chunk", type=int, default=3, help="latent frames of a chunk when streamed")
    parser.add_argument("--height", type=int, default=160)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--dtype", choices=list(TOLERANCE), default="float32")
    parser.add_argument("--repeats", type=int, default=5)
    add_json_argument(parser)
    args = parser.parse_args()

    contestants = make_contestants(args)
    print(machine_line("diffusers"))
    macs = multiply_adds(args)
    print(f"{args.height} x {args.width}, {args.latents} latents, {args.dtype}: {macs / 1e9:.1f} GMAC a latent frame")
    reference = contestants["diffusers"]()
    errors = {
        name: check_close(name, fn(), reference, TOLERANCE[args.dtype])
        for name, fn in contestants.items()
        if name != "diffusers"
    }
    medians = interleaved_medians(contestants, repeats=args.repeats, warmup=1)
    rows = []
    for name, seconds in medians.items():
        peak = peak_bytes(contestants[name])
        speedup = medians["diffusers"] / seconds
        print(
            f"{name:<15}{seconds / args.latents * 1e3:9.1f} ms a latent {speedup:6.2f}x{peak / 2**20:9.0f} MiB peak"
            f"{macs * args.latents / seconds / 1e9:8.0f} GMAC/s   error {errors.get(name, 0.0):.1e}"
        )
        row = {"contestant": name, "seconds": seconds, "speedup": speedup, "peak_bytes": peak}
        shape = {key: getattr(args, key) for key in ("base_dim", "latents", "chunk", "height", "width", "dtype")}
        rows.append({**row, "error": errors.get(name, 0.0), **shape})
        keep_row(rows[-1], args.json)
    print_rows(rows)


if __name__ == "__main__":
    main()
