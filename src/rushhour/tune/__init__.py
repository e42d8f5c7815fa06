"""Tuning: candidates in, a Plan out. `tune_run` does a whole run in a folder, `tune` the search alone.

A candidate is a bundle on an engine, at a precision, with a policy (`space.py`). The search times, validates, predicts,
races and confirms candidates (`search.py`), and every measurement is in the run's journal, so that it resumes after a
kill.
"""

from rushhour.tune.run import tune_run
from rushhour.tune.search import tune
from rushhour.tune.settings import TuneSettings

__all__ = ["TuneSettings", "tune", "tune_run"]
