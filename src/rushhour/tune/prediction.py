"""Prediction: the capacity of a candidate by simulation, from service times and the overhead of serving.

The overhead is learnt under load, from the first candidate of each layout and one that is much slower. A closed loop
alone would promise too much: its requests come together, just when others were answered, and it waits where the host
is slow. So each gets a short window of open-loop load beside it (docs/decisions/0037).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from rushhour.bundle import Bundle
from rushhour.capacity import (
    Overhead,
    Saturation,
    Scenario,
    ServiceProfile,
    capacities,
    smallest_bound,
    steady_share,
)
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.goal import SLO
from rushhour.load import Race
from rushhour.measurement import Interval, Outcome, Priors, ServiceTimes
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.tune.measuring import MeasurementSource
from rushhour.tune.priors import Earlier, learnt_words
from rushhour.tune.residuals import Residuals
from rushhour.tune.space import LARGEST_BATCH, Candidate, torch_code
from rushhour.tune.state import CandidateState

_KEPT_UP = 0.03
"""Share of late requests up to which a server kept up with a window."""
_LEAST_OPEN = 0.7
"""Of the throughput in the closed loop, which is 1.07 to 1.33 times the capacity. Where a short window shows less, the
host was disturbed meanwhile."""
_SLOWER = 2.0
"""The second candidate of a layout takes at least so many times as long for a sample."""
_TOGETHER = 3
"""Intervals of 100 ms that are averaged: a shorter variation of the host's speed fits into the limit."""
_INTERVAL_S = 0.1
"""Of `Measurement.speeds`."""
_LAYOUTS = 4
"""Layouts whose overhead is learnt under load, at most; the others are predicted with that of the first."""
_SURE = 1.25
"""A race whose ratio has a wider interval teaches nothing about predictions."""
_NORMAL = 1.96
_INFORMATIVE = (Outcome.PASS, Outcome.FAIL, Outcome.UNSTABLE, Outcome.INCONCLUSIVE)


