"""Model directories: what diffusers writes we read, what we write diffusers reads, and what cannot be read is named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.models import loading

from .parity import FP32_TOLERANCE, model_pair, prompt_inputs, random_config, relative_error

WEIGHTS, INDEX = "diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json"
SMALL: dict[str, Any] = {
    "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4, "text_dim": 8,
    "freq_dim": 16, "ffn_dim": 24, "num_layers": 2,
}  # fmt: skip
CLASSES: dict[bool, Any] = {False: AnyFlowTransformer3DModel, True: AnyFlowFARTransformer3DModel}

both_models = pytest.mark.parametrize("causal", [False, True], ids=["bidirectional", "far"])


def small_model(seed: int = 0, **config: Any) -> AnyFlowFARTransformer3DModel:
    torch.manual_seed(seed)
    return AnyFlowFARTransformer3DModel(**{**SMALL, **config}, backend="torch")


def assert_same_weights(a: Any, b: Any) -> None:
    mine, other = a.state_dict(), b.state_dict()
    assert mine.keys() == other.keys()
    different = [
        name for name in mine if mine[name].dtype != other[name].dtype or not torch.equal(mine[name], other[name])
    ]
    assert not different


def velocity(model: Any, config: dict[str, Any], causal: bool) -> Tensor:
    torch.manual_seed(3)
    x, times = torch.randn(1, 4, config["in_channels"], 8, 12), torch.rand(2, 1, 4) * 1000
    partition = {"chunk_partition": [1, 2, 1]} if causal else {}
    with torch.no_grad():
        return model(x, *times, **prompt_inputs(config, 1), **partition, return_dict=False)[0]


# reading what diffusers wrote


@both_models
@pytest.mark.parametrize("sharded", [False, True], ids=["single", "sharded"])
def test_directories_of_diffusers_are_read(causal: bool, sharded: bool, tmp_path: Path) -> None:
    config = random_config(2, causal)
    theirs, _ = model_pair(config, causal)
    theirs.save_pretrained(tmp_path, max_shard_size="40KB" if sharded else "10GB")  # type: ignore[operator]
    assert (tmp_path / INDEX).exists() == sharded
    mine = CLASSES[causal].from_pretrained(tmp_path, backend="torch")
    assert_same_weights(mine, theirs)
    assert {name: value for name, value in mine.config.items() if name in config} == config
    assert not mine.training
    assert relative_error(velocity(mine, config, causal), velocity(theirs, config, causal)) < FP32_TOLERANCE


def test_subfolder_of_a_pipeline_directory_is_read(tmp_path: Path) -> None:
    theirs, _ = model_pair({**SMALL}, causal=True)
    theirs.save_pretrained(tmp_path / "transformer")  # type: ignore[operator]
    assert_same_weights(AnyFlowFARTransformer3DModel.from_pretrained(str(tmp_path), subfolder="transformer"), theirs)


@both_models
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_modules_kept_in_fp32_are_those_of_diffusers(dtype: torch.dtype, causal: bool, tmp_path: Path) -> None:
    """From an fp32 checkpoint and from one stored in the dtype itself."""
    config = random_config(2, causal) | {"image_dim": 12, "cross_attn_norm": True}
    theirs: Any = model_pair(config, causal)[0]
    theirs.save_pretrained(tmp_path / "wide")
    read = type(theirs)
    narrow = read.from_pretrained(tmp_path / "wide", torch_dtype=dtype)
    kept = {
        name.split(".")[-2] if "norm" in name else name
        for name, p in narrow.named_parameters()
        if p.dtype == torch.float32
    }
    assert {"scale_shift_table", "norm2"} <= kept
    assert_same_weights(CLASSES[causal].from_pretrained(tmp_path / "wide", dtype=dtype), narrow)
    narrow.save_pretrained(tmp_path / "narrow")
    again = read.from_pretrained(tmp_path / "narrow", torch_dtype=dtype)
    assert_same_weights(CLASSES[causal].from_pretrained(tmp_path / "narrow", dtype=dtype), again)


def test_weights_keep_the_dtype_they_were_stored_in(tmp_path: Path) -> None:
    model = small_model().to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_weights(AnyFlowFARTransformer3DModel.from_pretrained(tmp_path), model)


def test_constructor_keywords_may_be_overridden(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    mine = AnyFlowFARTransformer3DModel.from_pretrained(
        tmp_path, backend="reference", phantom_padding=True, full_chunk_limit=2
    )
    assert (mine.ops.backend, mine.phantom_padding, mine.config.full_chunk_limit) == ("reference", True, 2)


def test_loaded_projections_share_one_storage_and_their_files_none(tmp_path: Path) -> None:
    """q, k and v are one GEMM; and a model must survive its files being overwritten, so it maps none of them."""
    model = small_model()
    model.save_pretrained(tmp_path)
    mine = AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)
    attn = mine.blocks[0].attn1
    assert len({getattr(attn, name).weight.untyped_storage().data_ptr() for name in ("to_q", "to_k", "to_v")}) == 1
    (tmp_path / WEIGHTS).write_bytes(b"\0" * (tmp_path / WEIGHTS).stat().st_size)
    assert_same_weights(mine, model)


def test_config_survives_a_round_trip() -> None:
    model = small_model(deltatime_type="t-r", chunk_partition=(1, 2), image_dim=12)
    again = AnyFlowFARTransformer3DModel.from_config(json.loads(json.dumps(model.config)), backend="torch")
    assert again.config == model.config
    assert again.config.chunk_partition == (1, 2)


# writing what diffusers reads


@both_models
@pytest.mark.parametrize("max_shard_bytes", [10**10, 30_000], ids=["single", "sharded"])
def test_diffusers_reads_what_we_write(causal: bool, max_shard_bytes: int, tmp_path: Path) -> None:
    config = random_config(4, causal)
    theirs: Any
    theirs, mine = model_pair(config, causal, backend="torch")
    mine.save_pretrained(tmp_path, max_shard_bytes=max_shard_bytes)
    assert (tmp_path / INDEX).exists() == (max_shard_bytes < 10**10)
    again, report = type(theirs).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    configs = [{k: v for k, v in model.config.items() if not k.startswith("_")} for model in (again, theirs)]
    assert json.dumps(configs[0], sort_keys=True) == json.dumps(configs[1], sort_keys=True)
    assert torch.equal(velocity(again, config, causal), velocity(theirs, config, causal))


def test_shards_stay_below_the_limit_and_the_index_is_complete(tmp_path: Path) -> None:
    model = small_model()
    model.save_pretrained(tmp_path, max_shard_bytes=30_000)
    index = json.loads((tmp_path / INDEX).read_text())
    tensors = {file.name: load_file(file) for file in tmp_path.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, shard in tensors.items() for name in shard}
    assert index["weight_map"].keys() == model.state_dict().keys()
    sizes = {file: sum(t.nbytes for t in shard.values()) for file, shard in tensors.items()}
    assert index["metadata"]["total_size"] == sum(sizes.values())
    assert all(size <= 30_000 or len(tensors[file]) == 1 for file, size in sizes.items())


@pytest.mark.parametrize(("first", "second"), [(30_000, 10**10), (10**10, 30_000), (30_000, 60_000)])
def test_saving_again_leaves_nothing_of_the_earlier_weights(first: int, second: int, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("keep me")
    small_model(0).save_pretrained(tmp_path, max_shard_bytes=first)
    model = small_model(1)
    model.save_pretrained(tmp_path, max_shard_bytes=second)
    assert_same_weights(AnyFlowFARTransformer3DModel.from_pretrained(tmp_path), model)
    named = (
        {WEIGHTS} if second == 10**10 else {INDEX, *json.loads((tmp_path / INDEX).read_text())["weight_map"].values()}
    )
    assert {f.name for f in tmp_path.iterdir()} == {"README.md", "config.json", *named}


@pytest.mark.parametrize(
    ("first", "second", "fails_at"),
    [(10**10, 10**10, 1), (30_000, 10**10, 1), (10**10, 30_000, 1), (10**10, 30_000, 3), (30_000, 30_000, 3)],
)
def test_interrupted_save_leaves_the_old_directory_readable(
    first: int, second: int, fails_at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk at the n-th file: the directory still holds the old model, all of it, and no partial file."""
    old = small_model(0)
    old.save_pretrained(tmp_path, max_shard_bytes=first)
    before = {f.name for f in tmp_path.iterdir()}
    calls = 0

    def failing_save(*args: Any, **kwargs: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == fails_at:
            Path(args[1]).write_bytes(b"half a file")
            raise OSError("No space left on device")
        save_file(*args, **kwargs)

    monkeypatch.setattr(loading, "save_file", failing_save)
    with pytest.raises(OSError, match="No space left"):
        small_model(1).save_pretrained(tmp_path, max_shard_bytes=second)
    assert_same_weights(AnyFlowFARTransformer3DModel.from_pretrained(tmp_path), old)
    assert before <= {f.name for f in tmp_path.iterdir()}
    assert not [f.name for f in tmp_path.iterdir() if "partial" in f.name]


# what cannot be read


def edit(directory: Path, change: Any) -> None:
    weights = load_file(directory / WEIGHTS)
    change(weights)
    save_file(weights, directory / WEIGHTS, metadata={"format": "pt"})


def test_all_unfit_weights_are_listed_in_one_error(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)

    def change(weights: dict[str, Tensor]) -> None:
        del weights["proj_out.bias"], weights["blocks.1.attn1.to_q.weight"]
        weights["blocks.2.attn1.to_q.weight"] = torch.ones(2)
        weights["blocks.0.ffn.net.2.bias"] = torch.ones(5)

    edit(tmp_path, change)
    with pytest.raises(ValueError, match="weights do not fit AnyFlowFARTransformer3DModel") as caught:
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert sorted(lines) == [
        "mis-shaped: blocks.0.ffn.net.2.bias got (5,), expected (32,)",
        "missing: blocks.1.attn1.to_q.weight (32, 32)",
        "missing: proj_out.bias (16,)",
        "unknown: blocks.2.attn1.to_q.weight",
    ]


def test_weight_absent_from_its_shard_is_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path, max_shard_bytes=30_000)
    shard = tmp_path / json.loads((tmp_path / INDEX).read_text())["weight_map"]["proj_out.bias"]
    weights = load_file(shard)
    del weights["proj_out.bias"]
    save_file(weights, shard)
    with pytest.raises(ValueError, match=f"missing: proj_out.bias is not in {shard.name}"):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)


