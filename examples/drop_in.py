"""A diffusers AnyFlow pipeline on our kernels, in place, and back again.

    python examples/drop_in.py [MODEL] [--steps 4]

Makes one video by diffusers, by the same pipeline after `accelerate`, and after `restore`. You see seconds, and how
far the latents are apart: about 1e-6 where diffusers' padding is reproduced (fp32), more by default, as the padding
then does not enter the softmax, and exactly 0 after `restore`. Without MODEL (a directory or a hub id of a FAR
pipeline) it takes a small model with random weights.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import diffusers
import torch

from anyflow_runtime import accelerate, restore


def random_pipeline() -> Any:
    """A FAR pipeline of diffusers' classes at a small size; it takes embeddings, as it has no text encoder."""
    torch.manual_seed(0)
    transformer = diffusers.AnyFlowFARTransformer3DModel(
        num_attention_heads=4, attention_head_dim=64, num_layers=4, ffn_dim=1024, text_dim=64
    )
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    return diffusers.AnyFlowFARPipeline(
        tokenizer=None, text_encoder=None, transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler
    )


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", help="directory or hub id of a FAR pipeline; default: random weights")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--height", type=int, default=96)
    parser.add_argument("--width", type=int, default=160)
    args = parser.parse_args(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.model is None:
        pipe, condition = random_pipeline().to(device), {"prompt_embeds": torch.randn(1, 12, 64).to(device)}
    else:
        pipe = diffusers.AnyFlowFARPipeline.from_pretrained(args.model, dtype=torch.bfloat16).to(device)
        condition = {"prompt": "a lighthouse above a stormy sea"}
    pipe.set_progress_bar_config(disable=True)
    size = {"height": args.height, "width": args.width, "num_frames": 25, "chunk_partition": [1, 3, 3]}

    def video(name: str) -> torch.Tensor:
        start = time.perf_counter()
        call = {**condition, **size, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        latents = pipe(**call, num_inference_steps=args.steps).frames
        print(f"{name:<32}{time.perf_counter() - start:8.2f} s", flush=True)
        return latents

    reference, differences = video("diffusers"), {}
    for name, change in {
        "accelerate(pipe)": lambda: accelerate(pipe),
        "with diffusers' padding": lambda: accelerate(pipe, match_diffusers_padding=True),
        "restore(pipe)": lambda: restore(pipe),
    }.items():
        change()
        differences[name] = (video(name) - reference).abs().max().item()
        print(f"{'':<10}largest difference {differences[name]:.1e}")
    return differences


if __name__ == "__main__":
    main()
