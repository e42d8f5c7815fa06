"""Training on several workers: the parallel plan, its cost, the network that it divides, and the worker processes.

Nothing here knows of the training loop, its checkpoints or its data feed: `rushhour.train` does.
"""

from rushhour.train.parallel.broadcast import run_on_leader
from rushhour.train.parallel.choice import choose_plan
from rushhour.train.parallel.cost import Constants, Layer
from rushhour.train.parallel.launch import launch, under_torchrun
from rushhour.train.parallel.layer_table import with_lookups
from rushhour.train.parallel.network import ParallelNetwork, parallelise
from rushhour.train.parallel.plan import ParallelPlan
from rushhour.train.parallel.planner import plan_for
from rushhour.train.parallel.position import record_layers, record_step
from rushhour.train.parallel.settings import (
    Backend,
    BatchNorm,
    GradientCompression,
    Mode,
    ParallelSettings,
    Relaxed,
)
from rushhour.train.parallel.workers import run_on_workers

__all__ = [
    "Backend",
    "BatchNorm",
    "Constants",
    "GradientCompression",
    "Layer",
    "Mode",
    "ParallelNetwork",
    "ParallelPlan",
    "ParallelSettings",
    "Relaxed",
    "choose_plan",
    "launch",
    "parallelise",
    "plan_for",
    "record_layers",
    "record_step",
    "run_on_leader",
    "run_on_workers",
    "under_torchrun",
    "with_lookups",
]
