"""Servers compared: interleaved windows on the same arrivals, and what is left of their differences after the noise.

Windows come in blocks of one for each server, in turn forwards and backwards (A B, B A), so that a machine that drifts
favours nobody; all windows of a block have the same arrivals. Each block gives one ratio for each server against the
first, and the logarithms of these give an interval by Student's t. What disturbs a whole block cancels in its ratio.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Literal

import msgspec

from rushhour.errors import LoadError
from rushhour.goal import SLO
from rushhour.measurement import Interval, Measurement, Outcome

Metric = Literal["p50_ms", "p99_ms", "answered_rps"]
METRICS: tuple[Metric, ...] = ("p50_ms", "p99_ms", "answered_rps")

_DISTURBED = (Outcome.VOID, Outcome.GENERATOR_LIMITED)
_RETRIES = 3
_FEWEST_PAIRS = 2

Ask = Callable[[str, float, int], Measurement]
"""Measures one window of a server, asked for by its name, its rate and its seed."""


class Window(msgspec.Struct, frozen=True):
    """One window of one server.

    Attributes:
        block: windows of the same block had the same arrivals.
        counted: whether it is part of the ratios; blocks that were disturbed are not.
    """

    server: str
    block: int
    counted: bool
    measurement: Measurement


class Ratio(msgspec.Struct, frozen=True):
    """One server against the first, in one figure at one rate.

    Attributes:
        ratio: geometric mean over the blocks, None where no block gave both figures.
        interval: its 95% interval, None where fewer than two blocks did.
        pairs: blocks that did.
        of_blocks: blocks there were.
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
        """Whether the two are shown to differ."""
        return self.interval is not None and not self.interval[0] <= 1 <= self.interval[1]


class Comparison(msgspec.Struct, frozen=True):
    """Servers compared.

    Attributes:
        servers: their names; the first is what the others are compared with.
        ratios: of each other server, at each rate, in each figure.
        windows: all that was measured, in the order asked.
        retries: blocks that were asked again because the machine was disturbed or the generator at its limit.
    """

    slo: SLO
    servers: tuple[str, ...]
    rates: tuple[float, ...]
    ratios: tuple[Ratio, ...]
    windows: tuple[Window, ...]
    retries: int


def compare(
    ask: Ask,
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
        ask: measures a window; `measure` with its server and requests filled in.
        servers: two or more different names.
        slo: what windows are judged by.
        rates: requests per second, each in its own blocks.
        blocks: at each rate; an even number gives every order the same weight.
        seed: all arrivals are made from it.
        on_window: is told each window. `counted` is provisional there: the rest of its block may yet be disturbed.

    Raises:
        LoadError: if there is nothing to compare, or as `ask` does.
    """
    if len(servers) < 2 or len(set(servers)) != len(servers):
        raise LoadError(
            f"cannot compare {', '.join(servers) or 'nothing'}", "it takes two or more different servers", "name them"
        )
    if not rates or blocks < _FEWEST_PAIRS:
        raise LoadError(
            f"cannot compare at {len(rates)} rates in {blocks} blocks",
            f"it takes one rate or more, and {_FEWEST_PAIRS} blocks or more for an interval",
            "use for example --rate 200 --blocks 6",
        )
    windows: list[Window] = []
    retries = block = 0
    for rate in rates:
        done = tried_again = 0
        while done < blocks:
            order = servers if done % 2 == 0 else servers[::-1]
            taken = []
            for server in order:
                measurement = ask(server, rate, seed * 1000 + block)
                taken.append(Window(server, block, measurement.outcome not in _DISTURBED, measurement))
                if on_window is not None:
                    on_window(taken[-1])
            is_counted = all(window.counted for window in taken)
            windows += [msgspec.structs.replace(window, counted=is_counted) for window in taken]
            block += 1
            if not is_counted and tried_again < _RETRIES:
                tried_again += 1
                retries += 1
                continue
            done += 1
    return summed_up(slo, tuple(servers), tuple(rates), windows, retries)


def summed_up(
    slo: SLO, servers: tuple[str, ...], rates: tuple[float, ...], windows: Sequence[Window], retries: int = 0
) -> Comparison:
    """The ratios of windows, whole blocks or not: of a comparison that was broken off, too."""
    ratios = [
        _ratio(server, servers[0], rate, metric, windows)
        for rate in rates
        for server in servers[1:]
        for metric in METRICS
    ]
    return Comparison(slo, servers, rates, tuple(ratios), tuple(windows), retries)


def _ratio(server: str, against: str, rate_rps: float, metric: Metric, windows: Sequence[Window]) -> Ratio:
    figures: dict[str, dict[int, float]] = {server: {}, against: {}}
    of_rate = [window for window in windows if window.measurement.rate_rps == rate_rps]
    for window in of_rate:
        value = _figure(window.measurement, metric)
        if window.server in figures and window.counted and value:
            figures[window.server][window.block] = value
    logs = [
        math.log(value / figures[against][block])
        for block, value in figures[server].items()
        if block in figures[against]
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


def _figure(window: Measurement, metric: Metric) -> float | None:
    if metric == "p50_ms":
        return window.p50_ms
    if metric == "p99_ms":
        return window.p99_ms
    return (window.n - window.errors - window.shed) / window.duration_s


def t_quantile(p: float, freedom: int) -> float:
    """The quantile of Student's t for p above one half: by bisection of its distribution, Simpson's rule inside."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def beyond_middle(t: float) -> float:
        # With t = sqrt(freedom) tan(a) the density becomes a power of a cosine, smooth for all degrees of freedom.
        end, steps = math.atan(t / math.sqrt(freedom)), 200
        at = [math.cos(end * i / steps) ** (freedom - 1) for i in range(steps + 1)]
        simpson = at[0] + at[-1] + 4 * sum(at[1:-1:2]) + 2 * sum(at[2:-1:2])
        return scale * math.sqrt(freedom) * simpson * end / steps / 3

    low, high = 0.0, 1e3
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if beyond_middle(middle) < p - 0.5 else (low, middle)
    return high
