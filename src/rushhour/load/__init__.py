"""Load: arrivals, the client that sends them, the verdict, and the search for capacity.

    discover, payloads    whom to load, and with what
    Generator             the process that sends
    measure               one window of open-loop load -> a Measurement with its verdict
    estimate_throughput   a closed loop's answer, to start a search from
    find_capacity         the highest rate that passes, confirmed on a fresh seed
    search_capacity       all of it: closed loops, the way to the limit, the proof

Below them: `poisson` makes schedules, `judge` turns samples into a verdict.
"""

from rushhour.load.arrivals import poisson
from rushhour.load.generator import Generator
from rushhour.load.job import ClosedJob, OpenJob, Tick
from rushhour.load.null import null_server, null_throughput
from rushhour.load.samples import Samples, Status
from rushhour.load.search import (
    Probe,
    Rung,
    Search,
    Sender,
    climb,
    estimate_throughput,
    find_capacity,
    look_sizes,
    measure,
    search_capacity,
    window_n,
)
from rushhour.load.target import Payload, Target, discover, payloads
from rushhour.load.verdict import Look, decide, judge, needed_n, percentile_ranks, variance_inflation

__all__ = [
    "ClosedJob",
    "Generator",
    "Look",
    "OpenJob",
    "Payload",
    "Probe",
    "Rung",
    "Samples",
    "Search",
    "Sender",
    "Status",
    "Target",
    "Tick",
    "climb",
    "decide",
    "discover",
    "estimate_throughput",
    "find_capacity",
    "judge",
    "look_sizes",
    "measure",
    "needed_n",
    "null_server",
    "null_throughput",
    "payloads",
    "percentile_ranks",
    "poisson",
    "search_capacity",
    "variance_inflation",
    "window_n",
]
