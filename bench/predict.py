"""Predicted seconds of a denoising step and of a chunk, per chunk of a 480p video, on GPUs that are not here: a model.

python -m bench.predict [--card NAME] [--model 1.3B|14B] [--chunk N] [--steps N] [--before [COMMIT]] [--json FILE]

Nothing in the output is a measurement. A step is the sum of its kernels: attention from the pipe model of its compiled
inner loop, the longest program of its tile schedule and the DRAM traffic of the L2 model; GEMMs from whole waves of
tiles; kernels over rows from the bytes they move; a gap per launch. A chunk is its denoising steps and the prefill that
makes it context. With `--before` also for the tile schedule and the attention rows of an older commit (its kernel
bodies are today's, and nothing launches early). Left out: the host, the prompt's encoder, the VAE.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from anyflow_kernels import AttentionPlan, FarLayout, launch_configs
from anyflow_kernels.aot_case import MODELS
from anyflow_kernels.launch_configs import attention as attention_rows
from anyflow_kernels.pipe_model import CHIPS, Chip
from anyflow_kernels.triton_ops import tile_schedule
from anyflow_kernels.triton_ops.gated_residual_layer_norm import bytes_moved as norm_bytes
from anyflow_kernels.triton_ops.linear_gelu import bytes_moved as gelu_bytes
from anyflow_kernels.triton_ops.qk_norm_rope_append import bytes_moved as append_bytes
from anyflow_kernels.triton_ops.rms_norm import bytes_moved as rms_bytes
from emulator.l2_model import dram_bytes

from .common import add_json_argument, keep_row, print_rows
from .kernel_bench import HEIGHT, PARTITION, WIDTH
from .model_bounds import forward_seconds
from .roofline import peak, roof_seconds

BEFORE = "0082965"  # the last commit before issue 10
TEXT_TOKENS, LATENT_CHANNELS, ITEMSIZE = 512, 64, 2
MEMORY = {"A100": 80, "RTX 4090": 24, "H100": 80, "B200": 180, "RTX 5090": 32}  # GB, data sheets
# MB. NVIDIA's white papers of GA100, AD102, GH100 and RTX Blackwell; Blackwell Tuning Guide, "Increased L2 Capacity".
L2 = {"A100": 40, "RTX 4090": 72, "H100": 50, "B200": 126, "RTX 5090": 96}
L2_SHARE = 0.9  # of it for keys and values; the rest holds queries and results
GEMM_SHARE = 0.8  # of the tensor cores' peak, in a full wave
GEMM_TILES = ((128, 256), (256, 128), (128, 192), (192, 128), (128, 128))
DRAM_SHARE = 0.85  # of the data sheet's bandwidth
GAP, EARLY_GAP = 1.8e-6, 0.8e-6  # seconds from a kernel to the next inside a CUDA graph; launched early
# Of what the pipe model expects, which knows no latencies and no clocks under load. One anchor: Triton's tutorial
# kernel on an H100, 477 TFLOP/s at head dim 128 (pytorch/benchmark#2391), where the model of ours expects 66 % of 989.
PIPE_SHARE = 0.73
LIBRARY_SHARE = {"cudnn": 0.6, "flash": 0.37}
ASSUMPTIONS = f"""model, not measurement; assumptions:
  clocks, multiprocessors, tensor-core rates, DRAM bandwidth: data sheets (anyflow_kernels/pipe_model.py), boost clock
  attention: {PIPE_SHARE:.0%} of the rate that the pipe model expects of the compiled inner loop (as Triton's tutorial
    kernel on an H100, pytorch/benchmark#2391); a tile costs one block more beside its loop
  libraries: {LIBRARY_SHARE} of the peak (FlashAttention-3, arXiv 2407.08608, H100, head dim 128)
  L2: {L2_SHARE:.0%} of it holds keys and values (assumed)
  GEMMs: {GEMM_SHARE:.0%} of peak in a full wave of the best of the tiles {GEMM_TILES} (assumed)
  rows and DRAM: {DRAM_SHARE:.0%} of the data sheet's bandwidth (assumed)
  launches, in CUDA graphs: {GAP * 1e6:.1f} us each, {EARLY_GAP * 1e6:.1f} us where one starts early, PDL (assumed)"""


class Rules(NamedTuple):
    """What decides a launch: modules in the place of `tile_schedule` and `launch_configs.attention`."""

    name: str
    schedule: Any
    rows: Any
    around: int  # launches of a step beside its blocks and the two GEMMs at its ends: tests/test_streaming_launches.py
    early: bool  # kernels start while the one before ends, where the chip can (programmatic dependent launch)


def rules_of(commit: str) -> Rules:
    """Those of a commit of this repository, loaded beside today's.

    Raises:
        SystemExit: if git does not have it.
    """
    packages = {"triton_ops.tile_schedule": "triton_ops", "launch_configs.attention": "launch_configs"}
    modules = []
    for path, package in packages.items():
        where = f"{commit}:anyflow_kernels/{path.replace('.', '/')}.py"
        shown = subprocess.run(
            ["git", "show", where], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
        if shown.returncode:
            raise SystemExit(f"--before: got {commit!r}, expected a commit of this clone ({shown.stderr.strip()})")
        module = ModuleType(f"anyflow_kernels.{path}_{commit}")
        module.__package__ = f"anyflow_kernels.{package}"
        sys.modules[module.__name__] = module  # dataclasses look their module up
        exec(compile(shown.stdout, where, "exec"), vars(module))
        modules.append(module)
    return Rules(commit, modules[0], modules[1], around=10, early=False)


TODAY = Rules("now", tile_schedule, attention_rows, around=8, early=True)


@dataclass
class Work:
    """Seconds of a forward, or of part of one, by kind."""

    attention: float = 0.0
    gemm: float = 0.0
    rows: float = 0.0
    gaps: float = 0.0
    dram_bytes: float = 0.0  # of self-attention

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(vars(self).values(), vars(other).values(), strict=True)))

    def __mul__(self, times: int) -> Work:
        return Work(*(times * n for n in vars(self).values()))

    @property
    def seconds(self) -> float:
        return self.attention + self.gemm + self.rows + self.gaps


def memory_seconds(chip: Chip, moved: float) -> float:
    return roof_seconds(chip, moved) / DRAM_SHARE


def gap(chip: Chip, rules: Rules) -> float:
    """Before a kernel of this package."""
    return EARLY_GAP if rules.early and getattr(launch_configs, "pdl", lambda arch: False)(chip.arch) else GAP


def gemm(chip: Chip, tokens: int, inputs: int, outputs: int) -> Work:
    """(tokens, inputs) times (inputs, outputs): whole waves of the tile that needs the least time."""
    one = chip.multiprocessors / (GEMM_SHARE * peak(chip))  # seconds per multiply-add on one multiprocessor
    waves = (
        -(-(-(-tokens // m) * -(-outputs // n)) // chip.multiprocessors) * m * n * inputs * one for m, n in GEMM_TILES
    )
    moved = ITEMSIZE * (tokens * inputs + inputs * outputs + tokens * outputs)
    return Work(gemm=max(min(waves), memory_seconds(chip, moved)), gaps=GAP)


def over_rows(chip: Chip, moved: float, rules: Rules) -> Work:
    """A kernel bound by the bytes it moves."""
    return Work(rows=memory_seconds(chip, moved), gaps=gap(chip, rules))


def attention(chip: Chip, plan: AttentionPlan, heads: int, rules: Rules) -> Work:
    """A forward of 128 channels per head: the slower of its longest program and its DRAM traffic, and the merge."""
    preferred = launch_configs.rows_for(rules.rows.FORWARD_KERNELS, chip.arch)[0]
    dense = all(ranges == ((0, plan.num_keys),) for _, _, ranges in plan.ranges)
    way = preferred.dense if dense else preferred.ranges
    compulsory = 2 * 128 * ITEMSIZE * heads * (plan.num_queries + plan.num_keys)  # q, k, v and out, once
    if way in LIBRARY_SHARE:
        products = 2 * plan.num_pairs * 128 * heads
        seconds = max(products / (LIBRARY_SHARE[way] * peak(chip)), memory_seconds(chip, compulsory))
        return Work(attention=seconds, gaps=GAP, dram_bytes=compulsory)
    if way == "gluon":
        row = next(r for r in rules.rows.ATTENTION_GLUON if r.arch == chip.arch and r.head_dim == 128)
    else:
        way, row = "forward", rules.rows.attention_row(rules.rows.ATTENTION_FORWARD, chip.arch, 128, ITEMSIZE)
    longest, schedule = forward_seconds(way, row, rules.schedule, chip, plan, heads, 128)
    keys = key_bytes(schedule, heads * plan.num_keys, row.block_n, chip.name)
    read = compulsory - 2 * 128 * ITEMSIZE * heads * plan.num_keys + keys
    merged = memory_seconds(chip, schedule.slots * row.block_m * 128 * 4 * 2)  # written and read in fp32
    return Work(
        attention=max(longest / PIPE_SHARE, memory_seconds(chip, read)) + merged,
        gaps=gap(chip, rules) * (1 + (schedule.slots > 0)),
        dram_bytes=read,
    )


def key_bytes(schedule: Any, num_keys: int, block: int, card: str) -> float:
    """Keys and values that come from DRAM; `num_keys` of all heads, each once if all fit the L2."""
    size, capacity = 2 * 128 * ITEMSIZE, L2[card] * 1e6 * L2_SHARE
    return num_keys * size if num_keys * size <= capacity else dram_bytes(schedule, block, size, capacity, line=block)


def forward(chip: Chip, model: str, layout: FarLayout, rules: Rules, keys_only: bool = False) -> Work:
    """One forward over a layout's queries; with `keys_only` the last block stops after its keys and values."""
    size, tokens = MODELS[model], layout.num_query_tokens
    dim, ffn, heads, layers = size["dim"], size["ffn"], size["heads"], size["layers"]
    x, qkv = (torch.empty(1, tokens, width, dtype=torch.bfloat16, device="meta") for width in (dim, 3 * dim))
    frames = sum(n for n, _ in layout.frame_map)
    rows, product = partial(over_rows, chip, rules=rules), partial(gemm, chip, tokens)
    norm = partial(norm_bytes, x, frames)
    first = rows(norm(True, 3)) + product(dim, 3 * dim) + rows(append_bytes(qkv, heads))
    after = attention(chip, AttentionPlan.from_layout(layout), heads, rules)
    after += product(dim, dim) + rows(norm(True, 1)) + product(dim, dim) + rows(rms_bytes(x))
    prompt = attention(chip, AttentionPlan.dense(tokens, TEXT_TOKENS), heads, rules)
    prompt.dram_bytes = 0
    after += prompt + product(dim, dim) + rows(norm(True, 2)) + product(dim, ffn) + product(ffn, dim)
    if launch_configs.rows_for(launch_configs.LINEAR_GELU, chip.arch)[0].way == "triton":
        after += rows(gelu_bytes(tokens, ffn, ITEMSIZE))
    ends = product(LATENT_CHANNELS, dim)
    if keys_only:
        return ends + first * layers + after * (layers - 1)
    modulation = Work(rows=memory_seconds(chip, 2 * 4 * 6 * dim * frames * layers))
    around = Work(gaps=rules.around * GAP)
    return (first + after) * layers + ends + product(dim, LATENT_CHANNELS) + modulation + around


def chunk_rows(card: str, model: str, chunk: int, steps: int, rules: Rules) -> dict[str, Any]:
    """A chunk of the default partition: a step, and all its steps with the prefill after them."""
    chip, chunks = CHIPS[card], chunk + 1
    layout = partial(FarLayout, height=HEIGHT, width=WIDTH)
    step = forward(chip, model, layout(PARTITION[:chunks], mode="inference"), rules)
    prefill = Work()
    if chunks < len(PARTITION):  # as `bench.costs.rollout_flops`
        demoted, earlier = (
            layout(PARTITION[:n], mode="prefill").num_compressed_chunks for n in (chunks, max(1, chunk))
        )
        cached = chunk if demoted == earlier else earlier
        prefill = forward(chip, model, layout(PARTITION[:chunks], mode="prefill", cached=cached), rules, keys_only=True)
    return {
        "kind": "model, not measurement",
        "rules": rules.name,
        "card": card,
        "model": model,
        "chunk": chunk,
        "step_ms": step.seconds * 1e3,
        "chunk_s": steps * step.seconds + prefill.seconds,
        "denoising_steps": steps,
        **{f"{name}_ms": getattr(step, name) * 1e3 for name in ("attention", "gemm", "rows", "gaps")},
        "attention_dram_gb_per_layer": step.dram_bytes / MODELS[model]["layers"] / 1e9,
        "prefill_ms": prefill.seconds * 1e3,
    }


def needed_gb(model: str) -> float:
    """bf16 weights of the blocks, and the slabs of keys and values of the longest chunk."""
    size = MODELS[model]
    weights = size["layers"] * (8 * size["dim"] ** 2 + 2 * size["dim"] * size["ffn"])
    keys = max(
        FarLayout(PARTITION[:n], HEIGHT, WIDTH, mode="inference").num_key_tokens for n in range(1, len(PARTITION) + 1)
    )
    return ITEMSIZE * (weights + size["layers"] * 2 * keys * size["dim"]) / 1e9


def print_table(rows: list[dict[str, Any]]) -> None:
    """Of one model on one card, as Markdown: a line per chunk, all rules beside each other."""
    card, model, names = rows[0]["card"], rows[0]["model"], list(dict.fromkeys(row["rules"] for row in rows))
    over = needed_gb(model) > MEMORY[card]
    lacking = f"; weights and cache take {needed_gb(model):.0f} GB, the card has {MEMORY[card]}" if over else ""
    print(f"\n**{model} on {card}** (model, not measurement{lacking})\n")
    parts = ("attention", "gemm", "rows", "gaps")
    titles = ["chunk", *(f"step {n}, ms" for n in names), *(f"{p} {names[-1]}" for p in parts)]
    titles += [*(f"DRAM {n}, GB a layer" for n in names), *(f"chunk {n}, s" for n in names)]
    print(f"| {' | '.join(titles)} |\n|{' --- |' * len(titles)}")
    for chunk in dict.fromkeys(row["chunk"] for row in rows):
        by = {row["rules"]: row for row in rows if row["chunk"] == chunk}
        cells = [str(chunk), *(f"{by[n]['step_ms']:.1f}" for n in names)]
        cells += [f"{by[names[-1]][f'{p}_ms']:.1f}" for p in parts]
        cells += [f"{by[n]['attention_dram_gb_per_layer']:.2f}" for n in names]
        cells += [f"{by[n]['chunk_s']:.3f}" for n in names]
        print(f"| {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", choices=list(MEMORY), action="append", help="may be repeated; all of them if absent")
    parser.add_argument("--model", choices=list(MODELS), action="append", help="may be repeated; both if absent")
    parser.add_argument("--chunk", type=int, choices=range(len(PARTITION)), action="append", help="may be repeated")
    parser.add_argument("--steps", type=int, default=4, help="denoising steps of a chunk")
    parser.add_argument("--before", nargs="?", const=BEFORE, metavar="COMMIT", help=f"{BEFORE} if none is named")
    add_json_argument(parser)
    options = parser.parse_args()
    rules = [rules_of(options.before), TODAY] if options.before else [TODAY]
    print(ASSUMPTIONS)
    rows: list[dict[str, Any]] = []
    for card in options.card or MEMORY:
        for model in options.model or MODELS:
            table = [
                chunk_rows(card, model, chunk, options.steps, rule)
                for chunk in options.chunk or range(len(PARTITION))
                for rule in rules
            ]
            print_table(table)
            for row in table:
                keep_row(row, options.json)
            rows += table
    print()
    print_rows(rows)


if __name__ == "__main__":
    main()