class Predictor:
    """Predicts capacities, with the overhead of serving once it is known.

    Args:
        journal: of the service times.
        bundles: role -> bundle.
        slo: of the capacities.
        time_s: how long each size of a batch is timed.
        trusted: as in `open_engine`.
        source: knows the service times; None to time the engines of this machine.
        priors: what earlier runs measured: it stands in for overheads that this run has not measured, and is weak
            beside its residuals.
    """

    def __init__(
        self,
        journal: Journal,
        bundles: Mapping[str, Bundle],
        slo: SLO,
        time_s: float,
        trusted: tuple[str, ...],
        source: MeasurementSource | None = None,
        priors: Priors | None = None,
    ) -> None:
        self._journal = journal
        self._bundles = bundles
        self._slo = slo
        self._time_s = time_s
        self._trusted = trusted
        self._source = source
        self._overheads: dict[tuple[int, int, int], Overhead] = {}
        """Of serving, by layout, from the first candidate of each layout under load."""
        self._earlier = Earlier.of(priors or Priors())
        self._slowdown: float | None = None
        """Of batches beside serving, where two candidates of a layout showed it."""
        self._speeds: list[float] = []
        """Of the host, in each 100 ms of the windows that the overheads were learnt from, relative to their median."""
        self._residuals = Residuals(self._earlier.residuals)
        self._measured: dict[str, tuple[Candidate, float]] = {}
        """Capacities under load, by the name of the candidate."""
        self._races: list[tuple[Candidate, Candidate, float]] = []
        """Two candidates, and the throughput of the second over that of the first."""
        self._profiles: dict[str, ServiceProfile] = {}
        self._own_profiles: dict[str, ServiceProfile] = {}
        """Of candidates with their own batch bound, by name."""
        self._known_capacities: dict[tuple[str, bool, Overhead, SLO, int], float] = {}
        """As simulated, by candidate, whether it was refined, overhead, SLO and how many times the cores."""
        self._policies: set[str] = set()

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        """How long the engine alone takes for batches of each size, whatever the candidate's batch bound.

        They hold for all candidates that compile the bundle alike: for processes of one stream each, and for one
        process with as many streams.

        Raises:
            EngineError: if it cannot run the bundle. Engines raise other errors, too.
        """
        return self._timed(candidate if candidate.engine == "torch" else candidate.with_batch(LARGEST_BATCH))

    def _timed(self, candidate: Candidate) -> ServiceTimes:
        config, limit_s, source = candidate.engine_config(), self._slo.limit_s, self._source
        return self._journal.measure(
            "service",
            candidate.compiled,
            f"up to {config.max_batch} samples or {limit_s * 1e3:g} ms",
            ServiceTimes,
            self._time if source is None else lambda **_: source.service_times(candidate),
            bundle=self._bundles[candidate.bundle],
            config=config,
            code=torch_code(candidate, self._bundles[candidate.bundle], self._trusted),
            limit_s=limit_s,
            seconds=self._time_s,
        )

    def refine(self, candidate: Candidate) -> None:
        """Time the engine with the candidate's own batch bound, as it is served: an engine may compile that size alone.

        Raises:
            EngineError: as `service_times`.
        """
        if str(candidate) not in self._own_profiles:
            self._own_profiles[str(candidate)] = ServiceProfile(self._timed(candidate))

    def _time(
        self, bundle: Bundle, config: EngineConfig, code: dict[str, str], limit_s: float, seconds: float
    ) -> ServiceTimes:
        engine = open_engine(bundle, config, trusted=self._trusted)
        try:
            return time_service(engine, bundle, limit_s, seconds)
        finally:
            engine.close()

    def choose_batch(self, state: CandidateState) -> ServiceTimes:
        """Set the best batch bound of the timed sizes, and the predicted capacity with it. Returns the service times.

        Raises:
            EngineError: as `service_times`.
        """
        times = self.service_times(state.candidate)
        self.choose_batches([state])
        return times

    def choose_batches(self, states: Sequence[CandidateState]) -> None:
        """The same for many candidates, all of whose policies are simulated at once.

        Raises:
            EngineError: as `service_times`.
        """
        for state, (candidate, capacity) in zip(states, self._best_bounds(states, self._slo), strict=True):
            state.candidate, state.predicted = candidate, capacity
            state.bounds = self.service_times(candidate).batch_sizes

    def capacities_under(self, states: Sequence[CandidateState], slo: SLO, times_cores: int = 1) -> list[float]:
        """The predicted capacities under another SLO or on more cores, each with the batch bound that is best there.

        Args:
            states: of candidates whose engines run.
            slo: with this limit.
            times_cores: with so many times as many processes, each on cores of its own.
        """
        return [capacity for _, capacity in self._best_bounds(states, slo, times_cores)]

    def _best_bounds(
        self, states: Sequence[CandidateState], slo: SLO, times_cores: int = 1
    ) -> list[tuple[Candidate, float]]:
        """Each candidate with its best batch bound, and the predicted capacity with it."""
        bounds = [self.service_times(state.candidate).batch_sizes for state in states]
        policies = [
            (state.candidate.with_batch(bound), self._overhead_of(state.candidate))
            for state, sizes in zip(states, bounds, strict=True)
            for bound in sizes
        ]
        simulated = iter(self._simulated(policies, slo, times_cores))
        found = []
        for state, sizes in zip(states, bounds, strict=True):
            rates = {bound: next(simulated) for bound in sizes}
            bound = smallest_bound(rates)
            candidate = state.candidate.with_batch(bound)
            found.append((candidate, rates[bound] * self._correction(candidate)))
        return found

    def predict(self, state: CandidateState) -> None:
        """Set the predicted capacity of a candidate as it is served; its batch bound stays.

        Raises:
            EngineError: as `service_times`.
        """
        self.refine(state.candidate)
        state.predicted = self.capacity(state.candidate)

    def correct(self, states: Iterable[CandidateState]) -> None:
        """Set the predicted capacities of those that are not decided, by what was learnt since; batch bounds stay."""
        for state in states:
            if state.fate is None and state.throughput is None and state.predicted is not None:
                state.predicted = self.capacity(state.candidate)

    def capacity(self, candidate: Candidate, overhead: Overhead | None = None) -> float:
        """The predicted capacity in requests per second.

        Args:
            candidate: with its batch bound.
            overhead: of serving; None for what is known of its layout.
        """
        return self._uncorrected(candidate, overhead) * self._residual(candidate)

    def _uncorrected(self, candidate: Candidate, overhead: Overhead | None = None) -> float:
        overhead = self._overhead_of(candidate) if overhead is None else overhead
        (simulated,) = self._simulated([(candidate, overhead)], self._slo)
        return simulated * self._steady()

    def _simulated(
        self,
        policies: Sequence[tuple[Candidate, Overhead]],
        slo: SLO,
        times_cores: int = 1,
        *,
        as_served: bool = True,
    ) -> list[float]:
        """Capacities as simulated, with the times of the candidate's own batch bound where they are known, unless
        `as_served` is false; the same policy is simulated once."""
        keys = [
            (str(candidate), as_served and str(candidate) in self._own_profiles, overhead, slo, times_cores)
            for candidate, overhead in policies
        ]
        missing = {key: policy for key, policy in zip(keys, policies, strict=True) if key not in self._known_capacities}
        scenarios = []
        for candidate, overhead in missing.values():
            overhead = dataclasses.replace(overhead, spare=times_cores * overhead.spare)
            streams = times_cores * candidate.streams
            scenarios.append(
                Scenario(self._profile(candidate, as_served), streams, candidate.policy.max_batch, overhead)
            )
        if missing:
            self._known_capacities.update(zip(missing, capacities(scenarios, slo).tolist(), strict=True))
            self._policies.update(name for name, *_ in missing)
        return [self._known_capacities[key] for key in keys]

    def _profile(self, candidate: Candidate, as_served: bool = True) -> ServiceProfile:
        """By the times with its own batch bound where they are known, unless `as_served` is false."""
        own = self._own_profiles.get(str(candidate)) if as_served else None
        if own is not None:
            return own
        if candidate.compiled not in self._profiles:
            self._profiles[candidate.compiled] = ServiceProfile(self.service_times(candidate))
        return self._profiles[candidate.compiled]

    def by_bound(self, candidates: Sequence[Candidate], *, alone: bool = False) -> list[dict[int, float]]:
        """The capacity of each with each batch bound, as simulated on the same service times, not corrected.

        Args:
            candidates: timed before; their own bounds do not matter.
            alone: without the overhead of serving, as they were predicted before any load.
        """
        bounds = [self.service_times(candidate).batch_sizes for candidate in candidates]
        policies = [
            (each.with_batch(bound), Overhead(spare=each.spare(cores())) if alone else self._overhead_of(each))
            for each, sizes in zip(candidates, bounds, strict=True)
            for bound in sizes
        ]
        share = 1.0 if alone else self._steady()
        rates = iter(self._simulated(policies, self._slo, as_served=False))
        return [{bound: share * next(rates) for bound in sizes} for sizes in bounds]

    @property
    def policies(self) -> int:
        """The number of policies that were simulated: candidates with a batch bound each."""
        return len(self._policies)

    def predicted(self, state: CandidateState) -> tuple[float, Interval]:
        """A candidate's predicted capacity by all that was learnt, with its 95% interval.

        The interval is that of the predictions whose candidates were measured.
        """
        rate, factor = self.capacity(state.candidate), math.exp(_NORMAL * self._residuals.spread)
        return rate, (rate / factor, rate * factor)

    def beside_serving(self, rate_rps: float, candidate: Candidate) -> float:
        """The capacity of a network that takes all cores at `rate_rps`, with the overhead of serving.

        Args:
            rate_rps: of the engine alone.
            candidate: of the same engine and layout.
        """
        overhead = self._overhead_of(candidate)
        whole = candidate.streams + overhead.spare
        busy = candidate.streams * overhead.slowdown / rate_rps + overhead.request_s
        return min(rate_rps / overhead.slowdown, whole / busy) * self._correction(candidate)

    def _correction(self, candidate: Candidate) -> float:
        """What the simulation does not know: the host's waves, and the residuals of what was measured."""
        return self._steady() * self._residual(candidate)

    def _residual(self, candidate: Candidate) -> float:
        return self._residuals.factor(candidate.engine, _where(candidate))

    def _steady(self) -> float:
        together = max(_TOGETHER, round(2 * self._slo.limit_s / _INTERVAL_S))
        return steady_share(self._speeds, self._slo.allowed_miss_rate, together=together)

    # Residuals.

    def learn_residual(self, state: CandidateState) -> None:
        """Compare a candidate's measured capacity with its prediction; later predictions are corrected by it.

        The eager baseline teaches nothing: no candidate is alike.
        """
        if state.capacity and state.candidate.engine != "torch":
            self._measured[str(state.candidate)] = state.candidate, state.capacity
            self._learn_again()

    def learn_race(self, incumbent: Candidate, rival: Candidate, result: Race) -> None:
        """Compare the ratio of two throughputs with that of their predictions, where the ratio is known well."""
        low, high = result.interval
        if high <= _SURE * low and "torch" not in (incumbent.engine, rival.engine):
            self._races.append((incumbent, rival, result.ratio))
            self._learn_again()

    def _learn_again(self) -> None:
        """All residuals anew: those of earlier measurements change with what is known of the overhead of serving.

        A race gives the capacity of one by that of the other, best where the other was measured.
        """
        self._residuals = Residuals(self._earlier.residuals)
        measured = {name: capacity for name, (_, capacity) in self._measured.items()}
        for candidate, capacity in self._measured.values():
            self._learn(candidate, capacity)
        for one, other, ratio in self._races:
            if str(one) in measured or str(other) not in measured:
                known, unknown, times = one, other, ratio
            else:
                known, unknown, times = other, one, 1 / ratio
            if str(unknown) not in measured:
                self._learn(unknown, times * measured.get(str(known), self.capacity(known)))

    def _learn(self, candidate: Candidate, capacity: float) -> None:
        self._residuals.learn(
            str(candidate), candidate.engine, _where(candidate), self._uncorrected(candidate), capacity
        )

    # The overhead of serving.

    def learn_overheads(
        self,
        states: Iterable[CandidateState],
        measure_throughput: Callable[[CandidateState], bool],
        is_over: Callable[[], bool] = lambda: False,
        *,
        keep: float = 0.0,
    ) -> list[CandidateState]:
        """Measure the overhead of serving in each layout, from the best candidate of it that runs.

        It differs by layout: processes parse requests on cores of their own, and threads of one batch wait for each
        other. In the first layout the slowest candidate is measured too, if it is much slower: it shows how much
        longer batches take beside serving. After each layout the others are predicted again.

        Args:
            states: best prediction first.
            measure_throughput: sets the throughput of a candidate, if it runs (`LoadTests.measure_throughput`), and
                adds a window of open-loop load.
            is_over: whether the time is up; the first measurement always takes place.
            keep: a layout whose best candidate is predicted below this share of the best of all is left out.

        Returns:
            The candidates whose throughput was measured. Their predictions include the overhead.
        """
        measured: list[CandidateState] = []
        states = list(states)
        while (state := self._first_of_a_layout(states, keep)) is not None and len(self._overheads) < _LAYOUTS:
            if measured and is_over():
                break
            if not measure_throughput(state):
                continue
            seen, candidate = [self._saturation(state)], state.candidate
            measured.append(state)
            if len(measured) == 1:
                slow = self._much_slower(state, states)
                if slow is not None and not is_over() and measure_throughput(slow):
                    seen.append(self._saturation(slow))
                    measured.append(slow)
            slowdown = self._slowdown or self._earlier.slowdown
            overhead = Overhead.explaining(seen, spare=candidate.spare(cores()), slowdown=slowdown)
            if len(seen) > 1:
                self._slowdown = overhead.slowdown
            self._overheads[candidate.layout] = overhead
            for each in measured:
                self.predict(each)
            self.choose_batches([each for each in states if each.fate is None and each not in measured])
        for state in measured:
            self._learn_speeds(state)
        self._learn_again()
        for state in measured:
            self.predict(state)
        return measured

    def _first_of_a_layout(self, states: Iterable[CandidateState], keep: float) -> CandidateState | None:
        """The best candidate of those in layouts whose overhead is not known; None where none is worth its time."""
        alive = [state for state in states if state.fate is None]
        best = max((state.predicted or 0.0 for state in alive), default=0.0)
        new = [state for state in alive if state.candidate.layout not in self._overheads]
        first = max(new, key=lambda state: state.predicted or 0.0, default=None)
        return first if first is not None and (first.predicted or 0.0) >= keep * best else None

    def _much_slower(self, fast: CandidateState, states: Iterable[CandidateState]) -> CandidateState | None:
        """The slowest candidate of the same layout; None where it is nearly as fast."""
        rivals = [
            state
            for state in states
            if state.candidate.layout == fast.candidate.layout and state.fate is None and state.predicted
        ]
        slow = min(rivals, key=lambda state: state.predicted or 0.0, default=fast)
        return slow if _SLOWER * (slow.predicted or 0.0) <= (fast.predicted or 0.0) else None

    def _saturation(self, state: CandidateState) -> Saturation:
        """The highest rate that a candidate answers in an open loop.

        Where it did not keep up with the window, what it answered in time. Where it did, the rate at which all cores
        would be busy at the CPU time that a request took: at least that of the window, and at most that of the closed
        loop, in which requests cost least.
        """
        candidate = state.candidate
        self.refine(candidate)
        highest = state.throughput or 1.0
        for window in state.windows[-1:]:
            seen = highest
            if window.late > _KEPT_UP * window.n:
                if window.outcome in _INFORMATIVE:
                    seen = window.rate_rps * (1 - window.late / window.n)
            elif window.server_cpu is not None:
                busy = (window.server_cpu + window.generator_cpu) / cores()
                seen = window.rate_rps / min(1.0, busy) if busy > 0 else highest
            highest = min(highest, max(seen, _LEAST_OPEN * highest))
        return Saturation.at(
            self._profile(candidate),
            highest,
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            spare=candidate.spare(cores()),
        )

    def _learn_speeds(self, state: CandidateState) -> None:
        for window in state.windows:
            if window.speed:
                self._speeds += [speed / window.speed for speed in window.speeds]

    def forget_overheads(self) -> None:
        """Forget what was learnt, where it was learnt from servers that failed later."""
        self._overheads.clear()
        self._speeds.clear()
        self._races.clear()
        self._slowdown = None

    def _overhead_of(self, candidate: Candidate) -> Overhead:
        """The overhead of its layout; where that is not known, that of the first layout measured; before any is, what
        earlier runs measured in its layout."""
        first = next(iter(self._overheads.values()), self._earlier.overhead(candidate.layout))
        known = self._overheads.get(candidate.layout, first)
        return dataclasses.replace(known, spare=candidate.spare(cores()))

    def learnt(self) -> dict[str, float]:
        """What this run measured for later ones, by the names that `Priors` has."""
        return learnt_words(self._overheads, self._slowdown, self._residuals)

    def capacity_alone(self, state: CandidateState) -> float | None:
        """Its capacity without the generator on the same machine: measured with it, and extrapolated by prediction.

        None where no window, capacity or overhead is known.
        """
        windows = [window for window in state.windows if window.outcome in (Outcome.PASS, Outcome.INCONCLUSIVE)]
        whole = self._overhead_of(state.candidate)
        if not windows or not state.capacity or not whole.request_s:
            return None
        window = max(windows, key=lambda window: window.rate_rps)
        own_s = max(0.0, whole.request_s - window.generator_cpu / window.rate_rps)
        shared = self.capacity(state.candidate, whole)
        alone = self.capacity(state.candidate, dataclasses.replace(whole, request_s=own_s))
        return state.capacity * alone / shared if shared else None


def _where(candidate: Candidate) -> tuple[int, ...]:
    """What residuals are alike in, beside the engine: layout, and whether it batches at all."""
    return (*candidate.layout, min(2, candidate.policy.max_batch))
