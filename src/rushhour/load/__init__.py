"""Load: arrivals, the client that sends them, the verdict, and the search for capacity.

    discover, payloads    whom to load, and with what
    Generator             the process that sends
    measure               one window of open-loop load -> a Measurement with its verdict
    estimate_throughput   a closed loop's answer, to start a search from
    find_capacity         the highest rate that passes, confirmed on a fresh seed

Below them: `poisson` makes schedules, `judge` turns samples into a verdict.
"""

from rushhour.load.arrivals import poisson
from rushhour.load.generator import Generator
from rushhour.load.job import ClosedJob, OpenJob, Tick
from rushhour.load.samples import Samples, Status
from rushhour.load.search import Probe, Search, estimate_throughput, find_capacity, measure, window_n
from rushhour.load.target import Payload, Target, discover, payloads
from rushhour.load.verdict import judge, needed_n, percentile_ranks, variance_inflation

__all__ = [
    "ClosedJob",
    "Generator",
    "OpenJob",
    "Payload",
    "Probe",
    "Samples",
    "Search",
    "Status",
    "Target",
    "Tick",
    "discover",
    "estimate_throughput",
    "find_capacity",
    "judge",
    "measure",
    "needed_n",
    "payloads",
    "percentile_ranks",
    "poisson",
    "variance_inflation",
    "window_n",
]