def test_absent_shard_is_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path, max_shard_bytes=30_000)
    shard = sorted(tmp_path.glob("*-of-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=shard.name):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all", None], ids=["empty", "text", "cut off"])
def test_corrupt_weights_are_named(content: bytes | None, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    file = tmp_path / WEIGHTS
    file.write_bytes(file.read_bytes()[:5000] if content is None else content)
    with pytest.raises(ValueError, match=f"{WEIGHTS}: not a readable safetensors file"):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"weight_map": 3}'])
def test_corrupt_index_is_named(content: str, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path, max_shard_bytes=30_000)
    (tmp_path / INDEX).write_text(content)
    with pytest.raises(ValueError, match=INDEX):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("content", ["{", "[1]"])
def test_corrupt_config_is_named(content: str, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json: (not valid JSON|got a JSON list)"):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)


def test_unknown_config_entry_is_named(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_experts": 8}))
    with pytest.raises(ValueError, match="num_experts"):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path)


def test_directory_of_another_class_is_refused(tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="AnyFlowFARTransformer3DModel, expected AnyFlowTransformer3DModel"):
        AnyFlowTransformer3DModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("missing", ["directory", "config.json", WEIGHTS])
def test_missing_file_is_named(missing: str, tmp_path: Path) -> None:
    small_model().save_pretrained(tmp_path)
    if missing != "directory":
        (tmp_path / missing).unlink()
    with pytest.raises(FileNotFoundError, match=missing):
        AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / ("no" if missing == "directory" else ""))


