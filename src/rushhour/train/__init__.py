"""Training: the loop, the parallel plan, and its execution on torch.distributed."""

from rushhour.train.cost import Constants
from rushhour.train.launch import launch
from rushhour.train.loop import TrainSettings, train
from rushhour.train.parallel import Parallel, Relaxed, parallelise
from rushhour.train.plan import ParallelPlan, plan_for

__all__ = [
    "Constants",
    "Parallel",
    "ParallelPlan",
    "Relaxed",
    "TrainSettings",
    "launch",
    "parallelise",
    "plan_for",
    "train",
]
