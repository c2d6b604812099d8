"""The kernel benches at tiny size: every contestant is right, and diffusers' rivals are what diffusers computes."""

from __future__ import annotations

import importlib
import json
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from anyflow_kernels import AttentionPlan, FarLayout, TimestepMLP, load_ops
from bench import diffusers_eager, far_attention, kernel_bench
from bench.diffusers_eager import NAME
from bench.roofline import draw_roofline

OPERATIONS = (
    "gated_residual_layer_norm",
    "qk_norm_rope_append",
    "rms_norm",
    "linear",
    "linear_gelu",
    "dual_timestep_embedding",
    "patch_embed",
    "unpatchify",
    "flow_map_step",
)
DTYPES = (torch.float32, torch.bfloat16)
MAIN = "diffusers.models.transformers.transformer_anyflow_far"


@pytest.fixture
def no_compiler(monkeypatch):
    """Compiling takes seconds a shape: "compiled" runs eager here."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_contestant_passes_its_parity_check(operation, dtype, no_compiler):
    """A rival that is silently wrong would lose its row, and with it the comparison that a bench is for."""
    bench = importlib.import_module(f"bench.{operation}")
    for case in bench.cases(dtype, True):
        contestants = kernel_bench.contestants(operation, case, "cpu")
        inputs = case.make(torch.Generator().manual_seed(0), "cpu", dtype)
        errors = kernel_bench.parity(case, contestants, inputs, dtype)
        assert list(errors) == ["eager", "compiled", NAME, "torch"], case.name


def test_a_wrong_or_idle_kernel_has_no_speed(capsys):
    """A kernel that does not write its slab must not pass on what another one wrote there."""
    bench = importlib.import_module("bench.qk_norm_rope_append")
    case = bench.cases(torch.float32, True)[0]
    eager = load_ops("reference").qk_norm_rope_append

    def idle(qkv: Tensor, *args: Any, **slabs: Any) -> Tensor:
        return eager(qkv, *args, **{**slabs, "k_cache": slabs["k_cache"].clone()})

    def wrong(*args: Any, **slabs: Any) -> Tensor:
        return eager(*args, **slabs) * 1.001

    inputs = case.make(torch.Generator().manual_seed(0), "cpu", torch.float32)
    errors = kernel_bench.parity(case, {"eager": eager, "idle": idle, "wrong": wrong}, inputs, torch.float32)
    assert list(errors) == ["eager"]
    assert capsys.readouterr().out.count("no speed: ") == 2


@pytest.mark.parametrize(
    "name", ["chunk 0", "chunk 6", "prefill after chunk 6", "bidirectional", "training, clean copy"]
)
def test_attention_of_diffusers_passes_its_parity_check(name):
    """Its padding, its zero keys in inference, and its masks, against float64."""
    layout = kernel_bench.layouts(tiny=True)[name]
    attend, plan = diffusers_eager.far_attention(layout, "cpu")
    assert plan.phantom_keys == (-layout.num_query_tokens % 128 if layout.mode == "inference" else 0)
    q, k, v = (torch.randn(1, n, 2, 16) for n in (plan.num_queries, plan.num_keys, plan.num_keys))
    far_attention.parity(attend, q, k, v, plan)
    if plan.phantom_keys:
        with pytest.raises(AssertionError, match="budget"):
            far_attention.parity(attend, q, k, v, AttentionPlan.from_layout(layout))


def test_the_portable_kernel_is_a_contestant_of_its_own():
    plan = AttentionPlan.from_layout(kernel_bench.layouts(tiny=True)["chunk 6"])
    q, k, v = (torch.randn(1, n, 2, 16) for n in (plan.num_queries, plan.num_keys, plan.num_keys))
    assert far_attention.parity(far_attention.portable_contestant(plan, 0.25), q, k, v, plan) > 0


@pytest.mark.parametrize("query", [0, 17, 23])
def test_one_wrong_query_of_attention_has_no_speed(query):
    """Whichever it is: the whole output is judged, and its worst row."""
    plan = AttentionPlan.from_layout(kernel_bench.layouts(tiny=True)["chunk 6"])
    q, k, v = (torch.randn(1, n, 2, 16) for n in (plan.num_queries, plan.num_keys, plan.num_keys))

    def broken(*tensors: Tensor) -> Tensor:
        out = load_ops("torch").far_attention(*tensors, plan)
        out[0, query, 1] *= 1.01
        return out

    with pytest.raises(AssertionError, match="worst row"):
        far_attention.parity(broken, q, k, v, plan)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_wrong_gradient_of_attention_has_no_speed(dtype):
    """A training row is of forward and backward: each of dq, dk and dv is checked, with keys in three ranges."""
    plan = AttentionPlan.from_layout(kernel_bench.layouts(tiny=True)["training, clean copy"])
    q, k, v = (torch.randn(1, plan.num_keys, 2, 16, dtype=dtype, requires_grad=True) for _ in range(3))
    attend = partial(load_ops("torch").far_attention, plan=plan)
    assert far_attention.gradient_parity(attend, q, k, v, plan) > 0
    for wrong in range(3):

        def stopped(*tensors: Tensor, wrong: int = wrong) -> Tensor:
            own = [x * 0.9 + x.detach() * 0.1 if i == wrong else x for i, x in enumerate(tensors)]
            return attend(*own)

        with pytest.raises(AssertionError, match=("dq", "dk", "dv")[wrong]):
            far_attention.gradient_parity(stopped, q, k, v, plan)


def test_ceilings_are_measured() -> None:
    """The command's test puts numbers in their place, for a machine under test is no yardstick."""
    copy, gemm = kernel_bench.copy_bandwidth("cpu"), kernel_bench.gemm_rate("cpu", torch.float32)
    assert 1e8 < copy < 1e13 and 1e8 < gemm < 1e15


