"""`qk_norm_rope_append` on the triton backend against float64 (reference backend)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from anyflow_kernels import triton_ops
from anyflow_kernels.testing.budget import check, widened

from .triton_checks import DEVICE, OPCHECKS, REFERENCE, TRITON, compare, count_compilations, poisoned_memory

# (B, L, H, d): smallest; ragged with d no power of two; d = 24, 44; the released models' heads.
SHAPES = [(1, 1, 1, 2), (2, 7, 3, 12), (2, 5, 2, 24), (1, 3, 5, 44), (1, 2, 12, 128), (1, 1, 40, 128)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    batch: int, length: int, heads: int, head_dim: int, dtype: torch.dtype = torch.float32, grad: bool = False
) -> tuple:
    """qkv rows are strided (a slice of wider rows), as is the rope table (a slice of a longer one)."""
    generator = torch.Generator().manual_seed(heads * head_dim)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE)

    width = heads * head_dim
    qkv = random(batch, length, 3 * width + 16).to(dtype)[..., : 3 * width].requires_grad_(grad)
    angle = random(length, head_dim)[:, head_dim // 2 :]
    weights = [random(width).requires_grad_(grad) for _ in range(2)]
    return qkv, *weights, (angle.cos(), angle.sin()), heads, 1e-6


def slabs(args: tuple, slots: int, transposed: bool = False) -> tuple[Tensor, Tensor]:
    """NaN slabs (B, T, H, d); `transposed` ones are stored (B, H, T, d)."""
    qkv, heads = args[0], args[4]
    shape = (qkv.shape[0], slots, heads, qkv.shape[2] // 3 // heads)
    if transposed:
        stored = (shape[0], shape[2], shape[1], shape[3])
        k, v = (torch.full(stored, torch.nan, dtype=qkv.dtype, device=DEVICE).transpose(1, 2) for _ in range(2))
    else:
        k, v = (torch.full(shape, torch.nan, dtype=qkv.dtype, device=DEVICE) for _ in range(2))
    return k, v


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_within_budget(shape, dtype):
    with poisoned_memory():
        compare("qk_norm_rope_append", inputs(*shape, dtype))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_appends_at_the_offset_and_nowhere_else(shape, dtype, transposed):
    args = inputs(*shape, dtype)
    length, offset = shape[1], 3
    k, v = slabs(args, length + 5, transposed)
    with poisoned_memory():
        q = TRITON.qk_norm_rope_append(*args, k, v, offset)
    low, high = REFERENCE.qk_norm_rope_append(*args), REFERENCE.qk_norm_rope_append(*widened(args))
    window = slice(offset, offset + length)
    for name, got, i in (("q", q, 0), ("k", k[:, window], 1), ("v", v[:, window], 2)):
        check(name, got, low[i], high[i])
    for slab in (k, v):
        assert slab[:, :offset].isnan().all() and slab[:, offset + length :].isnan().all()


def test_values_are_copied_bit_for_bit():
    args = inputs(2, 7, 3, 12, torch.bfloat16)
    k, v = slabs(args, 7)
    TRITON.qk_norm_rope_append(*args, k, v, 0)
    assert torch.equal(v.flatten(2), args[0][..., 72:])


def test_value_stays_a_view_without_slabs_and_gradients():
    """Attention reads strided views, so the bidirectional path must not copy v."""
    args = inputs(2, 7, 3, 12)
    v = TRITON.qk_norm_rope_append(*args)[2]
    assert v.data_ptr() == args[0][..., 72:].data_ptr()


def test_norm_spans_all_heads():
    """A head that dominates scales every other head down: a norm per head would not."""
    args = inputs(1, 2, 3, 12)
    args[0][..., :12] *= 100
    compare("qk_norm_rope_append", args)
    assert float(TRITON.qk_norm_rope_append(*args)[0][:, :, 1:].abs().max()) < 0.5


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("shape", SHAPES[:5], ids=str)
def test_gradients_within_budget(shape, dtype):
    """Of qkv and both weights; 7 tokens are more than a group, so weight gradients add several partial sums."""
    with poisoned_memory():
        compare("qk_norm_rope_append", inputs(*shape, dtype, grad=True), gradients=True)


def test_gradients_flow_through_slabs():
    """Written through autograd, as the reference backend does: keys read back from the slab carry their gradient."""
    grads = []
    for ops in (TRITON, REFERENCE):
        args = inputs(1, 5, 2, 12, grad=True)
        k, v = (torch.zeros(1, 8, 2, 12, device=DEVICE) for _ in range(2))
        q = ops.qk_norm_rope_append(*args, k, v, 2)
        grads.append(torch.autograd.grad((q * k[:, 2:7] * v[:, 2:7]).sum(), [args[0]])[0])
    torch.testing.assert_close(*grads)


def test_empty_sequence_writes_nothing():
    args = inputs(1, 0, 2, 12)
    k, v = slabs(args, 4)
    assert TRITON.qk_norm_rope_append(*args, k, v, 4).shape == (1, 0, 2, 12)
    assert k.isnan().all() and v.isnan().all()


def test_rejects_overflow():
    args = inputs(1, 5, 2, 12)
    with pytest.raises(ValueError, match="offset"):
        TRITON.qk_norm_rope_append(*args, *slabs(args, 8), 4)


def test_rejects_float64():
    with pytest.raises(TypeError, match=r"qkv\.dtype"):
        TRITON.qk_norm_rope_append(*widened(inputs(1, 2, 2, 12)))


def test_opcheck():
    qkv, q_weight, k_weight, rope, heads, eps = inputs(1, 3, 2, 12, grad=True)
    ops, args = torch.ops.anyflow, (qkv, q_weight, k_weight, *rope, heads, eps)
    torch.library.opcheck(ops.qk_norm_rope, args, test_utils=OPCHECKS)
    detached = tuple(a.detach() if isinstance(a, Tensor) else a for a in args)
    k, v = (torch.zeros(1, 6, 2, 12, device=DEVICE) for _ in range(2))
    torch.library.opcheck(ops.qk_norm_rope_append, (*detached, k, v, 2), test_utils=OPCHECKS)
    torch.library.opcheck(ops.qk_norm_rope_append, (*detached, k, None, 2), test_utils=OPCHECKS)
    grads = tuple(torch.randn(1, 3, 2, 12, device=DEVICE) for _ in range(3))
    torch.library.opcheck(ops.qk_norm_rope_backward, (*grads, *detached), test_utils=OPCHECKS)


def test_compiles_once_for_changing_lengths_and_offsets():
    """Chunks grow the cache: length and offset change at every call, and nothing compiles after the second."""

    def step(args, k, v, offset):
        q = triton_ops.qk_norm_rope_append(*args, k, v, offset)
        return q, k.nan_to_num(), v.nan_to_num()

    calls = []
    for length, offset in ((3, 2), (4, 3), (5, 7), (6, 4), (7, 9)):
        args = inputs(1, length, 2, 12)
        calls.append((args, *slabs(args, 20), offset))
    assert count_compilations(step, calls) <= 2
