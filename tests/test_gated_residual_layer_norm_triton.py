"""`gated_residual_layer_norm` on the triton backend against float64 (reference backend)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_kernels import triton_ops
from anyflow_kernels.testing.budget import check

from .triton_checks import DEVICE, OPCHECKS, REFERENCE, TRITON, compare, count_compilations, poisoned_memory

# Uses in a block: first norm, gated residual + norm2, residual + modulated norm, gated residual + next norm; then all
# terms.
USES = {
    "modulated": ("shift", "scale"),
    "plain": (),
    "gated + affine": ("branch", "gate", "weight", "bias"),
    "residual + modulated": ("branch", "shift", "scale"),
    "gated + modulated": ("branch", "gate", "shift", "scale"),
    "everything": ("branch", "gate", "shift", "scale", "weight", "bias"),
}
# Runs (frames, tokens per frame): one token; ragged; two resolutions; five runs, more than one launch takes; an empty
# run.
FRAME_MAPS = [((1, 1),), ((3, 5),), ((2, 3), (2, 9)), ((1, 2), (2, 1), (1, 7), (1, 4), (2, 3)), ((2, 0), (1, 6))]


def inputs(
    use: str, frame_map: tuple, width: int, dtype: torch.dtype = torch.float32, batch: int = 2, grad: bool = False
) -> tuple[tuple, dict[str, Tensor]]:
    """Strided on purpose: x and branch are slices of wider rows, modulation is a slice of a (B, F, 6, D) tensor."""
    generator = torch.Generator().manual_seed(width)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    tokens, frames = sum(f * t for f, t in frame_map), sum(f for f, _ in frame_map)
    modulation = random(batch, frames, 6, width)
    tensors = {
        "branch": random(batch, tokens, 2 * width).to(dtype)[..., width:],
        "gate": modulation[:, :, 2],
        "shift": modulation[:, :, 0],
        "scale": modulation[:, :, 1],
        "weight": random(width),
        "bias": random(width),
    }
    x = random(batch, tokens + 1, width).to(dtype)[:, 1:]
    chosen = {name: tensors[name].requires_grad_(grad) for name in USES[use]}
    return (x.requires_grad_(grad), frame_map), chosen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_outputs_within_budget(use, dtype):
    args, kwargs = inputs(use, ((2, 3), (2, 9)), 48, dtype)
    with poisoned_memory():
        compare("gated_residual_layer_norm", args, kwargs)


@pytest.mark.parametrize("frame_map", FRAME_MAPS, ids=str)
def test_every_token_takes_the_modulation_of_its_frame(frame_map):
    args, kwargs = inputs("gated + modulated", frame_map, 16)
    with poisoned_memory():
        compare("gated_residual_layer_norm", args, kwargs)


@pytest.mark.parametrize("width", [1, 37, 130, 1536, 5120, 8192])
def test_any_width(width):
    """Masked lanes of the power-of-two block leak into no sum."""
    args, kwargs = inputs("everything", ((1, 2),), width, batch=1)
    compare("gated_residual_layer_norm", args, kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("use", USES)
def test_gradients_within_budget(use, dtype):
    """Frames longer than a group of tokens: the second stage of the frame sums adds several partial sums."""
    args, kwargs = inputs(use, ((2, 3), (2, 9)), 48, dtype, grad=True)
    with poisoned_memory():
        compare("gated_residual_layer_norm", args, kwargs, gradients=True)


@pytest.mark.parametrize("frame_map", FRAME_MAPS[-2:], ids=str)
def test_gradients_of_many_runs(frame_map):
    """Frame sums land in the right row across launches; a frame without tokens has gradient zero."""
    args, kwargs = inputs("everything", frame_map, 16, grad=True)
    with poisoned_memory():
        compare("gated_residual_layer_norm", args, kwargs, gradients=True)


@pytest.mark.parametrize("used", [0, 1])
def test_gradients_when_one_output_is_unused(used):
    (x, frame_map), kwargs = inputs("gated + modulated", ((2, 3),), 16, grad=True)
    grads = []
    for ops in (TRITON, REFERENCE):
        out = ops.gated_residual_layer_norm(x, frame_map, **kwargs)[used]
        grads.append(torch.autograd.grad(out.square().sum(), [x, kwargs["branch"], kwargs["gate"]]))
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected)


def test_normalises_the_rounded_residual():
    """y is the norm of the bf16 x_new that is returned, not of its fp32 value: the two differ where x_new is large."""
    (x, frame_map), kwargs = inputs("residual + modulated", ((2, 3),), 64, torch.bfloat16)
    x = x + 100
    x_new, y = TRITON.gated_residual_layer_norm(x, frame_map, **kwargs)
    kwargs.pop("branch")
    _, low = REFERENCE.gated_residual_layer_norm(x_new, frame_map, **kwargs)
    high = {k: v.double() for k, v in kwargs.items()}
    check("y", y, low, REFERENCE.gated_residual_layer_norm(x_new.double(), frame_map, **high)[1])


def test_variance_of_a_large_mean():
    """mean(x^2) - mean(x)^2 in fp32 would lose every digit at mean 1e4; the centred variance does not."""
    x = 1e4 + torch.randn(1, 4, 256, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    compare("gated_residual_layer_norm", (x, ((1, 4),)))


def test_returns_x_itself_without_branch():
    (x, frame_map), kwargs = inputs("modulated", ((2, 3),), 16)
    assert TRITON.gated_residual_layer_norm(x, frame_map, **kwargs)[0] is x


def test_empty_batch():
    (x, frame_map), kwargs = inputs("gated + modulated", ((2, 3),), 16)
    empty = {k: v[:0] for k, v in kwargs.items()}
    x_new, y = TRITON.gated_residual_layer_norm(x[:0], frame_map, **empty)
    assert x_new.shape == y.shape == (0, 6, 16)


def test_rejects_float64():
    with pytest.raises(TypeError, match=r"x\.dtype"):
        TRITON.gated_residual_layer_norm(torch.zeros(1, 2, 8, dtype=torch.float64), ((1, 2),))


def test_rejects_rows_wider_than_the_table():
    with pytest.raises(ValueError, match="D: got 8193"):
        TRITON.gated_residual_layer_norm(torch.zeros(1, 2, 8193, device=DEVICE), ((1, 2),))


def test_opcheck():
    (x, _), kwargs = inputs("everything", ((2, 3),), 16, batch=1, grad=True)
    flat = [2, 3]
    ops = torch.ops.anyflow
    terms = [kwargs[name] for name in ("branch", "gate", "shift", "scale", "weight", "bias")]
    torch.library.opcheck(ops.gated_residual_layer_norm, (x, *terms, flat, 1e-6), test_utils=OPCHECKS)
    torch.library.opcheck(ops.modulated_layer_norm, (x, *terms[2:], flat, 1e-6), test_utils=OPCHECKS)
    branch, gate, _, scale, weight, bias = (t.detach() for t in terms)
    saved = (x.detach(), branch, gate, scale, weight, bias)
    dy = torch.randn_like(x)
    torch.library.opcheck(ops.gated_residual_layer_norm_backward, (*saved, None, dy, flat, 1e-6), test_utils=OPCHECKS)


def test_compiles_once_for_changing_lengths():
    """A chunk has its own length and frame map: after two compilations (static, dynamic) no chunk compiles again."""

    def block(x, frame_map, branch, gate, shift, scale):
        return triton_ops.gated_residual_layer_norm(x, frame_map, branch, gate, shift, scale, None, None, 1e-6)

    calls = []
    for frames, tokens in ((3, 4), (2, 7), (4, 5), (5, 3), (6, 7)):
        (x, frame_map), kwargs = inputs("gated + modulated", ((frames, tokens),), 16, batch=2)
        calls.append((x, frame_map, *kwargs.values()))
    assert count_compilations(block, calls) <= 2


def test_compiled_gradients_match_eager():
    (x, frame_map), kwargs = inputs("gated + modulated", ((2, 3),), 16, grad=True)

    def loss(x, *terms):
        x_new, y = TRITON.gated_residual_layer_norm(x, frame_map, *terms)
        return (x_new * y).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    args = (x, *kwargs.values())
    for got, expected in zip(
        torch.autograd.grad(compiled(*args), args), torch.autograd.grad(loss(*args), args), strict=True
    ):
        torch.testing.assert_close(got, expected)
