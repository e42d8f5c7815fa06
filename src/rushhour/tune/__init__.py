"""The joint search: candidates in, a Plan out. `tune_run` does a whole run, `tune` the search alone."""

from rushhour.tune.run import tune_run
from rushhour.tune.settings import TuneSettings
from rushhour.tune.tune import tune

__all__ = ["TuneSettings", "tune", "tune_run"]
