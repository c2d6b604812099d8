"""PTX text as Triton writes it, parsed: one kernel, its parameters, registers, labels and instructions.

Source: PTX ISA 8.7, chapters 4 to 6 (https://docs.nvidia.com/cuda/parallel-thread-execution/).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

SHARED_BASE = 1024  # the system keeps the first KiB of shared memory; a null pointer then lies outside
BRANCHES = ("bra", "brx", "ret", "exit", "bar", "barrier", "trap")


class EmulationError(AssertionError):
    """What a kernel does wrong, or an instruction that the emulator does not know."""


@dataclass(frozen=True)
class Register:
    name: str
    kind: str  # "pred", "b8", ..., "b128": the width alone counts
    negated: bool = False


@dataclass(frozen=True)
class Immediate:
    bits: int
    kind: str  # "int", "f32", "f64"


@dataclass(frozen=True)
class Special:
    name: str  # "%tid.x"


@dataclass(frozen=True)
class Symbol:
    name: str  # a parameter or an array in shared memory


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Vector:
    elements: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    base: Operand
    offset: int


@dataclass(frozen=True)
class TensorAddress:
    """`[descriptor, {coordinates}]`"""

    descriptor: Operand
    coordinates: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """`d|p`"""

    first: Operand
    second: Operand


# None is the sink "_".
Operand = Register | Immediate | Special | Symbol | Label | Vector | Address | TensorAddress | Pair | None


@dataclass
class Instruction:
    opcode: str
    operands: list[Operand]
    predicate: Register | None
    text: str
    line: str  # "far_attention.py:60:12", from .loc
    number: int
    parts: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.parts = self.opcode.split(".")

    def __str__(self) -> str:
        return f"{self.text[:160]} ({self.line})"


@dataclass
class Parameter:
    name: str
    offset: int
    size: int


@dataclass
class Kernel:
    name: str = ""
    threads: int = 0
    parameters: list[Parameter] = field(default_factory=list)
    shared_symbols: dict[str, int] = field(default_factory=dict)  # addresses
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # of instructions
    branch_targets: dict[str, list[str]] = field(default_factory=dict)

    def has(self, prefix: str) -> bool:
        return any(i.opcode.startswith(prefix) for i in self.instructions)


def parse(text: str) -> Kernel:
    """The one kernel of a PTX module.

    Raises:
        EmulationError: on a statement that it does not understand.
    """
    return _Parser(text).kernel


_ARGUMENT = re.compile(r"\{[^}]*\}|\[[^\[\]]*\]|[^,\s]+")
_LABEL = re.compile(r"^([\w$]+):(?!:)")
_INTEGER = re.compile(r"^-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_SIZES = {"8": 1, "16": 2, "32": 4, "64": 8}


class _Parser:
    def __init__(self, text: str) -> None:
        self.kernel = Kernel()
        self.scopes: list[tuple[str, dict[str, str]]] = []  # (suffix of names, kinds of registers by name, or `name<`)
        self.opened = 0
        self.known: dict[str, Operand] = {}
        self.line = ""
        head, found, rest = text.partition(".entry")
        if not found:
            raise EmulationError("PTX: got no .entry, expected a kernel")
        self._shared(head)
        signature, _, rest = rest.partition("{")
        self._signature(signature)
        self._body("{" + rest)

    def _shared(self, head: str) -> None:
        """Arrays of known size first, the one of dynamic size behind them."""
        at = SHARED_BASE
        for align, name, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d*)\]", head):
            at = -(-at // int(align)) * int(align)
            self.kernel.shared_symbols[name] = at
            at += int(size or 0)

    def _signature(self, text: str) -> None:
        name, _, rest = text.partition("(")
        self.kernel.name = name.strip()
        at = 0
        for kind, name, size in re.findall(
            r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+[^,\[]*?([\w$]+)(\[\d+\])?\s*(?:,|\))", rest
        ):
            width = int(size[1:-1]) if size else _SIZES[kind.lstrip("bufs")]
            align = 64 if size else width
            at = -(-at // align) * align
            self.kernel.parameters.append(Parameter(name, at, width))
            at += width
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", rest)
        if threads is None:
            raise EmulationError(f"{self.kernel.name}: got no .reqntid, expected the number of threads")
        self.kernel.threads = int(threads[1])

    def _body(self, text: str) -> None:
        pending = ""
        for raw in text.splitlines():
            code, _, comment = raw.partition("//")
            code = code.strip()
            if code.startswith(".loc"):
                self.line = comment.strip() or "line " + code.split()[2]
                continue
            pending = f"{pending} {code}" if pending else code
            pending = self._statements(pending)
            if not self.scopes:
                return

    def _statements(self, text: str) -> str:
        """Takes whole statements off the front; returns what is left of an unfinished one."""
        while text := text.strip():
            if text[0] == "{":
                self.opened += 1
                self.scopes.append((f"@{self.opened}" if len(self.scopes) else "", {}))
                text = text[1:]
            elif text[0] == "}":
                self.scopes.pop()
                text = text[1:]
                if not self.scopes:
                    return ""
            elif label := _LABEL.match(text):
                rest = text[label.end() :].strip()
                if rest.startswith(".branchtargets"):
                    if ";" not in rest:
                        return text
                    targets, _, text = rest.partition(";")
                    self.kernel.branch_targets[label[1]] = re.findall(r"\$?\w+", targets.partition(".branchtargets")[2])
                else:
                    self.kernel.labels[self._scoped_label(label[1])] = len(self.kernel.instructions)
                    text = rest
            else:
                statement, found, rest = text.partition(";")
                if not found:
                    return text
                self._statement(statement.strip())
                text = rest
        return ""

    def _scoped_label(self, name: str) -> str:
        return name if name.startswith("$") else name + self.scopes[-1][0]

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._declare(text)
            return
        if not text or text.startswith((".pragma", ".file")):
            return
        guard = re.match(r"^@(!?)([%\w$]+)\s+(.*)$", text, re.DOTALL)
        predicate = None
        rest = text
        if guard:
            register = self._register(guard[2])
            if register is None:
                raise EmulationError(f"PTX: unknown predicate in {text}")
            predicate = Register(register.name, "pred", guard[1] == "!")
            rest = guard[3]
        opcode, _, arguments = rest.replace("\t", " ").partition(" ")
        operands = [self._operand(a, opcode) for a in _ARGUMENT.findall(arguments)]
        number = len(self.kernel.instructions)
        self.kernel.instructions.append(
            Instruction(opcode, operands, predicate, " ".join(text.split()), self.line, number)
        )

    def _declare(self, text: str) -> None:
        kind = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL)
        if kind is None:
            raise EmulationError(f"PTX: unknown declaration {text}")
        width = "pred" if kind[1] == "pred" else "b" + kind[1].lstrip("bufs")
        for name in kind[2].split(","):
            name = name.strip()
            stem, numbered, _ = name.partition("<")  # Triton declares both `a` and `a<2>` in one scope
            self.scopes[-1][1][stem + numbered] = width

    def _register(self, name: str, negated: bool = False) -> Register | None:
        for suffix, kinds in reversed(self.scopes):
            if name in kinds:
                return Register(name + suffix, kinds[name], negated)
            numbered = name.rstrip("0123456789") + "<"
            if numbered in kinds:
                return Register(name + suffix, kinds[numbered], negated)
        return None

    def _operand(self, text: str, opcode: str) -> Operand:
        text = text.strip()
        if len(self.scopes) > 1 or opcode.startswith("br"):  # names of their own
            return self._parsed(text, opcode)
        if text not in self.known:
            self.known[text] = self._parsed(text, opcode)
        return self.known[text]

    def _parsed(self, text: str, opcode: str) -> Operand:
        if text == "_":
            return None
        if text[0] == "{":
            return Vector(tuple(self._operand(x, opcode) for x in text[1:-1].split(",") if x.strip()))
        if text[0] == "[":
            return self._address(text[1:-1].strip(), opcode)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first, opcode), self._operand(second, opcode))
        if re.match(r"^0[fF][0-9a-fA-F]{8}$", text):
            return Immediate(int(text[2:], 16), "f32")
        if re.match(r"^0[dD][0-9a-fA-F]{16}$", text):
            return Immediate(int(text[2:], 16), "f64")
        if _INTEGER.match(text):
            return Immediate(int(text.rstrip("U"), 0), "int")
        register = self._register(text.lstrip("!"), text[0] == "!")
        if register is not None:
            return register
        if text[0] == "%":
            return Special(text)
        if opcode.split(".")[0] in ("bra", "brx"):
            return Label(self._scoped_label(text))
        return Symbol(text)

    def _address(self, text: str, opcode: str) -> Operand:
        if "{" in text:
            descriptor, _, coordinates = text.partition(",")
            inner = coordinates.strip().strip("{}").split(",")
            return TensorAddress(self._operand(descriptor, opcode), tuple(self._operand(c, opcode) for c in inner))
        parts = re.match(r"^([%\w$]+)\s*(?:\+\s*(-?\w+))?$", text)
        if parts is None:
            raise EmulationError(f"PTX: unknown address [{text}]")
        return Address(self._operand(parts[1], opcode), int(parts[2], 0) if parts[2] else 0)
