"""`accelerate` on real diffusers pipelines at small size: same generator, same video. Witness: the pipeline before."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch

from anyflow_runtime import AnyFlowFARTransformer3DModel, AnyFlowTransformer3DModel, FarCache, accelerate, restore
from anyflow_runtime.schedulers import FlowMapEulerDiscreteScheduler
from bench.tiny_pipeline import tiny_pipeline

from .parity import FP32_TOLERANCE, relative_error

pytest.importorskip("diffusers")
SIZE = {"height": 32, "width": 48, "num_frames": 17}
CHUNKS = [1, 2, 1, 1]


def make(causal: bool = True, **kwargs: Any) -> Any:
    return tiny_pipeline(causal, heads=2, head_dim=16, layers=2, text_dim=16, vae_dim=4, **kwargs)


def run(pipe: Any, **kwargs: Any) -> torch.Tensor:
    causal = "FAR" in type(pipe).__name__
    call = {"prompt": "a cat", "num_inference_steps": 2, "output_type": "latent", "max_sequence_length": 12, **SIZE}
    call |= {"chunk_partition": CHUNKS} if causal else {}
    call |= {"generator": torch.Generator().manual_seed(7), **kwargs}
    return pipe(**call).frames


VARIANTS = {
    "t2v": {},
    "guidance": {"guidance_scale": 3.0, "negative_prompt": "blurry"},
    "two videos": {"num_videos_per_prompt": 2},
    "two prompts": {"prompt": ["a cat", "a dog on a hill"]},
    "generators": {"prompt": ["a", "b"], "generator": None},
    "sigmas": {"sigmas": [1.0, 0.7, 0.2]},
    "timesteps": {"timesteps": [1000.0, 400.0]},
    "plain velocity": {"use_mean_velocity": False},
    "i2v": {"video": torch.rand(1, 1, 3, 32, 48, generator=torch.Generator().manual_seed(1))},
    "v2v": {"video": torch.rand(1, 9, 3, 32, 48, generator=torch.Generator().manual_seed(2))},
    "v2v latents": {"video_latents": torch.randn(1, 3, 16, 4, 6, generator=torch.Generator().manual_seed(3))},
    "pixels": {"output_type": "pt"},
}


@pytest.mark.parametrize("causal", [True, False], ids=["far", "bidirectional"])
@pytest.mark.parametrize("name", VARIANTS)
def test_same_generator_same_video(name: str, causal: bool) -> None:
    pipe = make(causal)
    kwargs = dict(VARIANTS[name])

    def video() -> torch.Tensor:
        if name == "generators":
            kwargs["generator"] = [torch.Generator().manual_seed(i) for i in range(2)]
        return run(pipe, **kwargs)

    want = video()
    assert accelerate(pipe, match_diffusers_padding=True) is pipe
    assert isinstance(pipe.transformer, AnyFlowFARTransformer3DModel if causal else AnyFlowTransformer3DModel)
    assert relative_error(video(), want) < FP32_TOLERANCE


@pytest.mark.parametrize("causal", [True, False], ids=["far", "bidirectional"])
def test_outputs_are_those_of_diffusers(causal: bool) -> None:
    """Tuple equality, values(), keys and isinstance, as a user of diffusers has them."""
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from diffusers.models.transformers.transformer_anyflow_far import AnyFlowFARTransformerOutput
    from diffusers.schedulers.scheduling_flow_map_euler_discrete import FlowMapEulerDiscreteSchedulerOutput

    pipe = accelerate(make(causal))
    x, times, text = torch.randn(1, 2, 16, 4, 6), torch.full((1, 2), 500.0), torch.randn(1, 3, 16)
    model = pipe.transformer
    arguments = {"hidden_states": x, "timestep": times, "r_timestep": times / 2, "encoder_hidden_states": text}
    kind: Any = Transformer2DModelOutput
    if causal:
        cached = model(x[:, :1], times[:, :1] * 0, times[:, :1] * 0, text, (1,), kv_cache=FarCache.for_model(
            model, (1, 1), 4, 6, 1), kv_cache_flag={"is_cache_step": True})  # fmt: skip
        assert isinstance(cached, AnyFlowFARTransformerOutput) and cached.sample is None
        assert list(cached.keys()) == ["kv_cache"] and cached.to_tuple() == (cached.kv_cache,)
        arguments = {name: value[:, :1] if value is not text else text for name, value in arguments.items()}
        arguments |= {"chunk_partition": (1, 1), "kv_cache": cached.kv_cache}
        kind = AnyFlowFARTransformerOutput
    out = model(**arguments)
    assert isinstance(out, kind) and next(iter(out.values())) is out.sample is out[0] is out["sample"]
    step = pipe.scheduler.step(out.sample, 500.0, out.sample, 250.0)
    ours = FlowMapEulerDiscreteScheduler().step(out.sample, 500.0, out.sample, 250.0)
    for result in (step, ours):
        assert isinstance(result, FlowMapEulerDiscreteSchedulerOutput)
        assert result.to_tuple() == tuple(result.values()) == (result.prev_sample,)


@pytest.mark.parametrize("output_type", ["pil", "np"])
def test_output_types(output_type: str) -> None:
    pipe = make()
    want = np.asarray(run(pipe, output_type=output_type)[0], dtype=float)
    got = run(accelerate(pipe, match_diffusers_padding=True), output_type=output_type)
    assert np.abs(np.asarray(got[0], dtype=float) - want).max() <= 1  # one grey level of 255


def test_without_the_phantom_keys_the_video_differs() -> None:
    """Both facts stay tested: the default is the correct softmax, which is not diffusers'."""
    pipe = make()
    want = run(pipe)
    assert relative_error(run(accelerate(pipe)), want) > 1e-4