@pytest.mark.parametrize("operation", ["unpatchify", "far_attention"])
def test_a_bench_ends_in_json_and_draws(operation, no_compiler, monkeypatch, capsys, tmp_path):
    """The whole command on a CPU: machine first, ceilings, what was skipped, every contestant, JSON last, a picture."""
    arguments = ["--tiny", "--repeats", "1", "--shape", "chunk", "--plot", str(tmp_path / "roof.png")]
    monkeypatch.setattr(sys, "argv", [operation, *arguments, "--json", str(tmp_path / "rows.jsonl")])
    for ceiling, value in (("copy_bandwidth", 1e10), ("gemm_rate", 1e12)):
        monkeypatch.setattr(kernel_bench, ceiling, lambda *args, value=value: value)
    bench = importlib.import_module(f"bench.{operation}")
    bench.main() if operation == "far_attention" else kernel_bench.run(operation, bench.__doc__, bench.cases)
    lines = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in lines[0] and "diffusers" in lines[0]
    assert "ceilings: copy 10 GB/s" in lines[1]
    assert any(line.startswith("skipped: triton") for line in lines)
    rows = json.loads(lines[-1])
    assert {row["contestant"] for row in rows} == {"eager", "compiled", NAME, "torch"}
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [{key: row[key] for key in rows[0]} for row in kept] == rows
    assert all(row["command"].startswith(f"{operation} --tiny") and row["machine"] in lines[0] for row in kept)
    assert (tmp_path / "roof.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.parametrize("operation", ["unpatchify", "far_attention"])
def test_a_bench_that_is_killed_keeps_its_rows(operation, no_compiler, monkeypatch, tmp_path):
    bench = importlib.import_module(f"bench.{operation}")
    rounds = []

    def medians(functions, repeats):
        rounds.append(functions)
        if len(rounds) == 3:
            raise KeyboardInterrupt
        return dict.fromkeys(functions, 0.25)

    monkeypatch.setattr(bench if operation == "far_attention" else kernel_bench, "interleaved_medians", medians)
    for module in {kernel_bench, bench}:
        monkeypatch.setattr(module, "ceilings", lambda *args: (1e10, 1e12), raising=False)
    monkeypatch.setattr(sys, "argv", [operation, "--tiny", "--json", str(tmp_path / "rows.jsonl")])
    with pytest.raises(KeyboardInterrupt):
        bench.main() if operation == "far_attention" else kernel_bench.run(operation, bench.__doc__, bench.cases)
    kept = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len({row["shape"] for row in kept}) == 2 and {row["ms"] for row in kept} == {250.0}


def test_roofline_of_nothing_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="rows: got none"):
        draw_roofline([], 1e9, 1e12, tmp_path / "roof.png")


