"""How many threads a process on a CPU runs, and how they wait for each other."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

# What says already how OpenMP's threads wait; GNU's, LLVM's and Intel's runtimes.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
SMALL = 1 << 15  # elements of a layer's activations below which a second thread costs more than it computes
_CGROUP = Path("/sys/fs/cgroup")


def settle_threads() -> None:
    """Set what OpenMP reads when torch is loaded, where the environment does not say it; too late after that.

    Threads that spin at barriers are 50 times slower beside one other busy process: they wait passively. In a
    container with a share of the CPU there are no more threads than the share.
    """
    if "torch" in sys.modules:
        return
    if not any(name in os.environ for name in _WAITING):
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    share = cpu_share()
    if share is not None and "OMP_NUM_THREADS" not in os.environ and share < len(os.sched_getaffinity(0)):
        os.environ["OMP_NUM_THREADS"] = str(share)


def cpu_share(cgroup: Path = _CGROUP) -> int | None:
    """The CPUs that the container's quota amounts to, rounded up; None without a quota.

    Source: `cpu.max` of cgroup v2 and `cpu.cfs_quota_us` of v1 in the Linux kernel's admin guide.
    """
    try:
        quota, period = (cgroup / "cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            quota = (cgroup / "cpu" / "cpu.cfs_quota_us").read_text().strip()
            period = (cgroup / "cpu" / "cpu.cfs_period_us").read_text().strip()
        except OSError:
            return None
    if not (quota.isdecimal() and period.isdecimal() and int(quota) and int(period)):  # "max", or -1
        return None
    return math.ceil(int(quota) / int(period))


def suit_threads(tokens: int, channels: int) -> None:
    """One thread for a model whose layers see so few tokens that more would only wait for each other."""
    import torch

    if tokens * channels < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
