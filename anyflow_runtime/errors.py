"""Errors of the streaming runtime, notes on them, and the check that finds the first value that is not finite."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class LifecycleError(ValueError, AssertionError):
    """A call out of order: wrong chunk index, a missing or unexpected input, finalizing twice.

    Also an AssertionError, which is what programs written for other streaming runtimes catch here. It is raised before
    any work, so the cache stays usable.
    """


class NonFiniteError(ValueError):
    """A NaN or an infinity, with the name of the weight or latent that holds it."""


def check_finite(name: str, x: Tensor) -> None:
    """Raise NonFiniteError, naming the tensor and its first bad position, unless every value is finite.

    Reads the tensor once and waits for the device.
    """
    if not x.is_floating_point() or bool(torch.isfinite(x).all()):
        return
    bad = ~torch.isfinite(x)
    position = tuple(bad.nonzero()[0].tolist())
    nans = int(torch.isnan(x).sum())
    infinities = int(bad.sum()) - nans
    raise NonFiniteError(
        f"{name}: {nans} NaN and {infinities} infinite of {x.numel()} values, the first at {position} "
        f"of shape {tuple(x.shape)}"
    )


def check_finite_weights(name: str, module: nn.Module) -> None:
    """`check_finite` on every parameter of a module, in order; the parameter's full name is in the error."""
    for parameter_name, parameter in module.named_parameters():
        if not parameter.is_meta:
            check_finite(f"weight {name}.{parameter_name}", parameter.detach())


@contextmanager
def noting(note: str) -> Iterator[None]:
    """Add a note (PEP 678) to an error the block raises, such as what was being done; its type and text stay."""
    try:
        yield
    except Exception as error:
        # As `add_note` does, which Python 3.10 lacks.
        vars(error)["__notes__"] = [*getattr(error, "__notes__", ()), note]
        raise
