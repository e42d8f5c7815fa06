"""Rushhour finds, proves and runs the fastest way to serve a deep-learning model to a crowd.

The vocabulary is importable from here and costs nothing heavy; the verbs live in their own rooms:
`rushhour.train`, `rushhour.compress`, `rushhour.serve`, `rushhour.load`, `rushhour.tune`, `rushhour.report`.
"""

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
