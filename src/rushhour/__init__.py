"""Rushhour finds, proves and runs the fastest way to serve a deep-learning model to a crowd.

The vocabulary is importable from here and costs nothing heavy; the verbs live in their own rooms:
`rushhour.train`, `rushhour.compress`, `rushhour.serve`, `rushhour.load`, `rushhour.tune`, `rushhour.report`.

What is named here is imported when it is first used: a program that serves must hear signals before that.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rushhour.bundle import Bundle
    from rushhour.clock import Clock, VirtualClock, WallClock
    from rushhour.errors import RushhourError
    from rushhour.goal import SLO, AccuracyBudget, Goal, Workload
    from rushhour.measurement import Measurement, Outcome
    from rushhour.plan import Plan, Policy, Variant
    from rushhour.task import Task

__all__ = [
    "SLO",
    "AccuracyBudget",
    "Bundle",
    "Clock",
    "Goal",
    "Measurement",
    "Outcome",
    "Plan",
    "Policy",
    "RushhourError",
    "Task",
    "Variant",
    "VirtualClock",
    "WallClock",
    "Workload",
]

_HOMES = {
    "SLO": "goal",
    "AccuracyBudget": "goal",
    "Bundle": "bundle",
    "Clock": "clock",
    "Goal": "goal",
    "Measurement": "measurement",
    "Outcome": "measurement",
    "Plan": "plan",
    "Policy": "plan",
    "RushhourError": "errors",
    "Task": "task",
    "Variant": "plan",
    "VirtualClock": "clock",
    "WallClock": "clock",
    "Workload": "goal",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
