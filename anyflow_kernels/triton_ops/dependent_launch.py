"""Programmatic dependent launch: a kernel is set up while the one before it in its stream still runs (sm_90 on).

A kernel that is launched so starts once every block of its predecessor has signalled or ended, and must not touch
memory before it has waited: `gdc_wait` returns when the predecessor has ended and its writes are visible.

Why it is safe to signal first of all, before the own wait: grid n + 1 may then run while n - 1 does, but its wait lasts
until n has ended, and no block of n ends before its own wait for n - 1. So behind the wait everything earlier in the
stream has ended, whatever the chain: nothing is read too early, and nothing overwritten that is still being read. This
holds only while every kernel that is launched so waits, in every block, before its first load or store. Weights wait
too: they can be what the stream wrote last (an optimizer, a cast), and their loads hide under those of the rows. A
kernel launched without the attribute, as cuBLAS's are, starts after all that, and one that never signals does so by
ending.

Source: CUDA programming guide, "Programmatic Dependent Launch and Synchronization"; PTX ISA, griddepcontrol.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from .. import launch_configs


@triton.jit
def wait_for_predecessor(PDL: tl.constexpr):
    """Before the first load or store of a kernel that is launched with `dependent_launch`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()


def dependent_launch(arch: int) -> dict[str, bool]:
    """What such a kernel is launched with on this architecture: its constexpr PDL, and the attribute of the launch."""
    pdl = launch_configs.pdl(arch)
    return {"PDL": pdl, "launch_pdl": pdl}
