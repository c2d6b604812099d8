"""Samplers: the drop-in for diffusers' flow-map scheduler, and the streaming schedulers that own their loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from .base import FlowPredictor, ScheduleError, Scheduler, SchedulerConfig
from .euler_discrete import EulerDiscreteScheduler, EulerDiscreteSchedulerConfig
from .flow_map_stream import FlowMapEulerScheduler, FlowMapEulerSchedulerConfig
from .flow_match import FlowMatchScheduler, FlowMatchSchedulerConfig
from .unipc import FlowMatchUniPCScheduler, FlowMatchUniPCSchedulerConfig

if TYPE_CHECKING:
    from .flow_map_euler import FlowMapEulerDiscreteScheduler, FlowMapEulerDiscreteSchedulerOutput

__all__ = [
    "EulerDiscreteScheduler", "EulerDiscreteSchedulerConfig", "FlowMapEulerDiscreteScheduler",
    "FlowMapEulerDiscreteSchedulerOutput", "FlowMapEulerScheduler", "FlowMapEulerSchedulerConfig", "FlowMatchScheduler",
    "FlowMatchSchedulerConfig", "FlowMatchUniPCScheduler", "FlowMatchUniPCSchedulerConfig", "FlowPredictor",
    "ScheduleError", "Scheduler", "SchedulerConfig",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # `flow_map_euler` imports diffusers where it is installed, which takes a second.
    return getattr(importlib.import_module(".flow_map_euler", __name__), name)
