"""The Gluon kernel of `far_attention`, run without a GPU: its own functions, one thread per group of warps.

Triton's interpreter does not know Gluon. The few Gluon words that the kernel uses are played here by torch: shared
memory starts as NaN, an mbarrier is a condition variable with arrivals and bytes, a wgmma reads its operands only when
it is waited for, so a buffer released too early is seen overwritten, and a wait that nobody answers is a deadlock.
"""

from __future__ import annotations

import threading
import types
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import Tensor
from triton.language import constexpr

from anyflow_kernels import AttentionPlan, FarLayout, launch_configs
from anyflow_kernels.reference import plan_mask
from anyflow_kernels.testing.budget import check, widened
from anyflow_kernels.triton_ops import far_attention_gluon as gluon_module
from anyflow_kernels.triton_ops.tile_schedule import Schedule, encode, query_schedule

from .triton_checks import DEVICE, REFERENCE

BLOCK_N, HEAD_DIM = 32, 16
DEADLOCK_SECONDS = 20.0


@dataclass
class Pointer:
    memory: Tensor  # flat
    offset: Tensor | int = 0

    def __add__(self, offset):
        return Pointer(self.memory, self.offset + offset)

    @property
    def dtype(self):
        return types.SimpleNamespace(element_ty=self.memory.dtype)


@dataclass
class Shared:
    """Shared memory: a tensor that is indexed with `.index`."""

    memory: Tensor

    def index(self, i):
        return Shared(self.memory[int(i)])

    def reshape(self, shape):
        return Shared(self.memory.view(shape))

    def permute(self, order):
        return Shared(self.memory.permute(order))

    @property
    def dtype(self):
        return self.memory.dtype


class Barrier:
    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.count = self.pending = self.bytes = self.completed = 0

    def update(self, arrivals: int = 0, expected: int = 0) -> None:
        with self.condition:
            assert self.count, "used before its init"
            self.pending -= arrivals
            self.bytes += expected
            assert self.pending >= 0, "more arrivals than the barrier counts"
            if self.pending == 0 and self.bytes == 0:
                self.completed += 1
                self.pending = self.count
                self.condition.notify_all()

    def wait(self, parity: int) -> None:
        with self.condition:
            answered = self.condition.wait_for(lambda: self.completed & 1 != int(parity), DEADLOCK_SECONDS)
            assert answered, "deadlock"


@dataclass
class Barriers:
    barriers: list[Barrier]

    def index(self, i):
        return self.barriers[int(i)]


@dataclass
class Descriptor:
    """(B, L, H, d) as a TMA descriptor of axes (B, H, L, d)."""

    tensor: Tensor
    layout: None = None

    @property
    def dtype(self):
        return self.tensor.dtype

    def read(self, batch, head, row, shape) -> Tensor:
        tile = torch.zeros(shape, dtype=self.dtype)
        rows = torch.arange(shape[2]) + int(row)
        inside = (rows >= 0) & (rows < self.tensor.shape[1])
        tile[0, 0, inside] = self.tensor[int(batch), rows[inside], int(head)]
        return tile


@dataclass
class Product:
    """A wgmma in flight."""

    a: Tensor | Shared
    b: Shared
    acc: Tensor | Product
    use_acc: bool
    result: Tensor | None = None

    def finish(self) -> Tensor:
        if self.result is None:
            a = self.a.memory if isinstance(self.a, Shared) else self.a
            product = a.float() @ self.b.memory.float()
            self.result = product + self.acc if self.use_acc else product
        return self.result


