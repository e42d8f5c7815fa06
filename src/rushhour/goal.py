"""The goal of a tuning run: a latency limit (SLO), an accuracy budget and a workload.

All are small frozen values that are checked when they are built. Each reads and prints the text that a user writes.
"""

from __future__ import annotations

import re
from typing import Literal

import msgspec

from rushhour.errors import GoalError

_SLO = re.compile(r"p(?P<percentile>\d{1,2}(?:\.\d+)?)\s*<\s*(?P<limit>\d+(?:\.\d+)?)\s*(?P<unit>us|ms|s)")
_LONGEST_S = 1e9
_MOST_ROWS = 65_536
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0}


def _plain(value: float) -> str:
    """The number without an exponent and without rounding errors of binary fractions, so that it reads back equal."""
    return f"{value:.9f}".rstrip("0").rstrip(".")


class SLO(msgspec.Struct, frozen=True):
    """A percentile of the latency and its limit, e.g. `p99<50ms`.

    Latency runs from the scheduled arrival of a request to the last byte of its answer. Errors, time-outs and
    shed requests count as over the limit.

    Attributes:
        percentile: in (0, 100).
        limit_s: the limit, in seconds.
    """

    percentile: float
    limit_s: float

    def __post_init__(self) -> None:
        if not 0 < self.percentile < 100:
            raise GoalError(
                f"cannot use the percentile {self.percentile:g}",
                "a percentile is above 0 and below 100",
                "write for example p99<50ms",
            )
        if not 0 < self.limit_s <= _LONGEST_S:
            raise GoalError(
                f"cannot use the latency limit {self.limit_s:g} s",
                f"a limit is above 0 and at most {_LONGEST_S:g} s",
                "write for example p99<50ms",
            )

    @classmethod
    def parse(cls, text: str) -> SLO:
        """Read `p99<50ms`, `p99.9<0.2s`, `p50<800us`.

        Raises:
            GoalError: if the text is not of that form.
        """
        found = _SLO.fullmatch(text.strip().lower())
        if found is None:
            raise GoalError(
                f"cannot read the SLO {text!r}",
                "an SLO is a percentile, '<' and a time in us, ms or s",
                "write for example --slo 'p99<50ms' (in quotes, because the shell reads '<')",
            )
        return cls(
            percentile=float(found["percentile"]),
            limit_s=round(float(found["limit"]) * _SECONDS[found["unit"]], 9),
        )

    @property
    def limit_ms(self) -> float:
        """The limit in milliseconds."""
        return self.limit_s * 1e3

    @property
    def allowed_miss_rate(self) -> float:
        """The share of requests that may be late: 0.01 for p99."""
        return round(1 - self.percentile / 100, 9)

    def __str__(self) -> str:
        if self.limit_s >= 1:
            limit = f"{_plain(self.limit_s)}s"
        elif self.limit_s >= 1e-3:
            limit = f"{_plain(self.limit_s * 1e3)}ms"
        else:
            limit = f"{_plain(self.limit_s * 1e6)}us"
        return f"p{_plain(self.percentile)}<{limit}"


class AccuracyBudget(msgspec.Struct, frozen=True):
    """The most the task's metric may fall below the reference model's; `1%` is one percentage point, absolute.

    Attributes:
        max_drop: as a fraction of the metric's unit, so 0.01 for `1%`.
    """

    max_drop: float

    def __post_init__(self) -> None:
        if not 0 <= self.max_drop <= 1:
            raise GoalError(
                f"cannot use an accuracy budget of {self.max_drop:.4g}",
                "a budget is from 0% to 100%",
                "write for example --max-accuracy-drop 1%",
            )

    @classmethod
    def parse(cls, text: str) -> AccuracyBudget:
        """Read `1%`, `0.5%`, `0%`.

        Raises:
            GoalError: if the text is not a percentage.
        """
        found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
        if found is None:
            raise GoalError(
                f"cannot read the accuracy budget {text!r}",
                "a budget is a number of percentage points with its '%'",
                "write for example --max-accuracy-drop 1% (90% may become 89%)",
            )
        return cls(max_drop=round(float(found[1]) / 100, 9))

    def __str__(self) -> str:
        return f"{_plain(self.max_drop * 100)}%"


class Workload(msgspec.Struct, frozen=True):
    """How requests arrive, and what each one carries.

    Attributes:
        arrivals: the arrival process; Poisson stands for many independent users.
        rows: samples in one request.
    """

    arrivals: Literal["poisson"] = "poisson"
    rows: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.rows <= _MOST_ROWS:
            raise GoalError(
                f"cannot send requests of {self.rows} samples",
                f"a request carries 1 to {_MOST_ROWS:,}",
                "change `rows`",
            )


class Goal(msgspec.Struct, frozen=True):
    """What a plan has to achieve: the most requests per second within `slo` and `budget` under `workload`."""

    slo: SLO
    budget: AccuracyBudget = AccuracyBudget(max_drop=0.01)
    workload: Workload = Workload()
