"""`emulator.fake_cuda`: what it lets pass, what it counts as a wait, what it refuses."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from emulator.fake_cuda import FakeCuda, UnorderedAccess

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="it stands in for a GPU that is not there")


@pytest.fixture
def cuda() -> Iterator[FakeCuda]:
    with FakeCuda() as cuda, torch.no_grad():
        yield cuda


def test_tensors_have_a_shape_and_a_device_and_those_of_the_host_their_values(cuda):
    x = torch.randn(2, 3, device="cuda")
    y = (x[:, :2].double() @ x.new_ones(2, 5, dtype=torch.float64)).relu()
    assert (y.device, y.shape, y.dtype, y.is_cuda) == (torch.device("cuda:0"), (2, 5), torch.float64, True)
    assert (torch.ones(3) * 2).tolist() == [2.0] * 3
    assert {entry.kind for entry in cuda.log} == {"launch"} and not cuda.waits


def test_devices_do_not_mix_but_for_scalars(cuda):
    x = torch.ones(3, device="cuda")
    assert (x * torch.tensor(2.0)).is_cuda
    with pytest.raises(Exception, match="same device"):
        x + torch.ones(3)


WAITS = {
    "item": lambda x: x.sum().item(),
    "tolist": lambda x: x.sum().tolist(),
    "bool": lambda x: bool(x[0] > 0),
    "mask": lambda x: x[x > 0],
    "cpu": lambda x: x.cpu(),
    "to the host, unpinned": lambda x: x.to("cpu", non_blocking=True),
    "copied to the host": lambda x: torch.empty(3).copy_(x),
    "equal": lambda x: torch.equal(x, x + 1),
    "from the host": lambda x: torch.ones(3).to(x.device),
    "from the host, unpinned": lambda x: torch.ones(3).to(x.device, non_blocking=True),
    "from the host, awaited": lambda x: torch.ones(3).pin_memory().to(x.device),
    "a list": lambda x: torch.tensor([1.0, 2.0], device=x.device),
    "copied from the host": lambda x: x.copy_(torch.ones(3)),
    "assigned from the host": lambda x: x.__setitem__(slice(0, 2), torch.ones(2)),
    "synchronize": lambda x: torch.cuda.synchronize(),
    "event": lambda x: torch.cuda.current_stream().record_event().synchronize(),
}


@pytest.mark.parametrize("what", WAITS)
def test_the_host_waits_once_for(what, cuda):
    x = torch.ones(3, device="cuda")
    try:
        WAITS[what](x)
    except RuntimeError as error:
        assert "not known here" in str(error)
    assert len(cuda.waits) == 1


def test_pinned_memory_goes_either_way_without_a_wait(cuda):
    x = torch.ones(3).pin_memory().to("cuda:0", non_blocking=True)
    host = torch.empty(3, pin_memory=True).copy_(x, non_blocking=True)
    assert host.is_pinned() and not cuda.waits
    with pytest.raises(UnorderedAccess, match="may not yet have written"):
        host.sum()
    torch.cuda.current_stream().record_event().synchronize()
    host.sum()


@pytest.mark.parametrize("ordered", [False, True])
@pytest.mark.parametrize("access", ["read", "write"])
def test_streams_touch_the_same_memory_in_order_only(access, ordered, cuda):
    x = torch.ones(3, device="cuda")
    y = x + 1
    side = torch.cuda.Stream()
    if ordered:
        side.wait_event(torch.cuda.current_stream().record_event())
    with torch.cuda.stream(side):
        if ordered:
            x.mul_(2) if access == "write" else y.sum()
            return
        with pytest.raises(UnorderedAccess, match="stream 1 touches what has been"):
            x.mul_(2) if access == "write" else y.sum()


def test_a_graph_is_launched_by_its_replay_and_may_not_wait(cuda):
    x, side = torch.ones(3, device="cuda"), torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(RuntimeError, match="default stream"):
        graph.capture_begin()
    with torch.cuda.stream(side):
        graph.capture_begin(pool=None, capture_error_mode="thread_local")
        y = x + 1
        with pytest.raises(RuntimeError, match="while a graph is captured"):
            y.cpu()
        graph.capture_end()
    before = len(cuda.log)
    graph.replay()
    (y + 1).sum()
    assert [entry.kind for entry in cuda.log[before:]] == ["replay", "launch", "launch"]
    with torch.cuda.stream(side), pytest.raises(UnorderedAccess):
        graph.replay()  # its memory is in use on the other stream
