"""What combines with `accelerate`, and the tests that keep it so: the table of docs/drop_in.md.

`python -m tests.combinations` writes it there; tests/test_combinations.py finds a page that is behind and a test that
is gone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "drop_in.md"
MARKS = ("<!-- from tests/combinations.py: make docs-table -->", "<!-- end -->")
VERDICTS = {"works": "works", "with a condition": "*with a condition*", "not yet": "**not yet**"}


class Row(NamedTuple):
    """A feature of diffusers; a verdict of VERDICTS; names of tests; what else there is to know."""

    feature: str
    verdict: str
    tests: list[str]
    remark: str = ""


ROWS = [
    Row(
        "text to video, prompts and batches, `num_videos_per_prompt`, own generators",
        "works",
        ["test_same_generator_same_video"],
        "",
    ),
    Row(
        "guidance, `negative_prompt`",
        "works",
        ["test_same_generator_same_video"],
        "",
    ),
    Row(
        "I2V and V2V (`video=`, `video_latents=`)",
        "works",
        ["test_same_generator_same_video"],
        "",
    ),
    Row(
        "own `sigmas`, own `timesteps`, `use_mean_velocity=False`",
        "works",
        ["test_same_generator_same_video"],
        "",
    ),
    Row(
        "`output_type` latent, pt, np, pil",
        "works",
        ["test_output_types"],
        "",
    ),
    Row(
        "`callback_on_step_end`, also replacing latents and prompts",
        "works",
        ["test_callback_may_replace_latents_and_prompt"],
        "",
    ),
    Row(
        "interrupting the bidirectional loop",
        "works",
        ["test_interrupt_stops_the_bidirectional_loop"],
        "",
    ),
    Row(
        "two pipelines taking turns, a call that raised",
        "works",
        ["test_two_pipelines_do_not_disturb_each_other", "test_a_rollout_that_raised_leaves_the_pipeline_usable"],
        "",
    ),
    Row(
        "`.to(device)`, `.to(dtype)`",
        "works",
        ["test_to_keeps_one_gemm_for_qkv"],
        "",
    ),
    Row(
        "LoRA: `load_lora_weights` before or after, scale, `fuse_lora`, `unfuse_lora`, `unload_lora_weights`",
        "works",
        ["test_lora_loaded"],
        "no CUDA graphs while an adapter is loaded, fusing and unloading gives them back",
    ),
    Row(
        "LoRA: `set_adapters`, `disable_lora`, `delete_adapters`, hot swapping, original Wan keys",
        "works",
        ["test_adapters_change_and_go", "test_adapters_under_the_keys_of_wan"],
        "",
    ),
    Row(
        "model offload (`enable_model_cpu_offload`)",
        "works",
        ["test_model_offload_hooks"],
        "in either order",
    ),
    Row(
        "sequential offload (`enable_sequential_cpu_offload`)",
        "works",
        ["test_sequential_offload_hooks"],
        "in either order; no CUDA graphs (`tests/test_cuda_graphs.py`)",
    ),
    Row(
        "`save_pretrained`, and loading it with diffusers",
        "works",
        ["test_saved_pipeline_is_diffusers_own"],
        "",
    ),
    Row(
        "a bare transformer instead of a pipeline",
        "works",
        ["test_bare_transformer"],
        "",
    ),
    Row(
        "`copy.deepcopy`",
        "works",
        ["test_copies_stay_accelerated_and_are_their_own"],
        "the copy keeps no memory of the original's rollouts (`tests/test_cuda_graphs.py`)",
    ),
    Row(
        "VAE tiling and slicing",
        "works",
        ["test_vae_tiling"],
        "the VAE is diffusers' own, `accelerate` does not touch it",
    ),
    Row(
        "our scheduler in diffusers' pipeline",
        "works",
        ["test_a_diffusers_pipeline_makes_the_same_video_with_it"],
        "",
    ),
    Row(
        "quantised weights: torchao int8 and fp8 weight-only, quanto qint8, either order",
        "works",
        ["test_quantised_weights"],
        "as diffusers on the same quantised weights; q, k and v are then three matrix products",
    ),
    Row(
        "torchao int8 dynamic",
        "works",
        ["test_quantised_weights"],
        "differs from diffusers by less than int8 costs",
    ),
    Row(
        "`compile=True`, `compile_repeated_blocks`, also with `fullgraph=True`",
        "works",
        ["test_compiled_blocks_give_the_same_video", "test_compile_repeated_blocks_after_accelerate"],
        (
            "three graphs for a rollout of FAR, one for a bidirectional one, whatever the number of layers; "
            "`match_diffusers_padding` and other sizes may add some"
        ),
    ),
    Row(
        "`pipe.transformer.compile()`",
        "with a condition",
        ["test_the_whole_transformer_compiles_in_pieces"],
        "after `accelerate`; not with `fullgraph`: layouts are made in Python; compile the blocks instead",
    ),
    Row(
        "`torch.compile(pipe.transformer)` before `accelerate`",
        "not yet",
        ["test_rejects_what_it_cannot_accelerate"],
        "refused: accelerate first",
    ),
    Row(
        "layerwise casting (fp8 storage)",
        "works",
        ["test_layerwise_casting_stores_fp8"],
        "in either order; no CUDA graphs: the hook moves every weight at each forward",
    ),
    Row(
        "group offload (`enable_group_offload`), block and leaf level",
        "works",
        ["test_group_offload"],
        "in either order, on a CPU with offloaded weights poisoned; no CUDA graphs",
    ),
    Row(
        "disk offload: `device_map` with blocks on disk, group offload to disk",
        "works",
        ["test_disk_offload", "test_group_offload_to_disk"],
        "",
    ),
    Row(
        "`torch.autocast`, also in training",
        "works",
        ["test_autocast_is_no_less_exact_than_diffusers", "test_training_under_autocast"],
        "no CUDA graphs",
    ),
    Row(
        "`from_pipe(pipe)`",
        "works",
        ["test_from_pipe_shares_the_accelerated_transformer"],
        "",
    ),
    Row(
        "`pickle`, `torch.save` of the model",
        "works",
        ["test_copies_stay_accelerated_and_are_their_own"],
        "whoever loads it needs this package",
    ),
    Row(
        "`set_attention_backend`, `attn.set_processor`",
        "not yet",
        ["test_what_would_have_no_effect_is_refused_until_restored"],
        "refused with the reason: attention is ours; choose `backend=`",
    ),
    Row(
        "`enable_cache`, FirstBlockCache and the like, cache-dit",
        "not yet",
        ["test_a_hook_that_caches_blocks_is_refused", "test_replaced_blocks_are_refused"],
        (
            "diffusers has none for AnyFlow; hooks and blocks that replace ours are refused. At 4 steps "
            "there is little to skip"
        ),
    ),
    Row(
        "`enable_parallelism`",
        "not yet",
        ["test_what_would_have_no_effect_is_refused_until_restored"],
        "refused; several GPUs: [context parallelism](streaming.md#several-gpus)",
    ),
    Row(
        "`device_map` that spreads the transformer over devices",
        "with a condition",
        [],
        "tables of blocks on several devices are added block by block; tried by nobody on two GPUs",
    ),
    Row(
        "GGUF, `from_single_file`",
        "not yet",
        ["test_a_single_file_is_refused_in_words"],
        "diffusers refuses AnyFlow there",
    ),
    Row(
        "`use_kv_cache=False`",
        "not yet",
        ["test_without_a_kv_cache_the_answer_is_diffusers_own"],
        "raises in diffusers 0.42.1 itself",
    ),
]


def places() -> dict[str, str]:
    """The file of every test function."""
    files = sorted((ROOT / "tests").glob("test_*.py"))
    return {
        name: file.name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.MULTILINE)
    }


def table() -> str:
    """The rows in Markdown, each with its tests and their files."""
    lines, where = ["| feature of diffusers | | kept by | remark |", "| --- | --- | --- | --- |"], places()
    for feature, verdict, tests, remark in ROWS:
        kept = ", ".join(f"`{where[name]}::{name}`" for name in tests)
        lines.append(f"| {feature} | {VERDICTS[verdict]} | {kept} | {remark} |")
    return "\n".join(lines)


def page() -> str:
    """The guide with the table of now."""
    before, rest = PAGE.read_text().split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{table()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


if __name__ == "__main__":
    PAGE.write_text(page())
