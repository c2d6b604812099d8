"""A model of a compiled kernel: how many cycles of a multiprocessor each of its pipes takes, read from the SASS.

An attention kernel is its inner loop: the innermost loop with matrix products or exponentials (one per partition where
warps are specialised), of which the blocks that every iteration passes are counted, and those with products. Any other
kernel is its whole body, every instruction once. Nobody has measured what comes out: it is a bound that knows no
latencies, bank conflicts, caches or clocks under load, good for choosing between candidates and for finding what limits
one.

Source: rates per multiprocessor and clock from the CUDA C++ Programming Guide, "Arithmetic Instructions"; products from
the peaks, multiprocessors and boost clocks of NVIDIA's whitepapers (GA100, GA102, AD102, GH100, RTX Blackwell) and data
sheets (A40, L40S, B200, RTX PRO 6000); instruction shapes from the PTX ISA, "Warp-level matrix instructions",
"wgmma.mma_async" and "tcgen05, instruction descriptor".
"""

from __future__ import annotations

import functools
import operator
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple


@dataclass(frozen=True, kw_only=True)
class Chip:
    """A card: rates per multiprocessor and clock. `products`: multiply-adds of bf16 matrix products summed in fp32.

    GeForce cards sum in fp32 at half the rate of the other cards with their chip. `mma_sync` is the rate of Ampere's
    instruction where a chip has a newer one; `clock_ghz` is the boost clock, `dram_gb_s` the data sheet's.
    """

    name: str
    arch: int
    multiprocessors: int
    clock_ghz: float
    dram_gb_s: float
    products: int
    mma_sync: int | None = None
    fp32: int = 128
    alu: int = 64  # compares, minima, selects, logic, integer adds; also integer multiplies, in the fp32 pipe
    mufu: int = 16  # exp2, reciprocals; also the slow conversions
    shared_bytes: int = 128
    issue: int = 4  # warp instructions


def _chip(name: str, arch: int, multiprocessors: int, clock: float, dram: float, products: int, **rest: int) -> Chip:
    return Chip(
        name=name,
        arch=arch,
        multiprocessors=multiprocessors,
        clock_ghz=clock,
        dram_gb_s=dram,
        products=products,
        **rest,
    )


# The first card of an architecture is the one that rows are chosen for: with the most products a clock, everything else
# weighs most.
CHIPS = {
    chip.name: chip
    for chip in (
        _chip("A100", 80, 108, 1.41, 2039, 1024, fp32=64),
        _chip("A40", 86, 84, 1.74, 696, 512),
        _chip("RTX 3090", 86, 82, 1.695, 936, 256),
        _chip("L40S", 89, 142, 2.52, 864, 512),
        _chip("RTX 4090", 89, 128, 2.52, 1008, 256),
        # mma.sync reaches 62 % of wgmma: arXiv 2402.13499, table of tensor-core throughputs.
        _chip("H100", 90, 132, 1.83, 3350, 2048, mma_sync=1270),
        _chip("H200", 90, 132, 1.83, 4800, 2048, mma_sync=1270),
        _chip("B200", 100, 148, 1.85, 8000, 4096, mma_sync=1024),  # mma.sync: no source, taken as the A100's
        _chip("RTX PRO 6000", 120, 188, 2.617, 1792, 512),
        _chip("RTX 5090", 120, 170, 2.407, 1792, 256),
    )
}


def chip_of(arch: int) -> Chip:
    """The card that rows of an architecture are chosen for."""
    return next(chip for chip in CHIPS.values() if chip.arch == arch)


class Instruction(NamedTuple):
    address: int
    predicate: str
    opcode: str  # with modifiers
    operands: str


_LINE = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+)?\s*([A-Z][\w.]*)\s*([^;]*);", re.MULTILINE)
# HMMA, IMMA: mma.sync. HGMMA, QGMMA, IGMMA: wgmma of sm_90. UTCHMMA, UTCQMMA: tcgen05 of sm_100.
_NOTES = re.compile(r"(?:^|\s)[&?]")
_ENDS_BLOCK = re.compile(r"BR|EXIT|RET|CALL\.REL")
MATRIX = re.compile(r"^(HMMA|IMMA|QMMA|HGMMA|QGMMA|IGMMA|UTC\w*MMA)\b")


def parse(sass: str) -> list[Instruction]:
    """The instructions of `cuobjdump -sass` of a cubin with one kernel."""
    found = _LINE.findall(sass)
    # Some versions append scheduling notes: "&req={1} ?trans5".
    return [Instruction(int(a, 16), p, opcode, _NOTES.split(rest)[0].strip()) for a, p, opcode, rest in found]


