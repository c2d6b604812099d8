"""Checkpoint key layouts. Witnesses: data/training.json, round trips of the models' own keys, the merge formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from anyflow_kernels import TimestepMLP, load_ops
from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel
from anyflow_runtime.checkpoints import (
    check_config,
    convert,
    convert_state_dict,
    detect_layout,
    from_fastgen,
    from_fastvideo,
    from_research,
    read_checkpoint,
    to_fastgen,
    to_fastvideo,
)

ORACLE = json.loads((Path(__file__).parent / "data" / "training.json").read_text())
SIZES = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 3,
    "out_channels": 3,
    "text_dim": 6,
    "freq_dim": 16,
    "ffn_dim": 24,
    "num_layers": 2,
}
DELTA = "condition_embedder.delta_embedder.linear_1.weight"


@pytest.fixture(params=[False, True], ids=["bidirectional", "far"])
def state(request) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = (AnyFlowFARTransformer3DModel if request.param else AnyFlowTransformer3DModel)(**SIZES)
    return dict(model.state_dict())


def assert_same(a, b) -> None:
    """The same keys and the same tensor objects."""
    assert set(a) == set(b)
    assert all(a[key] is b[key] for key in a)


def test_fastgen_keys_match_oracle() -> None:
    remap = ORACLE["remap"]
    source = {key: torch.zeros(1) for key in remap["diffusers"]}
    new, _ = to_fastgen(source)
    assert list(new) == remap["fastgen_new(rename only)"]
    old, report = to_fastgen(source, old=True)
    assert set(old) == {*remap["fastgen_new(rename only)"], *remap["fastgen_old(additional copies)"]}
    assert report.added == remap["fastgen_old(additional copies)"]


@pytest.mark.parametrize("prefix", ["", "transformer."])
@pytest.mark.parametrize("old", [False, True], ids=["new", "old"])
def test_fastgen_round_trip_is_lossless(state, prefix: str, old: bool) -> None:
    prefixed = {prefix + key: value for key, value in state.items()}
    there, _ = to_fastgen(prefixed, old)
    assert detect_layout(there) == ("fastgen_old" if old else "fastgen")
    assert_same(from_fastgen(there)[0], prefixed)


def test_fastvideo_round_trip_is_lossless(state) -> None:
    there, report = to_fastvideo(state)
    assert detect_layout(there) == "fastvideo" and len(there) == len(state)
    assert_same(from_fastvideo(there)[0], state)
    assert {old for old, _ in report.renamed} >= {"patch_embedding.weight", "blocks.1.ffn.net.2.bias", DELTA}


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("patch_embedding.weight", "patch_embedding.proj.weight"),
        ("far_patch_embedding.weight", "far_patch_embedding.weight"),
        ("condition_embedder.text_embedder.linear_2.bias", "condition_embedder.text_embedder.fc_out.bias"),
        ("condition_embedder.time_embedder.linear_1.weight", "condition_embedder.time_embedder.mlp.fc_in.weight"),
        (DELTA, "condition_embedder.delta_embedder.mlp.fc_in.weight"),
        ("condition_embedder.time_proj.weight", "condition_embedder.time_modulation.linear.weight"),
        (
            "condition_embedder.image_embedder.ff.net.0.proj.weight",
            "condition_embedder.image_embedder.ff.fc_in.weight",
        ),
        ("condition_embedder.image_embedder.ff.net.2.bias", "condition_embedder.image_embedder.ff.fc_out.bias"),
        ("blocks.11.attn1.to_q.weight", "blocks.11.to_q.weight"),
        ("blocks.11.attn1.to_out.0.bias", "blocks.11.to_out.bias"),
        ("blocks.0.attn1.norm_k.weight", "blocks.0.norm_k.weight"),
        ("blocks.0.attn2.to_q.weight", "blocks.0.attn2.to_q.weight"),
        ("blocks.0.attn2.to_out.0.weight", "blocks.0.attn2.to_out.weight"),
        ("blocks.0.ffn.net.0.proj.weight", "blocks.0.ffn.fc_in.weight"),
        ("blocks.0.ffn.net.2.bias", "blocks.0.ffn.fc_out.bias"),
        ("blocks.0.norm2.weight", "blocks.0.self_attn_residual_norm.norm.weight"),
    ],
)
def test_fastvideo_names(key: str, expected: str) -> None:
    there, _ = to_fastvideo({key: 1, "patch_embedding.bias": 2})
    assert next(iter(there)) == expected


@pytest.mark.parametrize("convert_one", [to_fastgen, from_fastgen, to_fastvideo, from_fastvideo])
def test_nothing_to_do_returns_the_same_object(convert_one) -> None:
    plain = {"blocks.0.scale_shift_table": torch.zeros(1)}
    converted, report = convert_one(plain)
    assert converted is plain and not report.changed and str(report) == "nothing to do"


@pytest.mark.parametrize("target", ["fastgen", "fastgen_old", "fastvideo"])
def test_input_is_never_changed(state, target: str) -> None:
    before = dict(state)
    convert_state_dict(state, target)
    assert_same(state, before)


def test_both_layouts_at_once_are_refused(state) -> None:
    mixed = {**state, "r_embedder.time_embedder.linear_1.weight": state[DELTA]}
    for convert_one in (to_fastgen, from_fastgen):
        with pytest.raises(ValueError, match=r"got both condition_embedder\.delta_embedder"):
            convert_one(mixed)
    mixed = {**state, "blocks.0.to_q.weight": state["blocks.0.attn1.to_q.weight"]}
    with pytest.raises(ValueError):
        to_fastvideo(mixed)
    with pytest.raises(ValueError, match=r"expected one layout|layouts are mixed"):
        detect_layout(mixed)


def test_diverged_time_proj_of_old_fastgen_takes_the_live_copy_and_warns(state) -> None:
    """After gated training there only the copy has moved: the shared one would be a stale projection."""
    there, _ = to_fastgen(state, old=True)
    there["r_embedder.time_proj.weight"] = there["r_embedder.time_proj.weight"] + 1
    with pytest.warns(UserWarning, match="differs from condition_embedder.time_proj.weight"):
        back, report = from_fastgen(there)
    assert back["condition_embedder.time_proj.weight"] is there["r_embedder.time_proj.weight"]
    assert back["condition_embedder.time_proj.bias"] is state["condition_embedder.time_proj.bias"]
    assert "got no gradient" in str(report)


def test_copies_of_old_fastgen_do_not_share_memory(state) -> None:
    there, _ = to_fastgen(state, old=True)
    assert there["r_embedder.time_proj.weight"].data_ptr() != state["condition_embedder.time_proj.weight"].data_ptr()


def test_gated_fusion_is_not_the_additive_one() -> None:
    """Why FastGen's additive (MeanFlow) and gated checkpoints cannot be mapped to each other."""
    f = ORACLE["fusion"]
    w, b, temb, remb = (torch.tensor(f[name]) for name in ("W", "b", "temb", "remb"))

    def constant(embedding: torch.Tensor) -> TimestepMLP:
        return TimestepMLP(torch.zeros(2, 4), torch.zeros(2), torch.zeros(2, 2), embedding)

    ops, t = load_ops("torch"), torch.tensor([500.0])
    rt, proj = ops.dual_timestep_embedding(t, t, constant(temb), constant(remb), w, b, f["gate"])
    torch.testing.assert_close(rt[0], torch.tensor(f["gated"]["emb"]))
    torch.testing.assert_close(proj[0], torch.tensor(f["gated"]["proj"]))
    additive = sum(F.linear(F.silu(e), w, b) for e in (temb, remb))
    torch.testing.assert_close(additive, torch.tensor(f["additive"]["proj"]))
    torch.testing.assert_close(temb + remb, torch.tensor(f["additive"]["emb"]))
    convex = (1 - f["gate"]) * F.linear(F.silu(temb), w, b) + f["gate"] * F.linear(F.silu(remb), w, b)
    torch.testing.assert_close(convex, torch.tensor(f["convex_of_projections(not equal either)"]))
    assert (proj[0] - additive).abs().max() > 1 and (proj[0] - convex).abs().max() > 0.05


