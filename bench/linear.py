"""fp32 linears on a CPU: the backend's (oneDNN) against torch's own choice (MKL), and bf16, at the models' shapes.

    python -m bench.linear [--repeats 20]

FLOPs: 2*M*K*N. Both are strict fp32; the parity check is against float64.
"""

from __future__ import annotations

import argparse
from functools import partial

import torch
import torch.nn.functional as F

from anyflow_kernels import load_ops

from .common import check_close, interleaved_medians, machine_line, write_rows

SHAPES = {  # tokens, in, out
    "1.3B qkv, 1 frame": (1560, 1536, 4608),
    "1.3B out, 1 frame": (1560, 1536, 1536),
    "1.3B FFN down, 1 frame": (1560, 8960, 1536),
    "small qkv": (1170, 256, 768),
}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=20)
    args = parser.parse_args()
    print(machine_line())
    linear, rows = load_ops("torch").linear, []
    for name, (m, k, n) in SHAPES.items():
        x, weight, bias = torch.randn(m, k), torch.randn(n, k) / k**0.5, torch.randn(n)
        oracle = F.linear(x.double(), weight.double(), bias.double())
        check_close(name, linear(x, weight, bias), oracle, 1e-6)
        half = [t.bfloat16() for t in (x, weight, bias)]
        contestants = {
            "torch": partial(F.linear, x, weight, bias),
            "ours": partial(linear, x, weight, bias),
            "bf16": partial(linear, *half),
        }
        seconds = interleaved_medians(contestants, args.repeats)
        rates = {f"{key}_gflops": 2 * m * k * n / value / 1e9 for key, value in seconds.items()}
        rows.append({"shape": name, "speedup": seconds["torch"] / seconds["ours"], **rates})
        print(
            f"{name:<24}"
            + "   ".join(f"{key} {value:6.0f}" for key, value in rates.items())
            + f"   {rows[-1]['speedup']:.2f}x"
        )
    write_rows(rows)


if __name__ == "__main__":
    main()
