"""Numbers in words: one form for each kind of number, and words where a number is missing."""

from __future__ import annotations

import datetime
import math

from rushhour.measurement import Interval, Measurement, Outcome
from rushhour.plan import Policy, Relaxation
from rushhour.report.findings import Capacity

NOT_MEASURED = "not measured"
INSUFFICIENT = "insufficient samples"
ESTIMATED = "estimated, not proven"

_FEWEST_FOR_P99 = 299  # with fewer requests no order statistic bounds the 99th percentile at 95%

_MONTHS = (  # not by `strftime`, whose names depend on the machine's locale
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
)


def number(value: float, digits: int = 3) -> str:
    """A plain number with `digits` significant digits, thousands separated, with a typographic minus sign."""
    if value == 0:
        return "0"
    value = float(f"{value:.{digits - 1}e}")  # rounded first: 9.996 becomes 10.0, with one decimal less
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "\N{MINUS SIGN}")


def rate(rps: float | None) -> str:
    """Requests per second: `9,120/s`."""
    if rps is None:
        return NOT_MEASURED
    return f"{number(rps, max(3, len(str(int(abs(rps))))))}/s"


def milliseconds(value: float | None, missing: str = INSUFFICIENT) -> str:
    """A latency: `41.2 ms`; `missing` where there is none."""
    return missing if value is None else f"{number(value)} ms"


def duration(seconds: float) -> str:
    """`0.42 s`, `38 s`, `4 min 10 s`."""
    if seconds < 59.5:
        return f"{number(seconds, 2)} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes:,} min {rest} s" if rest else f"{minutes:,} min"


def share(value: float) -> str:
    """A share as a percentage: `3.2%`, `0.4%`."""
    return f"{number(100 * value, 2 if value >= 0.01 else 1)}%"


def capacity(found: Capacity) -> str:
    """A capacity; an estimate is named as such: `2,610/s, estimated, not proven (2,400 to 2,700)`."""
    if found.proven or not found.rps:
        return rate(found.rps)
    interval = "" if found.interval_rps is None else f" ({rates(found.interval_rps)})"
    return f"{rate(found.rps)}, {ESTIMATED}{interval}"


def estimated(found: Capacity) -> str:
    """The 95% interval of an estimate with its label: `2,400 to 2,700; estimated, not proven`."""
    return ESTIMATED if found.interval_rps is None else f"{rates(found.interval_rps)}; {ESTIMATED}"


def rates(interval: Interval) -> str:
    """An interval of rates: `2,400 to 2,700`; `at least 2,400` where it is a point, because nothing above was tried."""
    low, high = (rate(bound).removesuffix("/s") for bound in interval)
    return f"{low} to {high}" if low != high else f"at least {low}"


def gain(after: Capacity, before: Capacity) -> str:
    """How many times as much: `24×`; `about 24×` where one of them is an estimate; empty where either is 0."""
    times = factor(after.rps, before.rps)
    return times if (after.proven and before.proven) or not times else f"about {times}"


def percentile(value: float | None, interval: Interval | None, n: int | None) -> str:
    """A percentile of the latency with its interval and sample count: `41.2 ms (39.8 to 43.0, n = 6,000)`."""
    if value is None:
        return INSUFFICIENT
    known = [] if interval is None else [f"{number(interval[0])} to {number(interval[1])}"]
    if n is not None:
        known.append(f"n = {n:,}")
    return milliseconds(value) + (f" ({', '.join(known)})" if known else "")


def p99(window: Measurement) -> str:
    """The 99th percentile of a window of load with its interval and sample count, or why there is none."""
    if window.p99_ms is not None:
        return percentile(window.p99_ms, window.p99_interval_ms, window.n)
    if window.outcome is Outcome.UNSTABLE:
        return f"none: unstable (n = {window.n:,})"
    if window.n < _FEWEST_FOR_P99:
        return f"{INSUFFICIENT} (n = {window.n:,})"
    return f"none: over 1% unanswered (n = {window.n:,})"


