"""`python -m tests.compilations`: the kernels that Triton compiles in each rollout of a small model, as JSON.

The JIT is the real one, over a driver whose launches do nothing. It needs a process of its own, without
TRITON_INTERPRET.
"""

from __future__ import annotations

import json
from typing import Any

import torch

from anyflow_kernels.launch_configs import emulate
from emulator.driver import Driver

# Of 24 tokens a frame 1 and 3 frames are no multiple of 16 tokens and 2 are: as with the 1560 of the released models.
HEIGHT, WIDTH = 8, 12
ROLLOUTS: dict[str, tuple[tuple[int, ...], int, int]] = {  # frames per chunk, prompt tokens, batch
    "first": ((1, 3, 3, 2), 5, 1),
    "of the same shape": ((1, 3, 3, 2), 5, 1),
    "of other chunks": ((2, 5, 1, 4), 5, 1),
    "of another prompt": ((1, 3), 16, 1),
    "of two videos": ((1, 3), 5, 2),
}


@torch.no_grad()
def main() -> None:
    """Print for every rollout the names of the kernels compiled in each call: steps and prefills in turn."""
    driver = Driver(90, lambda launch: None)
    driver.activate()
    emulate(driver.arch)
    from anyflow_runtime import AnyFlowFARTransformer3DModel

    from .tiny import TINY

    torch.set_default_dtype(torch.bfloat16)
    model = AnyFlowFARTransformer3DModel(**(TINY | {"num_layers": 1}), backend="triton").eval().requires_grad_(False)
    torch.set_default_dtype(torch.float32)
    print(json.dumps({name: calls(driver, model, *shape) for name, shape in ROLLOUTS.items()}))


def calls(driver: Driver, model: Any, partition: tuple[int, ...], tokens: int, batch: int) -> list[list[str]]:
    """The kernels compiled in each step and prefill of a rollout."""
    from anyflow_runtime import FarCache

    compiled: list[list[str]] = []
    cache = FarCache.for_model(model, partition, HEIGHT, WIDTH, batch)
    text = torch.zeros(batch, tokens, model.config.text_dim, dtype=model.dtype)
    chunks: list[torch.Tensor] = []
    for i, frames in enumerate(partition):
        begin = len(driver.compiled)
        x = torch.zeros(batch, frames, model.config.in_channels, HEIGHT, WIDTH, dtype=model.dtype)
        t, r = (torch.full((batch, frames), time) for time in (1000.0, 0.0))
        u = model(x, t, r, text, partition[: i + 1], kv_cache=cache).sample
        chunks.append(model.ops.flow_map_step(x, u, 1.0, 0.0))
        compiled.append([kernel.name for kernel in driver.compiled[begin:]])
        begin = len(driver.compiled)
        if i + 1 < len(partition):
            model.prefill(cache, chunks, partition[: i + 1], text)
        compiled.append([kernel.name for kernel in driver.compiled[begin:]])
    return compiled


if __name__ == "__main__":
    main()
