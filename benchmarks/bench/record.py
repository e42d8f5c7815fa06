"""The record of a benchmark: `results/NAME.json`, one check for each claim."""

from __future__ import annotations

import datetime
import math
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import ArrayLike

from rushhour.system.machine import describe
from rushhour.system.storage import write_whole

_RESAMPLES = 10_000
_FEWEST = 3
_ROOT = Path(__file__).resolve().parents[2]


class Check(msgspec.Struct, frozen=True, omit_defaults=True):
    """One claim, and whether the measurement supports it.

    Attributes:
        id: of the line it answers to: `1.cnn.triton`.
        what: in words.
        unit: of value, interval and target; `x` for a ratio.
        target: `>= 2` or `<= 1.05`.
        value: None where it could not be measured.
        interval: 95%.
        n: how many measurements (rounds, windows) it rests on.
        holds: the target is met, by the whole interval where there is one.
        why: it does not hold, or what else must be known.
    """

    id: str
    what: str
    unit: str
    target: str
    value: float | None
    interval: tuple[float, float] | None
    n: int
    holds: bool
    why: str | None = None


class Table(msgspec.Struct, frozen=True):
    """Figures beside the checks. `rows` are as long as `columns`; numbers are formatted when rendered."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str | float | None, ...], ...]
    note: str = ""


class Record(msgspec.Struct, frozen=True):
    """The whole file.

    Attributes:
        machine: processor, cores, memory, system.
        versions: package -> version, the peers' among them.
        commit: that was measured; `+` where the work tree held changes.
        seeds: of all that was random.
        data: `tables` to be shown, and every single measurement.
    """

    machine: dict[str, Any]
    versions: dict[str, str]
    date: str
    commit: str
    seeds: dict[str, int]
    checks: tuple[Check, ...]
    data: dict[str, Any]

    def save(self, path: Path) -> None:
        """Write it, whole or not at all."""
        write_whole(path, msgspec.json.format(msgspec.json.encode(self), indent=1) + b"\n")

    @classmethod
    def load(cls, path: Path) -> Record:
        """Read it, and check its form."""
        return msgspec.json.decode(path.read_bytes(), type=cls)


def record(
    checks: Sequence[Check], data: Mapping[str, Any], seeds: Mapping[str, int], versions: Mapping[str, str]
) -> Record:
    """The record of a run that ends now, on this machine.

    Args:
        checks: in order.
        data: further figures.
        seeds: of all that was random.
        versions: of programs beside those that `rushhour.system.machine` knows.
    """
    machine = msgspec.to_builtins(describe())
    return Record(
        machine=machine,
        versions={**machine.pop("versions"), **versions},
        date=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        commit=commit(),
        seeds=dict(seeds),
        checks=tuple(checks),
        data=dict(data),
    )


def judged(
    id: str,
    what: str,
    target: str,
    values: Sequence[float],
    *,
    unit: str = "x",
    seed: int = 0,
    why: str = "",
) -> Check:
    """A check of repeated measurements of a ratio: their geometric mean, and its bootstrap interval over the rounds.

    Args:
        id: of the check.
        what: in words.
        target: `>= 2` or `<= 1.05`.
        values: one for each round, all above 0; none where it could not be measured.
        unit: of the values.
        seed: of the resampling.
        why: what must be known; where it could not be measured, the reason.
    """
    if not values:
        return verdict(id, what, target, None, None, 0, unit=unit, why=why)
    value, interval = mean_ratio(values, seed)
    return verdict(id, what, target, value, interval, len(values), unit=unit, why=why)


def verdict(
    id: str,
    what: str,
    target: str,
    value: float | None,
    interval: tuple[float, float] | None,
    n: int,
    *,
    unit: str = "x",
    why: str = "",
) -> Check:
    """A check of a value, None where it could not be measured; the reason is added where it does not hold."""
    if value is None:
        return Check(id, what, unit, target, None, None, n, False, why or "it could not be measured")
    low, high = interval or (value, value)
    holds = meets(low, target) and meets(high, target)
    if not holds:
        short = "the value misses the target" if not meets(value, target) else "the interval reaches over the target"
        why = f"{short}; {why}" if why else short
    return Check(id, what, unit, target, value, interval, n, holds, why or None)


def mean_ratio(values: Sequence[float], seed: int = 0) -> tuple[float, tuple[float, float] | None]:
    """The geometric mean of ratios and its 95% bootstrap interval (percentiles, rounds resampled); none of under 3."""
    logs = np.log(np.asarray(values, dtype=np.float64))
    if len(logs) < _FEWEST:
        return math.exp(float(logs.mean())), None
    picks = np.random.default_rng(seed).integers(0, len(logs), (_RESAMPLES, len(logs)))
    low, high = np.quantile(logs[picks].mean(axis=1), [0.025, 0.975])
    return math.exp(float(logs.mean())), (math.exp(float(low)), math.exp(float(high)))


def rank_correlation(one: ArrayLike, other: ArrayLike) -> float:
    """Spearman's, of values without ties."""
    first, second = (np.asarray(values).argsort().argsort() for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def meets(value: float, target: str) -> bool:
    """Whether `value` meets a target such as `>= 2`."""
    sign, _, bound = target.partition(" ")
    return {">=": value >= float(bound), "<=": value <= float(bound), "<": value < float(bound)}[sign]


def commit() -> str:
    """Of the code and the benchmarks as they are now; `+` where the work tree holds changes."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "src", "benchmarks", ":!benchmarks/results")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