def p99_of(found: Capacity) -> str:
    """The p99 at a capacity. At an estimate none was measured: that of the fastest window below it within the SLO."""
    if not found.rps:
        return "no rate within the SLO"
    if not found.proven:
        if found.window is None or found.window.p99_ms is None:
            return "not measured at that rate"
        return f"{milliseconds(found.window.p99_ms)} at {rate(found.window.rate_rps)} (n = {found.window.n:,})"
    if found.proof is not None and found.p99_ms in (None, found.proof.p99_ms):
        return p99(found.proof)
    return percentile(found.p99_ms, found.p99_interval_ms, None)


def speeds(window: Measurement) -> str:
    """The host's speed in a window: `median 1.02, 10th percentile 0.83`; empty where it is not known."""
    if window.speed is None or window.slow_speed is None:
        return ""
    return f"median {window.speed:.2f}, 10th percentile {window.slow_speed:.2f}"


def metric(value: float | None, name: str) -> str:
    """The task's metric: accuracy as `90.62%`, any other as a plain number."""
    if value is None:
        return NOT_MEASURED
    return f"{value * 100:.2f}%" if name == "accuracy" else number(value)


def metric_with_interval(value: float, interval: Interval, name: str) -> str:
    """The metric with its 95% interval: `90.62% (90.03 to 91.17)`."""
    low, high = (f"{bound * 100:.2f}" if name == "accuracy" else number(bound) for bound in interval)
    return f"{metric(value, name)} ({low} to {high})"


def drop(value: float | None, name: str, interval: Interval | None = None) -> str:
    """The drop of the metric: `0.42 points (0.05 to 0.80)`; negative where it rose."""
    if value is None:
        return NOT_MEASURED
    text = f"{_points(value, name)}{' points' if name == 'accuracy' else ''}"
    if interval is None:
        return text
    return f"{text} ({_points(interval[0], name)} to {_points(interval[1], name)})"


def factor(after: float | None, before: float | None) -> str:
    """The ratio of `after` to `before`: `24×`; empty where either is missing or zero."""
    if not after or not before:
        return ""
    times = after / before
    return f"{number(times, 2 if times < 10 else len(str(int(times))))}×"


def size(count: int) -> str:
    """Bytes in decimal units: `2.9 MB`."""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count} B"


def amount(count: int) -> str:
    """A large count: `2.79 million`."""
    for unit, scale in (("billion", 1e9), ("million", 1e6)):
        if count >= scale:
            return f"{number(count / scale)} {unit}"
    return f"{count:,}"


def relaxation(found: Relaxation) -> str:
    """What one change buys: `p99<75ms: 2,100/s, predicted`; `accuracy budget 2.3%: 5,000/s, predicted, by int8 ...`."""
    changed = f"accuracy budget {found.to}" if found.what == "accuracy" else found.to
    by = f", by {found.name}" if found.what == "accuracy" else ""
    return f"{changed}: {rate(found.capacity_rps)}, {found.kind}{by}"


def policy(value: Policy) -> str:
    """`2 streams × 1 thread, batches up to 32`."""
    cells = f"{value.cells} cells of " if value.cells > 1 else ""
    streams = f"{cells}{value.streams} stream{'s' if value.streams > 1 else ''}"
    threads = f"{value.threads} thread{'s' if value.threads > 1 else ''}"
    return f"{streams} × {threads}, {batches(value)}"


def batches(value: Policy) -> str:
    """`batches up to 32`."""
    return f"batches up to {value.max_batch}" if value.max_batch > 1 else "one at a time"


def when(at: str) -> str:
    """A time in ISO 8601 as `14 March 2026, 09:26 UTC`; any other text as it is."""
    try:
        time = datetime.datetime.fromisoformat(at)
    except ValueError:
        return at
    zone = f" {time.tzname()}" if time.tzinfo else ""
    return f"{time.day} {_MONTHS[time.month - 1]} {time:%Y, %H:%M}{zone}"


def _points(value: float, name: str) -> str:
    text = f"{value * 100:.2f}" if name == "accuracy" else number(value)
    return text.replace("-", "\N{MINUS SIGN}").replace("\N{MINUS SIGN}0.00", "0.00")
