"""A search replayed on recorded measurements: every plan of a small space is measured once, and any number of searches
get their answers from that record. They take no load and no time, so a search can be run a hundred times.

`MeasuredSpace` is the record. `ReplayBench` answers from it: windows are resampled from the recorded ones, with a seed,
so that the answers of two replays differ as two runs do. `replay` runs a search on it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing
from rushhour.clock import VirtualClock
from rushhour.data import Dataset, Split
from rushhour.errors import EngineError
from rushhour.goal import SLO
from rushhour.load import needed_n, window_n
from rushhour.load.significance import ERROR, passes
from rushhour.measurement import Accuracy, ClosedLoop, Measurement, Outcome, ServiceTimes
from rushhour.plan import Plan
from rushhour.progress import Silent
from rushhour.system.machine import cores
from rushhour.task import Task
from rushhour.testing.bundles import tiny_bundle
from rushhour.testing.measured import (
    BLOCKS,
    MeasuredPlan,
    MeasuredSpace,
    OpenWindow,
    artefact_of,
    compiled_of,
    measurement,
    name_of,
)
from rushhour.tune import TuneSettings
from rushhour.tune.search import tune
from rushhour.tune.space import Candidate

_START_S = 2.0
"""What the start of a server takes, on the replay's clock."""
_BEYOND = 1.02
"""Above the highest recorded rate by this factor, a server that held that rate counts as unstable."""
_REFUTED = 0.01
_ALL_OF_IT = (Outcome.UNSTABLE, Outcome.VOID, Outcome.GENERATOR_LIMITED)
"""Outcomes that are those of the recorded window, however long the replayed one is."""


class ReplayBench:
    """A `MeasurementSource` that answers from a record.

    The answer to a question depends on the record, the seed and the question alone: a search that was killed and goes
    on gets the same answers.

    Args:
        space: the record.
        seed: of the resampling.

    Attributes:
        clock: moves on by the time that each measurement would have taken.
    """

    def __init__(self, space: MeasuredSpace, seed: int = 0) -> None:
        if space.cores != cores():
            raise EngineError(
                f"cannot replay measurements of {space.cores} cores on {cores()}",
                "the space of a search depends on the number of cores",
                "measure the space on this machine",
            )
        self._space = space
        self._seed = seed
        self.clock = VirtualClock()

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        """As recorded, for the batch bounds of the space alone: a search chooses one of the sizes that were timed.

        Raises:
            EngineError: if the space does not have the candidate.
        """
        name = compiled_of(candidate)
        found = self._space.service.get(name)
        known = set(self._space.bounds(name))
        sizes = found.batch_sizes if found is not None else ()
        kept = [at for at, size in enumerate(sizes) if size in known and size <= candidate.policy.max_batch]
        if found is None or not kept:
            raise EngineError(f"cannot run {name}", "it is not in the measured space", "measure it too")
        self.clock.advance(_START_S)
        return ServiceTimes(
            tuple(found.batch_sizes[at] for at in kept),
            tuple(found.seconds[at] for at in kept),
            tuple(found.throughput[at] for at in kept),
            tuple(found.quantiles[at] for at in kept) if found.quantiles else (),
        )

    def host_speed(self, candidate: Candidate, when: str) -> float:
        """As recorded; 1 where it is not."""
        if when.startswith("timed"):
            return self._space.speeds.get(compiled_of(candidate), 1.0)
        plan = self._space.by_name.get(name_of(candidate))
        return 1.0 if plan is None else plan.speed

    def accuracy(self, candidate: Candidate, part: str) -> Accuracy:
        """As recorded.

        Raises:
            EngineError: if the space does not have the artefact.
        """
        name = artefact_of(candidate)
        if name not in self._space.accuracy:
            raise EngineError(f"cannot run {name}", "it is not in the measured space", "measure it too")
        validation, test = self._space.accuracy[name]
        return validation if part == "validation" else test

    @contextlib.contextmanager
    def serve(self, candidate: Candidate, phase: str) -> Iterator[ReplayedServer]:
        """The candidate's record, as a context.

        Raises:
            EngineError: if the space does not have it.
        """
        plan = self._space.by_name.get(name_of(candidate))
        if plan is None:
            raise EngineError(f"cannot serve {name_of(candidate)}", "it is not in the measured space", "measure it too")
        self.clock.advance(_START_S)
        yield ReplayedServer(plan, self.clock, functools.partial(_random, self._seed, phase, plan.name))


