"""End to end on a GPU: FAR at 480p, 81 frames, 1.3B and 14B configurations with random weights.

    python -m bench.rollout [--model 1.3B 14B] [--steps 1 2 4 8] [--rivals] [--repeats 3] [--json FILE]

The video is made by `open_model` and `stream`, as users make it. Per row, of the median run: time to the first chunk
(graph capture and first-use compilation apart), seconds of denoising and of cache steps, FPS of the transformer part
(no text encoder, no VAE), peak memory, achieved TFLOP/s (FLOPs counted from the layouts) and the share of the floor
that the FLOPs allow at the rates of `FLOOR`. `--rivals` adds diffusers' own loop, eager and compiled, which must give
the same video first. Without a GPU it says so and stops: `bench/rollout_cpu.py` is the CPU's.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, derive_config, open_model, stream

from .common import MODEL_ARGUMENTS as MODELS
from .common import add_json_argument, check_close, keep_row, machine_line, print_rows
from .costs import rollout_flops

PARTITION, HEIGHT, WIDTH, TEXT_TOKENS = (1, 3, 3, 3, 3, 3, 3, 2), 60, 104, 512
FRAMES = 4 * (sum(PARTITION) - 1) + 1
# Seconds the transformer needs on an H200 at 790 TFLOP/s in GEMMs and 600 in attention: `rollout_flops`, split.
FLOOR = {("1.3B", 1): 0.581, ("1.3B", 4): 1.314, ("14B", 1): 4.05, ("14B", 4): 8.90}


@dataclass
class Times:
    """Seconds of one rollout, each to the end of its kernels."""

    denoise: list[float] = field(default_factory=list)  # per chunk
    cache: list[float] = field(default_factory=list)

    @property
    def total(self) -> float:
        return sum(self.denoise) + sum(self.cache)


def build(model: str, device: str = "cuda") -> AnyFlowFARTransformer3DModel:
    """A model with random bf16 weights, norms and time embedder in fp32 as a loaded checkpoint has them."""
    with torch.device("meta"):
        skeleton = AnyFlowFARTransformer3DModel(**MODELS[model])
    transformer = skeleton.to_empty(device=device).to(torch.bfloat16).requires_grad_(False).eval()
    generator = torch.Generator(device).manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if not set(name.split(".")).isdisjoint(transformer.keep_in_fp32):
            parameter.data = parameter.data.float()
        if "norm" in name and name.endswith("weight"):
            parameter.fill_(1.0)
        else:
            parameter.normal_(0.0, 0.02, generator=generator)
    transformer.fuse_projections()
    return transformer


def rollout(model: Any, text: Tensor, noise: Tensor, steps: int) -> tuple[Tensor, Times]:
    """The video that `stream` makes, (1, F, C, H, W) latents; a profiling pipeline waits for the device once a chunk.

    Args:
        noise: (1, C, F, H, W), of the whole video.
    """
    pipeline = open_model(model, steps=steps)
    pipeline.config = derive_config(pipeline.config, enable_sync_and_profile=True)
    times = Times()

    def on_stats(_: int, stats: dict[str, float]) -> None:
        times.denoise.append(stats["diffuse_ms"] / 1e3)
        times.cache.append(stats["finalize_ms"] / 1e3)

    video = stream(
        pipeline, text, noise=noise, chunk_partition=PARTITION, height=HEIGHT, width=WIDTH, on_stats=on_stats
    )
    return torch.cat([*video], dim=1), times


def diffusers_rollout(name: str, ours: Any, text: Tensor, noise: Tensor, steps: int, compiled: bool) -> float:
    """Median seconds of diffusers' FAR pipeline loop on the same weights, latents only.

    Raises:
        AssertionError: if its video is another one than ours with its phantom keys; two bf16 rollouts of thirty layers
            and more drift apart by rounding, a wrong one is at a distance of about 1.4.
    """
    import diffusers

    with torch.device("meta"):
        skeleton = diffusers.AnyFlowFARTransformer3DModel(**MODELS[name])
    model = skeleton.to_empty(device="cuda").to(torch.bfloat16).eval()
    model.load_state_dict(ours.state_dict(), assign=True)
    model.condition_embedder.delta_emb_gate = torch.tensor([0.25], device="cuda")
    if compiled:
        model.compile_repeated_blocks(dynamic=True)
    vae = diffusers.AutoencoderKLWan(base_dim=8, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1).to("cuda")
    scheduler = diffusers.FlowMapEulerDiscreteScheduler(shift=5.0)
    pipe = diffusers.AnyFlowFARPipeline(None, None, model, vae, scheduler)
    pipe.set_progress_bar_config(disable=True)
    seconds = []
    for run in range(4):
        clock = _clock()
        video = pipe(
            prompt_embeds=text,
            height=8 * HEIGHT,
            width=8 * WIDTH,
            num_frames=FRAMES,
            num_inference_steps=steps,
            output_type="latent",
            latents=noise,
        ).frames
        seconds.append(_clock() - clock)
        if run == 0:
            ours.phantom_padding = True
            same, _ = rollout(ours, text, noise, steps)
            ours.phantom_padding = False
            check_close(f"diffusers {name}, {steps} steps", video.transpose(1, 2), same, 0.1)
    return median(seconds[1:])


def bench(name: str, steps: int, repeats: int, model: Any, text: Tensor, noise: Tensor) -> dict[str, Any]:
    torch.cuda.reset_peak_memory_stats()
    clock = _clock()
    _, first = rollout(model, text, noise, steps)
    cold = _clock() - clock
    runs = [rollout(model, text, noise, steps) for _ in range(repeats)]
    if not all(torch.isfinite(video).all() for video, _ in runs):
        raise AssertionError(f"{name}, {steps} steps: the video is not finite; no time is reported")
    middle = sorted((times for _, times in runs), key=lambda times: times.total)[len(runs) // 2]
    flops = rollout_flops(PARTITION, HEIGHT, WIDTH, model.config, steps)
    floor = FLOOR.get((name, steps))
    return {
        "model": name,
        "steps": steps,
        "cold_s": cold,
        "cold_first_chunk_s": first.denoise[0],
        "first_chunk_s": middle.denoise[0],
        "denoise_s": middle.denoise,
        "cache_s": middle.cache,
        "total_s": middle.total,
        "fps": FRAMES / middle.total,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30,
        "tflops": flops / middle.total / 1e12,
        "floor_s": floor,
        "of_floor": None if floor is None else floor / middle.total,
    }


def _clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["1.3B"])
    parser.add_argument("--steps", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--rivals", action="store_true", help="also diffusers' loop, eager and compiled")
    parser.add_argument("--no-graphs", action="store_true", help="without CUDA graphs")
    add_json_argument(parser)
    args = parser.parse_args()
    print(machine_line("triton", "diffusers"))
    if not torch.cuda.is_available():
        print("skipped: needs a CUDA device; `python -m bench.rollout_cpu` measures a rollout on a CPU")
        print_rows([])
        return
    rows: list[dict[str, Any]] = []
    for name in args.model:
        model = build(name)
        model.cuda_graphs = not args.no_graphs
        text = torch.randn(1, TEXT_TOKENS, 4096, device="cuda", dtype=torch.bfloat16)
        noise = torch.randn(1, 16, sum(PARTITION), HEIGHT, WIDTH, device="cuda", dtype=torch.bfloat16)
        for steps in args.steps:
            row = bench(name, steps, args.repeats, model, text, noise)
            if args.rivals:
                for kind in ("eager", "compiled"):
                    row[f"diffusers_{kind}_s"] = diffusers_rollout(name, model, text, noise, steps, kind == "compiled")
            rows.append(row)
            keep_row(row, args.json)
            share = "" if row["of_floor"] is None else f"   {row['of_floor']:.0%} of the floor"
            rivals = "".join(f"   {k[:-2]} {v:.2f} s" for k, v in row.items() if k.startswith("diffusers_"))
            print(
                f"{name:<5} {steps} steps: {row['total_s']:6.3f} s   {row['fps']:6.1f} FPS   first chunk "
                f"{row['first_chunk_s'] * 1e3:5.0f} ms ({row['cold_first_chunk_s']:.1f} s cold)   cache "
                f"{sum(row['cache_s']):.3f} s   {row['tflops']:.0f} TFLOP/s{share}   {row['peak_gib']:.1f} GiB{rivals}",
                flush=True,
            )
        del model
        torch.cuda.empty_cache()
    print_rows(rows)


if __name__ == "__main__":
    main()
