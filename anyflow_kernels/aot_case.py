"""What a module of Triton kernels tells `anyflow_kernels.aot`: which kernels to compile, for which arguments.

Each module of `triton_ops` has a function `aot_cases(arch: int) -> list[AotCase]`: its kernels, forward and backward,
at the shapes of the released models, with the launch parameters that `launch_configs` holds for that architecture.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

# Widths of the released models: heads, channels per head, D = heads * channels, hidden width of the FFN, layers.
MODELS = {
    "1.3B": {"heads": 12, "head_dim": 128, "dim": 1536, "ffn": 8960, "layers": 30},
    "14B": {"heads": 40, "head_dim": 128, "dim": 5120, "ffn": 13824, "layers": 40},
}


@dataclass(frozen=True)
class AotCase:
    """One kernel at one shape.

    Args:
        kernel: the `@triton.jit` (or `@gluon.jit`) function.
        shape: a name for people, such as "1.3B chunk 6".
        arguments: type of every run-time argument by name: "*bf16", "i32", "i64", "fp32", "tensordesc<bf16[128,64]>"
            (in Gluon "tensordesc<bf16[128,64],LAYOUT>").
        constexprs: value of every `tl.constexpr` by name, and of every run-time argument that is 1 or None at this
            shape (a launch specialises those to constants as well).
        num_warps, num_stages: launch parameters.
        tensor_cores: the kernel multiplies matrices: the check wants tensor-core instructions and no product in FMA.
        requires: a tensor-core instruction that must be among them, such as "HGMMA".
        divisible: names of integer arguments that are multiples of 16 at this shape, as a launch would find out.
            Pointers always count as 16-byte aligned.
        options: further compile options, such as `maxnreg`.
        products: multiply-adds that one iteration of the inner loop needs, for `pipe_model`.
        loaded: bytes of global memory that one iteration reads.
        bound: percent of the tensor cores' peak that its row claims, by `pipe_model`.
        per_multiprocessor: blocks that the launch places on a multiprocessor; as many as fit if None.
    """

    kernel: Any
    shape: str
    arguments: Mapping[str, str]
    constexprs: Mapping[str, Any] = field(default_factory=dict)
    num_warps: int = 4
    num_stages: int = 3
    tensor_cores: bool = False
    requires: str | None = None
    divisible: tuple[str, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    products: int = 0
    loaded: int = 0
    bound: int = 0
    per_multiprocessor: int | None = None

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__).strip("_")


def argument_types(
    kernel: Any, dtype: str, fp32: Sequence[str] = (), absent: Sequence[str] = (), fp64: Sequence[str] = ()
) -> dict[str, str]:
    """Types of a kernel's run-time arguments by name, for `AotCase`.

    Pointers (named `*_ptr`) have `dtype`, other arguments are i32, unless named in `fp32` or `fp64`. `absent` ones are
    left out: they are constants at this shape.
    """
    types = {}
    for parameter in kernel.params:
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            continue
        is_pointer = name.endswith("_ptr")
        plain = "fp32" if name in fp32 else "fp64" if name in fp64 else dtype if is_pointer else "i32"
        types[name] = "*" + plain if is_pointer else plain
    return types


def bf16_case(
    kernel: Any,
    shape: str,
    constexprs: Mapping[str, Any],
    num_warps: int,
    fp32: Sequence[str] = (),
    absent: Sequence[str] = (),
) -> AotCase:
    """A kernel of bf16 tensors, `fp32` and `absent` as in `argument_types`; absent ones are None.

    Its stride arguments are multiples of 16 at the released models' shapes.
    """
    types = argument_types(kernel, "bf16", fp32, absent)
    divisible = tuple(p.name for p in kernel.params if "_stride_" in p.name)
    return AotCase(kernel, shape, types, {**constexprs, **dict.fromkeys(absent)}, num_warps, divisible=divisible)