def _random(seed: int, *names: str) -> np.random.Generator:
    digest = hashlib.sha256("|".join((str(seed), *names)).encode()).digest()
    return np.random.default_rng(np.frombuffer(digest, np.uint32))


class ReplayedServer:
    """A `LoadedServer` that answers from the record of one plan; from `ReplayBench.serve`."""

    def __init__(self, plan: MeasuredPlan, clock: VirtualClock, random: Callable[[str], np.random.Generator]) -> None:
        self._plan = plan
        self._clock = clock
        self._random = random
        self._levels: list[tuple[float, list[OpenWindow]]] = [
            (rate, [window for window in plan.windows if window.rate_rps == rate])
            for rate in sorted({window.rate_rps for window in plan.windows})
        ]

    def closed_window(self, question: str, *, concurrency: int, seconds: float, within_s: float) -> ClosedLoop:
        """Of a recorded one, its throughput relative to the mean of its number of users; that mean is interpolated."""
        self._clock.advance(seconds)
        groups: dict[int, list[float]] = {}
        for users, rate in self._plan.closed:
            groups.setdefault(users, []).append(rate)
        users_ = sorted(groups)
        means = [float(np.mean(groups[users])) for users in users_]
        ratios = [rate / float(np.mean(groups[users])) for users, rate in self._plan.closed if len(groups[users]) > 1]
        middle = float(np.interp(math.log(concurrency), np.log(users_), means))
        rate = max(1e-3, middle * float(self._random(question).choice(ratios or [1.0])))
        return ClosedLoop(concurrency, rate, concurrency / rate)

    def open_window(self, question: str, slo: SLO, *, rate_rps: float, seed: int, **asked: Any) -> Measurement:
        """Blocks of requests drawn from the windows at the next lower and the next higher recorded rate.

        The nearer one of the two is drawn from more often. So the expected miss rate is interpolated in the logarithm
        of the rate, as it is in the estimate of a capacity (`rushhour.load.estimate`).
        """
        error = asked.get("error", ERROR)
        n = asked.get("n") or window_n(slo, rate_rps, asked["window_s"], error)
        self._clock.advance(n / rate_rps + asked.get("warmup_s", 1.0))
        random = self._random(question)
        lower, upper, share = self._around(rate_rps)
        drawn: list[NDArray[np.float64]] = []
        first: OpenWindow | None = None
        while sum(map(len, drawn)) < BLOCKS or sum(map(len, drawn)) * self._block(lower[0]) < n:
            low, high = (group[int(random.integers(len(group)))] for group in (lower, upper))
            first = first or (high if share >= 0.5 else low)
            drawn.append(_late_shares(low, high, share, random))
        assert first is not None
        if rate_rps > _BEYOND * self._levels[-1][0] and _held(first):
            return measurement(slo, rate_rps, seed, n, n // 2, Outcome.UNSTABLE, first)
        shares = np.concatenate(drawn)
        late = min(n, round(float(shares.mean()) * n))
        outcome = first.outcome if first.outcome in _ALL_OF_IT else _verdict(slo, n, late, shares, error)
        whole = shares[: len(shares) // BLOCKS * BLOCKS].reshape(BLOCKS, -1).mean(axis=1)
        blocks = np.floor(whole * (n // BLOCKS) + random.random(BLOCKS)).astype(int)
        return measurement(slo, rate_rps, seed, n, late, outcome, first, blocks=tuple(blocks.tolist()))

    @staticmethod
    def _block(window: OpenWindow) -> int:
        return max(1, window.n // BLOCKS)

    def _around(self, rate_rps: float) -> tuple[list[OpenWindow], list[OpenWindow], float]:
        """The windows at the recorded rates around this one, and how near it is to the upper ones, 0 to 1."""
        rates = [rate for rate, _ in self._levels]
        at = int(np.searchsorted(rates, rate_rps, side="right"))
        if at == 0 or at == len(rates):
            only = self._levels[min(at, len(rates) - 1)][1]
            return only, only, 1.0
        share = math.log(rate_rps / rates[at - 1]) / math.log(rates[at] / rates[at - 1])
        return self._levels[at - 1][1], self._levels[at][1], share


def _held(window: OpenWindow) -> bool:
    return not window.outcome.refutes and window.outcome not in (Outcome.VOID, Outcome.GENERATOR_LIMITED)


def _late_shares(low: OpenWindow, high: OpenWindow, share: float, random: np.random.Generator) -> NDArray[np.float64]:
    """The share of late requests in each of 20 blocks drawn from two windows."""

    def drawn(window: OpenWindow) -> NDArray[np.float64]:
        late = np.array(window.blocks or (0,), dtype=np.float64)
        return np.minimum(1.0, random.choice(late, BLOCKS) / max(1, window.n // BLOCKS))

    return np.where(random.random(BLOCKS) < share, drawn(high), drawn(low))


def _verdict(slo: SLO, n: int, late: int, shares: NDArray[np.float64], error: float) -> Outcome:
    """The verdict by the binomial test, on as many requests as these are worth where late ones come together."""
    allowed = slo.allowed_miss_rate
    if n < needed_n(slo):
        return Outcome.INCONCLUSIVE
    mean = float(shares.mean())
    inflation = 1.0
    if 0 < mean < 1:
        inflation = max(1.0, float(shares.var()) * n / len(shares) / (mean * (1 - mean)))
    worth, worth_late = n / inflation, late / inflation
    if passes(worth, worth - worth_late, 1 - allowed, _REFUTED):
        return Outcome.FAIL
    return Outcome.PASS if passes(worth, worth_late, allowed, error) else Outcome.INCONCLUSIVE


def replay(
    space: MeasuredSpace,
    run: Path,
    *,
    seed: int,
    settings: TuneSettings | None = None,
    so_far: Callable[[Plan], None] = lambda plan: None,
) -> Plan:
    """Run a search on a record.

    Args:
        space: the record.
        run: the run's folder; a search that was killed there goes on.
        seed: of the resampling, and of the search.
        settings: of the search.
        so_far: receives the best plan whenever there is a better one.
    """
    bench = ReplayBench(space, seed)
    return tune(
        bundles_of(space, run),
        data_of(space),
        space.goal,
        run=run,
        settings=msgspec.structs.replace(settings or TuneSettings(), seed=seed),
        progress=Silent(),
        clock=bench.clock,
        so_far=so_far,
        source=bench,
    )


def bundles_of(space: MeasuredSpace, run: Path) -> dict[str, Bundle]:
    """Small bundles in place of those of the space: what they answer is not asked."""
    return {
        role: tiny_bundle(run / "bundles" / role, name=role, precision="int8" if precision == "int8" else "f32")
        for role, precision in space.precisions.items()
    }


def data_of(space: MeasuredSpace) -> Dataset:
    """Empty data for a task like that of `tiny_bundle`: what is in it is not asked."""
    part = Split(np.zeros((4, 4, 4, 1), np.uint8), np.arange(4) % 3)
    task = Task.classification(tuple(f"class {index}" for index in range(3)))
    return Dataset("replayed", task, part, part, part, Preprocessing(1 / 255), "replayed")
