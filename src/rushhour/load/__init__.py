"""Load: arrivals, the client that sends them, the verdict, and the search for capacity.

    discover, payloads    whom to load, and with what; `endpoint`, `body_payloads` for what is no server of models
    Generator             the process that sends
    measure               one window of open-loop load -> a Measurement with its verdict
    climb                 a ladder of closed loops: where to start a search
    estimate              the capacity that all windows tell together, proven or not
    find_capacity         the highest rate that passes, confirmed on a fresh seed
    closed_window         the same for a moment, in one figure
    closed_loop           what so many users that wait for their answers get
    race                  which of two servers carries more, in as few short windows in turn as that takes
    compare               several servers, interleaved on the same arrivals, as ratios with intervals
    search_capacity       all of it: closed loops, the way to the limit, the proof

Below them: `poisson`, `constant`, `Bursty` and `Trace` make schedules, `judge` turns samples into a verdict.
"""

from rushhour.load.arrivals import Arrivals, Bursty, Trace, constant, poisson, read_arrivals, read_trace
from rushhour.load.contest import Comparison, Ratio, Window, compare
from rushhour.load.declared import Interface, Shape, read_shapes
from rushhour.load.estimate import Estimate, estimate
from rushhour.load.generator.closed import ClosedResult, closed_loop
from rushhour.load.generator.job import ClosedJob, OpenJob, Tick
from rushhour.load.generator.null import null_server, null_throughput
from rushhour.load.generator.process import Generator
from rushhour.load.generator.samples import Samples, Status
from rushhour.load.payload import Payload, body_payloads, folder_payloads, payloads, read_bodies
from rushhour.load.race import Race, race
from rushhour.load.search import (
    Probe,
    Search,
    Sender,
    climb,
    closed_window,
    find_capacity,
    glance_n,
    look_sizes,
    measure,
    rounded,
    search_capacity,
    why_longer,
    window_n,
)
from rushhour.load.target import Endpoint, Target, discover, endpoint
from rushhour.load.verdict import Look, decide, judge, needed_n, percentile_ranks, variance_inflation
from rushhour.measurement import Rung

__all__ = [
    "Arrivals",
    "Bursty",
    "ClosedJob",
    "ClosedResult",
    "Comparison",
    "Endpoint",
    "Estimate",
    "Generator",
    "Interface",
    "Look",
    "OpenJob",
    "Payload",
    "Probe",
    "Race",
    "Ratio",
    "Rung",
    "Samples",
    "Search",
    "Sender",
    "Shape",
    "Status",
    "Target",
    "Tick",
    "Trace",
    "Window",
    "body_payloads",
    "climb",
    "closed_loop",
    "closed_window",
    "compare",
    "constant",
    "decide",
    "discover",
    "endpoint",
    "estimate",
    "find_capacity",
    "folder_payloads",
    "glance_n",
    "judge",
    "look_sizes",
    "measure",
    "needed_n",
    "null_server",
    "null_throughput",
    "payloads",
    "percentile_ranks",
    "poisson",
    "race",
    "read_arrivals",
    "read_bodies",
    "read_shapes",
    "read_trace",
    "rounded",
    "search_capacity",
    "variance_inflation",
    "why_longer",
    "window_n",
]
