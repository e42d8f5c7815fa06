"""Load testing: arrivals, the generator that sends them, the verdict, and the search for a capacity.

    discover, payloads    the server to load, and the requests; `endpoint`, `body_payloads` for any other HTTP server
    Generator             the process that sends
    measure               one window of open-loop load, as a Measurement with its verdict
    closed_window         a short closed loop, as throughput and mean latency
    ramp_concurrency      closed loops of growing concurrency: where a search starts
    closed_loop           what a number of users that wait for their answers measure
    estimate              the capacity by all windows, proven or not
    find_capacity         the highest rate that passes, confirmed on a fresh seed
    search_capacity       all of it: closed loops, bracket, bisection, proof
    race                  which of two servers has the higher throughput, in as few short windows as that takes
    compare               several servers, interleaved on the same arrivals, as ratios with intervals

Below them: `poisson`, `constant`, `Bursty` and `Trace` make schedules, `judge` turns samples into a verdict.
"""

from rushhour.load.arrivals import Arrivals, Bursty, Trace, constant, poisson, read_arrivals, read_trace
from rushhour.load.closed import ClosedResult, closed_loop, closed_window, ramp_concurrency
from rushhour.load.comparison import Comparison, Ratio, Window, compare, summarize
from rushhour.load.estimate import Estimate, estimate
from rushhour.load.generator.job import ClosedJob, OpenJob, Tick
from rushhour.load.generator.null import null_server, null_throughput
from rushhour.load.generator.process import Generator, Sender
from rushhour.load.generator.samples import Samples, Status
from rushhour.load.payload import Payload, body_payloads, folder_payloads, payloads, read_bodies
from rushhour.load.race import Race, race
from rushhour.load.search import Search, find_capacity, rounded, search_capacity
from rushhour.load.significance import needed_n, percentile_ranks, t_quantile
from rushhour.load.target import Endpoint, Interface, Shape, Target, discover, endpoint, is_cascade, read_shapes
from rushhour.load.verdict import InterimAnalysis, decide, judge, variance_inflation
from rushhour.load.window import Probe, measure
from rushhour.load.window_size import interim_sizes, search_window_n, why_longer, window_n
from rushhour.measurement import ClosedLoop

__all__ = [
    "Arrivals",
    "Bursty",
    "ClosedJob",
    "ClosedLoop",
    "ClosedResult",
    "Comparison",
    "Endpoint",
    "Estimate",
    "Generator",
    "Interface",
    "InterimAnalysis",
    "OpenJob",
    "Payload",
    "Probe",
    "Race",
    "Ratio",
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
    "interim_sizes",
    "is_cascade",
    "judge",
    "measure",
    "needed_n",
    "null_server",
    "null_throughput",
    "payloads",
    "percentile_ranks",
    "poisson",
    "race",
    "ramp_concurrency",
    "read_arrivals",
    "read_bodies",
    "read_shapes",
    "read_trace",
    "rounded",
    "search_capacity",
    "search_window_n",
    "summarize",
    "t_quantile",
    "variance_inflation",
    "why_longer",
    "window_n",
]
