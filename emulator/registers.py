"""The registers of a gang: every PTX register is one array [warps, 32], and an operand is a view of it.

Instructions are bound to these views once; running them moves no references. A register that holds both bits and floats
is one array seen as two dtypes.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from .ptx import Address, EmulationError, Immediate, Kernel, Operand, Register, Special, Symbol, Vector

LANES = 32
PARAMETERS = 1 << 50  # address of the first kernel parameter
# Lanes that take part in an instruction: [warps, 32], or True for all of them.
Mask = Literal[True] | np.ndarray
DTYPES: dict[str, type] = {
    "pred": np.bool_,
    "b8": np.uint8, "u8": np.uint8, "s8": np.int8,
    "b16": np.uint16, "u16": np.uint16, "s16": np.int16, "f16": np.float16, "bf16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32, "bf16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64, "f64": np.float64,
}  # fmt: skip


def width(kind: str) -> int:
    """Bytes of a PTX type."""
    return np.dtype(DTYPES[kind]).itemsize


def unsigned(size: int) -> np.dtype:
    return np.dtype(f"u{size}")


class RegisterFile:
    """Registers, special registers and parameters of `ctas` thread blocks of a kernel."""

    def __init__(self, kernel: Kernel, ctas: int) -> None:
        self.kernel = kernel
        self.ctas = ctas
        self.warps_per_cta = kernel.threads // LANES
        self.warps = ctas * self.warps_per_cta
        self._arrays: dict[str, np.ndarray] = {}
        self._scratch: dict[tuple[str, int], np.ndarray] = {}
        self.parameters = np.zeros(max((p.offset + p.size for p in kernel.parameters), default=0) + 8, np.uint8)
        self._offsets = {p.name: p.offset for p in kernel.parameters}
        self.cta_of_warp = np.repeat(np.arange(ctas), self.warps_per_cta)
        self.warp_in_cta = np.tile(np.arange(self.warps_per_cta), ctas)
        self.specials = self._special_registers()

    def _special_registers(self) -> dict[str, np.ndarray]:
        lanes = np.broadcast_to(np.arange(LANES, dtype=np.uint32), (self.warps, LANES))
        of_cta = (self.warps, 1)
        zero, one = np.zeros((1, 1), np.uint32), np.ones((1, 1), np.uint32)
        found = {
            "%tid.x": (self.warp_in_cta[:, None] * LANES + lanes).astype(np.uint32),
            "%ntid.x": np.full((1, 1), self.kernel.threads, np.uint32),
            "%laneid": lanes.copy(),
            "%warpid": self.warp_in_cta[:, None].astype(np.uint32),
            "%cluster_ctarank": zero,
            "%cluster_nctarank": one,
        }
        for axis in "xyz":
            found[f"%ctaid.{axis}"] = np.zeros(of_cta, np.uint32)
            found[f"%nctaid.{axis}"] = np.ones((1, 1), np.uint32)
            found.setdefault(f"%tid.{axis}", zero)
            found.setdefault(f"%ntid.{axis}", one)
        return found

    def adopt(self, registers: list[Register], arrays: np.ndarray) -> bool:
        """Let registers, none of them in use yet, live in `arrays` [registers, warps, 32]; False where some are."""
        names = [r.name for r in registers]
        if len(set(names)) < len(names) or any(name in self._arrays for name in names):
            return False
        self._arrays.update(zip(names, arrays, strict=True))
        return True

    def array(self, register: Register) -> np.ndarray:
        if register.name not in self._arrays:
            dtype = np.bool_ if register.kind == "pred" else unsigned(int(register.kind[1:]) // 8)
            self._arrays[register.name] = np.zeros((self.warps, LANES), dtype)
        return self._arrays[register.name]

    def scratch(self, dtype: type, slot: int = 0) -> np.ndarray:
        """[warps, 32], shared by all instructions: gone when the next one runs."""
        key = (np.dtype(dtype).str, slot)
        if key not in self._scratch:
            self._scratch[key] = np.empty((self.warps, LANES), dtype)
        return self._scratch[key]

    def source(self, operand: Operand, kind: str) -> np.ndarray:
        """An operand read as a PTX type: a view, or something that broadcasts."""
        dtype = np.dtype(DTYPES[kind])
        if isinstance(operand, Register):
            if operand.negated:
                raise EmulationError(f"operand !{operand.name}: a negated predicate is known as a guard only")
            array = self.array(operand)
            if array.dtype.itemsize < dtype.itemsize:
                raise EmulationError(f"operand {operand.name}: got {array.dtype.itemsize} bytes, expected .{kind}")
            view = array.view(dtype)
            return view if view.shape == array.shape else view[:, :: array.dtype.itemsize // dtype.itemsize]
        if isinstance(operand, Immediate):
            if kind == "pred":
                return np.array(operand.bits != 0)
            bits = operand.bits
            if operand.kind == "f64" and dtype.itemsize == 4:
                return np.array(np.array(bits, np.uint64).view(np.float64), np.float32).view(dtype)
            return np.array(bits & ((1 << 8 * dtype.itemsize) - 1), unsigned(dtype.itemsize)).view(dtype)
        if isinstance(operand, Special):
            if operand.name not in self.specials:
                raise EmulationError(f"operand {operand.name}: expected one of {sorted(self.specials)}")
            special = self.specials[operand.name]
            return special.view(dtype) if dtype.itemsize == 4 else special.astype(dtype)
        if isinstance(operand, Symbol):
            return np.array(self._symbol(operand.name), unsigned(max(dtype.itemsize, 4))).astype(dtype)
        raise EmulationError(f"operand {operand}: expected a value of type .{kind}")

    def _symbol(self, name: str) -> int:
        if name in self.kernel.shared_symbols:
            return self.kernel.shared_symbols[name]
        if name in self._offsets:
            return PARAMETERS + self._offsets[name]
        raise EmulationError(f"symbol {name}: expected a parameter or an array in shared memory")

    def parameter(self, operand: Operand, kind: str) -> np.ndarray | None:
        """The view of a parameter that `[name+offset]` means; None where the address is in a register."""
        if not isinstance(operand, Address) or not isinstance(operand.base, Symbol):
            return None
        at = self._offsets[operand.base.name] + operand.offset
        return self.parameters[at : at + width(kind)].view(DTYPES[kind])

    def target(self, operand: Operand, kind: str) -> np.ndarray:
        """Where a result of a PTX type goes: a view [warps, 32]."""
        dtype = np.dtype(DTYPES[kind])
        if operand is None:
            return self.scratch(dtype.type, 9)
        if not isinstance(operand, Register):
            raise EmulationError(f"operand {operand}: expected a register")
        array = self.array(operand)
        if array.dtype.itemsize != dtype.itemsize:
            raise EmulationError(f"operand {operand.name}: got {array.dtype.itemsize} bytes, expected .{kind}")
        return array.view(dtype)

    def extended(self, operand: Operand, kind: str) -> np.ndarray:
        """As `target`, for results that a wider register takes extended by zeros or, if signed, by the sign."""
        if isinstance(operand, Register):
            size = self.array(operand).dtype.itemsize
            if size > width(kind):
                return self.array(operand).view(f"i{size}" if kind[0] == "s" else f"u{size}")
        return self.target(operand, kind)


def elements(operand: Operand) -> list[Operand]:
    """Those of a vector, or the one operand."""
    return list(operand.elements) if isinstance(operand, Vector) else [operand]