def inner_loops(code: Sequence[Instruction]) -> list[list[Instruction]]:
    """The innermost loops with matrix products or exponentials: of each, the instructions that count."""
    blocks, successors = _blocks(code)
    dominators = _dominators(successors)
    loops: dict[int, set[int]] = {}
    latches: dict[int, list[int]] = {}
    predecessors = [[u for u, after in enumerate(successors) if v in after] for v in range(len(blocks))]
    for latch, after in enumerate(successors):
        for head in after:
            if dominators[latch] >> head & 1:
                body, waiting = loops.setdefault(head, {head}), [latch]
                latches.setdefault(head, []).append(latch)
                while waiting:
                    block = waiting.pop()
                    if block not in body:
                        body.add(block)
                        waiting += predecessors[block]
    has_products = [any(MATRIX.match(i.opcode) for i in block) for block in blocks]
    works = [
        products or any(i.opcode == "MUFU.EX2" for i in block)
        for products, block in zip(has_products, blocks, strict=True)
    ]
    working = {head: body for head, body in loops.items() if any(works[b] for b in body)}
    found = []
    for head, body in working.items():
        if not any(other < body for other in working.values()):
            always = [b for b in body if has_products[b] or all(dominators[u] >> b & 1 for u in latches[head])]
            found.append([i for b in sorted(always) for i in blocks[b]])
    return found


