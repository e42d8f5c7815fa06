"""Arrival processes: whole schedules, made beforehand from a seed, so that a slow server does not delay its own load.

Every process is called as `arrivals(rate_rps, n=..., seed=...)` and gives the same arrivals for the same seed; a longer
schedule begins with the shorter one.
"""

from __future__ import annotations

import csv
import dataclasses
import datetime
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import LoadError

_MOST = 20_000_000
"""Arrivals in one schedule; more would take gigabytes, and no window needs them."""
_TIME_NAMES = ("timestamp", "time", "arrival", "at", "ts", "t")
_NOT_FINITE = ("nan", "inf", "infinity")
_KINDS = ("poisson", "constant", "bursty")


class Arrivals(Protocol):
    """An arrival process."""

    def __call__(
        self, rate_rps: float, *, n: int | None = None, duration_s: float | None = None, seed: int
    ) -> NDArray[np.float64]:
        """A schedule.

        Args:
            rate_rps: requests per second, on average.
            n: how many arrivals, or
            duration_s: for how long; exactly one of the two.
            seed: the same seed gives the same arrivals.

        Returns:
            Seconds from the start, ascending, shape `(n,)`.

        Raises:
            LoadError: if the rate, the number or the duration is not above zero, or the schedule would not fit in
                memory.
        """
        ...


def poisson(
    rate_rps: float, *, n: int | None = None, duration_s: float | None = None, seed: int
) -> NDArray[np.float64]:
    """Arrivals of many independent users (MLPerf LoadGen's Server scenario). See `Arrivals`."""

    def first(count: int) -> NDArray[np.float64]:
        return np.cumsum(np.random.default_rng(seed).exponential(1 / rate_rps, count))

    return _schedule(first, rate_rps, n, duration_s)


def constant(
    rate_rps: float, *, n: int | None = None, duration_s: float | None = None, seed: int
) -> NDArray[np.float64]:
    """One arrival every `1 / rate_rps` seconds; easier for a server than independent users. See `Arrivals`."""

    def first(count: int) -> NDArray[np.float64]:
        return np.arange(1, count + 1) / rate_rps

    return _schedule(first, rate_rps, n, duration_s)


@dataclasses.dataclass(frozen=True)
class Bursty:
    """A Poisson process that switches between a calm and a burst state (MMPP-2), each of exponentially distributed
    length. Its mean rate is the one asked for.

    Attributes:
        intensity: the rate in a burst over the rate in the calm state.
        share: of the time in bursts, between 0 and 1.
        burst_s: mean length of a burst.
    """

    intensity: float = 5.0
    share: float = 0.1
    burst_s: float = 0.5

    def __post_init__(self) -> None:
        if not (1 <= self.intensity < math.inf and 0 < self.share < 1 and 0 < self.burst_s < math.inf):
            raise LoadError(
                f"cannot make bursts of {self}",
                "intensity must be 1 or more, share between 0 and 1, burst_s above zero",
                "write for example bursty:intensity=5,share=0.1,burst_s=0.5",
            )

    def __call__(
        self, rate_rps: float, *, n: int | None = None, duration_s: float | None = None, seed: int
    ) -> NDArray[np.float64]:
        """See `Arrivals`."""
        calm_rps = rate_rps / (1 + self.share * (self.intensity - 1))
        calm_s = self.burst_s * (1 - self.share) / self.share

        def first(count: int) -> NDArray[np.float64]:
            # In a time that runs faster in bursts, arrivals are a plain Poisson process of rate 1.
            own = np.cumsum(np.random.default_rng([seed, 0]).exponential(1.0, count))
            begins_calm = int(np.random.default_rng([seed, 1]).random() >= self.share)
            states = 64
            while True:
                is_burst = (np.arange(states) + begins_calm) % 2 == 0
                lengths = np.random.default_rng([seed, 2]).exponential(1.0, states)
                lengths *= np.where(is_burst, self.burst_s, calm_s)
                wall_at = np.concatenate([[0.0], np.cumsum(lengths)])
                passed = lengths * np.where(is_burst, self.intensity * calm_rps, calm_rps)
                own_at = np.concatenate([[0.0], np.cumsum(passed)])
                if own_at[-1] >= own[-1]:
                    found: NDArray[np.float64] = np.interp(own, own_at, wall_at)
                    return found
                states *= 2

        return _schedule(first, rate_rps, n, duration_s)

    def __str__(self) -> str:
        return f"bursty:intensity={self.intensity:g},share={self.share:g},burst_s={self.burst_s:g}"


