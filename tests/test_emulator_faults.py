"""Faults planted in the project's kernels, in their PTX or in their source. The emulator names each; the kernels pass.

What runs is a launch by the project's own host code; one with a changed PTX is the same launch again.
"""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from triton.runtime.driver import driver as triton_driver

from anyflow_kernels import AttentionPlan, launch_configs
from anyflow_kernels.reference import plan_mask
from anyflow_kernels.triton_ops import attention_tiles, far_attention_gluon
from anyflow_kernels.triton_ops.dependent_launch import dependent_launch
from anyflow_kernels.triton_ops.rms_norm import _rms_norm_kernel
from anyflow_kernels.triton_ops.tile_schedule import encode
from emulator.driver import Driver, Launch
from emulator.launch import Emulator
from emulator.ptx import EmulationError

pytestmark = pytest.mark.emulated
SEEDS = [None, 0]  # the order of the emulator's own, and a drawn one
# The package's attribute of that name is the operation.
far_attention = importlib.import_module("anyflow_kernels.triton_ops.far_attention")
# 4 tiles of 128 queries for 3 programs; ranges of several blocks, and one that the last block reaches back into.
PLAN = AttentionPlan(150, 300, ((0, 20, ((3, 141), (160, 293))), (20, 150, ((0, 139),))))


def tensors() -> list[torch.Tensor]:
    """q, k, v; what no query sees is NaN."""
    generator = torch.Generator().manual_seed(0)
    lengths = (PLAN.num_queries, PLAN.num_keys, PLAN.num_keys)
    q, k, v = (torch.randn(1, n, 2, 64, generator=generator).bfloat16() for n in lengths)
    unseen = ~plan_mask(PLAN).any(dim=0)
    k[:, unseen] = v[:, unseen] = torch.nan
    return [q, k, v]


def attention(arch: int, descriptors: bool) -> None:
    rows = launch_configs.rows_for(launch_configs.ATTENTION_FORWARD, arch)
    row = next(r for r in rows if (r.head_dim, r.itemsize, r.descriptors) == (64, 2, descriptors))
    far_attention.launch_forward(*tensors(), tuple(encode(PLAN.ranges)), 0, 0.125, row)


def rms_norm(x: torch.Tensor) -> None:
    """Five rows of 1000 channels, a block of 1024 by four warps each."""
    y, weight = torch.empty(x.shape), torch.ones(1000)
    options = {"D": 1000, "ROWS": 1, "BLOCK_D": 1024, "num_warps": 4, **dependent_launch(90)}
    _rms_norm_kernel[(5,)](x, weight, y, len(x), x.stride(0), 1e-6, **options)


def gluon_attention(module) -> None:
    """Two stages of 64 keys, so that every tile comes round to the first again."""
    row = next(r for r in launch_configs.ATTENTION_GLUON if r.head_dim == 64)
    row = replace(row, block_n=64, num_stages=2)
    module.launch_gluon(*tensors(), tuple(encode(PLAN.ranges)), 0, 0.125, row)


KERNELS: dict[str, tuple[int, Callable[[], None]]] = {
    "norm": (90, lambda: rms_norm(torch.randn(5, 1000))),
    "norm of a view": (90, lambda: rms_norm(torch.randn(6, 1040)[:, :1000])),
    "attention, cp.async": (80, lambda: attention(80, descriptors=False)),
    "attention, wgmma": (90, lambda: attention(90, descriptors=False)),
    "attention, TMA": (90, lambda: attention(90, descriptors=True)),
    "attention, Gluon": (90, lambda: gluon_attention(far_attention_gluon)),
}


class Recorder:
    """Runs every launch on an architecture and keeps the first of each run."""

    def __init__(self, arch: int) -> None:
        self.launches: list[Launch] = []
        self.driver = Driver(arch, self)

    def __call__(self, launch: Launch) -> None:
        self.launches.append(launch)
        Emulator()(launch)

    def first(self, run: Callable[[], None]) -> Launch:
        self.launches = []
        self.driver.activate()
        run()
        return self.launches[0]


@pytest.fixture(scope="module")
def recorders():
    """A recorder of an architecture; three programs share the tiles of an attention."""
    before = triton_driver.active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_tiles, "attention_programs", lambda device, config: 3)
        yield {arch: Recorder(arch) for arch in (80, 90)}
    triton_driver.set_active(before)


@pytest.fixture(scope="module")
def launch_of(recorders):
    """The launch of a kernel by its name; each is compiled and run once."""
    launches: dict[str, Launch] = {}

    def find(name: str) -> Launch:
        if name not in launches:
            arch, run = KERNELS[name]
            launches[name] = recorders[arch].first(run)
        return launches[name]

    return find


@pytest.mark.parametrize("name", KERNELS)
def test_the_kernel_passes(launch_of, name):
    launch = launch_of(name)
    for seed in SEEDS[1:]:  # the first is run to find the launch
        Emulator(seed)(launch)