# memory

PEAK = """
import resource, sys, threading, time
import torch
from anyflow_runtime import AnyFlowFARTransformer3DModel as Model

def anonymous():  # private memory: pages of a mapped file are not a second copy
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon")) * 1024

Model.from_pretrained(sys.argv[2])  # a tiny model, so that everything is imported and warm
before, peak, done = anonymous(), 0, threading.Event()

def watch():
    global peak
    while not done.is_set():
        peak = max(peak, anonymous())
        time.sleep(0.0005)

watcher = threading.Thread(target=watch)
watcher.start()
model = Model.from_pretrained(sys.argv[1], dtype=getattr(torch, sys.argv[3]))
done.set()
watcher.join()
print(max(peak, anonymous()) - before, sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_holds_no_second_copy(dtype: str, tmp_path: Path) -> None:
    """Private memory peaks at the model and one block more: neither a state dict nor a float32 model beside it."""
    small_model().save_pretrained(tmp_path / "tiny")
    large = {"num_attention_heads": 4, "attention_head_dim": 64, "ffn_dim": 1024, "num_layers": 16}
    small_model(**large).save_pretrained(tmp_path / "large", max_shard_bytes=20 * 1000**2)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "large"), str(tmp_path / "tiny"), dtype]
    out = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]).stdout
    peak, size = map(int, out.split())
    assert size > 30 * 1000**2
    assert peak < 1.4 * size
