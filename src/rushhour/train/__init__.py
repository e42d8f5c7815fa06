"""Training: from a network and data to a sealed bundle, on one worker or several."""

from rushhour.train.fingerprint import Fingerprint, fingerprint_of
from rushhour.train.job import TrainingJob
from rushhour.train.loop import Diverged
from rushhour.train.parallel import (
    Constants,
    ParallelNetwork,
    ParallelPlan,
    ParallelSettings,
    Relaxed,
    launch,
    parallelise,
    plan_for,
)
from rushhour.train.run import PARALLEL_PLAN
from rushhour.train.settings import TrainSettings
from rushhour.train.tracking import Tracking
from rushhour.train.training import bundle_at, step_seconds, train, trained_weights

__all__ = [
    "PARALLEL_PLAN",
    "Constants",
    "Diverged",
    "Fingerprint",
    "ParallelNetwork",
    "ParallelPlan",
    "ParallelSettings",
    "Relaxed",
    "Tracking",
    "TrainSettings",
    "TrainingJob",
    "bundle_at",
    "fingerprint_of",
    "launch",
    "parallelise",
    "plan_for",
    "step_seconds",
    "train",
    "trained_weights",
]