def test_restore_gives_back_the_reference() -> None:
    pipe = make()
    want, cls, state = run(pipe), type(pipe.transformer), set(vars(pipe.transformer))
    restore(accelerate(pipe))
    assert type(pipe.transformer) is cls and set(vars(pipe.transformer)) == state
    assert torch.equal(run(pipe), want)


def test_weights_are_shared() -> None:
    """Acceleration allocates no second set of weights: the parameters are the same objects, side by side in memory."""
    pipe = make()
    parameters = dict(pipe.transformer.named_parameters())
    accelerate(pipe)
    after = dict(pipe.transformer.named_parameters())
    assert all(after[name] is p for name, p in parameters.items()) and after.keys() == parameters.keys()
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in after.values()}
    assert sum(storages.values()) == sum(p.nbytes for p in after.values())


def test_callback_may_replace_latents_and_prompt() -> None:
    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        return {"latents": tensors["latents"] * 0.5, "prompt_embeds": tensors["prompt_embeds"] * (0.9 + step)}

    extra = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
    for causal in (True, False):
        pipe = make(causal)
        want = run(pipe, **extra)
        assert relative_error(run(accelerate(pipe, match_diffusers_padding=True), **extra), want) < FP32_TOLERANCE


def test_interrupt_stops_the_bidirectional_loop() -> None:
    def callback(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = True
        return tensors

    pipe = make(causal=False)
    want = run(pipe, num_inference_steps=4, callback_on_step_end=callback)
    got = run(accelerate(pipe), num_inference_steps=4, callback_on_step_end=callback)
    assert relative_error(got, want) < FP32_TOLERANCE


def test_two_pipelines_do_not_disturb_each_other() -> None:
    """Rollouts that take turns, chunk by chunk, give what each gives alone: no state is shared."""
    pipes = [accelerate(make(seed=i)) for i in range(2)]
    alone = [run(pipe) for pipe in pipes]

    inner: list[torch.Tensor] = []

    def other_rollout(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inner.append(run(pipes[1]))
        return tensors

    outer = run(pipes[0], callback_on_step_end=other_rollout)
    assert torch.equal(outer, alone[0]) and all(torch.equal(video, alone[1]) for video in inner)


def test_a_rollout_that_raised_leaves_the_pipeline_usable() -> None:
    pipe = accelerate(make())
    want = run(pipe)
    calls = []

    def fail(pipe: Any, step: int, t: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        calls.append(step)
        if len(calls) == 5:
            raise RuntimeError("stop")
        return tensors

    with pytest.raises(RuntimeError, match="stop"):
        run(pipe, callback_on_step_end=fail)
    assert torch.equal(run(pipe), want)


def lora_state(pipe: Any, seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for layer in range(2):
        for name in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ffn.net.0.proj"):
            module = pipe.transformer.get_submodule(f"blocks.{layer}.{name}")
            weight = getattr(module, "base_layer", module).weight
            key = f"transformer.blocks.{layer}.{name}"
            state[f"{key}.lora_A.weight"] = torch.randn(3, weight.shape[1], generator=generator)
            state[f"{key}.lora_B.weight"] = 0.2 * torch.randn(weight.shape[0], 3, generator=generator)
    return state


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("fused", [False, True], ids=["adapter", "fused"])
def test_lora_loaded(when: str, fused: bool) -> None:
    pytest.importorskip("peft")
    pipe = make()
    plain = run(pipe)
    if when == "after":
        accelerate(pipe, match_diffusers_padding=True)
    pipe.load_lora_weights(lora_state(pipe, 0))
    if fused:
        pipe.fuse_lora()
    kwargs = {} if fused else {"attention_kwargs": {"scale": 0.5}}
    got = run(accelerate(pipe, match_diffusers_padding=True), **kwargs)
    want = run(restore(pipe), **kwargs)
    assert relative_error(want, plain) > 1e-3
    assert relative_error(got, want) < FP32_TOLERANCE
    accelerate(pipe, match_diffusers_padding=True)
    if fused:
        pipe.unfuse_lora()
    pipe.unload_lora_weights()
    assert relative_error(run(pipe), plain) < FP32_TOLERANCE


def test_to_keeps_one_gemm_for_qkv() -> None:
    """`.to()` moves every parameter to its own storage; the projections must be fused again, not copied per call."""
    from anyflow_runtime.models.parameters import fused_weight

    pipe = accelerate(make())
    pipe.to(torch.bfloat16).to(torch.float32)
    for block in pipe.transformer.blocks:
        assert fused_weight([block.attn1.to_q, block.attn1.to_k, block.attn1.to_v]) is not None


@pytest.mark.parametrize("order", ["hooks first", "accelerate first"])
def test_sequential_offload_hooks(order: str) -> None:
    """Hooks that keep weights away until a module runs: parameters we read directly must be there when we read them."""
    offloading = pytest.importorskip("accelerate")
    pipe = make()
    want = run(pipe)
    if order == "accelerate first":
        accelerate(pipe, match_diffusers_padding=True)
    offloading.cpu_offload(pipe.transformer, torch.device("cpu"))
    assert pipe.transformer.proj_out.weight.is_meta
    accelerate(pipe, match_diffusers_padding=True)
    assert relative_error(run(pipe), want) < FP32_TOLERANCE


@pytest.mark.parametrize("order", ["hooks first", "accelerate first"])
def test_model_offload_hooks(order: str) -> None:
    """A whole-model hook calls the forward it found when it was attached: it must find ours."""
    offloading = pytest.importorskip("accelerate")
    pipe = make()
    want = run(pipe)
    if order == "accelerate first":
        accelerate(pipe)
    offloading.cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    accelerate(pipe)
    assert relative_error(run(pipe), want) > 1e-4  # the correct softmax: ours ran
    assert relative_error(run(accelerate(pipe, match_diffusers_padding=True)), want) < FP32_TOLERANCE


def test_saved_pipeline_is_diffusers_own(tmp_path: Any) -> None:
    import diffusers

    pipe = accelerate(make(), match_diffusers_padding=True)
    pipe.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["transformer"][0] == "diffusers"
    again = diffusers.AnyFlowFARPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert relative_error(run(again), run(pipe)) < FP32_TOLERANCE


def test_bare_transformer() -> None:
    pipe = make(causal=False)
    transformer = pipe.transformer
    args = (torch.randn(1, 2, 16, 4, 6), torch.full((1, 2), 700.0), torch.full((1, 2), 300.0), torch.randn(1, 5, 16))
    with torch.no_grad():
        want = transformer(*args).sample
        got = accelerate(transformer)(*args).sample
    assert isinstance(transformer, AnyFlowTransformer3DModel) and relative_error(got, want) < FP32_TOLERANCE


def test_rejects_what_it_cannot_accelerate() -> None:
    with pytest.raises(TypeError, match="expected a diffusers AnyFlowPipeline"):
        accelerate(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match=r"torch\.compile"):
        accelerate(torch.compile(make(causal=False).transformer))


@pytest.mark.parametrize("causal", [True, False], ids=["far", "bidirectional"])
def test_compiled_blocks_give_the_same_video(causal: bool) -> None:
    """A block is a graph for each kind of step (chunks and prefills of one run of queries, of several), whatever the
    layer, the length and the rollout; with `fullgraph` torch raises where it cannot trace or exceeds its limit."""
    from torch._dynamo.testing import CompileCounter

    graphs = []
    for layers in (2, 4):
        torch._dynamo.reset()
        counter = CompileCounter()
        pipe = tiny_pipeline(causal, heads=2, head_dim=16, layers=layers, text_dim=16, vae_dim=4)
        want = run(accelerate(pipe))
        accelerate(pipe, compile={"backend": counter, "fullgraph": True})
        assert relative_error(run(pipe), want) < FP32_TOLERANCE
        assert counter.op_count > 20 * counter.frame_count
        graphs.append(counter.frame_count)
        run(pipe, prompt="another prompt")
        assert counter.frame_count == graphs[-1]  # nothing is compiled in a second rollout
    longer = {"chunk_partition": [1, 2, 1, 1, 1]} if causal else {}
    run(pipe, height=48, num_frames=21, **longer)  # five chunks of another size: within torch's limit of graphs
    assert graphs == ([3, 3] if causal else [1, 1])


@pytest.mark.parametrize("causal", [True, False], ids=["far", "bidirectional"])
def test_compile_repeated_blocks_after_accelerate(causal: bool) -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    pipe, counter = make(causal), CompileCounter()
    want = run(accelerate(pipe))
    pipe.transformer.compile_repeated_blocks(backend=counter, fullgraph=True)
    assert relative_error(run(pipe), want) < FP32_TOLERANCE and 1 <= counter.frame_count <= 3
    pipe.transformer.train()  # the training path: gradients through compiled blocks
    times, partition = torch.full((1, 3), 700.0), {"chunk_partition": (1, 2)} if causal else {}
    arguments = (torch.randn(1, 3, 16, 4, 6), times, times / 2, torch.randn(1, 5, 16))
    gradients = []
    for options in ({}, {"compile": {"backend": "aot_eager"}}):
        accelerate(pipe, **options).transformer(*arguments, **partition).sample.square().mean().backward()
        gradients.append(pipe.transformer.blocks[1].attn2.to_k.weight.grad.clone())
        pipe.transformer.zero_grad()
    assert relative_error(*gradients[::-1]) < FP32_TOLERANCE


@pytest.mark.parametrize("causal", [True, False], ids=["far", "bidirectional"])
def test_the_whole_transformer_compiles_in_pieces(causal: bool) -> None:
    torch._dynamo.reset()
    pipe = accelerate(make(causal))
    want = run(pipe)
    pipe.transformer.compile(backend="eager")
    assert relative_error(run(pipe), want) < FP32_TOLERANCE
