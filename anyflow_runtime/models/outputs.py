"""What the models return: an attribute, an index or a key gives the same tensor."""

from __future__ import annotations

import sys
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from torch import Tensor


@dataclass
class TransformerOutput:
    """The predicted average velocity, (B, F, C, H, W).

    Where diffusers' `Transformer2DModelOutput` is loaded, an instance is also one of those.
    """

    sample: Tensor

    def __getitem__(self, index: int | str | slice) -> Any:
        return getattr(self, index) if isinstance(index, str) else self.to_tuple()[index]

    def to_tuple(self) -> tuple[Any, ...]:
        """What is not None, in order."""
        values = (getattr(self, field.name) for field in fields(self))
        return tuple(value for value in values if value is not None)


@dataclass
class AnyFlowFARTransformerOutput(TransformerOutput):
    """The velocity of the newest chunk, None after a cache step, and the cache.

    Where diffusers' class of this name is loaded, an instance is also one of those.
    """

    sample: Tensor | None = None  # type: ignore[assignment]
    kv_cache: Any = None


# A caller who has one of these classes has loaded its module: diffusers is not imported for them, which takes seconds.
_THEIRS = {
    TransformerOutput: ("diffusers.models.modeling_outputs", "Transformer2DModelOutput"),
    AnyFlowFARTransformerOutput: (
        "diffusers.models.transformers.transformer_anyflow_far",
        "AnyFlowFARTransformerOutput",
    ),
}


def output(kind: Any, **values: Any) -> Any:
    """An instance of the class, and of diffusers' where that is loaded."""
    module, name = _THEIRS[kind]
    theirs = getattr(sys.modules.get(module), name, None)
    return (kind if theirs is None else _both(theirs, kind))(**values)


@cache
def _both(theirs: Any, ours: type) -> Any:
    return type(ours.__name__, (theirs, ours), {"__module__": __name__, "__doc__": theirs.__doc__})
