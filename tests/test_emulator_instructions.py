"""What single PTX instructions compute in the emulator, against the PTX ISA in plain Python."""

from __future__ import annotations

import math
import struct

import pytest
import torch
from torch import Tensor

from emulator.ptx import EmulationError

from .ptx_snippets import compute, run


def ints(*values: int) -> Tensor:
    return torch.tensor([v - (1 << 32) if v >= 1 << 31 else v for v in (values * 32)[:32]], dtype=torch.int32)


def floats(*values: float) -> Tensor:
    return torch.tensor((values * 32)[:32], dtype=torch.float32)


BIG = 0x7FFFFFFF
INTEGER = [
    ("add.s32", (BIG, 1), -(1 << 31)),
    ("add.sat.s32", (BIG, 1), BIG),
    ("sub.s32", (3, 5), -2),
    ("mul.lo.s32", (70000, 70000), 70000 * 70000 - (1 << 32)),
    ("mul.hi.u32", (0xFFFFFFFF, 0xFFFFFFFF), -2),
    ("mul.hi.s32", (-2, 1 << 30), -1),
    ("div.s32", (-7, 2), -3),
    ("rem.s32", (-7, 2), -1),
    ("div.u32", (0xFFFFFFFF, 2), BIG),
    ("min.s32", (-1, 1), -1),
    ("min.u32", (0xFFFFFFFF, 1), 1),
    ("shl.b32", (1, 31), -(1 << 31)),
    ("shl.b32", (1, 32), 0),
    ("shr.s32", (-8, 40), -1),
    ("shr.u32", (0x80000000, 31), 1),
    ("xor.b32", (0b1100, 0b1010), 0b0110),
]


@pytest.mark.parametrize(("name", "inputs", "wanted"), INTEGER, ids=lambda x: x if isinstance(x, str) else "")
def test_integer(name, inputs, wanted):
    got = compute(f"{name} %r0, %r1, %r2;", *map(ints, inputs))
    assert got.eq(wanted).all()


