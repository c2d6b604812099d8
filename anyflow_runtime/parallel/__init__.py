"""Several GPUs for one video: context parallelism through `torch.distributed`.

Every process holds all weights and a share of the tokens; only self-attention needs the others.
"""

from __future__ import annotations

from .context import ContextParallel, context_parallel
from .processes import process_group

__all__ = ["ContextParallel", "context_parallel", "process_group"]