RANK, ALPHA = 3, 6.0


def research(state, dtype=torch.float32) -> tuple[dict, dict[str, torch.Tensor]]:
    """A LoRA checkpoint of two layers, and the weights its student merges to, in float64."""
    torch.manual_seed(1)
    layers = ["blocks.0.attn1.to_q", "condition_embedder.delta_embedder.linear_1"]
    student, ema, merged = {}, {}, {}
    for key, value in state.items():
        layer = key.rpartition(".")[0]
        middle = f"{layer}.base_layer" if layer in layers else layer
        student[f"base_model.model.{middle}.{key.rpartition('.')[2]}".replace("..", ".")] = value.to(dtype)
    for layer in layers:
        weight = state[f"{layer}.weight"].to(dtype)
        a, b = torch.randn(RANK, weight.shape[1]).to(dtype), torch.randn(weight.shape[0], RANK).to(dtype)
        for target, factor in ((student, 1.0), (ema, 0.5)):
            target[f"base_model.model.{layer}.lora_A.real.weight"] = a
            target[f"base_model.model.{layer}.lora_B.real.weight"] = b * factor
        merged[f"{layer}.weight"] = weight.double() + ALPHA / RANK * b.double() @ a.double()
    return {"ema": ema, "model_state_dict_g": student}, merged


def test_research_lora_merges_by_the_formula(state) -> None:
    content, merged = research(state)
    got, report = from_research(content, "student", alpha=ALPHA)
    assert set(got) == set(state)
    for key, value in merged.items():
        torch.testing.assert_close(got[key].double(), value, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(got[key], state[key]) for key in state if key not in merged)
    assert sum("one-way" in note for note in report.notes) == 2


