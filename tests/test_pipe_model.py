"""The pipe model on SASS written by hand: which loop it finds, and what each pipe is charged."""

from __future__ import annotations

import pytest

from anyflow_kernels import pipe_model
from anyflow_kernels.pipe_model import CHIPS, Chip, inner_loops, model, parse, pipe_cycles


def sass(*instructions: str) -> str:
    """As cuobjdump prints them, 16 bytes apart, with the second half of each code on a line of its own."""
    code = "/* 0x0000000000007b1d */"
    lines = [f"        /*{16 * i:04x}*/    {text:<60};    {code}\n{code:>114}" for i, text in enumerate(instructions)]
    return "\n".join(["\tcode for sm_80", *lines])


HMMA = "HMMA.16816.F32.BF16 R4, R8, R12, R4"
# 0x00 a prologue with a product; 0x10 to 0x70 the loop; a wait that spins out of line at 0xa0; an edge block at 0x80.
LOOP = sass(
    HMMA,  # 00
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R4",  # 10
    "@!P0 BRA 0xa0",  # 20
    HMMA,  # 30
    "MUFU.EX2 R4, R5",  # 40
    "@P1 BRA 0x70",  # 50
    "FSEL R4, R5, -INF , P2",  # 60: a mask that only some iterations need
    "@P3 BRA 0x10",  # 70
    HMMA,  # 80
    "EXIT",  # 90
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R4",  # a0
    "@!P0 BRA 0xa0",  # b0
    "BRA 0x30",  # c0
)


def test_the_loop_is_what_every_iteration_passes():
    (loop,) = inner_loops(parse(LOOP))
    assert [i.address for i in loop] == [0x10, 0x20, 0x30, 0x40, 0x50, 0x70]


def test_scheduling_notes_are_no_operands():
    """The cuobjdump of triton 3.6 prints them for sm_120."""
    code = sass("HMMA.16816.F32.BF16 R4, R8, R12, R4 ?WAIT12_END_GROUP", "@P6 BRA 0x0 &req={1} ?trans5", "EXIT ?trans5")
    assert [i.operands for i in parse(code)] == ["R4, R8, R12, R4", "0x0", ""] and len(inner_loops(parse(code))) == 1


def test_an_outer_loop_with_products_of_its_own_is_not_the_inner_one():
    inner_and_edge = sass(HMMA, HMMA, "@P0 BRA 0x10", HMMA, "@P1 BRA 0x0", "EXIT")
    (loop,) = inner_loops(parse(inner_and_edge))
    assert [i.address for i in loop] == [0x10, 0x20]


def test_a_predicated_call_leaves_the_loop():
    """ptxas of sm_80 writes the end of a loop so; taken for a call, the loop would never end."""
    code = sass("NOP", HMMA, "@P3 CALL.REL.NOINC 0x40", "BRA 0x10", HMMA, "@P1 BRA 0x0", "EXIT")
    (loop,) = inner_loops(parse(code))
    assert [i.address for i in loop] == [0x10, 0x20, 0x30]


def test_each_partition_has_its_loop():
    """What an indirect branch leads to has no other way in; the first of the two waits in place before its loop."""
    wait = ["SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR5], R4", "@!P0 BRA 0x10"]
    code = sass("BRX R10 -0x10", *wait, HMMA, "@P1 BRA 0x30", "EXIT", HMMA, HMMA, "@P1 BRA 0x60", "EXIT")
    assert [[i.address for i in loop] for loop in inner_loops(parse(code))] == [[0x30, 0x40], [0x60, 0x70, 0x80]]


@pytest.mark.parametrize(
    ("instruction", "chip", "pipe", "cycles"),
    [
        # 8 warps: 16 * 8 * 16 products each at 1,024 a clock; half of that rate in TF32, twice in FP8.
        (HMMA, "A100", "tensor", 16.0),
        ("HMMA.1688.F32.TF32 R4, R8, R12, R4", "A100", "tensor", 16.0),
        (HMMA, "RTX 4090", "tensor", 64.0),
        ("QMMA.16832.F32.E4M3.E4M3 R4, R8, R12, R4", "L40S", "tensor", 32.0),
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", "H100", "tensor", 128.0),
        # Two groups of warps, each reading 128 rows of 32 bytes of one operand, and 64 of the other if it is there.
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], R24", "H100", "operands", 96.0),
        ("HGMMA.64x128x16.F32.BF16 R88, R156, gdesc[UR4].tnspB, R88", "H100", "operands", 64.0),
        ("MUFU.EX2 R4, R5", "H100", "mufu", 16.0),
        ("FFMA R4, R5, R6, R7", "A100", "fp32", 4.0),
        ("FFMA R4, R5, R6, R7", "H100", "fp32", 2.0),
        ("FFMA2 R4, R6, R8, R10", "B200", "fp32", 4.0),
        ("FMNMX R4, R5, R6, !PT", "H100", "alu", 4.0),
        ("LDSM.16.MT88.4 R4, [R5]", "A100", "shared", 32.0),
        ("LDSM.16.M88 R4, [R5]", "A100", "shared", 8.0),
        ("STS.64 [R5], R6", "A100", "shared", 16.0),
        ("LDGSTS.E.BYPASS.128 [R9], [R74.64], !P3", "A100", "shared", 32.0),
        ("@P0 NOP", "A100", "issue", 2.0),
    ],
)
def test_what_an_instruction_costs(instruction, chip, pipe, cycles):
    """Of 8 warps, by the throughputs of the programming guide."""
    assert pipe_cycles(parse(sass(instruction)), CHIPS[chip], 8)[0][pipe] == cycles


