"""The C++ extension: patch_embed and unpatchify, against a float64 convolution and an index formula written here."""

from __future__ import annotations

import itertools
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck

from anyflow_kernels import patch_embed as extension
from anyflow_kernels.patch_embed import patch_embed, unpatchify
from anyflow_kernels.testing.budget import check, judge, relative_error
from anyflow_runtime.models.parameters import warm_start_compressed_weight

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
PATCHES = [(1, 2, 2), (1, 4, 4), (2, 3, 1), (1, 1, 5)]


def conv_tokens(latents: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The oracle: the convolution the embedding stands for, in the dtype of the weight."""
    video = latents.transpose(1, 2).to(weight.dtype)
    return F.conv3d(video, weight, bias, stride=tuple(weight.shape[2:])).flatten(2).transpose(1, 2)


def make_inputs(
    patch: tuple[int, int, int] = (1, 2, 2),
    size: tuple[int, ...] = (2, 3, 4, 9, 11),
    dim: int = 24,
    dtype: torch.dtype = torch.float32,
    latent_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(size, generator=generator, dtype=torch.float64).to(latent_dtype or dtype)
    weight = torch.randn(dim, size[2], *patch, generator=generator, dtype=torch.float64).to(dtype)
    return latents, weight, torch.randn(dim, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("patch", PATCHES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_conv3d(dtype: torch.dtype, patch: tuple[int, int, int]) -> None:
    """Rows and columns of 9 x 11 fill no whole patch: the remainder is dropped."""
    latents, weight, bias = make_inputs(patch, (2, 4, 4, 9, 11), dtype=dtype)
    oracle = conv_tokens(latents.double(), weight.double(), bias.double())
    check("tokens", patch_embed(latents, weight, bias, patch), conv_tokens(latents, weight, bias), oracle)


@pytest.mark.parametrize(("latent_dtype", "dtype"), list(itertools.permutations(DTYPES, 2)), ids=str)
def test_latents_of_another_dtype_are_converted_while_packing(latent_dtype: torch.dtype, dtype: torch.dtype) -> None:
    latents, weight, bias = make_inputs(dtype=dtype, latent_dtype=latent_dtype)
    oracle = conv_tokens(latents.double(), weight.double(), bias.double())
    tokens = patch_embed(latents, weight, bias, (1, 2, 2))
    assert tokens.dtype == dtype
    check("tokens", tokens, conv_tokens(latents, weight, bias), oracle)


def test_rounding_matches_torch_exactly_at_special_values() -> None:
    """NaN, infinities, ties and subnormals: an identity weight shows the conversion alone."""
    values = torch.tensor([0.0, -0.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, 1e-40, 3.4e38, float("inf"), float("nan")])
    latents = values.reshape(1, 1, 1, 1, 8)
    for dtype in (torch.bfloat16, torch.float16):
        packed = torch.ops.anyflow.pack_patches(latents, (1, 1, 2), False, dtype)
        torch.testing.assert_close(packed.flatten(), values.to(dtype), rtol=0, atol=0, equal_nan=True)


def test_every_fp16_value_survives_fp32() -> None:
    """The vectorised conversions, both ways, over all 65,536 bit patterns."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(torch.float16).reshape(1, 1, 1, 1, -1)
    wide = torch.ops.anyflow.pack_patches(every, (1, 1, 8), False, torch.float32)
    torch.testing.assert_close(wide.flatten(), every.flatten().float(), rtol=0, atol=0, equal_nan=True)
    back = torch.ops.anyflow.pack_patches(wide.reshape(every.shape), (1, 1, 8), False, torch.float16)
    torch.testing.assert_close(back.flatten(), every.flatten(), rtol=0, atol=0, equal_nan=True)


def test_without_bias() -> None:
    latents, weight, _ = make_inputs(dtype=torch.float64)
    assert relative_error(patch_embed(latents, weight, None, (1, 2, 2)), conv_tokens(latents, weight, None)) < 1e-14


@settings(deadline=None, max_examples=60)
@given(
    size=st.tuples(*(st.integers(1, n) for n in (2, 5, 3, 9, 9))),
    patch=st.tuples(st.integers(1, 2), st.integers(1, 4), st.integers(1, 5)),
    order=st.permutations(range(5)),
    steps=st.lists(st.integers(1, 2), min_size=5, max_size=5),
)
def test_any_sizes_and_strides(
    size: tuple[int, ...], patch: tuple[int, int, int], order: list[int], steps: list[int]
) -> None:
    """Latents are read through their strides: any memory order, with gaps, even where no token fits."""
    memory = torch.randn([size[axis] * steps[axis] for axis in order], dtype=torch.float64)
    latents = memory.permute([order.index(axis) for axis in range(5)])[tuple(slice(None, None, s) for s in steps)]
    weight = torch.randn(5, size[2], *patch, dtype=torch.float64)
    bias = torch.randn(5, dtype=torch.float64)
    grid = tuple(n // p for n, p in zip((size[1], size[3], size[4]), patch, strict=True))
    expected = torch.empty(size[0], 0, 5).double() if 0 in grid else conv_tokens(latents, weight, bias)
    torch.testing.assert_close(patch_embed(latents, weight, bias, patch), expected, rtol=1e-12, atol=1e-12)


def test_expanded_latents() -> None:
    """A stride of zero, as classifier-free guidance makes when it doubles the batch without a copy."""
    latents, weight, bias = make_inputs(size=(1, 3, 4, 8, 8))
    doubled = latents.expand(2, -1, -1, -1, -1)
    assert torch.equal(
        patch_embed(doubled, weight, bias, (1, 2, 2)), patch_embed(doubled.clone(), weight, bias, (1, 2, 2))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 3])
def test_writes_its_tokens_and_nothing_else(batch: int, dtype: torch.dtype) -> None:
    """A NaN slab: what stands before and after the written tokens stays NaN, and what is written is all of them."""
    latents, weight, bias = make_inputs(size=(batch, 3, 4, 9, 11), dtype=dtype)
    slab = torch.full((batch, 75, 24), float("nan"), dtype=dtype)
    written = patch_embed(latents, weight, bias, (1, 2, 2), slab, 7)
    assert written.data_ptr() == slab[:, 7].data_ptr() and written.shape == (batch, 60, 24)
    oracle = conv_tokens(latents.double(), weight.double(), bias.double())
    check("tokens", written, conv_tokens(latents, weight, bias), oracle)
    assert slab[:, :7].isnan().all() and slab[:, 67:].isnan().all()


@pytest.mark.parametrize("view", ["token gap", "feature slice", "batch last"])
def test_writes_into_a_strided_slab(view: str) -> None:
    latents, weight, bias = make_inputs(dtype=torch.float32)
    memory = torch.full((2, 140, 40), float("nan"))
    slab = {
        "token gap": memory[:, ::2, :24],
        "feature slice": memory[:, :70, 8:32],
        "batch last": torch.full((70, 2, 24), float("nan")).transpose(0, 1),
    }[view]
    patch_embed(latents, weight, bias, (1, 2, 2), slab, 10)
    assert relative_error(slab[:, 10:], conv_tokens(latents.double(), weight.double(), bias.double())) < 1e-6
    assert slab[:, :10].isnan().all()
    assert view == "batch last" or (memory[:, :, 32:].isnan().all() and int((~memory.isnan()).sum()) == 2 * 60 * 24)


def test_more_rows_than_one_block_of_the_gemm() -> None:
    """The fp32 GEMM goes in blocks of 512 rows; 1,274 tokens end in a partial one."""
    latents, weight, bias = make_inputs(size=(2, 1, 4, 52, 98), dtype=torch.float32)
    oracle = conv_tokens(latents.double(), weight.double(), bias.double())
    check("tokens", patch_embed(latents, weight, bias, (1, 2, 2)), conv_tokens(latents, weight, bias), oracle)


def test_threads_do_not_change_the_result() -> None:
    latents = torch.randn(2, 8, 16, 64, 64)
    packs, threads = [], torch.get_num_threads()
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            packs.append(torch.ops.anyflow.pack_patches(latents, (1, 2, 2), False, torch.bfloat16))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(*packs)


def test_gradients_in_float64() -> None:
    """First and second derivatives in latents (a remainder gets zero), weight and bias."""
    latents, weight, bias = make_inputs((1, 2, 2), (1, 2, 2, 5, 4), 3, torch.float64)
    inputs = tuple(x.requires_grad_() for x in (latents.transpose(3, 4), weight, bias))
    assert torch.autograd.gradcheck(lambda *x: patch_embed(*x, (1, 2, 2)), inputs)
    assert torch.autograd.gradgradcheck(lambda *x: patch_embed(*x, (1, 2, 2)), inputs)
    tokens = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpatchify(x, (1, 2, 3), (1, 2, 2), 2), (tokens,))
    assert torch.autograd.gradgradcheck(lambda x: unpatchify(x, (1, 2, 3), (1, 2, 2), 2), (tokens,))


