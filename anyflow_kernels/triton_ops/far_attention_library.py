"""The forwards of cuDNN and flash SDPA where every query sees every key, and whether this machine's are right.

What PyTorch's dispatcher would refuse is refused here, since the operators are called without it. cuDNN serves by
default on some chips, so it is tried once per device, dtype and head_dim before: an answer that breaks the error law,
or an exception, and the kernel of this package serves in its place; `probed` keeps the reason for `anyflow info`.

Source: aten/src/ATen/native/transformers/cuda/sdp_utils.cpp (what cuDNN takes), aten/src/ATen/native/cudnn/MHA.cpp.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..testing.budget import check
from .attention_tiles import describable

LIBRARIES = ("cudnn", "flash")
# PyTorch prefers cuDNN from the next one on: earlier ones err where a length is no multiple of 128 (pytorch#169849).
CUDNN_TOO_OLD = 91500
_PROBED: dict[tuple[str, int, torch.dtype, int], str | None] = {}


def library_forward(library: str, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(out, lse) as `launch_forward` returns them, every query on every key."""
    queries, (q, k, v) = q.shape[1], (x.transpose(1, 2) for x in (q, k, v))
    if library == "cudnn":
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, scale=scale)[:2]
        lse = lse.flatten(2)  # (B, H, Lq, 1) before torch 2.13
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, scale=scale)[:2]
    return out.transpose(1, 2).contiguous(), lse[:, :, :queries].contiguous()


def refused(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a library cannot take these arguments, or None."""
    if not q.is_cuda:
        return f"q: got a tensor on {q.device}, expected CUDA"
    if q.itemsize != 2 or q.shape[3] % 8 or q.shape[3] > 128:
        return f"q: got {q.dtype} with head_dim {q.shape[3]}, expected half precision and a multiple of 8 up to 128"
    if q.numel() == 0 or k.shape[1] < 2:
        return f"k: got {tuple(k.shape)}, expected at least 2 keys, and queries"
    if not all(map(describable, (q, k, v))):
        return "q, k, v: expected 16-byte aligned rows"
    return None


def unproven(library: str, q: Tensor) -> str | None:
    """Why a library must not serve calls like this one, or None where it has been right here.

    The first call of a device, dtype and head_dim tries it, which synchronises; inside a CUDA graph capture it does
    not try, and refuses.
    """
    key = (library, q.get_device(), q.dtype, q.shape[3])
    if key not in _PROBED:
        if _capturing(q):
            return "first met inside a CUDA graph capture, where it cannot be tried"
        _PROBED[key] = _obstacle(library, q.device, q.dtype, q.shape[3])
    return _PROBED[key]


def probed() -> dict[tuple[str, int, torch.dtype, int], str | None]:
    """What was tried so far, by library, device, dtype and head_dim: why it does not serve, or None."""
    return dict(_PROBED)


def _capturing(q: Tensor) -> bool:
    return q.is_cuda and torch.cuda.is_current_stream_capturing()


def _obstacle(library: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    version = torch.backends.cudnn.version() or 0
    if library == "cudnn" and version <= CUDNN_TOO_OLD:
        return f"cuDNN: got version {version}, expected newer than {CUDNN_TOO_OLD} (pytorch#169849)"
    try:
        _check_parity(library, device, dtype, head_dim)
    except Exception as error:  # whatever a library does wrong, the kernel of this package serves
        return f"{library}: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
    return None


def _check_parity(library: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    """A small call as in the models: q a slice of the projection, k and v the front of slabs that go on as NaN,
    lengths that fill no tile.

    Raises:
        AssertionError: if out or lse breaks the error law against float64.
    """
    batch, heads, queries, keys, width = 2, 3, 200, 333, 3 * head_dim
    generator = torch.Generator().manual_seed(0)

    def random(length: int, channels: int) -> Tensor:
        return torch.randn(batch, length, channels, generator=generator).to(device, dtype)

    q = random(queries, 3 * width)[..., :width].unflatten(-1, (heads, head_dim))
    slabs = (torch.full((batch, keys + 67, heads, head_dim), torch.nan, dtype=dtype, device=device) for _ in range(2))
    k, v = (slab[:, :keys].copy_(random(keys, width).unflatten(-1, (heads, head_dim))) for slab in slabs)
    scale = head_dim**-0.5
    got = library_forward(library, q, k, v, scale)
    low, exact = _dense(q, k, v, scale), _dense(q.double(), k.double(), v.double(), scale)
    for name, out, near, true in zip(("out", "lse"), got, low, exact, strict=True):
        check(name, out, near, true)


def _dense(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The formula; statistics in fp32 or wider, as every backend has them."""
    wide = torch.promote_types(q.dtype, torch.float32)
    scores = (q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).to(wide) * scale
    lse = scores.logsumexp(dim=-1)
    weights = (scores - lse[..., None]).exp().to(v.dtype)
    return (weights @ v.transpose(1, 2)).transpose(1, 2), lse