def test_tiny_layouts_are_those_of_the_real_sizes():
    """`--tiny` must exercise each kind of call that the real sizes have; these are the models' token counts at 480p."""
    real = kernel_bench.layouts(tiny=False)
    assert real.keys() == kernel_bench.layouts(tiny=True).keys()
    assert real["bidirectional"].num_query_tokens == 32760
    assert real["chunk 6"].num_key_tokens == 13 * 390 + 9 * 1560 - 3 * 390
    assert real["training, clean copy"].clean


# --- the rivals against diffusers' own modules, bit for bit


class _Third(nn.Module):
    """A third of the channels, standing for to_q, to_k or to_v."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        return x.chunk(3, dim=-1)[self.index]


class _Recorder(nn.Module):
    """Gives a fixed output and keeps its input."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, hidden_states: Tensor, **others: Any) -> Tensor:
        self.seen = hidden_states
        return self.out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_are_those_of_a_diffusers_block(dtype):
    far = pytest.importorskip(MAIN)
    block = far.AnyFlowTransformerBlock(32, 64, 2, cross_attn_norm=True)
    nn.init.zeros_(block.scale_shift_table)
    frame_map, tokens = ((2, 6), (3, 24)), 84
    x, attended, prompted, fed = (torch.randn(1, tokens, 32).to(dtype) for _ in range(4))
    rows = torch.randn(1, 5, 6, 32).to(dtype).float()
    shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = rows.unbind(2)
    block.attn1, block.attn2, block.ffn = (_Recorder(out) for out in (attended, prompted, fed))
    repeated = rows.repeat_interleave(torch.tensor([6, 6, 24, 24, 24]), dim=1).to(dtype)
    with torch.no_grad():
        out = block(x, torch.empty(1, 0, 32), repeated, None, None)
        norm = partial(diffusers_eager.gated_residual_layer_norm, frame_map=frame_map)
        _, y1 = norm(x, shift=shift_1, scale=scale_1)
        x1, y2 = norm(x, branch=attended, gate=gate_1, weight=block.norm2.weight, bias=block.norm2.bias)
        x2, y3 = norm(x1, branch=prompted, shift=shift_2, scale=scale_2)
        x3, _ = norm(x2, branch=fed, gate=gate_2, shift=shift_1, scale=scale_1)
    for got, expected in ((y1, block.attn1.seen), (y2, block.attn2.seen), (y3, block.ffn.seen), (x3, out)):
        assert got.dtype == dtype and torch.equal(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_is_that_of_the_diffusers_processor(dtype):
    """RMSNorm, cache, rotation, padding and softmax of one inference step with a cache."""
    far = pytest.importorskip(MAIN)
    heads, head_dim = 2, 16
    layout = FarLayout((1, 2), 8, 12, mode="inference")
    length, cached = layout.num_query_tokens, layout.cache_offset
    attn = far.AnyFlowAttention(heads * head_dim, heads, head_dim).to(dtype)
    attn.to_q, attn.to_k, attn.to_v = (_Third(i) for i in range(3))
    attn.to_out[0] = nn.Identity()
    for norm in (attn.norm_q, attn.norm_k):
        nn.init.uniform_(norm.weight)
    qkv = torch.randn(1, length, 3 * heads * head_dim).to(dtype)
    cache = torch.randn(2, 1, heads, cached, head_dim).to(dtype)
    angles = torch.cat([torch.zeros(cached, head_dim // 2), torch.randn(length, head_dim // 2)])
    rope = (angles.cos(), angles.sin())
    rotation = torch.complex(*(table.double() for table in rope))[None, None]
    state = {"compressed_cache": cache[:, :, :, :0], "full_cache": cache}
    flags = {"is_cache_step": False, "num_cached_compressed_tokens": 0, "num_cached_full_tokens": cached}
    slabs = [torch.zeros(1, cached + length, heads, head_dim, dtype=dtype) for _ in range(2)]
    for slab, context in zip(slabs, cache, strict=True):
        slab[:, :cached] = context.transpose(1, 2)
    with torch.no_grad():
        rotary = {"query": rotation[:, :, cached:], "key": rotation}
        expected = attn(qkv, rotary_emb=rotary, kv_cache=state, kv_cache_flag=flags)
        weights = (attn.norm_q.weight, attn.norm_k.weight)
        own_rope = (rope[0][cached:], rope[1][cached:])
        q, k, v = diffusers_eager.qk_norm_rope_append(qkv, *weights, own_rope, heads, attn.norm_q.eps, *slabs, cached)
        attend, _ = diffusers_eager.far_attention(layout, "cpu")
        assert torch.equal(attend(q, k, v).flatten(2), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_timestep_embedding_is_that_of_diffusers(dtype):
    far = pytest.importorskip(MAIN)
    embedder = far.AnyFlowDualTimestepTextImageEmbeddingCausal(32, 0.25, "r", 16, 192, 8)
    for module in (embedder.delta_embedder, embedder.time_proj):
        module.to(dtype)
    t, r = torch.rand(2, 3) * 1000

    def mlp(module: Any) -> TimestepMLP:
        return TimestepMLP(
            *(getattr(module, f"linear_{i}").get_parameter(n) for i in (1, 2) for n in ("weight", "bias"))
        )

    proj = embedder.time_proj
    args = (t, r, mlp(embedder.time_embedder), mlp(embedder.delta_embedder), proj.weight, proj.bias, 0.25)
    sequence = diffusers_eager.dual_timestep_embedding(tokens_per_frame=4)
    with torch.no_grad():
        expected = embedder.forward_timestep(t[None], r[None], torch.empty(0, dtype=dtype), 4)
        got = sequence.call(*sequence.prepare(*args))
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


def test_patches_linears_and_step_are_those_of_diffusers():
    far = pytest.importorskip(MAIN)
    from diffusers import FlowMapEulerDiscreteScheduler

    model = far.AnyFlowFARTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, num_layers=1, ffn_dim=64, text_dim=8, freq_dim=16
    )
    latents = torch.randn(1, 3, 16, 8, 12)
    with torch.no_grad():
        config = {"num_compressed_frames": 1}
        expected = model._forward_far_patchify(latents.transpose(1, 2), config)
        embed, compress = model.patch_embedding, model.far_patch_embedding
        context = diffusers_eager.patch_embed(latents[:, :1], compress.weight, compress.bias, (1, 4, 4))
        slab = torch.cat([context, torch.empty(1, 48, 32)], dim=1)
        args = (latents[:, 1:], embed.weight, embed.bias, (1, 2, 2), slab, context.shape[1])
        sequence, start = diffusers_eager.patch_embed.call(*diffusers_eager.patch_embed.prepare(*args))
        assert start == 6 and torch.equal(sequence, expected)
        tokens = torch.randn(1, 72, 64)
        unpacked = model._unpack_latent_sequence(tokens, 3, 8, 12, 2)
        assert torch.equal(diffusers_eager.unpatchify(tokens, (3, 4, 6), (1, 2, 2), 16), unpacked)

        block, x = model.blocks[0], torch.randn(1, 5, 32)
        gelu = block.ffn.net[0]
        assert torch.equal(diffusers_eager.linear_gelu(x, gelu.proj.weight, gelu.proj.bias), gelu(x))
        layers = (block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        fused = [torch.cat([layer.get_parameter(n) for layer in layers]) for n in ("weight", "bias")]
        assert torch.equal(diffusers_eager.linear(x, *fused), torch.cat([layer(x) for layer in layers], dim=-1))
        assert torch.equal(diffusers_eager.rms_norm(x, block.attn1.norm_q.weight, 1e-6), block.attn1.norm_q(x))

    scheduler: Any = FlowMapEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(4)
    u, u_uncond = torch.randn(2, *latents.shape)
    guided = u_uncond + 5.0 * (u - u_uncond)
    expected = scheduler.step(guided, scheduler.timesteps[1], latents, return_dict=False)[0]
    sigmas = (scheduler.sigmas[1], scheduler.sigmas[2])
    assert torch.equal(diffusers_eager.flow_map_step(latents, u, *sigmas, u_uncond=u_uncond, guidance=5.0), expected)