@dataclasses.dataclass(frozen=True, eq=False)
class Trace:
    """Recorded arrivals, scaled in time to the rate asked for, and repeated from the beginning after the end.

    A schedule with the whole trace starts at its beginning. In a shorter one the seed decides where it starts, so that
    different windows see different parts.

    Attributes:
        name: for people, usually the file name.
        gaps: seconds between an arrival and the one before, shape `(n,)`; the first is their mean.
    """

    name: str
    gaps: NDArray[np.float64]

    @property
    def rate_rps(self) -> float:
        """Of the recording, on average."""
        return len(self.gaps) / float(self.gaps.sum())

    def __call__(
        self, rate_rps: float, *, n: int | None = None, duration_s: float | None = None, seed: int
    ) -> NDArray[np.float64]:
        """See `Arrivals`."""

        def first(count: int) -> NDArray[np.float64]:
            start = 0 if count >= len(self.gaps) else int(np.random.default_rng(seed).integers(len(self.gaps)))
            return np.cumsum(self.gaps[(start + np.arange(count)) % len(self.gaps)]) * (self.rate_rps / rate_rps)

        return _schedule(first, rate_rps, n, duration_s)

    def __str__(self) -> str:
        return self.name


def read_arrivals(text: str) -> Arrivals:
    """The arrival process by name: `poisson`, `constant`, `bursty`, `bursty:intensity=8,share=0.05`, or the file of a
    recorded trace (`read_trace`).

    Raises:
        LoadError: if it is none of these.
    """
    kind, _, parameters = text.partition(":")
    if kind == "bursty":
        known = {field.name for field in dataclasses.fields(Bursty)}
        values: dict[str, float] = {}
        for part in filter(None, parameters.split(",")):
            name, _, value = part.partition("=")
            try:
                if name.strip() not in known:
                    raise ValueError
                values[name.strip()] = float(value)
            except ValueError:
                raise LoadError(
                    f"cannot read {part!r} in --arrivals {text}",
                    f"the parameters are {', '.join(sorted(known))}",
                    "write for example bursty:intensity=5,share=0.1,burst_s=0.5",
                ) from None
        return Bursty(**values)
    if text in ("poisson", "constant"):
        return poisson if text == "poisson" else constant
    path = Path(text)
    if not path.suffix and not path.exists():
        raise LoadError(
            f"there is no arrival process {text!r}",
            f"the processes are {', '.join(_KINDS)}, or a file of recorded times",
            "write for example --arrivals poisson",
        )
    return read_trace(path)


def read_trace(path: Path) -> Trace:
    """A recorded trace: one arrival a line, in seconds (from any zero) or in ISO 8601.

    Text and CSV have it in the column timestamp, time, arrival, at, ts or t, else in the first; JSONL (`.jsonl`,
    `.ndjson`) as a bare value or in a field of such a name. Blank lines and lines that begin with `#` are skipped, and
    arrivals are sorted.

    Raises:
        LoadError: if the file cannot be read, or has fewer than two arrivals at different times.
    """
    try:
        text = path.read_text("utf-8-sig")
    except OSError as error:
        raise _bad_trace(path, error.strerror or str(error)) from error
    except UnicodeDecodeError as error:
        raise _bad_trace(path, "it is not text") from error
    read = _json_lines if path.suffix in (".jsonl", ".ndjson") else _csv_rows
    try:
        times = np.sort(np.fromiter(read(path, text), np.float64))
    except csv.Error as error:
        raise _bad_trace(path, str(error)) from error
    if len(times) < 2 or times[-1] <= times[0]:
        raise _bad_trace(path, f"it has {len(times)} arrivals; at least two at different times are needed")
    gaps = np.diff(times)
    return Trace(path.name, np.concatenate([[gaps.mean()], gaps]))