@pytest.mark.parametrize("with_slab", [False, True], ids=["new tensor", "slab"])
def test_mixed_dtype_gradients_match_conv3d(with_slab: bool) -> None:
    """fp32 latents, bf16 weight: each gradient in the dtype of its input; the slab records its write."""
    latents, weight, bias = make_inputs(dtype=torch.bfloat16, latent_dtype=torch.float32)
    upstream = torch.randn(2, 60, 24, dtype=torch.bfloat16)

    def gradients(embed, dtype: torch.dtype | None = None) -> tuple[Tensor, ...]:
        inputs = [x.detach().to(dtype or x.dtype).requires_grad_() for x in (latents, weight, bias)]
        return torch.autograd.grad(embed(*inputs), inputs, upstream.to(dtype or upstream.dtype))

    def fused(*inputs: Tensor) -> Tensor:
        slab = torch.full((2, 70, 24), float("nan"), dtype=torch.bfloat16) if with_slab else None
        return patch_embed(*inputs, (1, 2, 2), slab, 5 if with_slab else 0)

    fused_gradients, low, high = gradients(fused), gradients(conv_tokens), gradients(conv_tokens, torch.float64)
    for name, got, reference, oracle in zip(("latents", "weight", "bias"), fused_gradients, low, high, strict=True):
        assert got.dtype == reference.dtype, name
        kept = judge(name, got, reference, oracle, dtype=torch.bfloat16)
        assert kept.ok, kept