def test_research_average_is_merged_over_the_students_base(state) -> None:
    content, merged = research(state)
    got, _ = from_research(content, "ema", alpha=ALPHA)
    key = "blocks.0.attn1.to_q.weight"
    expected = (merged[key] + state[key].double()) / 2  # B halved
    torch.testing.assert_close(got[key].double(), expected, rtol=1e-5, atol=1e-6)


def test_research_average_alone_needs_its_base(state) -> None:
    content, _ = research(state)
    content = {"ema": content["ema"]}
    with pytest.raises(ValueError, match="base: no weight"):
        from_research(content, alpha=ALPHA)
    got, _ = from_research(content, alpha=ALPHA, base=state)
    assert set(got) == set(state)


def test_bfloat16_merge_rounds_once(state) -> None:
    content, merged = research(state, torch.bfloat16)
    got, _ = from_research(content, "student", alpha=ALPHA)
    for key, value in merged.items():
        assert got[key].dtype == torch.bfloat16
        assert ((got[key].double() - value).abs() <= value.abs() * 2**-8).all()  # half a step, and fp32's own error


def test_lora_alpha_is_not_guessed(state) -> None:
    content, _ = research(state)
    with pytest.raises(ValueError, match="alpha: got None"):
        from_research(content, "student")


def test_merged_research_weights_are_the_same_object(state) -> None:
    content = {"ema": state, "model_state_dict_g": {}}
    got, report = from_research(content)
    assert got is state and not report.changed


def far_directory(tmp_path: Path, **changes) -> tuple[Path, AnyFlowFARTransformer3DModel]:
    torch.manual_seed(0)
    model = AnyFlowFARTransformer3DModel(**SIZES, gate_value=0.4, chunk_partition=(1, 2), **changes)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model", model


@pytest.mark.parametrize("target", ["fastgen", "fastgen_old", "fastvideo"])
def test_directory_round_trips_through_a_file(tmp_path: Path, target: str) -> None:
    """Weights and config: the config travels in the file's metadata."""
    directory, model = far_directory(tmp_path)
    report = convert(directory, tmp_path / "x.safetensors", target)
    assert report.renamed
    convert(tmp_path / "x.safetensors", tmp_path / "back", "diffusers")
    back = AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / "back")
    assert back.config == model.config and back.config.gate_value == 0.4
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters(), strict=True))


def test_research_file_becomes_a_directory(tmp_path: Path) -> None:
    directory, model = far_directory(tmp_path)
    content, merged = research(dict(model.state_dict()))
    torch.save(content, tmp_path / "research.pt")
    config = json.loads((directory / "config.json").read_text())
    convert(tmp_path / "research.pt", tmp_path / "out", "diffusers", config=config, alpha=ALPHA, weights="student")
    got = AnyFlowFARTransformer3DModel.from_pretrained(tmp_path / "out").state_dict()
    for key, value in merged.items():
        torch.testing.assert_close(got[key].double(), value, rtol=1e-5, atol=1e-6)


def test_config_is_not_guessed(tmp_path: Path) -> None:
    _, model = far_directory(tmp_path)
    torch.save({"ema": dict(model.state_dict())}, tmp_path / "research.pt")
    with pytest.raises(ValueError, match="config: got None"):
        convert(tmp_path / "research.pt", tmp_path / "out", "diffusers")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"config: lacks \['gate_value'"):
        check_config({"_class_name": "AnyFlowTransformer3DModel"})
    with pytest.raises(ValueError, match="chunk_partition"):
        check_config({"_class_name": "AnyFlowFARTransformer3DModel", "gate_value": 0.25, "deltatime_type": "r"})


def test_weights_that_do_not_fit_the_config_are_listed_before_writing(tmp_path: Path) -> None:
    directory, _ = far_directory(tmp_path)
    config = json.loads((directory / "config.json").read_text()) | {"num_layers": 3, "ffn_dim": 32}
    with pytest.raises(ValueError, match=r"missing blocks\.2\.[\s\S]*ffn\.net\.2\.weight: got"):
        convert(directory, tmp_path / "out", "diffusers", config=config)
    assert not (tmp_path / "out").exists()


def test_research_files_cannot_run_code(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self):
            return (print, ("executed",))

    torch.save({"ema": Payload()}, tmp_path / "bad.pt")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        read_checkpoint(tmp_path / "bad.pt")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: convert_state_dict({}, "onnx"), "target: got 'onnx'"),
        (lambda: convert_state_dict({}, "research"), "LoRA factors cannot be recovered"),
        (lambda: read_checkpoint("weights.bin"), r"path: got weights\.bin"),
        (lambda: from_research({"ema": {}}, "teacher"), "weights: got 'teacher'"),
        (lambda: from_research({"ema": {}}, "student"), "holds only"),
    ],
)
def test_bad_arguments_are_named(call, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