@dataclass
class Machine:
    """One program of the grid: what `gl`, `tl`, `mbarrier`, `tma` and the wgmma functions are to the kernel."""

    program: int
    errors: list[BaseException] = field(default_factory=list)

    def names(self) -> dict[str, object]:
        gl = types.SimpleNamespace(
            constexpr=int,
            int64=torch.int64,
            float32=torch.float32,
            program_id=lambda axis: self.program,
            static_range=range,
            minimum=lambda a, b: torch.minimum(torch.as_tensor(a), torch.as_tensor(b)),
            maximum=lambda a, b: torch.maximum(torch.as_tensor(a), torch.as_tensor(b)),
            where=lambda c, a, b: torch.where(torch.as_tensor(c), torch.as_tensor(a), torch.as_tensor(b)),
            max=lambda x, axis: x.amax(axis),
            sum=lambda x, axis: x.sum(axis),
            exp2=torch.exp2,
            log=torch.log,
            cdiv=lambda a, b: -(-a // b),
            arange=lambda a, b, layout: torch.arange(a, b),
            zeros=lambda shape, dtype, layout: torch.zeros(shape, dtype=dtype),
            convert_layout=lambda x, layout: x,
            load=lambda pointer: pointer.memory[pointer.offset].long(),
            store=self.store,
            allocate_shared_memory=self.allocate,
            warp_specialize=self.warp_specialize,
            NVMMADistributedLayout=lambda *a: None,
            DotOperandLayout=lambda **k: None,
            SliceLayout=lambda *a: None,
            BlockedLayout=lambda *a: None,
        )
        return {
            "gl": gl,
            "tl": types.SimpleNamespace(range=lambda a, b, disable_licm: range(a, b)),
            "mbarrier": types.SimpleNamespace(
                MBarrierLayout=lambda: "barrier",
                init=self.init,
                wait=lambda barrier, phase: barrier.wait(phase),
                arrive=lambda barrier, count: barrier.update(arrivals=count),
                expect=lambda barrier, size: barrier.update(arrivals=1, expected=int(size)),
            ),
            "async_load": self.copy,
            "warpgroup_mma": lambda a, b, acc, use_acc=True, is_async=False: Product(a, b, acc, use_acc),
            "warpgroup_mma_wait": self.wait_products,
            **dict.fromkeys(("fence_async_shared", "gdc_launch_dependents", "gdc_wait"), lambda: None),
        }

    @staticmethod
    def store(pointer: Pointer, value: Tensor, mask: Tensor | None = None) -> None:
        offset = torch.as_tensor(pointer.offset).expand(value.shape)
        keep = torch.ones(value.shape, dtype=torch.bool) if mask is None else mask.expand(value.shape)
        assert pointer.memory[offset[keep]].isnan().all(), "written twice"
        pointer.memory[offset[keep]] = value[keep].to(pointer.memory.dtype)

    @staticmethod
    def allocate(dtype, shape, layout):
        if layout == "barrier":
            return Barriers([Barrier() for _ in range(shape[0])])
        return Shared(torch.full(shape, torch.nan, dtype=dtype))

    @staticmethod
    def init(barrier: Barrier, count: int) -> None:
        barrier.count = barrier.pending = count

    @staticmethod
    def copy(descriptor: Descriptor, coordinates, barrier: Barrier, target: Shared) -> None:
        batch, head, row, column = coordinates
        assert column == 0
        target.memory.copy_(descriptor.read(batch, head, row, target.memory.shape))
        barrier.update(expected=-target.memory.numel() * target.memory.element_size())

    @staticmethod
    def wait_products(outstanding: int, deps):
        results = tuple(d.finish() if isinstance(d, Product) else d for d in deps)
        return results[0] if len(results) == 1 else results

    def warp_specialize(self, functions, warps, registers) -> None:
        assert len(warps) == len(registers) == len(functions) - 1
        threads = [threading.Thread(target=self.guarded, args=job, daemon=True) for job in functions]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if self.errors:
            raise self.errors[0]

    def guarded(self, function, arguments) -> None:
        try:
            function(*arguments)
        except BaseException as error:  # a thread cannot raise into the test by itself
            self.errors.append(error)

    def run(self, **arguments) -> None:
        """The kernel, its helpers and this machine's words in one namespace."""
        names = {n: x.value if isinstance(x, constexpr) else x for n, x in vars(gluon_module).items()} | self.names()
        for name in ("_load_tiles", "_attend", "_mask_seen", "_far_attention_gluon_kernel"):
            names[name] = types.FunctionType(getattr(gluon_module, name).fn.__code__, names)
        names["_far_attention_gluon_kernel"](**arguments)


def run_kernel(q, k, v, schedule: Schedule, scale: float, stages: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, length, heads, width = q.shape
    out, lse = torch.full(q.shape, torch.nan, dtype=q.dtype), torch.full((batch, heads, length), torch.nan)
    partial = torch.full((schedule.slots, 128, width), torch.nan)
    partial_lse = torch.full((schedule.slots, 128), torch.nan)
    pointers = {"out_ptr": out, "lse_ptr": lse, "partial_ptr": partial, "partial_lse_ptr": partial_lse}
    pointers |= {"starts_ptr": schedule.starts, "items_ptr": schedule.items, "ranges_ptr": schedule.ranges}
    for program in range(schedule.programs):
        Machine(program).run(
            **{name: Descriptor(x) for name, x in {"q": q, "k": k, "v": v}.items()},
            **{name: Pointer(x.view(-1)) for name, x in pointers.items()},
            heads=heads,
            num_queries=length,
            scale_log2=scale / gluon_module.LN2.value,
            HEAD_DIM=width,
            BLOCK_N=BLOCK_N,
            STAGES=stages,
        )
    return out, lse, partial, partial_lse


PLANS = {
    "dense, ragged": AttentionPlan.dense(130, 100),
    "one block": AttentionPlan.dense(5, 32),
    "shorter than a block": AttentionPlan.dense(40, 7),
    "clean": AttentionPlan.from_layout(FarLayout((2, 2, 2), 12, 16, full_chunk_limit=2, clean=True)),
    "gaps": AttentionPlan(150, 300, ((0, 20, ((3, 41), (60, 93), (100, 300))), (20, 150, ((7, 39),)))),
}


def tensors(plan: AttentionPlan, dtype=torch.bfloat16) -> list[Tensor]:
    """q, k, v; what no query sees is NaN in k and v."""
    generator = torch.Generator().manual_seed(plan.num_queries)
    lengths = (plan.num_queries, plan.num_keys, plan.num_keys)
    q, k, v = (torch.randn(2, n, 2, HEAD_DIM, generator=generator).to(dtype) for n in lengths)
    unseen = ~plan_mask(plan).any(dim=0)
    k[:, unseen] = v[:, unseen] = torch.nan
    return [q, k, v]


def assert_matches(plan: AttentionPlan, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
    k, v = k.nan_to_num(), v.nan_to_num()
    low = REFERENCE.far_attention(q, k, v, plan, return_lse=True)
    high = REFERENCE.far_attention(*widened((q, k, v)), plan, return_lse=True)
    for name, got, a, b in zip(("out", "lse"), (out, lse), low, high, strict=True):
        check(name, got, a, b)


@pytest.mark.parametrize("stages", [2, 3])
@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_kernel_matches_reference(plan, stages):
    """Several items a program: rings and phases go on from one tile to the next."""
    q, k, v = tensors(plan)
    schedule = query_schedule(tuple(encode(plan.ranges)), 4, 128, BLOCK_N, 3, None, 0, torch.device("cpu"))
    out, lse, *_ = run_kernel(q, k, v, schedule, HEAD_DIM**-0.5, stages)
    assert_matches(plan, q, k, v, out, lse)


@pytest.mark.parametrize("phantom_keys", [0, 6])
def test_split_keys_and_phantom_keys(phantom_keys):
    plan = replace(PLANS["gaps"], phantom_keys=phantom_keys)
    q, k, v = tensors(plan)
    schedule = query_schedule(tuple(encode(plan.ranges)), 4, 128, BLOCK_N, 7, 0, phantom_keys, torch.device("cpu"))
    assert schedule.slots
    out, lse, partial, partial_lse = run_kernel(q, k, v, schedule, HEAD_DIM**-0.5, 2)
    for head, start, end, slot, slots in schedule.merges.tolist():
        parts, weights = partial[slot : slot + slots], partial_lse[slot : slot + slots]
        total = weights.logsumexp(dim=0)
        merged = ((weights - total).exp()[..., None] * parts).sum(dim=0)
        out[head // 2, start:end, head % 2] = merged[: end - start].to(out.dtype)
        lse[head // 2, head % 2, start:end] = total[: end - start]
    assert_matches(plan, q, k, v, out, lse)


def test_rejects_ranges_that_the_last_block_would_leave():
    """A range of less than a block, not at key 0: the block would read rows in front of it, which may be NaN."""
    config = replace(launch_configs.rows_for(launch_configs.ATTENTION_GLUON, 90)[0], head_dim=HEAD_DIM)
    q, k, v = tensors(AttentionPlan.dense(4, 300))
    for ranges, suited in [(((0, 7),), True), (((1, 129),), True), (((1, 128),), False)]:
        assert gluon_module.suits(q, k, v, ((0, 4, ranges),), config) == suited
    assert not gluon_module.suits(
        q, k.expand(2, 300, 2, HEAD_DIM)[..., :8], v, ((0, 4, ((0, 7),)),), replace(config, head_dim=8)
    )
    with pytest.raises(ValueError, match="ranges >= 128"):
        gluon_module.launch_gluon(q, k, v, tuple(encode(((0, 4, ((1, 128),)),))), 0, 0.25, config)


COMPILED = {
    "dense": AttentionPlan.dense(130, 300),
    "shorter than a block": AttentionPlan.dense(40, 37),
    "gaps": AttentionPlan(150, 700, ((0, 20, ((3, 241), (260, 393), (400, 700))), (20, 150, ((7, 139),)))),
    "phantom": AttentionPlan(40, 200, ((0, 40, ((0, 200),)),), 5),
}


@pytest.mark.emulated("sm_90")
@pytest.mark.parametrize("split_cost", [None, 0], ids=["whole", "split"])
@pytest.mark.parametrize("plan", COMPILED.values(), ids=COMPILED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("config", launch_configs.ATTENTION_GLUON, ids=lambda c: f"d{c.head_dim}")
def test_compiled_kernel(config, dtype, plan, split_cost):
    """Its own PTX: warp roles, TMA, mbarriers and wgmma, under the emulator's checks."""
    lengths = (plan.num_queries, plan.num_keys, plan.num_keys)
    q, k, v = (torch.randn(1, n, 2, config.head_dim).to(dtype) for n in lengths)
    unseen = ~plan_mask(plan).any(dim=0)
    k[:, unseen] = v[:, unseen] = torch.nan
    config = replace(config, split_cost=split_cost)
    flat = tuple(encode(plan.ranges))
    out, lse = gluon_module.launch_gluon(q, k, v, flat, plan.phantom_keys, config.head_dim**-0.5, config)
    assert_matches(plan, q, k, v, out, lse)


@pytest.mark.gpu
@pytest.mark.parametrize("config", launch_configs.ATTENTION_GLUON, ids=lambda c: f"d{c.head_dim}")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("frames", [(1,), (3, 3, 2)], ids=str)
def test_on_hopper(config, dtype, frames):
    if launch_configs.architecture(DEVICE) != 90:
        pytest.skip("needs sm_90")
    layout = FarLayout((1, *frames), 40, 52, mode="inference" if len(frames) == 1 else "train")
    plan = AttentionPlan.from_layout(layout)
    lengths = (plan.num_queries, plan.num_keys, plan.num_keys)
    q, k, v = (torch.randn(2, n, 3, config.head_dim, device=DEVICE).to(dtype) for n in lengths)
    out, lse = gluon_module.launch_gluon(q, k, v, tuple(encode(plan.ranges)), 0, config.head_dim**-0.5, config)
    assert_matches(plan, q, k, v, out, lse)
