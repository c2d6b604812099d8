"""Hand-written PTX for the tests of the emulator: a body gets a frame around it, and runs on tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from emulator.launch import run_ptx
from emulator.machine import Statistics

FRAME = """
.version 8.7
.target sm_90a
.address_size 64
.extern .shared .align 16 .b8 smem[];
.visible .entry kernel({parameters})
.reqntid {threads}
{{
    .reg .pred %p<20>;
    .reg .b16 %rs<20>;
    .reg .b32 %r<90>;
    .reg .b64 %rd<40>;
    mov.u32 %r80, %tid.x;
    mov.u32 %r81, %ctaid.x;
    {loads}
    .loc 1 7 0 // snippet.py:7:0
    {body}
    ret;
}}
"""


def module(body: str, parameters: int, threads: int = 32) -> str:
    """%r80 is the thread, %r81 the block, %rd30 + k the k-th parameter, %rd20 + k its element of this thread (b32)."""
    names = [f".param .u64 param_{k}" for k in range(parameters)]
    loads = [
        f"ld.param.b64 %rd{30 + k}, [param_{k}]; mad.wide.u32 %rd{20 + k}, %r80, 4, %rd{30 + k};"
        for k in range(parameters)
    ]
    return FRAME.format(parameters=", ".join(names), threads=threads, loads="\n".join(loads), body=body)


def run(
    body: str,
    *tensors: Tensor,
    threads: int = 32,
    blocks: int = 1,
    shared: int = 0,
    seed: int | None = None,
    strict: bool = True,
) -> Statistics:
    text = module(body, len(tensors), threads)
    return run_ptx(text, list(tensors), (blocks, 1, 1), shared, seed, strict)


def compute(instruction: str, *inputs: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """32 results of an instruction: %r0 = f(%r1, %r2, ...), inputs [32] of 4 bytes."""
    out = torch.zeros(32, dtype=dtype or inputs[0].dtype)
    loads = "".join(f"ld.global.b32 %r{k}, [%rd{20 + k}];" for k in range(1, len(inputs) + 1))
    run(f"{loads} {instruction} st.global.b32 [%rd20], %r0;", out, *inputs)
    return out
