"""A comparison of servers: interleaved windows on the same arrivals, as ratios with confidence intervals.

Windows come in blocks of one for each server, in alternating order (A B, B A), so that a drift of the machine favours
no server; all windows of a block have the same arrivals. Each block gives one ratio for each server against the first,
and the logarithms of these give an interval by Student's t. A disturbance of a whole block cancels in its ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.load.significance import t_quantile
from rushhour.measurement import Interval, Measurement, Outcome

Metric = Literal["p50_ms", "p99_ms", "answered_rps"]
METRICS: tuple[Metric, ...] = ("p50_ms", "p99_ms", "answered_rps")

_DISTURBED = (Outcome.VOID, Outcome.GENERATOR_LIMITED)
_RETRIES = 3
_FEWEST_PAIRS = 2

MeasureServer = Callable[[str, float, int], Measurement]
"""Measures one window of a server, by its name, the rate and the seed."""


class Window(msgspec.Struct, frozen=True):
    """One window of one server.

    Attributes:
        block: windows of the same block had the same arrivals.
        counted: whether it is part of the ratios; disturbed blocks are not.
    """

    server: str
    block: int
    counted: bool
    measurement: Measurement


class Ratio(msgspec.Struct, frozen=True):
    """One server against the first, in one metric at one rate.

    Attributes:
        ratio: geometric mean over the blocks, None where no block gave both values.
        interval: its 95% interval, None where fewer than two blocks did.
        pairs: blocks that gave both values.
        of_blocks: all blocks.
    """

    server: str
    against: str
    rate_rps: float
    metric: Metric
    ratio: float | None
    interval: Interval | None
    pairs: int
    of_blocks: int

    @property
    def differs(self) -> bool:
        """Whether the difference is significant."""
        return self.interval is not None and not self.interval[0] <= 1 <= self.interval[1]


class Comparison(msgspec.Struct, frozen=True):
    """Servers compared.

    Attributes:
        servers: their names; the others are compared with the first.
        ratios: of each other server, at each rate, in each metric.
        windows: all that were measured, in order.
        retries: blocks that were repeated because the machine was disturbed or the generator at its limit.
    """

    slo: SLO
    servers: tuple[str, ...]
    rates: tuple[float, ...]
    ratios: tuple[Ratio, ...]
    windows: tuple[Window, ...]
    retries: int


def compare(
    measure: MeasureServer,
    servers: Sequence[str],
    slo: SLO,
    *,
    rates: Sequence[float],
    blocks: int = 6,
    seed: int = 0,
    on_window: Callable[[Window], None] | None = None,
) -> Comparison:
    """Compare servers at the given rates.

    Args:
        measure: measures a window: `rushhour.load.measure` with its server and requests filled in.
        servers: two or more different names.
        slo: of the verdicts.
        rates: requests per second, each in its own blocks.
        blocks: at each rate; an even number gives both orders the same weight.
        seed: all arrivals are made from it.
        on_window: receives each window. `counted` is provisional there: the rest of its block may yet be disturbed.

    Raises:
        LoadError: if there is nothing to compare, or as `measure` does.
    """
    if len(servers) < 2 or len(set(servers)) != len(servers):
        raise LoadError(
            f"cannot compare {', '.join(servers) or 'nothing'}",
            "a comparison needs two or more different servers",
            "give their URLs",
        )
    if not rates or blocks < _FEWEST_PAIRS:
        raise LoadError(
            f"cannot compare at {len(rates)} rates in {blocks} blocks",
            f"a comparison needs at least one rate, and {_FEWEST_PAIRS} blocks for an interval",
            "use for example --rate 200 --blocks 6",
        )
    windows: list[Window] = []
    retries = block = 0
    for rate in rates:
        done = repeated = 0
        while done < blocks:
            order = servers if done % 2 == 0 else servers[::-1]
            taken = []
            for server in order:
                measurement = measure(server, rate, seed * 1000 + block)
                taken.append(Window(server, block, measurement.outcome not in _DISTURBED, measurement))
                if on_window is not None:
                    on_window(taken[-1])
            is_counted = all(window.counted for window in taken)
            windows += [msgspec.structs.replace(window, counted=is_counted) for window in taken]
            block += 1
            if not is_counted and repeated < _RETRIES:
                repeated += 1
                retries += 1
                continue
            done += 1
    return summarize(slo, tuple(servers), tuple(rates), windows, retries)


def summarize(
    slo: SLO, servers: tuple[str, ...], rates: tuple[float, ...], windows: Sequence[Window], retries: int = 0
) -> Comparison:
    """The comparison from its windows, also where it was interrupted within a block."""
    ratios = [
        _ratio(server, servers[0], rate, metric, windows)
        for rate in rates
        for server in servers[1:]
        for metric in METRICS
    ]
    return Comparison(slo, servers, rates, tuple(ratios), tuple(windows), retries)


def _ratio(server: str, against: str, rate_rps: float, metric: Metric, windows: Sequence[Window]) -> Ratio:
    values: dict[str, dict[int, float]] = {server: {}, against: {}}
    of_rate = [window for window in windows if window.measurement.rate_rps == rate_rps]
    for window in of_rate:
        value = _value(window.measurement, metric)
        if window.server in values and window.counted and value:
            values[window.server][window.block] = value
    logs = [
        math.log(value / values[against][block]) for block, value in values[server].items() if block in values[against]
    ]
    interval = None
    if len(logs) >= _FEWEST_PAIRS:
        mean, error = statistics.fmean(logs), statistics.stdev(logs) / math.sqrt(len(logs))
        half = t_quantile(0.975, len(logs) - 1) * error
        interval = (math.exp(mean - half), math.exp(mean + half))
    return Ratio(
        server=server,
        against=against,
        rate_rps=rate_rps,
        metric=metric,
        ratio=math.exp(statistics.fmean(logs)) if logs else None,
        interval=interval,
        pairs=len(logs),
        of_blocks=len({window.block for window in of_rate}),
    )


def _value(window: Measurement, metric: Metric) -> float | None:
    if metric == "p50_ms":
        return window.p50_ms
    if metric == "p99_ms":
        return window.p99_ms
    return (window.n - window.errors - window.shed) / window.duration_s