@pytest.mark.parametrize(
    ("text", "inputs", "wanted"),
    [
        ("bfe.u32 %r0, %r1, 4, 8;", (0xABCD1234,), 0x23),
        ("bfe.s32 %r0, %r1, 31, 4;", (0x80000000,), -1),
        ("bfi.b32 %r0, %r1, %r2, 8, 8;", (0xFF12, 0x11223344), 0x11221244),
        ("prmt.b32 %r0, %r1, %r2, 0x7632U;", (0x11223344, 0x55667788), 0x55661122),
        ("prmt.b32 %r0, %r1, %r2, 0x8U;", (0x80, 0), 0x808080FF - (1 << 32)),
        ("lop3.b32 %r0, %r1, %r2, %r1, 0xC0;", (0b1100, 0b1010), 0b1000),
        ("popc.b32 %r0, %r1;", (0xF0F0,), 8),
        ("clz.b32 %r0, %r1;", (1,), 31),
        ("clz.b32 %r0, %r1;", (0,), 32),
        ("brev.b32 %r0, %r1;", (1,), -(1 << 31)),
        ("dp4a.s32.s32 %r0, %r1, %r2, %r1;", (0x01FF02FE, 0x02030405), 0x01FF02FE + (2 - 3 + 8 - 10)),
        ("shf.l.wrap.b32 %r0, %r1, %r2, 8;", (0xAA000000, 0x00112233), 0x112233AA),
        ("not.b32 %r0, %r1;", (0,), -1),
        ("mad.lo.s32 %r0, %r1, %r2, %r1;", (3, 5), 18),
        ("mul.wide.s32 %rd1, %r1, %r2; shr.s64 %rd1, %rd1, 32; cvt.u32.u64 %r0, %rd1;", (-1, BIG), -1),
        ("mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r0, {%rs2, %rs1};", (0x11223344,), 0x33441122),
        ("setp.lt.u32 %p1|%p2, %r1, %r2; selp.b32 %r0, 7, 9, %p2;", (1, 0xFFFFFFFF), 9),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)
def test_bits_and_moves(text, inputs, wanted):
    assert compute(text, *map(ints, inputs)).eq(wanted).all()


NAN = math.nan


@pytest.mark.parametrize(
    ("text", "inputs", "wanted"),
    [
        ("add.f32 %r0, %r1, %r2;", (1.5, 2.25), 3.75),
        ("min.f32 %r0, %r1, %r2;", (NAN, 2.0), 2.0),
        ("max.NaN.f32 %r0, %r1, %r2;", (NAN, 2.0), NAN),
        ("fma.rn.f32 %r0, %r1, %r1, %r2;", (1.0 + 2.0**-23, -1.0), 2.0**-22 + 2.0**-46),
        ("add.ftz.f32 %r0, %r1, %r2;", (2.0**-127, 0.0), 0.0),
        ("add.sat.f32 %r0, %r1, %r2;", (0.75, 0.75), 1.0),
        ("div.full.f32 %r0, %r1, %r2;", (1.0, 4.0), 0.25),
        ("ex2.approx.ftz.f32 %r0, %r1;", (-math.inf,), 0.0),
        ("lg2.approx.f32 %r0, %r1;", (8.0,), 3.0),
        ("rsqrt.approx.ftz.f32 %r0, %r1;", (16.0,), 0.25),
        ("cvt.rzi.s32.f32 %r2, %r1; cvt.rn.f32.s32 %r0, %r2;", (-2.75,), -2.0),
        ("cvt.rni.s32.f32 %r2, %r1; cvt.rn.f32.s32 %r0, %r2;", (2.5,), 2.0),
        ("cvt.rn.bf16.f32 %rs1, %r1; cvt.f32.bf16 %r0, %rs1;", (1.0 + 2.0**-8,), 1.0),
        ("cvt.rn.bf16x2.f32 %r3, %r1, %r2; mov.b32 {%rs1, %rs2}, %r3; cvt.f32.bf16 %r0, %rs2;", (3.0, 5.0), 3.0),
        ("cvt.rn.satfinite.e4m3x2.f32 %rs1, %r1, %r2; cvt.rn.f16x2.e4m3x2 %r3, %rs1; "
         "mov.b32 {%rs2, %rs3}, %r3; cvt.f32.f16 %r0, %rs3;", (1000.0, 1.0), 448.0),
        ("cvt.rn.bf16x2.f32 %r3, %r1, %r2; fma.rn.bf16x2 %r3, %r3, %r3, %r3; mov.b32 {%rs1, %rs2}, %r3; "
         "cvt.f32.bf16 %r0, %rs1;", (3.0, 5.0), 30.0),
        ("setp.geu.f32 %p1, %r1, %r2; selp.f32 %r0, %r2, 0f00000000, %p1;", (NAN, 2.0), 2.0),
        ("setp.ne.f32 %p1, %r1, %r2; selp.f32 %r0, %r2, 0f00000000, %p1;", (NAN, 2.0), 0.0),
        ("cvt.f64.f32 %rd1, %r1; mul.f64 %rd1, %rd1, 0d4000000000000000; cvt.rn.f32.f64 %r0, %rd1;", (1.5,), 3.0),
    ],
    ids=lambda x: x.split()[0] if isinstance(x, str) else "",
)  # fmt: skip
def test_floating_point(text, inputs, wanted):
    torch.testing.assert_close(compute(text, *map(floats, inputs)), floats(wanted), rtol=0, atol=0, equal_nan=True)


def test_lanes_exchange():
    lane = torch.arange(32, dtype=torch.int32)
    assert compute("shfl.sync.bfly.b32 %r0, %r1, 5, 31, -1;", lane).equal(lane ^ 5)
    assert compute("shfl.sync.idx.b32 %r0, %r1, 3, 31, -1;", lane).eq(3).all()
    assert compute("shfl.sync.up.b32 %r0|%p1, %r1, 1, 0, -1;", lane).equal((lane - 1).clamp(min=0))
    # Segments of eight lanes: the last of each has no source.
    assert compute("shfl.sync.down.b32 %r0, %r1, 1, 6175, -1;", lane).equal(torch.where(lane % 8 == 7, lane, lane + 1))
    assert compute("redux.sync.add.s32 %r0, %r1, -1;", lane).eq(496).all()
    assert compute("setp.lt.s32 %p1, %r1, 3; vote.sync.ballot.b32 %r0, %p1, -1;", lane).eq(7).all()
    assert compute("elect.sync %r2|%p1, -1; selp.b32 %r0, 1, 0, %p1;", lane).equal((lane == 0).int())


def test_memory_vectors_and_small_elements():
    data = torch.arange(128, dtype=torch.int32)
    out = torch.zeros(32, dtype=torch.int32)
    run(
        "mad.wide.u32 %rd1, %r80, 16, %rd31; ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];"
        "shl.b32 %r5, %r80, 4; mov.b32 %r6, smem; add.s32 %r5, %r5, %r6;"
        "st.shared.v4.b32 [%r5], {%r4, %r3, %r2, %r1}; ld.shared.u8 %r7, [%r5+4]; ld.shared.s8 %r8, [%r5+1];"
        "add.s32 %r0, %r7, %r8; st.global.b32 [%rd20], %r0;",
        out, data, shared=512,
    )  # fmt: skip
    assert out.equal(data.view(32, 4)[:, 2])


def test_atomics_from_several_blocks():
    total = torch.zeros(1, dtype=torch.int32)
    run("atom.global.add.s32 %r1, [%rd30], 2;", total, blocks=3, threads=64)
    assert total.item() == 2 * 3 * 64


def test_unknown_instructions_are_named_with_their_line():
    with pytest.raises(EmulationError, match=r"no instruction tcgen05.mma.*snippet.py:7"):
        run("tcgen05.mma %r1, %r2;")


def test_float_bits_of_immediates():
    bits = struct.unpack("<I", struct.pack("<f", 1.1))[0]
    assert compute(f"mul.f32 %r0, %r1, 0f{bits:08X};", floats(2.0)).eq(floats(2.0) * floats(1.1)).all()