def _blocks(code: Sequence[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Basic blocks in order of address, and of each the blocks that may follow it."""
    # A predicated CALL.REL.NOINC leaves a loop where a branch would.
    targets = {i.address: _target(i) for i in code if re.match(r"BRA|CALL\.REL", i.opcode)}
    starts = {code[0].address, *targets.values()}
    starts |= {after.address for i, after in pairwise(code) if _ENDS_BLOCK.match(i.opcode)}
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    index = {block[0].address: n for n, block in enumerate(blocks)}
    successors = []
    for n, block in enumerate(blocks):
        last = block[-1]
        after = [index[targets[last.address]]] if last.address in targets else []
        # "BRA.U UP0, 0x..." is conditional as well. What an indirect branch (BRX) leads to starts anew.
        goes_on = last.predicate or "," in last.operands or not re.match("BR|EXIT|RET", last.opcode)
        if goes_on and n + 1 < len(blocks):
            after.append(n + 1)
        successors.append(after)
    return blocks, successors


def _target(branch: Instruction) -> int:
    return int(branch.operands.rsplit("0x", 1)[1], 16)


def _dominators(successors: Sequence[Sequence[int]]) -> list[int]:
    """Of each block, the set of blocks (as bits) that every path to it passes. What nothing leads to is an entry."""
    size, everything = len(successors), (1 << len(successors)) - 1
    predecessors: list[list[int]] = [[] for _ in range(size)]
    for u, after in enumerate(successors):
        for v in after:
            predecessors[v].append(u)
    entries: list[int] = []
    reached: set[int] = set()
    for first in range(size):
        waiting = [first]
        entries += waiting if first not in reached else []
        while waiting:
            block = waiting.pop()
            if block not in reached:
                reached.add(block)
                waiting += successors[block]
    dominators = [1 << v if v in entries else everything for v in range(size)]
    changed = True
    while changed:
        changed = False
        for v in range(size):
            if v not in entries:
                common = functools.reduce(operator.and_, (dominators[u] for u in predecessors[v])) | 1 << v
                changed |= common != dominators[v]
                dominators[v] = common
    return dominators


class _Product(NamedTuple):
    """One matrix instruction: multiply-adds, its rate against bf16, bytes it reads from shared memory by itself."""

    products: int
    rate: float
    operand_bytes: int


def _product(instruction: Instruction, descriptors: dict[str, int]) -> _Product:
    """Raises ValueError where the shape cannot be read."""
    opcode, operands = instruction.opcode, instruction.operands
    # TF32 at half, 8-bit operands at twice the rate; a row of k is 32 bytes in wgmma and tcgen05.
    rate = 0.5 if "TF32" in opcode else 2.0 if opcode[0] in "QI" or opcode.startswith("UTCQ") else 1.0
    k_wide = int(16 * rate)
    if warp_level := re.match(r"[HIQ]MMA\.(?:SP\.)?168(\d+)\.", opcode):
        return _Product(16 * 8 * int(warp_level[1]), rate, 0)
    if group := re.match(r"[HIQ]GMMA\.(\d+)x(\d+)x(\d+)\.", opcode):
        m, n, k = map(int, group.groups())
        from_shared = operands.split(",")[1].strip().startswith("gdesc")
        return _Product(m * n * k, rate, 32 * (n + (m if from_shared else 0)))
    shape = re.search(r"idesc\[(UR\d+)\]", operands)
    if shape and shape[1] in descriptors:
        bits = descriptors[shape[1]]
        m, n = (bits >> 24 & 31) * 16, (bits >> 17 & 63) * 8
        return _Product(m * n * k_wide, rate, 32 * (n + (m if operands.startswith("gdesc") else 0)))
    raise ValueError(f"SASS: got {opcode} {operands}, expected a matrix product of known shape")


_ALU = set(
    "FMNMX FMNMX3 FSEL SEL FSETP ISETP PLOP3 LOP3 IADD IADD3 VIADD VIADDMNMX VIMNMX VIMNMX3 IMNMX LEA SHF PRMT SGXT "
    "MOV I2FP F2FP P2R R2P IABS BMSK VABSDIFF LOP FCHK".split()
)
_WIDTH = {"128": 16, "64": 8, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
PIPES = ("tensor", "operands", "shared", "mufu", "fp32", "alu", "issue")


def _bytes(opcode: str) -> int:
    """Of a memory instruction, per lane."""
    return next((width for name, width in _WIDTH.items() if name in opcode.split(".")), 4)


def pipe_cycles(code: Iterable[Instruction], chip: Chip, warps: int) -> tuple[dict[str, float], int]:
    """Cycles of a multiprocessor per pipe for `warps` warps that execute `code` once, and the multiply-adds of matrix
    products. "operands" is shared memory read by matrix instructions themselves, "shared" what warps read and write.

    Raises:
        ValueError: at a matrix product whose shape cannot be read.
    """
    cycles = dict.fromkeys(PIPES, 0.0)
    products = 0
    descriptors: dict[str, int] = {}
    for instruction in code:
        opcode = instruction.opcode
        name, *modifiers = opcode.split(".")
        cycles["issue"] += warps / chip.issue
        if MATRIX.match(opcode):
            one = _product(instruction, descriptors)
            # mma.sync: each warp. wgmma: each group of four. tcgen05: one thread for all.
            times = 1 if name.startswith("UTC") else warps // 4 if "GMMA" in name else warps
            peak = chip.mma_sync or chip.products if re.match("[HIQ]MMA", name) else chip.products
            cycles["tensor"] += times * one.products / (peak * one.rate)
            cycles["operands"] += times * one.operand_bytes / chip.shared_bytes
            products += times * one.products
        elif moved := re.fullmatch(r"(UR\d+), (0x[0-9a-f]+)", instruction.operands):
            descriptors[moved[1]] = int(moved[2], 16)
        elif name in ("MUFU", "F2F", "F2I", "I2F", "FRND", "POPC", "FLO"):
            cycles["mufu"] += warps * 32 / chip.mufu
        elif name in ("FADD", "FMUL", "FFMA", "HFMA2", "FADD2", "FMUL2", "FFMA2", "HADD2", "HMUL2", "FSWZADD"):
            paired = name in ("FADD2", "FMUL2", "FFMA2")
            cycles["fp32"] += warps * 32 * (1 + paired) / chip.fp32
        elif name in ("IMAD", "IDP"):
            cycles["fp32"] += warps * 32 / chip.alu
        elif name in _ALU:
            cycles["alu"] += warps * 32 / chip.alu
        elif name in ("LDSM", "STSM"):
            matrices = int(modifiers[-1]) if modifiers[-1].isdigit() else 1
            cycles["shared"] += warps * matrices * 128 / chip.shared_bytes
        elif name in ("LDS", "STS", "LDGSTS", "ATOMS", "SHFL", "LDL", "STL"):  # spills live in L1, the same memory
            cycles["shared"] += warps * max(1, _bytes(opcode) * 32 / chip.shared_bytes)
    return cycles, products


@dataclass(frozen=True, kw_only=True)
class PipeModel:
    """What the SASS says of one iteration of a block's inner loop (of one pass over the body without products).

    Args:
        cycles: of a multiprocessor, by pipe; without products also "dram", bytes of global loads and stores over the
            card's bandwidth (more than it moves where caches serve).
        redundancy: matrix products computed against those that the tile needs. 0 without products.
        bound: share of the tensor cores' peak (without products of the memory's) if all pipes overlap.
        serial: the same if, within a block (a partition of it), products overlap with nothing else.
        expected: `serial` of as many blocks as share a multiprocessor, at most `bound`.
        busiest: the pipe that `bound` is about.
        barriers: block-wide, per iteration.
        bytes_per_clock: global memory a multiprocessor reads, from L2, at `bound`; 0 without products.
    """

    chip: str
    cycles: dict[str, float] = field(default_factory=dict)
    redundancy: float = 0.0
    bound: float
    serial: float
    expected: float
    busiest: str
    barriers: int
    bytes_per_clock: float = 0.0

    def as_row(self) -> dict[str, Any]:
        """For JSON; "model" says that nobody has measured it."""
        rounded = {
            name: round(value, 3) if isinstance(value, float) else value
            for name, value in vars(self).items()
            if name != "cycles"
        }
        return {**rounded, "cycles": {name: round(n) for name, n in self.cycles.items()}, "kind": "model"}


def model(sass: str, chip: Chip, *, warps: int, blocks: int = 1, products: int = 0, loaded: int = 0) -> PipeModel:
    """Model a kernel with one cubin function.

    Args:
        warps: of a block; of each computing partition where warps are specialised.
        blocks: that share a multiprocessor.
        products: multiply-adds that one iteration of the inner loop needs; 0 for a kernel without matrix products.
        loaded: bytes of global memory that one iteration reads.

    Raises:
        ValueError: if there should be matrix products and no loop has any, or one of unknown shape.
    """
    code = parse(sass)
    if not products:
        return _body(code, chip, warps)
    loops = inner_loops(code)
    if not any(MATRIX.match(i.opcode) for loop in loops for i in loop):
        raise ValueError("SASS: no loop with matrix products")
    # A partition that only issues products for tcgen05 is one warp.
    issues = [not any(i.opcode.startswith("MUFU") for i in loop) for loop in loops]
    only = [issue and any(i.opcode.startswith("UTC") for i in loop) for issue, loop in zip(issues, loops, strict=True)]
    parts = [pipe_cycles(loop, chip, 1 if one else warps) for loop, one in zip(loops, only, strict=True)]
    total = {pipe: sum(cycles[pipe] for cycles, _ in parts) for pipe in PIPES}
    # TMA writes shared memory too, without an instruction per warp.
    if any(i.opcode.startswith("UTMALDG") for i in code):
        total["shared"] += loaded / chip.shared_bytes
    executed = sum(done for _, done in parts)
    ideal = total["tensor"] * products / executed
    pipes = _pipes(total)
    busiest = max(PIPES, key=pipes.__getitem__)
    longest = max(_serial(cycles) for cycles, _ in parts)
    bound = ideal / pipes[busiest]
    return PipeModel(
        chip=chip.name,
        cycles=total,
        redundancy=executed / products,
        bound=bound,
        serial=min(bound, ideal / longest),
        expected=min(bound, blocks * ideal / longest),
        barriers=max(sum(i.opcode.startswith("BAR.SYNC") for i in loop) for loop in loops),
        busiest=busiest,
        bytes_per_clock=loaded / pipes[busiest],
    )


def _pipes(cycles: dict[str, float]) -> dict[str, float]:
    """Shared memory is one pipe."""
    return {**cycles, "shared": cycles["shared"] + cycles["operands"]}


def _serial(cycles: dict[str, float]) -> float:
    others = max(cycles[pipe] for pipe in PIPES if pipe not in ("tensor", "operands"))
    return max(cycles["tensor"], cycles["operands"]) + others


def _body(code: Sequence[Instruction], chip: Chip, warps: int) -> PipeModel:
    cycles, _ = pipe_cycles(code, chip, warps)
    moved = sum(32 * _bytes(i.opcode) for i in code if i.opcode.split(".")[0] in ("LDG", "STG", "LDGSTS"))
    cycles["dram"] = warps * moved / (chip.dram_gb_s / chip.clock_ghz / chip.multiprocessors)
    busiest = max(cycles, key=cycles.__getitem__)
    rest = max(n for pipe, n in cycles.items() if pipe != "dram")
    return PipeModel(
        chip=chip.name,
        cycles=cycles,
        bound=cycles["dram"] / cycles[busiest],
        serial=cycles["dram"] / (cycles["dram"] + rest),
        expected=cycles["dram"] / cycles[busiest],
        busiest=busiest,
        barriers=sum(i.opcode.startswith("BAR.SYNC") for i in code),
    )
