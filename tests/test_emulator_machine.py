"""How the emulator runs warps and blocks, and what it refuses: divergence, barriers, races, conflicts, deadlocks."""

from __future__ import annotations

import pytest
import torch

from emulator.ptx import EmulationError

from .ptx_snippets import run

SEEDS = [None, 1, 2, 3]
OWN = "shl.b32 %r1, %r80, 2; mov.b32 %r2, smem; add.s32 %r3, %r1, %r2;"  # the thread's word: [%r3]
OTHER = "xor.b32 %r4, %r80, 32; shl.b32 %r4, %r4, 2; add.s32 %r4, %r4, %r2;"  # that of the other warp


def numbers(count: int) -> torch.Tensor:
    return torch.zeros(count, dtype=torch.int32)


@pytest.mark.parametrize("seed", SEEDS)
def test_lanes_diverge_and_meet(seed):
    """Each lane loops as often as its number says; after the loop the warp shuffles, so all must be there."""
    out = numbers(64)
    run(
        "and.b32 %r1, %r80, 31; mov.b32 %r2, 0;"
        "$L_loop: setp.ge.s32 %p1, %r2, %r1; @%p1 bra $L_end; add.s32 %r2, %r2, 1; bra.uni $L_loop;"
        "$L_end: shfl.sync.bfly.b32 %r3, %r2, 1, 31, -1; st.global.b32 [%rd20], %r3;",
        out, threads=64, seed=seed,
    )  # fmt: skip
    assert out.equal(torch.arange(64, dtype=torch.int32) % 32 ^ 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_blocks_share_nothing_but_global_memory(seed):
    out = numbers(3 * 64)
    run(
        f"{OWN}{OTHER} mad.lo.s32 %r5, %r81, 64, %r80; st.shared.b32 [%r3], %r5; bar.sync 0; ld.shared.b32 %r6, [%r4];"
        "mad.wide.s32 %rd1, %r5, 4, %rd30; st.global.b32 [%rd1], %r6;",
        out, threads=64, blocks=3, shared=256, seed=seed,
    )  # fmt: skip
    assert out.equal(torch.arange(3 * 64, dtype=torch.int32) ^ 32)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_missing_barrier_is_a_race(seed):
    with pytest.raises(EmulationError, match=r"race in shared memory.*read by warp"):
        run(f"{OWN}{OTHER} st.shared.b32 [%r3], %r80; ld.shared.b32 %r6, [%r4];", threads=64, shared=256, seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_write_after_a_read_needs_a_barrier_too(seed):
    body = f"{OWN}{OTHER} st.shared.b32 [%r3], %r80; bar.sync 0; ld.shared.b32 %r6, [%r4];"
    body += "BARRIER st.shared.b32 [%r3], -1;"
    run(body.replace("BARRIER", "bar.sync 0;"), threads=64, shared=256, seed=seed)
    with pytest.raises(EmulationError, match="write after read"):
        run(body.replace("BARRIER", ""), threads=64, shared=256, seed=seed)


def test_named_barriers_order_those_who_arrive():
    """Warp 0 writes and arrives, warp 1 waits and reads; the other way round it would be a race."""
    body = (
        f"{OWN}{OTHER} setp.lt.u32 %p1, %r80, 32; @!%p1 bra $L_reader;"
        "st.shared.b32 [%r3], 5; bar.arrive 1, 64; bra.uni $L_end;"
        "$L_reader: bar.sync 1, 64; ld.shared.b32 %r6, [%r4]; st.global.b32 [%rd20], %r6; $L_end:"
    )
    out = numbers(64)
    run(body, out, threads=64, shared=256)
    assert out[32:].eq(5).all()
    with pytest.raises(EmulationError, match="race"):
        run(body.replace("bar.arrive 1, 64;", "").replace("bar.sync 1, 64;", ""), out, threads=64, shared=256)


def test_blocks_must_not_meet_in_global_memory():
    out = numbers(32)
    with pytest.raises(EmulationError, match=r"conflict in global memory.*snippet.py:7"):
        run("st.global.b32 [%rd20], %r81;", out, blocks=2)
    with pytest.raises(EmulationError, match="conflict in global memory"):
        run("setp.eq.s32 %p1, %r81, 0; @%p1 st.global.b32 [%rd20], 1; @!%p1 ld.global.b32 %r1, [%rd20];", out, blocks=2)


def test_accesses_stay_inside_what_was_passed():
    out = numbers(64)
    with pytest.raises(EmulationError, match="outside every tensor"):
        run("st.global.b32 [%rd20+4], 1;", out[:32])
    with pytest.raises(EmulationError, match="between the elements of a view"):
        run("ld.global.b32 %r1, [%rd20];", out.view(16, 4)[:, :3])
    with pytest.raises(EmulationError, match="misaligned global"):
        run("ld.global.v2.b32 {%r1, %r2}, [%rd20];", out)
    with pytest.raises(EmulationError, match="shared access outside"):
        run(f"{OWN} st.shared.b32 [%r3+4], 1;", shared=128)
    with pytest.raises(EmulationError, match="shared access outside"):
        run("st.shared.b32 [0], 1;", shared=128)


def test_what_nobody_wrote_reads_as_nan():
    out = torch.zeros(32)
    run(f"{OWN} ld.shared.b32 %r4, [%r3]; st.global.b32 [%rd20], %r4;", out, shared=128)
    assert out.isnan().all()


def test_deadlock_says_who_waits_where():
    with pytest.raises(EmulationError, match=r"deadlock in kernel:\n.*warp 1 waits for barrier 0.*snippet.py:7"):
        run("setp.lt.u32 %p1, %r80, 32; @%p1 ret; bar.sync 0;", threads=64)


MBARRIER = (
    "mov.b32 %r2, smem; setp.eq.s32 %p1, %r80, 0; @%p1 mbarrier.init.shared::cta.b64 [%r2], 1; INIT"
    "setp.lt.u32 %p2, %r80, 32; @!%p2 bra $L_reader;"
    "mad.lo.s32 %r3, %r80, 4, %r2; st.shared.b32 [%r3+16], 5; bar.warp.sync -1;"
    "@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2]; bra.uni $L_end;"
    "$L_reader: WAIT and.b32 %r4, %r80, 31; mad.lo.s32 %r3, %r4, 4, %r2;"
    "ld.shared.b32 %r6, [%r3+16]; st.global.b32 [%rd20], %r6; $L_end:"
)
WAIT = (
    "{ .reg .pred complete; waitLoop: mbarrier.try_wait.parity.shared::cta.b64 complete, [%r2], 0;"
    " @!complete bra.uni waitLoop; }"
)


@pytest.mark.parametrize("seed", SEEDS)
def test_mbarriers(seed):
    out = numbers(64)
    good = MBARRIER.replace("INIT", "bar.sync 0;").replace("WAIT", WAIT)
    run(good, out, threads=64, shared=256, seed=seed)
    assert out[32:].eq(5).all()
    with pytest.raises(EmulationError, match="race"):
        run(good.replace(WAIT, ""), out, threads=64, shared=256, seed=seed)
    with pytest.raises(EmulationError, match=r"used before its initialisation|nothing orders its use"):
        run(good.replace("bar.sync 0;", ""), out, threads=64, shared=256, seed=seed)
    with pytest.raises(EmulationError, match="more arrivals than the 1"):
        run(good.replace("@%p1 mbarrier.arrive", "mbarrier.arrive"), out, threads=64, shared=256, seed=seed)
    with pytest.raises(EmulationError, match="waits for mbarrier"):
        run(good.replace("@%p1 mbarrier.arrive.shared::cta.b64 _, [%r2];", ""), out, threads=64, shared=256, seed=seed)


COPY = (
    f"{OWN} cp.async.ca.shared.global [%r3], [%rd21], 4; cp.async.commit_group; WAIT"
    "BARRIER ld.shared.b32 %r6, [%r4]; st.global.b32 [%rd20], %r6;"
)


def test_async_copies_arrive_with_their_wait_and_a_barrier():
    data, out = torch.arange(64, dtype=torch.int32), numbers(64)
    good = (OTHER + COPY).replace("WAIT", "cp.async.wait_group 0;").replace("BARRIER", "bar.sync 0;")
    good = OWN + good
    run(good, out, data, threads=64, shared=256)
    assert out.equal(data ^ 32)
    for missing in ("cp.async.wait_group 0;", "bar.sync 0;"):
        with pytest.raises(EmulationError, match=r"race in shared memory.*cp.async"):
            run(good.replace(missing, ""), out, data, threads=64, shared=256)
    late = good.replace("wait_group 0", "wait_group 1")  # the latest group may still fly
    with pytest.raises(EmulationError, match="race"):
        run(late, out, data, threads=64, shared=256)


def test_statistics_count_warp_instructions():
    # Two moves, then three, in each of two warps of two blocks.
    assert run("mov.b32 %r1, 0; mov.b32 %r2, 0;", threads=64, blocks=2).instructions == 2 * 2 * (2 + 3)
