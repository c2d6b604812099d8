"""One operation against float64, on this machine, as tests and `anyflow verify` do it.

    python examples/verify_kernel.py [--operation far_attention] [--backend torch] [--shapes small]

For every case of the operation you see the error of the backend and that of the `reference` backend in the same
dtype, of the whole and of the worst row, and the budget: twice the reference's own plus a rounding step. Slabs start
as NaN, so what was not written, or was written where it should not be, fails as well. On a GPU, --backend triton; on a
CPU, TRITON_INTERPRET=1 before Python starts and --shapes tiny run the Triton kernels slowly.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import torch

from anyflow_kernels import Ops, load_ops
from anyflow_kernels.testing.budget import judge, map_tensors
from anyflow_kernels.testing.cases import SIZES, OperationCase, Random, operation_cases


def results(ops: Ops, case: OperationCase, dtype: torch.dtype, device: torch.device, wide: bool = False) -> list[Any]:
    """What the operation returns and writes. Inputs are made anew, from one seed: an operation may write into them."""
    inputs = case.make(Random(0, dtype, device))
    if wide:  # the same numbers, in float64
        inputs = map_tensors(lambda x: x.double(), inputs)
    out = getattr(ops, case.operation)(**inputs)
    return [*(out if isinstance(out, tuple) else (out,)), *(inputs[name] for name in case.written)]


@torch.no_grad()
def main(argv: Sequence[str] | None = None) -> bool:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted({case.operation for case in operation_cases(SIZES["tiny"])})
    parser.add_argument("--operation", choices=names, default="far_attention")
    parser.add_argument("--backend", choices=["auto", "triton", "torch"], default="auto")
    parser.add_argument("--shapes", choices=sorted(SIZES), default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="bfloat16")
    args = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, args.dtype)

    ops, good = load_ops(args.backend), True
    print(f"{args.operation} on {ops.backend}, {args.dtype}, {device}: errors relative to float64, whole | worst row")
    for case in operation_cases(SIZES[args.shapes]):
        if case.operation != args.operation:
            continue
        low, exact = (results(load_ops("reference"), case, dtype, device, wide=wide) for wide in (False, True))
        for i, tensors in enumerate(zip(results(ops, case, dtype, device), low, exact, strict=True)):
            verdict = judge(f"result {i}", *tensors, dtype=dtype)  # of the inputs: a log-sum-exp is fp32
            good &= verdict.ok
            print(f"  {case.shape}, result {i}: {'within budget' if verdict.ok else verdict.problem or 'OUTSIDE'}")
            for name in ("errors", "reference", "budget"):
                whole, row = getattr(verdict, name)
                print(f"    {name:<10}{whole:10.2e} | {row:.2e}")
    return good


if __name__ == "__main__":
    raise SystemExit(not main())