def test_a_product_of_sm_100_has_its_shape_in_a_descriptor():
    """128 x 64 x 16 for all warps at once: 0x8100490 holds M / 16 from bit 24 and N / 8 from bit 17."""
    code = sass("UMOV UR13, 0x8100490", "UTCHMMA gdesc[UR14], gdesc[UR56], tmem[UR40], tmem[UR12], idesc[UR13], !UPT")
    cycles, products = pipe_cycles(parse(code), CHIPS["B200"], 8)
    assert products == 128 * 64 * 16
    assert cycles["tensor"] == products / 4096 and cycles["operands"] == 32 * (128 + 64) / 128


TEN_TO_ONE = Chip(
    name="toy", arch=80, multiprocessors=1, clock_ghz=1, dram_gb_s=1, products=2048, mufu=4, shared_bytes=64
)


def test_bounds():
    """Two products of 4 warps: 8 cycles; an exponential: 32; a load of 16 bytes a lane: 32; 4 instructions: 4."""
    code = sass(HMMA, HMMA, "MUFU.EX2 R4, R5", "LDS.128 R4, [R5]", "@P0 BRA 0x0", "EXIT")
    needed = 4 * 2 * 16 * 8 * 16
    one = model(code, TEN_TO_ONE, warps=4, products=needed)
    assert (one.redundancy, one.bound, one.serial) == (1.0, 8 / 32, 8 / (8 + 32))
    # A second block fills the waiting of the first, up to what the busiest pipe takes.
    assert one.expected == one.serial and model(code, TEN_TO_ONE, warps=4, blocks=2, products=needed).expected == 8 / 32


def test_a_partition_that_issues_products_is_one_warp():
    """Of a warp-specialised kernel of sm_100: its products run beside the exponentials of another partition's loop."""
    code = sass(
        "BRX R10 -0x10",
        "UMOV UR13, 0x8100490",  # 10: 128 x 64
        "UTCHMMA gdesc[UR14], gdesc[UR56], tmem[UR40], tmem[UR12], idesc[UR13], UPT",
        "@P0 BRA 0x10",
        "EXIT",
        *["MUFU.EX2 R4, R5"] * 3,  # 50
        "@P1 BRA 0x50",
        "EXIT",
    )
    both = model(code, CHIPS["B200"], warps=8, products=128 * 64 * 16)
    assert both.cycles["tensor"] == 32 and both.cycles["mufu"] == 3 * 8 * 32 / 16
    assert both.cycles["issue"] == (1 * 3 + 8 * 4) / 4
    # The longest partition waits for its operands, 48 cycles, after its own three instructions.
    assert (both.redundancy, both.bound, both.serial) == (1.0, 32 / 48, 32 / 48.75)


def test_products_computed_twice_are_no_work():
    code = sass(HMMA, HMMA, "@P0 BRA 0x0", "EXIT")
    twice = model(code, TEN_TO_ONE, warps=4, products=4 * 16 * 8 * 16)
    assert twice.redundancy == 2.0 and twice.bound == 0.5


def test_a_kernel_without_products_is_its_whole_body():
    """One warp: 512 bytes in and out at one byte a clock, a sum between."""
    code = sass("LDG.E.128 R4, [R2.64]", "FADD R4, R4, R5", "STG.E.128 [R2.64], R4", "EXIT")
    body = model(code, TEN_TO_ONE, warps=1)
    assert body.cycles["dram"] == 1024 and body.busiest == "dram" and body.bound == 1.0


def test_what_cannot_be_modelled_says_so():
    with pytest.raises(ValueError, match="no loop with matrix products"):
        model(sass(HMMA, "EXIT"), TEN_TO_ONE, warps=4, products=1)
    with pytest.raises(ValueError, match=r"got HMMA.884.F32"):
        model(sass("HMMA.884.F32 R4, R8, R12, R4", "@P0 BRA 0x0", "EXIT"), TEN_TO_ONE, warps=4, products=1)


def test_peaks_are_the_published_ones():
    """Products per clock and clocks of the table, against dense bf16 TFLOP/s of the data sheets."""
    published = {
        "A100": 312, "A40": 149.7, "RTX 3090": 71, "L40S": 362, "RTX 4090": 165.2, "H100": 989.4, "B200": 2250,
        "RTX PRO 6000": 503.8, "RTX 5090": 209.5,
    }  # fmt: skip
    for name, tflops in published.items():
        chip = pipe_model.CHIPS[name]
        assert 2e-3 * chip.multiprocessors * chip.products * chip.clock_ghz == pytest.approx(tflops, rel=0.015), name
