"""When a library's forward serves, and when not. Witness: float64; the library itself is played by the formula."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from anyflow_kernels.triton_ops import far_attention_library as library

from .triton_checks import DEVICE


def test_a_library_is_refused_what_pytorch_would_refuse_it():
    """The operators are called without PyTorch's dispatcher."""
    q, k, v = (torch.zeros(1, n, 2, 32, dtype=torch.bfloat16, device=DEVICE) for n in (9, 21, 21))
    assert "expected CUDA" in library.refused(q.cpu(), k.cpu(), v.cpu())
    if DEVICE == "cuda":
        assert library.refused(q, k, v) is None
        assert "multiple of 8" in library.refused(q[..., :12], k[..., :12], v[..., :12])
        assert "half precision" in library.refused(q.float(), k.float(), v.float())
        assert "2 keys" in library.refused(q, k[:, :1], v[:, :1])
        assert "aligned" in library.refused(q, k[..., 1:9], v[..., :8])


def wrong_row(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    out[0, 7, 0] = 0
    return out, lse


FAULTS = {
    "right": (lambda out, lse: (out, lse), None),
    "a wrong row": (wrong_row, "AssertionError: out: got error .*, worst row "),
    "NaN": (lambda out, lse: (out * torch.nan, lse), "AssertionError: out: got NaN"),
    "lse in base 2": (lambda out, lse: (out, lse * 1.4427), "AssertionError: lse: got error"),
    "another dtype": (lambda out, lse: (out.float(), lse), "AssertionError: out: got .* expected"),
}


@pytest.mark.parametrize(("fault", "reason"), FAULTS.values(), ids=FAULTS)
def test_a_library_serves_only_where_it_was_right(fault, reason, monkeypatch):
    """q is a slice, k and v are fronts of slabs that go on as NaN, and no length fills a tile."""
    seen = []

    def formula(name: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
        seen.append((q.is_contiguous(), k.is_contiguous(), q.shape[1] % 64, k.shape[1] % 64))
        out, lse = library._dense(q, k, v, scale)
        return fault(out.contiguous(), lse)

    monkeypatch.setattr(library, "library_forward", formula)
    monkeypatch.setattr(library, "_PROBED", {})
    q = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    for _ in range(2):
        told = library.unproven("flash", q)
        assert told is None if reason is None else re.match(f"flash: {reason}", told), told
    assert len(seen) == 1 and not any(seen[0][:2]) and all(seen[0][2:])
    assert list(library.probed().values()) == [told]


def test_a_library_that_raises_does_not_serve(monkeypatch):
    def missing(*arguments: object) -> None:
        raise RuntimeError("No available kernel.\nMore lines.")

    monkeypatch.setattr(library, "library_forward", missing)
    monkeypatch.setattr(library, "_PROBED", {})
    q = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    assert library.unproven("flash", q) == "flash: RuntimeError: No available kernel."


def test_no_library_is_tried_inside_a_capture(monkeypatch):
    """It would synchronise. The refusal is not kept: the next eager call tries."""
    monkeypatch.setattr(library, "_PROBED", {})
    monkeypatch.setattr(library, "_obstacle", lambda *arguments: None)
    q = torch.zeros(1, 4, 2, 32, dtype=torch.bfloat16, device=DEVICE)
    with monkeypatch.context() as capturing:
        capturing.setattr(library, "_capturing", lambda q: True)
        assert "inside a CUDA graph capture" in library.unproven("cudnn", q)
    assert library.unproven("cudnn", q) is None


@pytest.mark.parametrize("version", [None, 91002, 91500])
def test_an_old_cudnn_does_not_serve(version, monkeypatch):
    """PyTorch's own rule (sdp_utils.cpp): up to 9.15.0, lengths that are no multiple of 128 come out wrong."""
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: version)
    assert "expected newer than 91500" in library._obstacle("cudnn", torch.device(DEVICE), torch.bfloat16, 64)
