"""Extension points of diffusers around an accelerated transformer: they work, or say in a sentence why not.

A CPU stands for the accelerator that weights are brought to: what is offloaded is poisoned with NaN meanwhile.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")

from anyflow_runtime import accelerate, restore
from anyflow_runtime.models import AnyFlowModel

from .group_offload import poison_offloaded
from .parity import FP32_TOLERANCE, relative_error
from .test_accelerate import make, run

both_models = pytest.mark.parametrize("causal", [True, False], ids=["far", "bidirectional"])


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    return poison_offloaded(monkeypatch)


@both_models
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offload(level: str, when: str, causal: bool, poisoned: list[int]) -> None:
    pipe = make(causal)
    want = run(pipe)

    def offload() -> None:
        pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)

    if when == "before":
        offload()
    accelerate(pipe, match_diffusers_padding=True)
    if when == "after":
        offload()
    assert relative_error(run(pipe), want) < FP32_TOLERANCE
    assert poisoned
    restore(pipe)
    assert relative_error(run(pipe), want) < FP32_TOLERANCE


def test_prefill_brings_offloaded_weights(poisoned: list[int]) -> None:
    from anyflow_runtime import FarCache

    model = accelerate(make()).transformer
    video, text = torch.randn(1, 2, 16, 4, 6), torch.randn(1, 3, 16)

    def velocity() -> torch.Tensor:
        cache = FarCache.for_model(model, (1, 1, 1), 4, 6, 1)
        model.prefill(cache, video, (1, 1), text)
        times = torch.full((1, 1), 500.0)
        return model(video[:, :1], times, times / 2, text, (1, 1, 1), kv_cache=cache).sample

    with torch.no_grad():
        want = velocity()
        model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
        torch.testing.assert_close(velocity(), want)


@both_models
@pytest.mark.parametrize("when", ["before", "after"])
def test_layerwise_casting_stores_fp8(when: str, causal: bool) -> None:
    pipe, reference = make(causal), make(causal)
    cast = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.float32}
    reference.transformer.enable_layerwise_casting(**cast)
    want = run(reference)
    if when == "after":
        accelerate(pipe, match_diffusers_padding=True)
    pipe.transformer.enable_layerwise_casting(**cast)
    if when == "before":
        accelerate(pipe, match_diffusers_padding=True)
    assert relative_error(run(pipe), want) < FP32_TOLERANCE
    assert pipe.transformer.blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    pipe.transformer.cuda_graphs = True
    assert not pipe.transformer.captures(torch.device("cuda"))  # its hooks free the memory that a graph would read


@both_models
def test_from_pipe_shares_the_accelerated_transformer(causal: bool) -> None:
    pipe = accelerate(make(causal), match_diffusers_padding=True)
    other = type(pipe).from_pipe(pipe)
    assert other.transformer is pipe.transformer and isinstance(other.transformer, AnyFlowModel)
    assert relative_error(run(other), run(pipe)) == 0
    restore(pipe)
    assert type(pipe).from_pipe(pipe).transformer is pipe.transformer


@both_models
@pytest.mark.parametrize("how", ["pickle", "torch.save", "deepcopy"])
def test_copies_stay_accelerated_and_are_their_own(how: str, causal: bool) -> None:
    pipe = accelerate(make(causal), match_diffusers_padding=True)
    want = run(pipe)
    if how == "pickle":
        copied = pickle.loads(pickle.dumps(pipe.transformer))
    elif how == "torch.save":
        file = io.BytesIO()
        torch.save(pipe.transformer, file)
        file.seek(0)
        copied = torch.load(file, weights_only=False)
    else:
        copied = copy.deepcopy(pipe.transformer)
    assert type(copied) is type(pipe.transformer)
    with torch.no_grad():
        for p in pipe.transformer.parameters():
            p.zero_()
    pipe.transformer = copied
    assert relative_error(run(pipe), want) == 0
    restore(pipe)
    assert not isinstance(copied, AnyFlowModel)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda model: model.set_attention_backend("native"), "set_attention_backend: .*backend="),
        (lambda model: model.blocks[0].attn1.set_processor(object()), "set_processor: .*calls no processor"),
        (lambda model: model.enable_parallelism(config=None), "enable_parallelism: .*context_parallel"),
    ],
    ids=["set_attention_backend", "set_processor", "enable_parallelism"],
)
def test_what_would_have_no_effect_is_refused_until_restored(call: Any, says: str) -> None:
    pipe = accelerate(make(causal=False))
    with pytest.raises(NotImplementedError, match=says):
        call(pipe.transformer)
    restore(pipe)
    assert "refuse" not in str(type(pipe.transformer).set_attention_backend)
    assert type(pipe.transformer.blocks[0].attn1).set_processor.__module__.startswith("diffusers")


def test_a_foreign_processor_is_refused_before_anything_changes() -> None:
    pipe = make(causal=False)
    pipe.transformer.blocks[1].attn1.processor = lambda *arguments: None
    kinds = [type(module) for module in pipe.transformer.modules()]
    with pytest.raises(TypeError, match="has the processor function, which replaces what our kernels fuse"):
        accelerate(pipe)
    assert [type(module) for module in pipe.transformer.modules()] == kinds


def test_a_hook_that_caches_blocks_is_refused() -> None:
    from diffusers.hooks import HookRegistry, ModelHook

    pipe = make(causal=False)
    HookRegistry.check_if_exists_or_initialize(pipe.transformer.blocks[0]).register_hook(ModelHook(), "fbc_block_hook")
    with pytest.raises(TypeError, match=r"blocks\.0 has the hook 'fbc_block_hook', which replaces"):
        accelerate(pipe)


def test_replaced_blocks_are_refused() -> None:
    """cache-dit puts one module in the place of all blocks."""
    pipe = make(causal=False)
    pipe.transformer.blocks = torch.nn.ModuleList([torch.nn.Identity()])
    with pytest.raises(TypeError, match="a block is a Identity, which replaces"):
        accelerate(pipe)


@both_models
@pytest.mark.parametrize("order", ["offload, accelerate, restore, unhook", "accelerate, offload, unhook, restore"])
def test_hooks_come_and_go_in_any_order(order: str, causal: bool) -> None:
    from diffusers.hooks import HookRegistry

    pipe = make(causal)
    want = run(pipe)
    steps = {
        "offload": lambda: pipe.transformer.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        "accelerate": lambda: accelerate(pipe, match_diffusers_padding=True),
        "restore": lambda: restore(pipe),
        "unhook": lambda: HookRegistry.check_if_exists_or_initialize(pipe.transformer).remove_hook("group_offloading"),
    }
    for step in order.split(", "):
        steps[step]()
        assert relative_error(run(pipe), want) < FP32_TOLERANCE, step
    assert isinstance(accelerate(pipe, match_diffusers_padding=True).transformer, AnyFlowModel)
    assert relative_error(run(pipe), want) < FP32_TOLERANCE


def test_without_a_kv_cache_the_answer_is_diffusers_own() -> None:
    """`use_kv_cache=False` fails in diffusers 0.42 itself; accelerated it fails the same way, not silently wrong."""
    failures = []
    for pipe in (make(), accelerate(make())):
        with pytest.raises(Exception) as failure:
            run(pipe, use_kv_cache=False)
        failures.append(type(failure.value))
    assert failures[0] is failures[1]


def test_a_single_file_is_refused_in_words(tmp_path: Any) -> None:
    from diffusers import AnyFlowFARTransformer3DModel

    with pytest.raises(ValueError, match="FromOriginalModelMixin is currently only compatible with"):
        AnyFlowFARTransformer3DModel.from_single_file(str(tmp_path / "x.gguf"))


@both_models
@pytest.mark.parametrize("when", ["before", "after"])
def test_disk_offload(when: str, causal: bool, tmp_path: Any) -> None:
    """`device_map` with blocks on disk: their weights are on no device until the hook of a linear reads them."""
    import diffusers

    pipe = make(causal)
    want = run(pipe)
    pipe.transformer.save_pretrained(tmp_path / "model")
    kind = diffusers.AnyFlowFARTransformer3DModel if causal else diffusers.AnyFlowTransformer3DModel
    places = {name: "cpu" for name, _ in pipe.transformer.named_children() if name != "blocks"}
    places |= {"scale_shift_table": "cpu", "blocks.0": "cpu", "blocks.1": "disk"}
    disk = str(tmp_path / "disk")
    pipe.transformer = kind.from_pretrained(tmp_path / "model", device_map=places, offload_folder=disk)
    if when == "after":
        accelerate(pipe, match_diffusers_padding=True)
    assert pipe.transformer.blocks[1].ffn.net[2].weight.is_meta
    assert relative_error(run(accelerate(pipe, match_diffusers_padding=True)), want) < FP32_TOLERANCE


@both_models
def test_group_offload_to_disk(causal: bool, tmp_path: Any) -> None:
    pipe = accelerate(make(causal), match_diffusers_padding=True)
    want = run(pipe)
    pipe.transformer.enable_group_offload(
        torch.device("cpu"), offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path)
    )
    assert list(tmp_path.glob("*.safetensors"))
    assert relative_error(run(pipe), want) < FP32_TOLERANCE  # q, k and v are three products then


@both_models
def test_autocast_is_no_less_exact_than_diffusers(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 weights under autocast to bf16: linears round, the residual stream, norms and softmax statistics do not."""
    pipe = make(causal)
    want = run(pipe)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = run(pipe)
        ours = run(accelerate(pipe, match_diffusers_padding=True))
    assert 1e-4 < relative_error(ours, want) < 2 * relative_error(theirs, want)
    pipe.transformer.cuda_graphs = True
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: True)  # torch.autocast refuses an absent device
    assert not pipe.transformer.captures(torch.device("cuda"))


@both_models
@pytest.mark.parametrize("cast", [False, True], ids=["fp32", "stored in fp16"])
def test_training_under_autocast(cast: bool, causal: bool) -> None:
    model = accelerate(make(causal)).transformer
    if cast:
        model.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    times = torch.full((1, 3), 700.0)
    arguments = (torch.randn(1, 3, 16, 4, 6), times, times / 2, torch.randn(1, 5, 16))
    partition = {"chunk_partition": (1, 2)} if causal else {}
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*arguments, **partition).sample.float().square().mean()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.blocks.parameters() if p.requires_grad)