def test_gradient_of_a_slab_reaches_what_was_there_before() -> None:
    """Autograd through a slab: the overwritten tokens get no gradient, the others keep theirs."""
    latents, weight, bias = make_inputs(dtype=torch.float64)
    before = torch.randn(2, 65, 24, dtype=torch.float64, requires_grad=True)
    slab = before.clone()
    patch_embed(latents, weight.requires_grad_(), bias, (1, 2, 2), slab, 5)
    slab.sum().backward()
    assert torch.equal(before.grad, torch.cat([torch.ones(2, 5, 24), torch.zeros(2, 60, 24)], 1).double())
    assert weight.grad is not None


def test_opcheck() -> None:
    """Schema, fake, autograd registration and AOT dispatch of every operation agree with what it does."""
    latents, weight, bias = make_inputs(dtype=torch.float32)
    tokens = torch.randn(2, 60, 16, requires_grad=True)
    ops = torch.ops.anyflow
    opcheck(ops.patch_embed_out.default, (latents, weight, bias, torch.zeros(2, 70, 24), 5))
    opcheck(ops.patch_embed_out.default, (latents, weight, None, torch.zeros(2, 70, 30)[..., :24], 0))
    leaves = tuple(x.clone().requires_grad_() for x in (latents, weight, bias))
    opcheck(ops.patch_embed.default, leaves)
    opcheck(ops.patch_embed.default, (leaves[0].transpose(3, 4), leaves[1], None))
    opcheck(ops.pack_patches.default, (leaves[0], (1, 2, 2), False, torch.bfloat16))
    opcheck(ops.unpack_patches.default, (tokens, (2, 3, 4, 9, 11), (1, 2, 2), True, torch.float32))


