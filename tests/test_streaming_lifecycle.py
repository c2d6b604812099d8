"""Pipeline lifecycle: order of calls, misuse, retries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from anyflow_runtime.encoders.base import EncoderConfig, NullEncoderConfig
from anyflow_runtime.schedulers import FlowMatchSchedulerConfig
from anyflow_runtime.streaming import (
    LifecycleError,
)

from .streaming_toys import (
    CHANNELS,
    FRAMES,
    SIDE,
    Breaks,
    CountingEncoderConfig,
    SumDecoderConfig,
    control,
    rollout,
    toy_pipeline,
)


def test_output_without_a_decoder_is_the_unpatchified_latent():
    pipeline = toy_pipeline()
    output = pipeline.generate(0, pipeline.initialize_cache(seed=0))
    assert output.shape == (1, FRAMES, CHANNELS, SIDE, SIDE)
    assert torch.isfinite(output).all() and not output.requires_grad


def test_later_chunks_depend_on_earlier_ones():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    shape = (1, FRAMES, CHANNELS, SIDE, SIDE)
    outputs = []
    for i in range(2):
        outputs.append(pipeline.generate(i, cache, noise=torch.ones(shape)))
        pipeline.finalize(i, cache)
    assert not torch.allclose(*outputs)


@pytest.mark.parametrize("index", [-1, 1, 2])
def test_first_chunk_must_be_zero(index):
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match=f"got {index}, expected 0"):
        pipeline.generate(index, cache)
    pipeline.generate(0, cache)


@pytest.mark.parametrize("index", [0, 2])
def test_index_must_follow(index):
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    with pytest.raises(AssertionError, match="expected 1"):
        pipeline.generate(index, cache)
    pipeline.generate(1, cache)


def test_next_chunk_before_finalize_is_refused():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    with pytest.raises(LifecycleError, match="chunk 0 is not finalized"):
        pipeline.generate(1, cache)
    pipeline.finalize(0, cache)
    pipeline.generate(1, cache)


def test_finalize_consumes_the_state():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    assert cache.final_state is None
    with pytest.raises(AssertionError, match="nothing to finalize"):
        pipeline.finalize(0, cache)


def test_finalize_wants_the_index_of_the_latest_generate():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match="nothing to finalize"):
        pipeline.finalize(0, cache)
    pipeline.generate(0, cache)
    with pytest.raises(AssertionError, match="got 1 to finalize, expected chunk 0"):
        pipeline.finalize(1, cache)
    pipeline.finalize(0, cache)


def test_input_without_an_encoder_is_refused():
    pipeline = toy_pipeline()
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match="no encoder"):
        pipeline.generate(0, cache, input=control(0))
    pipeline.generate(0, cache)


def test_encoder_without_an_input_is_refused():
    pipeline = toy_pipeline(encoder=CountingEncoderConfig())
    cache = pipeline.initialize_cache()
    with pytest.raises(AssertionError, match="input: got None"):
        pipeline.generate(0, cache)
    pipeline.generate(0, cache, control(0))


def test_null_encoder_in_the_pipeline_passes_the_input_on():
    given, none = toy_pipeline(encoder=NullEncoderConfig()), toy_pipeline()
    zero = torch.zeros(1, FRAMES, CHANNELS, SIDE, SIDE)
    caches = given.initialize_cache(seed=3), none.initialize_cache(seed=3)
    torch.testing.assert_close(given.generate(0, caches[0], zero), none.generate(0, caches[1]), rtol=0, atol=0)
    caches = given.initialize_cache(seed=3), none.initialize_cache(seed=3)
    assert not torch.allclose(given.generate(0, caches[0], control(0)), none.generate(0, caches[1]))


def test_one_shot_encoder_in_the_pipeline_is_refused_at_construction():
    with pytest.raises(TypeError, match="encoder: got Encoder, expected a streaming encoder"):
        toy_pipeline(encoder=EncoderConfig())


def test_contexts_reach_their_parts_and_are_ignored_without_them():
    both = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig())
    cache = both.initialize_cache(encoder_context={"calls": 7}, decoder_context={"total": 2.0})
    assert cache.encoder_cache.calls == 7 and cache.decoder_cache.total == 2.0
    cache = toy_pipeline().initialize_cache(encoder_context={"calls": 7}, decoder_context={"total": 2.0})
    assert cache.encoder_cache is None and cache.decoder_cache is None


def test_order_of_calls_within_a_chunk():
    pipeline = toy_pipeline(scheduler=FlowMatchSchedulerConfig(num_inference_steps=2, denoising_timesteps=(1000, 500)))
    cache = pipeline.initialize_cache()
    pipeline.generate(0, cache)
    pipeline.finalize(0, cache)
    kinds = [entry if entry[0] != "flow" else "flow" for entry in cache.transformer_cache.log]
    assert kinds == [("start", 0), "flow", "flow", "flow", ("finalize", 0)]
    assert cache.transformer_cache.log[3] == ("flow", 0.0)  # the cache update runs on the clean chunk


@pytest.mark.parametrize("part", ["encoder", "transformer", "decoder"])
def test_failed_generate_leaves_no_trace(part):
    """A retry gives the very output the chunk would have had: noise, encoder and decoder state are rewound."""
    pipeline = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig())
    expected = rollout(pipeline, 3)
    cache = pipeline.initialize_cache(seed=0)
    breaking = {"transformer": pipeline.diffusion_model.transformer}.get(part) or getattr(pipeline, part)
    for i in range(3):
        breaking.breaks = True
        with pytest.raises(Breaks, match=part):
            pipeline.generate(i, cache, control(i))
        breaking.breaks = False
        assert cache.final_state is None and cache.next_index == i
        torch.testing.assert_close(pipeline.generate(i, cache, control(i)), expected[i], rtol=0, atol=0)
        pipeline.finalize(i, cache)
    assert cache.encoder_cache.seen == [0, 1, 2]


def test_failed_finalize_can_be_repeated():
    pipeline = toy_pipeline(context_noise=100)
    expected = rollout(pipeline, 2)
    cache = pipeline.initialize_cache(seed=0)
    pipeline.generate(0, cache)
    pipeline.diffusion_model.transformer.breaks = True
    with pytest.raises(Breaks):
        pipeline.finalize(0, cache)
    pipeline.diffusion_model.transformer.breaks = False
    pipeline.finalize(0, cache)
    torch.testing.assert_close(pipeline.generate(1, cache), expected[1], rtol=0, atol=0)


def test_interleaved_rollouts_do_not_disturb_each_other():
    pipeline = toy_pipeline(decoder=SumDecoderConfig())
    expected = rollout(pipeline, 3, seed=1), rollout(pipeline, 3, seed=2)
    caches = pipeline.initialize_cache(seed=1), pipeline.initialize_cache(seed=2)
    for i in range(3):
        for cache, outputs in zip(caches, expected, strict=True):
            torch.testing.assert_close(pipeline.generate(i, cache), outputs[i], rtol=0, atol=0)
            pipeline.finalize(i, cache)


class Lifecycle(RuleBasedStateMachine):
    """Any order of right, wrong and failing calls: whatever succeeds is what an undisturbed rollout gives."""

    LENGTH = 5
    pipeline = toy_pipeline(encoder=CountingEncoderConfig(), decoder=SumDecoderConfig(), context_noise=50)
    expected = rollout(pipeline, LENGTH)

    def __init__(self) -> None:
        super().__init__()
        self.cache = self.pipeline.initialize_cache(seed=0)
        self.done = 0  # chunks generated
        self.finalized = 0

    @property
    def parts(self) -> dict[str, Any]:
        model = self.pipeline.diffusion_model.transformer
        return {"encoder": self.pipeline.encoder, "transformer": model, "decoder": self.pipeline.decoder}

    @precondition(lambda self: self.done < self.LENGTH)
    @rule(offset=st.integers(-2, 2), with_input=st.booleans())
    def generate(self, offset: int, with_input: bool) -> None:
        index = self.done + offset
        given = control(index) if with_input else None
        if offset == 0 and self.done == self.finalized and with_input:
            output = self.pipeline.generate(index, self.cache, given)
            torch.testing.assert_close(output, self.expected[index], rtol=0, atol=0)
            self.done += 1
        else:
            with pytest.raises(AssertionError):
                self.pipeline.generate(index, self.cache, given)

    @precondition(lambda self: self.done == self.finalized and self.done < self.LENGTH)
    @rule(part=st.sampled_from(["encoder", "transformer", "decoder"]))
    def fail_to_generate(self, part: str) -> None:
        self.parts[part].breaks = True
        try:
            with pytest.raises(Breaks):
                self.pipeline.generate(self.done, self.cache, control(self.done))
        finally:
            self.parts[part].breaks = False

    @rule(offset=st.integers(-2, 1))
    def finalize(self, offset: int) -> None:
        index = self.done + offset
        if offset == -1 and self.finalized < self.done:
            self.pipeline.finalize(index, self.cache)
            self.finalized += 1
        else:
            with pytest.raises(AssertionError):
                self.pipeline.finalize(index, self.cache)

    @precondition(lambda self: self.finalized < self.done)
    @rule()
    def fail_to_finalize(self) -> None:
        self.parts["transformer"].breaks = True
        try:
            with pytest.raises(Breaks):
                self.pipeline.finalize(self.done - 1, self.cache)
        finally:
            self.parts["transformer"].breaks = False

    @rule()
    def new_rollout(self) -> None:
        self.cache = self.pipeline.initialize_cache(seed=0)
        self.done = self.finalized = 0

    @invariant()
    def cache_tells_where_it_is(self) -> None:
        assert self.cache.next_index == self.done
        assert (self.cache.final_state is None) == (self.done == self.finalized)
        assert self.cache.encoder_cache.seen == list(range(self.done))


TestLifecycleOrders = Lifecycle.TestCase
TestLifecycleOrders.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
