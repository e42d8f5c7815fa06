"""Trials of a search on a Ray cluster: its nodes build bundles, and this machine measures them.

Importing it needs the extra `cluster` for nothing; using it does.
"""

from rushhour.cluster.trials.building import AUTO, RayBuilder, trial_builder
from rushhour.cluster.trials.packing import Loader

__all__ = ["AUTO", "Loader", "RayBuilder", "trial_builder"]