def test_compiles_to_a_full_graph_once_for_all_offsets() -> None:
    """The slab is mutated inside the graph, and offsets are symbolic: one recompilation, not one per chunk."""
    latents, weight, bias = make_inputs()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    @torch.compile(fullgraph=True, backend=backend)
    def step(latents: Tensor, slab: Tensor, offset: int) -> Tensor:
        return unpatchify(
            patch_embed(latents, weight, bias, (1, 2, 2), slab, offset)[..., :16], (3, 4, 5), (1, 2, 2), 4
        )

    expected = conv_tokens(latents, weight, bias)
    for offset in (3, 5, 7, 9, 11):
        slab = torch.full((2, 80, 24), float("nan"))
        video = step(latents, slab, offset)
        assert (
            relative_error(slab[:, offset : offset + 60], expected.double()) < 1e-6
            and int(slab.isnan().sum()) == 2 * 20 * 24
        )
        assert video.shape == (2, 3, 4, 8, 10)
    assert len(graphs) <= 2


def test_compiles_with_gradients() -> None:
    """AOT autograd traces the backward formulas."""
    latents, weight, bias = (x.requires_grad_() for x in make_inputs(dtype=torch.float64))
    compiled = torch.compile(lambda *x: patch_embed(*x, (1, 2, 2)).sin().sum(), fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(latents, weight, bias), (latents, weight, bias))
    expected = torch.autograd.grad(conv_tokens(latents, weight, bias).sin().sum(), (latents, weight, bias))
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_unpatchify_puts_every_feature_in_its_place(patch: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Against the index formula, element by element; the tokens are a strided slice of a longer sequence."""
    (frames, rows, columns), channels = (2, 3, 2), 3
    pt, ph, pw = patch
    count, features = frames * rows * columns, pt * ph * pw * channels
    tokens = torch.randn(2, 2 * count + 5, features + 3).to(dtype)[:, 5::2, 1 : features + 1]
    latents = unpatchify(tokens, (frames, rows, columns), patch, channels)
    expected = torch.empty(2, frames * pt, channels, rows * ph, columns * pw, dtype=dtype)
    for f, c, y, x in itertools.product(range(frames * pt), range(channels), range(rows * ph), range(columns * pw)):
        token = (f // pt * rows + y // ph) * columns + x // pw
        expected[:, f, c, y, x] = tokens[:, token, ((f % pt * ph + y % ph) * pw + x % pw) * channels + c]
    assert torch.equal(latents, expected) and latents.is_contiguous()


def test_unpatchify_of_tokens_with_strided_features() -> None:
    tokens = torch.randn(1, 16, 6).transpose(1, 2)
    assert torch.equal(
        unpatchify(tokens, (1, 2, 3), (1, 2, 2), 4), unpatchify(tokens.contiguous(), (1, 2, 3), (1, 2, 2), 4)
    )


@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_unpatchify_inverts_an_identity_embedding(patch: tuple[int, int, int]) -> None:
    """A weight that copies pixel (t, y, x, c) to feature number (t, y, x, c): the round trip is exact."""
    channels, features = 3, 3 * patch[0] * patch[1] * patch[2]
    weight = torch.eye(features).reshape(features, *patch, channels).permute(0, 4, 1, 2, 3)
    latents = torch.randn(2, 2 * patch[0], channels, 3 * patch[1], 2 * patch[2])
    tokens = patch_embed(latents, weight, None, patch)
    assert torch.equal(unpatchify(tokens, (2, 3, 2), patch, channels), latents)


def test_warm_start_interpolates_each_kernel() -> None:
    """Trilinear, align_corners=False, 2 to 4 samples: weights 1, 3/4 and 1/4 on each axis, written out as a matrix."""
    _, weight, _ = make_inputs(dtype=torch.float64)
    axis = torch.tensor([[1, 0], [0.75, 0.25], [0.25, 0.75], [0, 1]], dtype=torch.float64)
    expected = torch.einsum("yi,xj,dctij->dctyx", axis, axis, weight)
    torch.testing.assert_close(warm_start_compressed_weight(weight, (1, 4, 4)), expected, rtol=1e-14, atol=1e-14)
    half = warm_start_compressed_weight(weight.bfloat16().requires_grad_(), (1, 4, 4))
    assert half.dtype == torch.bfloat16 and not half.requires_grad


def test_operations_called_directly_stay_in_bounds() -> None:
    """torch.ops.anyflow bypasses the checks in Python; what memory safety needs is checked below them."""
    latents, weight, bias = make_inputs()
    with pytest.raises(RuntimeError, match="exceeds dimension size"):
        torch.ops.anyflow.patch_embed_out(latents, weight, bias, torch.zeros(2, 70, 24), 11)
    with pytest.raises(RuntimeError, match="tokens: got"):
        torch.ops.anyflow.unpack_patches(torch.zeros(2, 59, 16), (2, 3, 4, 9, 11), (1, 2, 2), True, torch.float32)


@pytest.mark.filterwarnings("ignore:the C.. extension")
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("patch", [(1, 2, 2), (2, 2, 3), (1, 12, 1), (1, 1, 1)], ids=str)
def test_plain_torch_moves_the_same_bits(patch: tuple[int, int, int], channels_last: bool) -> None:
    """What serves a device that the extension was not built for; with remainders, and with no token at all."""
    size = (2, 5, 4, 11, 9)
    latents = torch.randn(2, 5, 4, 9, 11).transpose(3, 4)
    for source, target in itertools.product(DTYPES, DTYPES):
        arguments = (patch, channels_last, target)
        packed = torch.ops.anyflow.pack_patches(latents.to(source), *arguments)
        assert torch.equal(extension._pack_patches(latents.to(source), *arguments), packed)
        unpacked = torch.ops.anyflow.unpack_patches(packed, size, *arguments)
        assert torch.equal(extension._unpack_patches(packed, size, *arguments), unpacked)


def test_without_the_extension_the_package_runs_and_says_so_once() -> None:
    """In a fresh interpreter where the compiled module cannot be found."""
    program = (
        "import sys; sys.modules['anyflow_kernels._C'] = None\n"
        "import torch; from anyflow_kernels import load_ops, patch_embed as m\n"
        "print(m.extension_available(), m.extension_obstacle())\n"
        "for _ in range(2):\n"
        "    print(load_ops('torch').patch_embed(*[torch.ones(1, 1, 1, 2, 2)] * 2, None, (1, 2, 2)).item())\n"
        "    print(load_ops('torch').unpatchify(torch.ones(1, 1, 4), (1, 1, 1), (1, 2, 2), 1).sum().item())\n"
    )
    done = subprocess.run([sys.executable, "-W", "always", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("False not built") and "pip install -e . --no-build-isolation" in done.stdout
    assert done.stdout.endswith("\n4.0\n4.0\n4.0\n4.0\n") and done.stderr.count("UserWarning") == 1
    assert "is not built" in done.stderr and "plain PyTorch" in done.stderr


def test_extension_is_built_here() -> None:
    assert extension.extension_available()


@pytest.mark.gpu
@pytest.mark.parametrize("patch", PATCHES, ids=str)
def test_cuda_matches_cpu(patch: tuple[int, int, int]) -> None:
    """Data movement is exact: packing and unpacking give the same bits on both devices, aligned and unaligned."""
    sizes = ((2, 4, 16, 16, 48), (2, 4, 4, 9, 11))
    for size, dtype, latent_dtype in itertools.product(sizes, DTYPES, DTYPES):
        latents, weight, bias = make_inputs(patch, size, dtype=dtype, latent_dtype=latent_dtype)
        for channels_last in (False, True):
            packed = torch.ops.anyflow.pack_patches(latents, patch, channels_last, dtype)
            on_gpu = torch.ops.anyflow.pack_patches(latents.cuda(), patch, channels_last, dtype)
            assert torch.equal(on_gpu.cpu(), packed)
            back = torch.ops.anyflow.unpack_patches(packed, size, patch, channels_last, latent_dtype)
            assert torch.equal(
                torch.ops.anyflow.unpack_patches(on_gpu, size, patch, channels_last, latent_dtype).cpu(), back
            )
        oracle = conv_tokens(latents.double(), weight.double(), bias.double())
        slab = torch.full((2, oracle.shape[1] + 9, 24), float("nan"), dtype=dtype, device="cuda")
        tokens = patch_embed(latents.cuda(), weight.cuda(), bias.cuda(), patch, slab, 4)
        check("tokens", tokens.cpu(), conv_tokens(latents, weight, bias), oracle)
        assert slab[:, :4].isnan().all() and slab[:, -5:].isnan().all()
