"""CUDA tensors without a GPU and without values: what a program launches, in which order, and where its host waits.

    with FakeCuda() as cuda:
        with torch.device("cuda"):
            model = make()
        model(torch.empty(2, 8, device="cuda"))
    assert not cuda.waits

Tensors on a CUDA device have a shape, a dtype and a device (PyTorch's fake tensors), so that mixing devices raises as
it does there; tensors in host memory are ordinary ones. `torch.cuda`'s streams, events and graphs are stand-ins that
keep the order. Every launch and every wait of the host is logged, and these raise:

* reading or writing, on one stream, what another has not been waited for (`UnorderedAccess`), and reading in host
  memory what a copy may still be writing;
* a wait of the host, or a copy from pageable memory, while a graph is captured.

A copy between host and device is a wait unless it is asynchronous and the host memory pinned: the driver first drains
the stream. PyTorch built without CUDA does not know what `.to("cuda")` means, but `.to("cuda:0")`.
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

DEVICE = torch.device("cuda", 0)
# Operators whose result is for the host.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2", "item"}
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
FILLS = {"uniform_", "normal_", "random_"}  # in place, and of no effect on what is known
Clock = dict[int, int]  # how far each stream is known to be, by its number


class UnorderedAccess(RuntimeError):
    """Two streams, or a stream and the host, touch the same memory in no order."""


@dataclass(frozen=True)
class Logged:
    """A `kind` ("launch", "wait" of the host, "replay") of `name`, on the stream of this number, from the lines of
    the program in `where`, the innermost last.
    """

    kind: str
    name: str
    stream: int
    where: tuple[str, ...]


@dataclass
class _Memory:
    """Who touched a storage last: the write, and the reads since, as (stream, tick)."""

    write: tuple[int, int] | None = None
    reads: Clock = field(default_factory=dict)


class FakeCuda(TorchDispatchMode):
    """A context manager, see above; one at a time, and only where there is no GPU.

    Args:
        capability: of the device.
        multiprocessors: of the device.
        package: lines of code are logged as `where` if this is in their path.

    Attributes:
        log: all that happened, in order.
        captures: graphs captured.
    """

    def __init__(self, capability: tuple[int, int] = (9, 0), multiprocessors: int = 132, package: str = "anyflow"):
        super().__init__()
        self.log: list[Logged] = []
        self.captures = 0
        self._capability, self._multiprocessors, self._package = capability, multiprocessors, package
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._numbers = itertools.count()
        self._default = self._current = Stream(self)
        self._host: Clock = {}
        self._seen: dict[int, StorageWeakRef] = {}
        self._memory: dict[int, _Memory] = {}  # by storage
        self._pinned: set[int] = set()
        self._captured: tuple[set[int], set[int]] | None = None  # by the capture that is under way
        self._exits = ExitStack()

    @property
    def waits(self) -> list[Logged]:
        """Where the host has waited for the device."""
        return [entry for entry in self.log if entry.kind == "wait"]

    def __enter__(self) -> FakeCuda:
        with ExitStack() as stack:
            stack.enter_context(self._fake)  # first: it asks whether there is a GPU
            stack.enter_context(_Calls(self))
            for target, name, stand_in in self._stand_ins():
                stack.enter_context(patch.object(target, name, stand_in, create=True))
            super().__enter__()
            self._exits = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._exits.__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        leaves = tree_leaves((args, kwargs))
        given = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        name = func._schema.name.split("::")[1]
        if func.namespace == "prim":  # questions about a tensor
            return func(*args, **kwargs)
        to_device = any(isinstance(leaf, torch.device) and leaf.type == "cuda" for leaf in leaves)
        if not to_device and not any(x.is_cuda for x in given):
            return self._on_host(func, name, given, args, kwargs)
        if name in READS:
            self._wait(name, self._current)
            if name == "equal":
                return args[0].shape == args[1].shape
            raise RuntimeError(f"{name}: got a tensor on {DEVICE}, whose values are not known here")
        if name in FILLS:
            result: Any = args[0]
        elif name == "_to_copy":
            result = self._to_copy(args[0], kwargs)
        else:
            result = func(*tree_map_only(Tensor, self._without_values, args), **kwargs)
        if not _is_view(func) and name not in ALLOCATIONS:
            schema = zip(func._schema.arguments, args, strict=False)
            written = [x for a, x in schema if isinstance(x, Tensor) and a.alias_info and a.alias_info.is_write]
            old = {self._storage(x) for x in given}
            new = [x for x in tree_leaves(result) if isinstance(x, Tensor) and self._storage(x) not in old]
            self._touch(name, given, written + new)
        return result

    def wait_for_host(self, clock: Clock, name: str) -> None:
        """The host waits until the device is as far as `clock`."""
        if self._captured is not None:
            raise RuntimeError(f"{name}: the host waits while a graph is captured")
        self.note("wait", name, self._current)
        _merge(self._host, clock)

    def note(self, kind: str, name: str, stream: Stream) -> None:
        """Add to the log."""
        frames = traceback.extract_stack()
        where = tuple(f"{f.filename.rsplit('/', 1)[-1]}:{f.lineno}" for f in frames if self._package in f.filename)
        self.log.append(Logged(kind, name, stream.number, where[-4:]))

    def is_done(self, clock: Clock) -> bool:
        """Whether the host has waited for all of it."""
        return all(self._host.get(number, 0) >= tick for number, tick in clock.items())

    def _without_values(self, x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else self._fake.from_tensor(x)

    def _wait(self, name: str, stream: Stream) -> None:
        self.wait_for_host(dict(stream.clock), name)

    def _on_host(self, func: Any, name: str, given: list[Tensor], args: tuple, kwargs: dict) -> Any:
        """An operator on ordinary tensors; pinned memory is that of a list."""
        if name == "is_pinned":
            return self._storage(args[0]) in self._pinned
        for x in () if _is_view(func) else given:
            memory = self._memory.get(self._storage(x))
            if memory is not None and memory.write is not None and not self.is_done(dict([memory.write])):
                raise UnorderedAccess(
                    f"{name}: reads host memory that a copy on stream {memory.write[0]} may not yet have written; wait "
                    "for its event first"
                )
        pinned = bool(kwargs.get("pin_memory"))
        if pinned:
            kwargs["pin_memory"] = False
        with unset_fake_temporarily():
            result = func(*args, **kwargs)
        if pinned:
            self._pinned.add(self._storage(result))
        return result

    def copied(self, target: Tensor, source: Tensor, asynchronous: bool = False) -> Tensor:
        """`target.copy_(source)`, of which at least one is on the device."""
        torch.broadcast_to(source, target.shape)  # raises where shapes do not fit
        self._transfer("copy_", source, target, asynchronous)
        self._touch("copy_", [source], [target])
        return target

    def pinned(self, x: Tensor) -> Tensor:
        """`x.pin_memory()`."""
        with unset_fake_temporarily():
            result = x.clone()
        self._pinned.add(self._storage(result))
        return result

    def _transfer(self, name: str, source: Tensor, target: Tensor, asynchronous: bool) -> None:
        """The wait of a copy between host and device; none if it is from one to the same."""
        if source.is_cuda == target.is_cuda:
            return
        if not asynchronous or self._storage(source if target.is_cuda else target) not in self._pinned:
            self._wait(f"{name} {'from pageable host memory' if target.is_cuda else 'to the host'}", self._current)

    def _to_copy(self, source: Tensor, kwargs: dict) -> Tensor:
        """`source.to(...)` with another device or dtype."""
        device = kwargs.get("device") or source.device
        if device.type == "cpu":
            with unset_fake_temporarily():
                result = torch.zeros(source.shape, dtype=kwargs.get("dtype") or source.dtype)
        else:
            settings = {name: value for name, value in kwargs.items() if name != "non_blocking"}
            result = torch.ops.aten._to_copy(self._without_values(source), **settings)
        self._transfer("to", source, result, bool(kwargs.get("non_blocking")))
        return result

    def _touch(self, name: str, read: list[Tensor], written: list[Tensor]) -> None:
        """A launch, now or of the graph that is being captured."""
        storages = {self._storage(x) for x in read}, {self._storage(x) for x in written}
        if self._captured is None:
            self.launched("launch", name, *storages)
        else:
            for known, more in zip(self._captured, storages, strict=True):
                known |= more

    def launched(self, kind: str, name: str, read: set[int], written: set[int]) -> None:
        """Log it on the current stream, and check that what it touches has been waited for."""
        stream = self._current
        tick = stream.clock[stream.number] = stream.clock.get(stream.number, 0) + 1
        self.note(kind, name, stream)
        for storage in read:
            memory = self._memory.setdefault(storage, _Memory())
            self._ordered(name, stream, memory.write, "has been written")
            memory.reads[stream.number] = tick
        for storage in written:
            memory = self._memory.get(storage, _Memory())
            for access in (memory.write, *memory.reads.items()):
                self._ordered(name, stream, access, "has been used")
            self._memory[storage] = _Memory((stream.number, tick))

    def _storage(self, x: Tensor) -> int:
        """The storage, by an address that no other one gets: a weak reference keeps it."""
        storage = x.untyped_storage()
        self._seen.setdefault(storage._cdata, StorageWeakRef(storage))
        return storage._cdata

    def _ordered(self, name: str, stream: Stream, access: tuple[int, int] | None, what: str) -> None:
        if access is not None and stream.clock.get(access[0], 0) < access[1]:
            raise UnorderedAccess(
                f"{name}: on stream {stream.number} touches what {what} on stream {access[0]}; let it wait for that"
            )

    def _stand_ins(self) -> Iterator[tuple[Any, str, Any]]:
        """(object, attribute, value) for everything of torch that asks for a GPU."""
        storage_address = torch.UntypedStorage.data_ptr
        cuda = torch.cuda
        yield cuda, "is_available", lambda: True
        yield cuda, "current_device", lambda: 0
        yield cuda, "device_count", lambda: 1
        yield cuda, "get_device_capability", lambda device=None: self._capability
        yield cuda, "get_device_properties", lambda device=None: _Properties(self._multiprocessors)
        yield cuda, "Stream", lambda device=None, **_: Stream(self)
        yield cuda, "Event", lambda **_: Event(self)
        yield cuda, "CUDAGraph", lambda: Graph(self)
        yield cuda, "is_current_stream_capturing", lambda: self._captured is not None
        yield cuda, "current_stream", lambda device=None: self._current
        yield cuda, "default_stream", lambda device=None: self._default
        yield cuda, "stream", self._stream
        yield cuda, "synchronize", lambda device=None: self._wait("synchronize", self._current)
        yield cuda, "graph_pool_handle", lambda: (0, 0)
        yield cuda, "empty_cache", lambda: None
        yield Tensor, "record_stream", lambda x, stream: None  # for the allocator, which is not modelled
        # Addresses, which fused weights and captured steps are known by.
        yield (
            torch.UntypedStorage,
            "data_ptr",
            lambda s: s._cdata << 24 if s.device.type == "meta" else storage_address(s),
        )
        yield FakeTensor, "data_ptr", lambda x: (self._storage(x) << 24) + x.storage_offset() * x.element_size()

    @contextmanager
    def _stream(self, stream: Stream | None) -> Iterator[None]:
        before, self._current = self._current, stream or self._current
        try:
            yield
        finally:
            self._current = before

    @contextmanager
    def capturing(self) -> Iterator[tuple[set[int], set[int]]]:
        """Until the end of the block launches go into a graph: the storages it reads and writes."""
        if self._current is self._default:
            raise RuntimeError("capture_begin: got the default stream, which cannot be captured")
        self._captured = captured = (set(), set())
        try:
            yield captured
        finally:
            self._captured = None
            self.captures += 1


class _Calls(TorchFunctionMode):
    """What asks for a GPU before it reaches the dispatcher."""

    def __init__(self, cuda: FakeCuda) -> None:
        super().__init__()
        self._cuda = cuda

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is Tensor.copy_ and (args[0].is_cuda or args[1].is_cuda):
            return self._cuda.copied(*args, *(kwargs or {}).values())
        if func is Tensor.__setitem__ and args[0].is_cuda:
            return self._cuda.copied(_indexed(*args[:2]), torch.as_tensor(args[2]))
        if func is Tensor.__getitem__ and args[0].is_cuda:
            return _indexed(*args)
        if func is Tensor.__bool__ and args[0].is_cuda:
            return args[0].item()
        if func is Tensor.pin_memory:
            return self._cuda.pinned(args[0])
        return func(*args, **(kwargs or {}))


class Stream:
    """Stands in for `torch.cuda.Stream`."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda, self.number = cuda, next(cuda._numbers)
        self.clock: Clock = {}
        self.cuda_stream = self.number

    def wait_stream(self, other: Stream) -> None:
        _merge(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        _merge(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event(self._cuda)
        event.record(self)
        return event

    def synchronize(self) -> None:
        self._cuda.wait_for_host(dict(self.clock), "stream.synchronize")


class Event:
    """Stands in for `torch.cuda.Event`; it is done once the host has waited for it, or for what came after."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or self._cuda._current).clock)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._cuda._current).wait_event(self)

    def query(self) -> bool:
        return self._cuda.is_done(self.clock)

    def synchronize(self) -> None:
        self._cuda.wait_for_host(dict(self.clock), "event.synchronize")

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds.

        Raises:
            RuntimeError: if an event may not have happened yet.
        """
        if not (self.query() and end.query()):
            raise RuntimeError("elapsed_time: got an event that the host has not waited for")
        return 1.0


class Graph:
    """Stands in for `torch.cuda.CUDAGraph`: a replay is one entry in the log."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda
        self._exits = ExitStack()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global") -> None:
        self._touched = self._exits.enter_context(self._cuda.capturing())

    def capture_end(self) -> None:
        self._exits.close()

    def replay(self) -> None:
        self._cuda.launched("replay", "graph", *self._touched)


def _indexed(x: Tensor, key: Any) -> Tensor:
    """`x[key]` by integers, slices, None, an ellipsis, or a single mask."""
    if isinstance(key, Tensor):
        return x.masked_select(key)
    keys = list(key) if isinstance(key, tuple) else [key]
    if Ellipsis in keys:
        at = keys.index(Ellipsis)
        missing = x.ndim - sum(k is not None for k in keys) + 1
        keys[at : at + 1] = [slice(None)] * missing
    dim = 0
    for k in keys:
        if k is None:
            x = x.unsqueeze(dim)
        elif isinstance(k, slice):
            start, stop, step = k.indices(x.shape[dim])
            x = torch.ops.aten.slice(x, dim, start, max(start, stop), step)
        else:
            x = x.select(dim, k)
            continue
        dim += 1
    return x


@dataclass(frozen=True)
class _Properties:
    multi_processor_count: int
    name: str = "no GPU"


def _is_view(func: Any) -> bool:
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _merge(clock: Clock, other: Clock) -> None:
    for number, tick in other.items():
        clock[number] = max(clock.get(number, 0), tick)
