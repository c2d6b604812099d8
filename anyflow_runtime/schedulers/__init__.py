"""Samplers: the drop-in for diffusers' flow-map scheduler, and the streaming schedulers that own their loop."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .base import FlowPredictor as FlowPredictor
    from .base import ScheduleError as ScheduleError
    from .base import Scheduler as Scheduler
    from .base import SchedulerConfig as SchedulerConfig
    from .euler_discrete import EulerDiscreteScheduler as EulerDiscreteScheduler
    from .euler_discrete import EulerDiscreteSchedulerConfig as EulerDiscreteSchedulerConfig
    from .flow_map_euler import FlowMapEulerDiscreteScheduler as FlowMapEulerDiscreteScheduler
    from .flow_map_euler import FlowMapEulerDiscreteSchedulerOutput as FlowMapEulerDiscreteSchedulerOutput
    from .flow_map_stream import FlowMapEulerScheduler as FlowMapEulerScheduler
    from .flow_map_stream import FlowMapEulerSchedulerConfig as FlowMapEulerSchedulerConfig
    from .flow_match import FlowMatchScheduler as FlowMatchScheduler
    from .flow_match import FlowMatchSchedulerConfig as FlowMatchSchedulerConfig
    from .unipc import FlowMatchUniPCScheduler as FlowMatchUniPCScheduler
    from .unipc import FlowMatchUniPCSchedulerConfig as FlowMatchUniPCSchedulerConfig

# Loaded on first use: `flow_map_euler` imports diffusers where it is installed, which takes a second.
_EXPORTS = {
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerDiscreteSchedulerConfig": "euler_discrete",
    "FlowMapEulerDiscreteScheduler": "flow_map_euler",
    "FlowMapEulerDiscreteSchedulerOutput": "flow_map_euler",
    "FlowMapEulerScheduler": "flow_map_stream",
    "FlowMapEulerSchedulerConfig": "flow_map_stream",
    "FlowMatchScheduler": "flow_match",
    "FlowMatchSchedulerConfig": "flow_match",
    "FlowMatchUniPCScheduler": "unipc",
    "FlowMatchUniPCSchedulerConfig": "unipc",
    "FlowPredictor": "base",
    "ScheduleError": "base",
    "Scheduler": "base",
    "SchedulerConfig": "base",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_EXPORTS[name]}", __name__), name)


def __dir__() -> list[str]:
    return __all__
