"""Launch parameters per GPU: frozen rows with named fields, each with the reason for it.

A new GPU is a `Gpu` and new rows, a better measurement a changed one; no kernel holds a tile size of its own.
"compiled" in a reason means seen with `python -m anyflow_kernels.aot`, "model" its pipe model, "timed" a result under
`bench/results/`. No row has been timed on a GPU yet. A launch gives its dtype as well: what `anyflow tune` found
fastest on the card (`tuned`) then takes the place of the row.
"""

from . import attention, gpus, rows
from .attention import *  # noqa: F403
from .gpus import *  # noqa: F403
from .rows import *  # noqa: F403

__all__ = [*gpus.__all__, *attention.__all__, *rows.__all__]
