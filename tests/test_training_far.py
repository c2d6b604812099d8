"""The causal training layout and the FAR rollout, on our FAR model. Witnesses: oracle numbers; float64 gradients."""

from __future__ import annotations

import pytest
import torch

from anyflow_kernels import FarLayout
from anyflow_runtime import AnyFlowFARTransformer3DModel
from anyflow_runtime.training import (
    BidirectionalVelocity,
    FarClip,
    FarVelocity,
    FlowMapConfig,
    RolloutDraw,
    draw_num_chunks,
    far_rollout,
    flow_map_loss,
    rollout,
    sample_time_pairs,
)

from . import trainer_runs
from .trainer_runs import SIZES

ORACLE = trainer_runs.ORACLE["far_training_layout"]
PARTITION = [1, 2, 1, 2]


def far_model(seed: int = 0, **changes) -> AnyFlowFARTransformer3DModel:
    """A tiny float64 model: in float64, gradients computed in two ways agree to 1e-9 or are wrong."""
    torch.manual_seed(seed)
    model = AnyFlowFARTransformer3DModel(**(SIZES | {"full_chunk_limit": 2} | changes)).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(batch: int = 2, frames: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(7)
    return torch.randn(batch, frames, 3, 8, 8, dtype=torch.float64), torch.randn(batch, 5, 6, dtype=torch.float64)


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("num_chunks", ORACLE["layout_by_num_chunks"], ids=str)
def test_clip_matches_oracle(num_chunks: str) -> None:
    expected, partition = ORACLE["layout_by_num_chunks"][num_chunks], ORACLE["chunk_partition"]
    latents = torch.arange(float(sum(partition))).view(1, -1, 1, 1, 1)
    clip = FarClip.from_latents(latents, partition, int(num_chunks), ORACLE["full_chunk_limit"])
    frames = expected["context_frames"], expected["noisy_frames"]
    assert (clip.context.shape[1], clip.target.shape[1]) == frames
    assert torch.equal(torch.cat([clip.context, clip.target], 1), latents[:, : sum(frames)])
    assert list(clip.partition) == expected["context_chunks"] + expected["noisy_chunks"]
    assert clip.starts_video == (frames[0] == 0)


@pytest.mark.parametrize("num_chunks", ORACLE["layout_by_num_chunks"], ids=str)
def test_layout_of_the_clip_has_the_oracle_token_counts(num_chunks: str) -> None:
    expected = ORACLE["layout_by_num_chunks"][num_chunks]["tokens_480x832(60x104 latent)"]
    layout = FarLayout(tuple(ORACLE["chunk_partition"][: int(num_chunks)]), 60, 104, mode="train", clean=True)
    names = {"context": "compressed", "noisy": "full", "clean": "clean"}
    got = {name: sum(s.tokens for s in layout.segments if s.kind == kind) for name, kind in names.items()}
    assert got == expected


def test_chunk_mask_of_the_layout_matches_oracle() -> None:
    expected = ORACLE["chunk_mask_5_chunks"]
    layout = FarLayout((1, 3, 3, 3, 3), 4, 4, mode="train", clean=True)
    kinds = {"compressed": "ctx", "full": "noise", "clean": "clean"}
    assert [f"{kinds[s.kind]}{s.chunk}" for s in layout.segments] == expected["order"]
    allowed = [
        [int(any(a <= s.offset and s.end <= b for a, b in keys)) for s in layout.segments]
        for _, _, keys in layout.key_ranges
    ]
    assert allowed == expected["allow[q][k]"]


def test_gradient_reaches_exactly_what_the_mask_allows() -> None:
    """Noisy chunk j depends on the context, itself and earlier clean chunks: on nothing later, no noisy neighbour."""
    model = far_model()
    latents, text = inputs()
    clip = FarClip.from_latents(latents, PARTITION, 4, 2)
    clean, context = clip.target.clone().requires_grad_(), clip.context.clone().requires_grad_()
    x = torch.randn_like(clip.target).requires_grad_()
    t = torch.full((2, 3), 600.0, dtype=torch.float64)
    out = FarVelocity(model, FarClip(context, clean, clip.partition))(x, t, t / 2, text)
    first, second = slice(0, 1), slice(1, 3)  # chunks of 1 and 2 frames
    for mine, other, sees_clean in ((first, second, False), (second, first, True)):
        g_x, g_clean, g_context = torch.autograd.grad(out[:, mine].sum(), (x, clean, context), retain_graph=True)
        assert g_x[:, mine].abs().max() > 0 and g_x[:, other].abs().max() == 0
        assert g_clean[:, mine].abs().max() == 0
        assert (g_clean[:, other].abs().max() > 0) == sees_clean
        assert g_context.abs().max() > 0


def test_chunk_counts_have_the_oracle_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    draws = torch.tensor([draw_num_chunks(8, 3, 0.5, generator) for _ in range(12000)])
    expected = ORACLE["p_num_chunks"]
    for n in range(3, 9):
        p = expected["3"] if n == 3 else expected["4..8 each"]
        assert (draws == n).double().mean().item() == pytest.approx(p, abs=4 * (p * (1 - p) / 12000) ** 0.5)


def test_probes_move_only_the_noisy_frames() -> None:
    """The context and the clean copy that reach the model are the data, at t = r = 0, in all forwards of a loss."""
    model, seen = far_model(), []
    latents, text = inputs()
    clip = FarClip.from_latents(latents, PARTITION, 4, 2)
    model.register_forward_pre_hook(lambda _m, _a, kwargs: seen.append(kwargs), with_kwargs=True)
    labels = torch.tensor([2, 2])
    times = sample_time_pairs(labels, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    config = FlowMapConfig(text_dropout=0.0)
    flow_map_loss(FarVelocity(model, clip), clip.target, text, times, config, negative=text[:1] * 0)
    assert len(seen) == 4  # conditional, unconditional, two probes
    for kwargs in seen:
        assert torch.equal(kwargs["hidden_states"][:, :3], clip.context)
        assert torch.equal(kwargs["clean_hidden_states"], clip.target)
        assert (kwargs["timestep"][:, :3] == 0).all() and (kwargs["r_timestep"][:, :3] == 0).all()
        assert (kwargs["clean_timestep"] == 0).all()
    assert not torch.equal(seen[2]["hidden_states"][:, 3:], seen[3]["hidden_states"][:, 3:])


def test_selected_rows_are_those_of_the_whole_batch() -> None:
    model = far_model()
    latents, text = inputs(3)
    clip = FarClip.from_latents(latents, PARTITION, 4, 2)
    t = torch.full((3, 3), 500.0, dtype=torch.float64)
    rows = torch.tensor([2, 0])
    velocity = FarVelocity(model, clip)
    with torch.no_grad():
        whole = velocity(clip.target, t, t, text)
        part = velocity.select(rows)(clip.target[rows], t[rows], t[rows], text[rows])
    torch.testing.assert_close(part, whole[rows], rtol=1e-10, atol=1e-12)


def test_full_attention_by_the_far_model_sees_later_frames() -> None:
    """Bidirectional co-training: as one chunk, the first frame depends on the last."""
    model = far_model()
    latents, text = inputs()
    x = latents.requires_grad_()
    t = torch.full((2, 6), 400.0, dtype=torch.float64)
    out = BidirectionalVelocity(model)(x, t, t, text)
    (gradient,) = torch.autograd.grad(out[:, 0].sum(), x)
    assert gradient[:, 5].abs().max() > 0


def loss_of(model, latents, text) -> torch.Tensor:
    clip = FarClip.from_latents(latents, PARTITION, 4, 2)
    times = sample_time_pairs(torch.tensor([0, 2]), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    noise = torch.randn(clip.target.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    config = FlowMapConfig(guidance=None, text_dropout=0.0)
    return flow_map_loss(FarVelocity(model, clip), clip.target, text, times, config, noise=noise).loss


def rolled_out(model, noise, text) -> torch.Tensor:
    return far_rollout(model, noise, text, PARTITION, RolloutDraw(4, 1).segments()).square().mean()


@pytest.mark.parametrize("loss", [loss_of, rolled_out], ids=["flow_map", "rollout"])
def test_gradient_checkpointing_changes_no_gradient(loss) -> None:
    """Reference: cache buffers overwritten while chunks are recomputed give gradients 2 to 10 % off."""
    model = far_model()
    latents, text = inputs()
    plain = gradients(model, loss(model, latents, text))
    model.enable_gradient_checkpointing()
    recomputed = gradients(model, loss(model, latents, text))
    assert plain.keys() == recomputed.keys()
    for name, gradient in plain.items():
        assert torch.equal(gradient, recomputed[name]), name


def chunked_without_cache(model, noise, text, segments) -> torch.Tensor:
    """The rollout the slow, obvious way: each chunk is a training-path forward with its clean, detached past."""
    chunks: list[torch.Tensor] = []
    for i, chunk_noise in enumerate(noise.split(PARTITION, dim=1)):
        known = PARTITION[: i + 1]
        past = torch.cat([noise[:, :0], *chunks], dim=1).detach()
        full = known[-2:]
        context_frames = sum(known) - sum(full)

        def velocity(x, t, r, text, past=past, known=known, context_frames=context_frames):
            zeros = t.new_zeros(x.shape[0], past.shape[1])
            clean = torch.cat([past[:, context_frames:], torch.zeros_like(x)], dim=1)  # its own clean copy is unseen
            return model(
                torch.cat([past, x], 1),
                torch.cat([zeros, t], 1),
                torch.cat([zeros, r], 1),
                text,
                known,
                clean_hidden_states=clean,
                clean_timestep=torch.zeros_like(clean[:, :, 0, 0, 0]),
                return_dict=False,
            )[0][:, -x.shape[1] :]

        chunks.append(rollout(velocity, chunk_noise, text, segments))
    return torch.cat(chunks, dim=1)


def test_rollout_through_the_cache_equals_rollout_without_one() -> None:
    """Values of the cached rollout, against training-path forwards that see the clean past as data."""
    model = far_model()
    noise, text = inputs()
    segments = RolloutDraw(4, 2).segments()
    with torch.no_grad():
        got = far_rollout(model, noise, text, PARTITION, segments)
        want = chunked_without_cache(model, noise, text, segments)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9)


def test_only_the_queries_of_a_rollout_carry_gradient() -> None:
    """Frozen past: a change of the noise of chunk 0 moves later chunks, but no gradient says so."""
    model = far_model()
    noise, text = inputs()
    x = noise.clone().requires_grad_()
    out = far_rollout(model, x, text, PARTITION, RolloutDraw(2, 0).segments())
    (gradient,) = torch.autograd.grad(out[:, 1:].sum(), x)
    assert gradient[:, 0].abs().max() == 0 and gradient[:, 1:].abs().max() > 0
    with torch.no_grad():
        moved = noise.clone()
        moved[:, 0] += 1
        other = far_rollout(model, moved, text, PARTITION, RolloutDraw(2, 0).segments())
    assert (other[:, 1:] - out[:, 1:]).abs().max() > 1e-6


@pytest.mark.parametrize("name", ["blocks.0.attn2.to_k.weight", "condition_embedder.text_embedder.linear_1.weight"])
def test_every_chunk_of_a_rollout_trains_the_text_path(name: str) -> None:
    """Keys of the prompt kept by a cache step (no gradient) must not be what the next chunk's forward uses."""
    model = far_model()
    noise, text = inputs()
    out = far_rollout(model, noise, text, PARTITION, RolloutDraw(2, 0).segments())
    parameter = model.get_parameter(name)
    for start, end in ((0, 1), (1, 3), (3, 4), (4, 6)):
        (gradient,) = torch.autograd.grad(
            out[:, start:end].square().sum(), parameter, retain_graph=True, allow_unused=True
        )
        assert gradient is not None and gradient.abs().max() > 0, f"frames {start}-{end}"


def test_rollout_gradient_matches_finite_differences_of_its_last_segment() -> None:
    """One chunk, one segment: no cache effect, so the gradient is an ordinary derivative."""
    model = far_model()
    noise, text = inputs(1, 1)
    bias = model.proj_out.bias

    def value() -> torch.Tensor:
        return far_rollout(model, noise, text, [1], RolloutDraw(4, 2).segments()).square().sum()

    model.zero_grad()
    value().backward()
    with torch.no_grad():
        bias[0] += 1e-5
        high = value()
        bias[0] -= 2e-5
        low = value()
        bias[0] += 1e-5
    assert bias.grad[0].item() == pytest.approx(((high - low) / 2e-5).item(), rel=1e-6)


def test_no_graph_under_no_grad() -> None:
    model = far_model()
    noise, text = inputs()
    with torch.no_grad():
        out = far_rollout(model, noise, text, PARTITION, RolloutDraw(2, 0).segments())
    assert not out.requires_grad and out.shape == noise.shape and out.isfinite().all()


@pytest.mark.parametrize("draw", [RolloutDraw(16, 7), RolloutDraw(1, 0), RolloutDraw(4, 3)], ids=str)
def test_at_most_three_forwards_per_chunk(draw: RolloutDraw) -> None:
    model, calls = far_model(), []
    noise, text = inputs()
    model.register_forward_pre_hook(lambda _m, _a, kwargs: calls.append("kv_cache_flag" in kwargs), with_kwargs=True)
    with torch.no_grad():
        far_rollout(model, noise, text, PARTITION, draw.segments())
    assert calls.count(False) == len(PARTITION) * len(draw.segments()) <= len(PARTITION) * 3
    assert calls.count(True) == len(PARTITION) - 1  # the last chunk is nobody's context


def test_rollout_needs_the_frames_of_its_partition() -> None:
    noise, text = inputs()
    with pytest.raises(ValueError, match=r"noise: got shape \(2, 6, 3, 8, 8\), expected \(B, F=3"):
        far_rollout(far_model(), noise, text, [1, 2], RolloutDraw(2, 0).segments())