def _csv_rows(path: Path, text: str) -> Iterator[float]:
    column, is_first = 0, True
    for number, row in enumerate(csv.reader(text.splitlines()), 1):
        cells = [cell.strip() for cell in row]
        if not any(cells) or cells[0].startswith("#"):
            continue
        if is_first:
            is_first = False
            names = [cell.lower() for cell in cells]
            named = [names.index(name) for name in _TIME_NAMES if name in names]
            if named or (_seconds(cells[0]) is None and cells[0][:1].isalpha() and names[0] not in _NOT_FINITE):
                column = named[0] if named else 0
                continue
        yield _arrival(path, number, cells[column] if column < len(cells) else "")


def _json_lines(path: Path, text: str) -> Iterator[float]:
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError):
            raise _bad_trace(path, f"line {number} is not JSON: {line[:40]!r}") from None
        if isinstance(value, dict):
            value = next((value[name] for name in _TIME_NAMES if name in value), "")
        yield _arrival(path, number, value)


def _arrival(path: Path, line: int, value: Any) -> float:
    seconds = _seconds(value)
    if seconds is None:
        raise _bad_trace(path, f"line {line} holds no time: {str(value)[:40]!r}")
    return seconds


def _seconds(value: Any) -> float | None:
    """A time as seconds or ISO 8601; None if it is neither."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        seconds = float(value)
    except (ValueError, OverflowError):
        try:
            seconds = datetime.datetime.fromisoformat(str(value)).timestamp()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) else None


def _bad_trace(path: Path, why: str) -> LoadError:
    return LoadError(
        f"cannot use the trace {path}", why, "use a text, CSV or JSONL file with one time in seconds per line"
    )


def _schedule(
    first: Callable[[int], NDArray[np.float64]], rate_rps: float, n: int | None, duration_s: float | None
) -> NDArray[np.float64]:
    """The first `n` arrivals of a process, or those within `duration_s`; `first` gives any number of first arrivals."""
    check_rate(rate_rps)
    if (n is None) == (duration_s is None):
        raise ValueError(f"give either n or duration_s, but got n={n} and duration_s={duration_s}")
    if n is not None:
        if n < 1:
            raise LoadError(f"cannot send {n} requests", "a load has at least one request", "use a larger number")
        _check_size(n)
        return first(n)
    assert duration_s is not None
    if not (math.isfinite(duration_s) and duration_s > 0):
        raise LoadError(f"cannot send requests for {duration_s:g} s", "a time is above zero", "use --duration 10s")
    expected = rate_rps * duration_s
    _check_size(expected)
    enough = math.ceil(expected + 10 * math.sqrt(expected) + 10)  # ten standard deviations above what is expected
    while True:
        arrivals = first(enough)
        if arrivals[-1] > duration_s:
            return arrivals[arrivals <= duration_s]
        enough *= 2


def check_rate(rate_rps: float) -> None:
    """Raise a `LoadError` unless the rate is finite and above zero."""
    if not (math.isfinite(rate_rps) and rate_rps > 0):
        raise LoadError(f"cannot send {rate_rps:g} requests per second", "a rate is above zero", "use --rate 100")


def _check_size(n: float) -> None:
    if n > _MOST:
        raise LoadError(
            f"cannot schedule {n:,.0f} requests",
            f"a window has at most {_MOST:,}",
            "use a lower rate or a shorter time",
        )
