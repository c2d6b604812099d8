"""`make drop-in`: one small FAR pipeline, run as diffusers runs it and again through `accelerate`.

    python -m bench.drop_in [--out DIR] [--steps 4]

The pipeline is made of the released models' classes (AutoencoderKLWan, UMT5, AnyFlowFARTransformer3DModel) at small
size with weights from a fixed seed, so it needs no download and its videos are coloured noise: what counts is that both
runs give the same one, and how long each took. Text to video, and image to video from a photograph.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from anyflow_runtime import accelerate, restore
from anyflow_runtime.video_io import VideoWriter, read_image

from .common import machine_line
from .memory import with_peak_bytes
from .tiny_pipeline import tiny_pipeline

HEIGHT, WIDTH, CHUNKS = 240, 416, [1, 3, 3]
FRAMES = 4 * (sum(CHUNKS) - 1) + 1
PICTURE = Path(__file__).parent / "data" / "picture.jpg"
PROMPT = "a lighthouse above a stormy sea"


@dataclass
class Run:
    latents: Tensor
    seconds: float
    peak_bytes: int


def run(pipe: Any, steps: int, picture: Tensor | None) -> Run:
    """The pipeline up to the latents: the VAE is the same in every run and is not what is compared."""

    def rollout() -> Tensor:
        return pipe(
            PROMPT,
            video=None if picture is None else picture[None, None],
            height=HEIGHT,
            width=WIDTH,
            num_frames=FRAMES,
            num_inference_steps=steps,
            chunk_partition=CHUNKS,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        ).frames

    start = time.perf_counter()
    latents, peak = with_peak_bytes(rollout)
    return Run(latents, time.perf_counter() - start, peak)


@torch.no_grad()
def decode(pipe: Any, latents: Tensor) -> Tensor:
    """Latents to a video, (T, C, H, W) in [0, 1]."""
    mean, std = (
        torch.tensor(s).view(1, -1, 1, 1, 1) for s in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
    )
    pixels = pipe.vae.decode(latents * std + mean, return_dict=False)[0]
    return pipe.video_processor.postprocess_video(pixels, output_type="pt")[0]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("drop_in_out"))
    parser.add_argument("--steps", type=int, default=4)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    print(machine_line("diffusers"))
    print(
        f"{WIDTH}x{HEIGHT}, {FRAMES} frames in chunks {CHUNKS}, {args.steps} steps, fp32; denoising and cache, no VAE\n"
    )
    pipe = tiny_pipeline()
    picture = read_image(PICTURE, size=(HEIGHT, WIDTH))
    header = f"{'task':<6}{'runtime':<34}{'seconds':>9}{'speed':>8}{'peak memory':>14}{'largest difference':>20}"
    print(header)
    for task, given in (("T2V", None), ("I2V", picture)):
        restore(pipe)
        run(pipe, 1, given)  # imports and first-use costs belong to no one
        reference = run(pipe, args.steps, given)
        ours = run(accelerate(pipe), args.steps, given)
        padded = run(accelerate(pipe, match_diffusers_padding=True), args.steps, given)
        rows = {"diffusers": reference, "accelerate(pipe)": ours, "  with diffusers' phantom keys": padded}
        for name, row in rows.items():
            difference = (row.latents - reference.latents).abs().max().item()
            print(
                f"{task:<6}{name:<34}{row.seconds:9.2f}{reference.seconds / row.seconds:7.1f}x"
                f"{row.peak_bytes / 2**20:10.0f} MiB{difference:20.1e}"
            )
        videos = {"diffusers": decode(pipe, reference.latents), "ours": decode(pipe, ours.latents)}
        for name, video in videos.items():
            with VideoWriter(args.out / f"{task.lower()}_{name}.mp4", fps=16) as writer:
                writer.write(video)
        with VideoWriter(args.out / f"{task.lower()}_side_by_side.png") as writer:
            writer.write(torch.cat(list(videos.values()), dim=-1)[::6])
    print("\nlatents differ by the zero keys that diffusers' padding adds to every softmax, and by nothing else")
    print(f"wrote {args.out}/")


if __name__ == "__main__":
    main()
