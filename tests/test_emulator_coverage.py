"""Instructions that later kernels will use, compiled by Triton and run in the emulator, against numpy: exactly.

Products of small integers and of 8-bit floats sum exactly in fp32, so nothing is left to a tolerance.
"""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver as triton_driver
from triton.tools.tensor_descriptor import TensorDescriptor

from emulator.driver import Driver
from emulator.formats import decode, encode
from emulator.launch import Emulator

pytestmark = pytest.mark.emulated
ARCHITECTURES = [80, 89, 90, 120]


@triton.jit
def _dot(
    a_ptr, b_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, STEPS: tl.constexpr, B_ROWS: tl.constexpr
):
    """c = a b; a is (M, K * STEPS), b (K * STEPS, N) or, with B_ROWS, its transpose."""
    m, n = tl.arange(0, M), tl.arange(0, N)
    acc = tl.zeros((M, N), c_ptr.dtype.element_ty)
    for i in range(STEPS):
        k = i * K + tl.arange(0, K)
        a = tl.load(a_ptr + m[:, None] * (K * STEPS) + k[None, :])
        if B_ROWS:
            b = tl.load(b_ptr + n[:, None] * (K * STEPS) + k[None, :]).trans()
        else:
            b = tl.load(b_ptr + k[:, None] * N + n[None, :])
        acc = tl.dot(a, b, acc, out_dtype=c_ptr.dtype.element_ty)
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def _convert(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def _quantise(x_ptr, q_ptr, scale_ptr, N: tl.constexpr):
    """A row to int8 with the scale that its largest magnitude asks for."""
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    scale = tl.max(tl.abs(x), 0) / 127.0
    rounded = tl.extra.cuda.libdevice.rint(x / scale)
    tl.store(q_ptr + i, rounded.to(tl.int8))
    tl.store(scale_ptr + tl.program_id(0), scale)


@triton.jit
def _scan(x_ptr, total_ptr, ordered_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(total_ptr + i, tl.cumsum(x, 0))
    tl.store(ordered_ptr + i, tl.sort(x, 0))


@triton.jit
def _count(x_ptr, counts_ptr, sum_ptr, N: tl.constexpr, BINS: tl.constexpr):
    i = tl.program_id(0) * N + tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.atomic_add(counts_ptr + tl.arange(0, BINS), tl.histogram(x, BINS))
    tl.atomic_add(sum_ptr, tl.sum(x.to(tl.float32), 0))


@triton.jit
def _scaled_dot(a_ptr, a_scale_ptr, b_ptr, b_scale_ptr, c_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    """e4m3 with a power of two per 32 elements along K, as in MXFP8."""
    m, n, k, block = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K), tl.arange(0, K // 32)
    a, b = tl.load(a_ptr + m[:, None] * K + k[None, :]), tl.load(b_ptr + k[:, None] * N + n[None, :])
    a_scale = tl.load(a_scale_ptr + m[:, None] * (K // 32) + block[None, :])
    b_scale = tl.load(b_scale_ptr + n[:, None] * (K // 32) + block[None, :])
    acc = tl.dot_scaled(a, a_scale, "e4m3", b, b_scale, "e4m3")
    tl.store(c_ptr + m[:, None] * N + n[None, :], acc)


@triton.jit
def _shift(x, y, ROWS: tl.constexpr, BY: tl.constexpr):
    """y, moved down by BY rows; zeros come in from above."""
    row = tl.program_id(0) * ROWS
    y.store([row, 0], x.load([row - BY, 0]))


@pytest.fixture(params=ARCHITECTURES, ids="sm_{}".format)
def arch(request):
    """Kernels are compiled for it and run in the emulator."""
    before = triton_driver.active
    Driver(request.param, Emulator()).activate()
    yield request.param
    triton_driver.set_active(before)


def integers(low, high, shape, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def opcodes(compiled):
    return set(re.findall(r"^\s*(?:@!?%p\d+ )?([a-z][\w.:]+)", compiled.asm["ptx"], re.MULTILINE))


# operands, accumulator, bound of the operands (every partial sum is exact), instruction; by architecture where another
# one, None where there is none. f16 accumulators of wgmma are left out: Triton reads them before it waits for them.
PRODUCTS = {
    "int8": (torch.int8, torch.int32, 128, "mma.sync.*s32.s8.s8.s32", {90: "wgmma.*s32.s8.s8"}),
    "e4m3": (torch.float8_e4m3fn, torch.float32, 9, "mma.sync.*e4m3.e4m3.f32", {80: None, 90: "wgmma.*f32.e4m3.e4m3"}),
    "e4m3 to f16": (torch.float8_e4m3fn, torch.float16, 4, "mma.sync.*f16.e4m3.e4m3.f16", {80: None, 90: None}),
    "e5m2": (torch.float8_e5m2, torch.float32, 5, "mma.sync.*(e5m2.e5m2|f16.f16).f32", {90: "wgmma.*f32.e5m2.e5m2"}),
    "f16": (torch.float16, torch.float16, 4, "mma.sync.*f16.f16.f16.f16", {90: None}),
    "tf32": (torch.float32, torch.float32, 1000, "mma.sync.*f32.tf32.tf32.f32", {90: "wgmma.*f32.tf32.tf32"}),
    "f64": (torch.float64, torch.float64, 1 << 20, "mma.sync.*f64.f64.f64.f64", {89: None, 120: None}),
}
HAVE = [(arch, name) for name, p in PRODUCTS.items() for arch in ARCHITECTURES if p[4].get(arch, p[3])]


@pytest.mark.parametrize("b_rows", [False, True])
@pytest.mark.parametrize(("arch", "product"), HAVE, indirect=["arch"])
def test_products(arch, product, b_rows):
    dtype, accumulator, bound, usual, others = PRODUCTS[product]
    a, b = integers(-bound, bound, (64, 128)), integers(-bound, bound, (128, 32), seed=1)
    c = torch.full((64, 32), -1, dtype=accumulator)
    stored = b.T.contiguous() if b_rows else b
    compiled = _dot[(1,)](a.to(dtype), stored.to(dtype), c, 64, 32, 64, 2, b_rows)
    assert any(re.match(others.get(arch, usual), op) for op in opcodes(compiled))
    assert torch.equal(c.double(), a.double() @ b.double())


@pytest.mark.parametrize("arch", [89, 90, 120], indirect=True)
def test_scaled_products(arch):
    """mma with scales on sm_120, elsewhere widened to bf16: the same numbers, for all of them are exact."""
    a, b = integers(-8, 9, (64, 64)), integers(-8, 9, (64, 32), seed=1)
    a_scale, b_scale = integers(124, 131, (64, 2), seed=2), integers(124, 131, (32, 2), seed=3)
    c = torch.empty(64, 32)
    compiled = _scaled_dot[(1,)](
        a.to(torch.float8_e4m3fn), a_scale.byte(), b.to(torch.float8_e4m3fn), b_scale.byte(), c, 64, 32, 64
    )
    assert any("block_scale" in op for op in opcodes(compiled)) == (arch == 120)
    scaled_a = a.double() * (a_scale.double() - 127).exp2().repeat_interleave(32, 1)
    scaled_b = b.double() * (b_scale.double() - 127).exp2().repeat_interleave(32, 1).T
    assert torch.equal(c.double(), scaled_a @ scaled_b)


EIGHT_BITS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
WIDE = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
STORAGE = {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}


def numbers(fmt):
    """4096 values: of 8-bit types every bit pattern, else random ones of all sizes, many of them ties."""
    if fmt in EIGHT_BITS:
        return torch.arange(256).byte().repeat(16).view(EIGHT_BITS[fmt])
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4096, generator=generator) * torch.linspace(-22, 20, 4096).exp2()
    for which, mantissa in ((slice(0, None, 4), 3), (slice(1, None, 4), 4), (slice(2, None, 4), 11)):
        dropped = 23 - mantissa
        wide[which] = (wide[which].view(torch.int32) >> dropped << dropped).view(torch.float32)
    wide[:6] = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0, 3e38])
    return wide.to(WIDE[fmt])


def values(x, fmt):
    return decode(x.view(STORAGE[x.itemsize]).numpy(), fmt)


# sm_80 has no conversion of 8-bit floats; between the two of them there is none anywhere.
CONVERSIONS = [
    (arch, fmt, to)
    for arch in ARCHITECTURES
    for fmt in (WIDE | EIGHT_BITS)
    for to in (WIDE | EIGHT_BITS)
    if fmt != to and len({fmt, to} & set(EIGHT_BITS)) < (1 if arch == 80 else 2)
]


@pytest.mark.parametrize(("arch", "fmt", "to"), CONVERSIONS, indirect=["arch"])
def test_conversions_of_floats(arch, fmt, to):
    """To nearest, ties to even; to 8 bits saturating."""
    x, y = numbers(fmt), torch.zeros(4096, dtype=(WIDE | EIGHT_BITS)[to])
    _convert[(1,)](x, y, 4096)
    source, got = values(x, fmt), values(y, to)
    if (arch, fmt) == (89, "f32") and to in EIGHT_BITS:
        # Triton cuts to f16 first on sm_89: what lies just beyond a tie is rounded as the tie is.
        want = decode(encode(decode(encode(source, "f16", "rz"), "f16"), to, saturate=True), to)
    else:
        want = decode(encode(source, to, saturate=to in EIGHT_BITS), to)
    if (fmt, to) == ("e5m2", "bf16"):  # by integer arithmetic, which knows no infinity
        got, want = (x[np.isfinite(source)] for x in (got, want))
    np.testing.assert_array_equal(got, want)


INTEGERS = {"int8": (torch.int8, -128, 128), "uint8": (torch.uint8, 0, 256), "int32": (torch.int32, -(2**31), 2**31)}


@pytest.mark.parametrize("arch", [80, 90], indirect=True)
@pytest.mark.parametrize("fmt", [*WIDE, "f64"])
@pytest.mark.parametrize("kind", INTEGERS)
def test_integers_and_floats(arch, kind, fmt):
    """To a float to nearest, to an integer toward zero."""
    dtype, low, high = INTEGERS[kind]
    floating = (WIDE | {"f64": torch.float64})[fmt]
    x = integers(low, high, (4096,)).to(dtype)
    y = torch.zeros(4096, dtype=floating)
    _convert[(1,)](x, y, 4096)
    want = encode(x.double().numpy(), fmt)
    np.testing.assert_array_equal(y.view({**STORAGE, 8: torch.uint64}[y.itemsize]).numpy(), want)

    bound = min(high, 60_000) * 0.99  # f16's largest is 65504
    generator = torch.Generator().manual_seed(0)
    y = ((torch.rand(4096, generator=generator) * 2 - 1) * bound).clamp(min=low).to(floating)
    _convert[(1,)](y, x, 4096)
    assert torch.equal(x, y.double().trunc().to(dtype))


def test_quantised_rows(arch):
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(0))
    q, scale = torch.zeros(6, 256, dtype=torch.int8), torch.zeros(6)
    _quantise[(6,)](x, q, scale, 256)
    want = x.abs().amax(1) / 127
    torch.testing.assert_close(scale, want, rtol=3e-7, atol=0)  # div.full has 2 ulp
    assert torch.equal(q, (x / scale[:, None]).round().to(torch.int8))


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32], ids=str)
@pytest.mark.parametrize("count", [128, 512])
def test_scans_and_sorts(arch, dtype, count):
    x = integers(-1000, 1000, (count,)).to(dtype)
    total, ordered = torch.zeros_like(x), torch.zeros_like(x)
    _scan[(1,)](x, total, ordered, count)
    assert torch.equal(total, x.cumsum(0, dtype=dtype)) and torch.equal(ordered, x.sort().values)


def test_histograms_and_atomics(arch):
    """Six blocks add into one histogram and one sum."""
    x = integers(0, 16, (6 * 256,)).int()
    counts, total = torch.zeros(16, dtype=torch.int32), torch.zeros(1)
    _count[(6,)](x, counts, total, 256, 16)
    assert torch.equal(counts, x.bincount(minlength=16).int()) and total.item() == x.sum().item()


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bfloat16, torch.float32], ids=str)
def test_descriptors(arch, dtype):
    """Boxes that start before the tensor or end after it: TMA from sm_90 on, loads and stores before."""
    x = integers(0, 200, (100, 64)).to(dtype)
    y = torch.zeros(112, 64, dtype=dtype)
    box = [32, 64 if dtype != torch.float32 else 32]
    descriptors = (TensorDescriptor.from_tensor(t, box) for t in (x, y[:100]))
    compiled = _shift[(4,)](*descriptors, 32, 5)
    copies = {op for op in opcodes(compiled) if op.startswith("cp.async.bulk.tensor")}
    assert len(copies) == (2 if arch >= 90 else 0)
    columns = box[1]
    assert torch.equal(y[5:100, :columns], x[:95, :columns])
    assert not y[:5].any() and not y[100:].any() and not y[:, columns:].any()
