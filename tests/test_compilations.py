"""No kernel compiles in mid-rollout, counted with Triton's own JIT: half a second to one each, with the GPU idle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("emulator.driver")  # which needs Triton
from .compilations import ROLLOUTS


def test_all_kernels_are_compiled_in_the_first_step() -> None:
    """None in a later step or prefill, in a rollout of other chunks, of another prompt, of more videos."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "-m", "tests.compilations"],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    compiled = json.loads(run.stdout)
    first_step, *rest = compiled["first"]
    kernels = {"_qk_norm_rope_append_kernel", "_far_attention_forward_kernel", "_flow_map_step_kernel"}
    assert kernels < set(first_step)
    assert rest == [[]] * (2 * len(ROLLOUTS["first"][0]) - 1)
    later = {name: calls for name, calls in compiled.items() if name != "first"}
    assert later == {name: [[]] * (2 * len(ROLLOUTS[name][0])) for name in later}
