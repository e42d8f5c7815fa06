"""Training: the loop, the parallel plan, and its execution on torch.distributed."""

from rushhour.train.loop import step_seconds, train
from rushhour.train.parallel.cost import Constants
from rushhour.train.parallel.division import Division
from rushhour.train.parallel.launch import launch
from rushhour.train.parallel.network import Parallel, Relaxed, parallelise
from rushhour.train.parallel.plan import ParallelPlan, plan_for
from rushhour.train.settings import TrainSettings
from rushhour.train.tracking import Tracking

__all__ = [
    "Constants",
    "Division",
    "Parallel",
    "ParallelPlan",
    "Relaxed",
    "Tracking",
    "TrainSettings",
    "launch",
    "parallelise",
    "plan_for",
    "step_seconds",
    "train",
]