LOAD, BARRIER = r"@%p\d+ (ld\.global)", r"bar\.sync\s+0;"
# kernel, pattern in its PTX and replacement (everywhere, or in the n-th place), error
PTX_FAULTS: dict[str, tuple[str, str, str, int | None, str]] = {
    "no barrier in a reduction": ("norm", BARRIER, "", -1, "race in shared memory"),
    "no mask at a ragged tail": ("norm", LOAD, r"\1", None, "past the end of its tensor"),
    "no mask at the end of a view's rows": ("norm of a view", LOAD, r"\1", None, "read between the elements of a view"),
    "a vector load off by 4 bytes": (
        "norm", r"(ld\.global\S*v4\.b32 .*\+ )0 \]", r"\g<1>4 ]", None, "misaligned global access, 16 bytes",
    ),
    "two blocks write one row": ("norm", r"%ctaid\.x", "0", None, "conflict in global memory: write by block"),
    "no wait for the kernel before": ("norm", r"griddepcontrol\.wait;", "", None, "before griddepcontrol.wait"),
    "no wait for cp.async": ("attention, cp.async", r"cp\.async\.wait_group\s+\d+;", "", None, "race in shared memory"),
    "no barrier before a stage is written again": ("attention, cp.async", BARRIER, "", None, "race in shared memory"),
    "no wait for wgmma": ("attention, wgmma", r"wgmma\.wait_group\S* \d+;", "", None, "wgmma"),
    "no fence of registers before wgmma": (
        "attention, wgmma", r"wgmma\.fence\S*;", "", 0, "without wgmma.fence since the last wait",
    ),
    "no proxy fence between q's stores and wgmma": (
        "attention, wgmma", r"fence\.proxy\.async\S*;", "", None, "without fence.proxy.async in between",
    ),
    "an mbarrier that expects more bytes": (
        "attention, TMA", r"(mbarrier\.arrive\.expect_tx\S* _, \[%r\d+\], )(\d+);", r"\g<1>1\2;", None, "deadlock",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", PTX_FAULTS)
def test_fault_in_ptx(launch_of, fault):
    name, pattern, replacement, at, message = PTX_FAULTS[fault]

    def plant(ptx: str) -> str:
        matches = list(re.finditer(pattern, ptx))
        assert matches, f"{name}: nothing matches {pattern}"
        for match in reversed(matches if at is None else [matches[at]]):
            ptx = ptx[: match.start()] + match.expand(replacement) + ptx[match.end() :]
        return ptx

    for seed in SEEDS:
        with pytest.raises(EmulationError, match=message):
            Emulator(seed, plant)(launch_of(name))


RELEASE = "            mbarrier.arrive(v_empty.index(step % STAGES), count=1)\n"
WAIT = "            acc, p_operand = warpgroup_mma_wait(0, deps=[acc, p_operand])\n"
# text of the Gluon kernel, what it becomes, error
GLUON_FAULTS = {
    "values released before the wait": (WAIT + RELEASE, RELEASE + WAIT, "race in shared memory"),
    "the loader does not wait for q": (
        "mbarrier.wait(q_empty.index(part), (count & 1) ^ 1)",
        "pass",
        "race in shared memory|more arrivals",
    ),
    "one arrival releases keys": (
        "mbarrier.init(k_empty.index(stage), count=2)",
        "mbarrier.init(k_empty.index(stage), count=1)",
        "race in shared memory|more arrivals|deadlock",
    ),
    "an arrival that nobody makes": (
        "mbarrier.init(v_empty.index(stage), count=2)",
        "mbarrier.init(v_empty.index(stage), count=3)",
        "deadlock",
    ),
    "values read before they are there": (
        "            mbarrier.wait(v_full.index(step % STAGES), (step // STAGES) & 1)\n",
        "",
        "race in shared memory",
    ),
    "half the bytes expected": (
        "mbarrier.expect(k_full.index(stage), BLOCK_N * HEAD_DIM * 2)",
        "mbarrier.expect(k_full.index(stage), BLOCK_N * HEAD_DIM)",
        "deadlock|race in shared memory",
    ),
    "no fence after the initialisation": ("    fence_async_shared()\n", "", "without a proxy fence since its init"),
    "rows of the next run written": (
        ", mask=(q_start + out_rows < q_end)[:, None])",
        ")",
        "conflict in global memory|outside every tensor",
    ),
}


@pytest.mark.parametrize("fault", GLUON_FAULTS)
def test_fault_in_gluon(recorders, tmp_path, fault):
    old, new, message = GLUON_FAULTS[fault]
    source = Path(far_attention_gluon.__file__).read_text()
    assert source.count(old) == 1, f"not once in the kernel: {old}"
    path = tmp_path / "planted.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location("anyflow_kernels.triton_ops.planted", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(EmulationError, match=message):
        recorders[90].first(lambda: gluon_attention(module))
    for seed in SEEDS[1:]:
        with pytest.raises(EmulationError, match=message):
            Emulator(seed)(recorders[90].launches[0])
