"""Prediction: the capacity of a candidate by simulation, from service times and the overhead of serving.

The overhead is learnt under load, from the first candidate of each layout and one that is much slower (`overheads`).
Service times and measured capacities are compared at equal speed of the host (`engine_times`).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Sequence

from rushhour.capacity import Overhead, Saturation, Scenario, capacities, smallest_bound
from rushhour.goal import SLO
from rushhour.load import Race
from rushhour.measurement import Interval, Outcome, Priors, ServiceTimes
from rushhour.system.machine import cores
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.overheads import Overheads, saturation
from rushhour.tune.priors import Earlier, learnt_words
from rushhour.tune.residuals import Residuals
from rushhour.tune.space import Candidate
from rushhour.tune.state import CandidateState

_SLOWER = 2.0
"""The second candidate of a layout takes at least so many times as long for a sample."""
_LAYOUTS = 4
"""Layouts whose overhead is learnt under load, at most; the others are predicted with that of the first."""
_SURE = 1.25
"""A race whose ratio has a wider interval teaches nothing about predictions."""
_NORMAL = 1.96


class Predictor:
    """Predicts capacities, with the overhead of serving once it is known.

    Args:
        times: of the engines, and the SLO of the capacities.
        priors: what earlier runs measured: it stands in for overheads that this run has not measured, and is weak
            beside its residuals.
    """

    def __init__(self, times: EngineTimes, priors: Priors | None = None) -> None:
        self._times = times
        self._slo = times.slo
        self._earlier = Earlier.of(priors or Priors())
        self._overheads = Overheads(self._earlier)
        self._residuals = Residuals(self._earlier.residuals)
        self._measured: dict[str, tuple[Candidate, float]] = {}
        """Capacities under load at speed 1 of the host, by the name of the candidate."""
        self._races: list[tuple[Candidate, Candidate, float]] = []
        """Two candidates, and the throughput of the second over that of the first."""
        self._speeds: dict[str, float] = {}
        """Of the host beside load, by the name of the candidate."""
        self._known_capacities: dict[tuple[str, bool, Overhead, SLO, int], float] = {}
        """As simulated, by candidate, whether it was refined, overhead, SLO and how many times the cores."""
        self._policies: set[str] = set()

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        """How long the engine alone takes for batches of each size, whatever the candidate's batch bound.

        Raises:
            EngineError: if it cannot run the bundle. Engines raise other errors, too.
        """
        return self._times.of(candidate)

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
            (state.candidate.with_batch(bound), self._overheads.of(state.candidate))
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

    def overhead(self, candidate: Candidate) -> Overhead:
        """Of serving, as far as it is known of the candidate's layout."""
        return self._overheads.of(candidate)

    def predict(self, state: CandidateState) -> None:
        """Set the predicted capacity of a candidate as it is served; its batch bound stays.

        Raises:
            EngineError: as `service_times`.
        """
        self._times.refine(state.candidate)
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
        return self._uncorrected(candidate, overhead) * self._residual(candidate) * self.speed

    def _uncorrected(self, candidate: Candidate, overhead: Overhead | None = None) -> float:
        """At speed 1 of the host."""
        overhead = self._overheads.of(candidate) if overhead is None else overhead
        (simulated,) = self._simulated([(candidate, overhead)], self._slo)
        return simulated * self._overheads.steady(self._slo)

    @property
    def speed(self) -> float:
        """Of the host beside load, by most load tests so far: predictions are made for it."""
        return statistics.median(self._speeds.values()) if self._speeds else 1.0

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
            (str(candidate), as_served and self._times.is_refined(candidate), overhead, slo, times_cores)
            for candidate, overhead in policies
        ]
        missing = {key: policy for key, policy in zip(keys, policies, strict=True) if key not in self._known_capacities}
        scenarios = []
        for candidate, overhead in missing.values():
            overhead = dataclasses.replace(overhead, spare=times_cores * overhead.spare)
            streams = times_cores * candidate.streams
            profile = self._times.profile(candidate, as_served=as_served)
            scenarios.append(Scenario(profile, streams, candidate.policy.max_batch, overhead))
        if missing:
            self._known_capacities.update(zip(missing, capacities(scenarios, slo).tolist(), strict=True))
            self._policies.update(name for name, *_ in missing)
        return [self._known_capacities[key] for key in keys]

    def by_bound(self, candidates: Sequence[Candidate], *, alone: bool = False) -> list[dict[int, float]]:
        """The capacity of each with each batch bound, as simulated on the same service times, not corrected.

        Args:
            candidates: timed before; their own bounds do not matter.
            alone: without the overhead of serving, as they were predicted before any load.
        """
        bounds = [self.service_times(candidate).batch_sizes for candidate in candidates]
        policies = [
            (each.with_batch(bound), Overhead(spare=each.spare(cores())) if alone else self._overheads.of(each))
            for each, sizes in zip(candidates, bounds, strict=True)
            for bound in sizes
        ]
        share = 1.0 if alone else self._overheads.steady(self._slo) * self.speed
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
        overhead = self._overheads.of(candidate)
        whole = candidate.streams + overhead.spare
        busy = candidate.streams * overhead.slowdown / rate_rps + overhead.request_s
        return min(rate_rps / overhead.slowdown, whole / busy) * self._correction(candidate)

    def _correction(self, candidate: Candidate) -> float:
        """What the simulation does not know: the host's speed and its waves, and the residuals of what was measured."""
        return self.speed * self._overheads.steady(self._slo) * self._residual(candidate)

    def _residual(self, candidate: Candidate) -> float:
        return self._residuals.factor(candidate.engine, _where(candidate))

    # Residuals.

    def learn_residual(self, state: CandidateState) -> None:
        """Compare a candidate's measured capacity with its prediction; later predictions are corrected by it.

        The eager baseline teaches nothing: no candidate is alike.
        """
        if state.capacity and state.candidate.engine != "torch":
            self._speeds[str(state.candidate)] = state.speed
            self._measured[str(state.candidate)] = state.candidate, state.capacity / state.speed
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
                self._learn(unknown, times * measured.get(str(known), self.capacity(known) / self.speed))

    def _learn(self, candidate: Candidate, capacity: float) -> None:
        self._residuals.learn(
            str(candidate), candidate.engine, _where(candidate), self._uncorrected(candidate), capacity
        )

    # The overhead of serving.

    def learn_overheads(
        self,
        states: Iterable[CandidateState],
        measure_throughput: Callable[[CandidateState], bool],
        is_over: Callable[[float], bool] = lambda ahead: False,
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
            is_over: whether the time is up for a candidate that is so far ahead of the best of those that were measured
                (`CandidateState.ahead_of`); the first measurement always takes place.
            keep: a layout whose best candidate is predicted below this share of the best of all is left out.

        Returns:
            The candidates whose throughput was measured. Their predictions include the overhead.
        """
        measured: list[CandidateState] = []
        states = list(states)
        while (state := self._first_of_a_layout(states, keep)) is not None and len(self._overheads.known) < _LAYOUTS:
            if measured and is_over(min(state.ahead_of(each) for each in measured)):
                break
            if not measure_throughput(state):
                continue
            seen = [self._saturation(state)]
            measured.append(state)
            if len(measured) == 1:
                slow = self._much_slower(state, states)
                if slow is not None and not is_over(0.0) and measure_throughput(slow):
                    seen.append(self._saturation(slow))
                    measured.append(slow)
            self._overheads.learn(state.candidate, seen)
            for each in measured:
                self.predict(each)
            self.choose_batches([each for each in states if each.fate is None and each not in measured])
        for state in measured:
            self._overheads.learn_speeds(state.windows)
        self._learn_again()
        for state in measured:
            self.predict(state)
        return measured

    def _first_of_a_layout(self, states: Iterable[CandidateState], keep: float) -> CandidateState | None:
        """The best candidate of those in layouts whose overhead is not known; None where none is worth its time."""
        alive = [state for state in states if state.fate is None]
        best = max((state.predicted_rps for state in alive), default=0.0)
        new = [state for state in alive if state.candidate.layout not in self._overheads.known]
        first = max(new, key=lambda state: state.predicted_rps, default=None)
        return first if first is not None and first.predicted_rps >= keep * best else None

    def _much_slower(self, fast: CandidateState, states: Iterable[CandidateState]) -> CandidateState | None:
        """The slowest candidate of the same layout; None where it is nearly as fast."""
        rivals = [
            state
            for state in states
            if state.candidate.layout == fast.candidate.layout and state.fate is None and state.predicted
        ]
        slow = min(rivals, key=lambda state: state.predicted_rps, default=fast)
        return slow if _SLOWER * slow.predicted_rps <= fast.predicted_rps else None

    def _saturation(self, state: CandidateState) -> Saturation:
        self._times.refine(state.candidate)
        self._speeds[str(state.candidate)] = state.speed
        return saturation(state, self._times.profile(state.candidate))

    def forget_overheads(self) -> None:
        """Forget what was learnt, where it was learnt from servers that failed later."""
        self._overheads.forget()
        self._races.clear()

    def learnt(self) -> dict[str, float]:
        """What this run measured for later ones, by the names that `Priors` has."""
        return learnt_words(self._overheads.known, self._overheads.slowdown, self._residuals)

    def capacity_alone(self, state: CandidateState) -> float | None:
        """Its capacity without the generator on the same machine: measured with it, and extrapolated by prediction.

        None where no window, capacity or overhead is known.
        """
        windows = [window for window in state.windows if window.outcome in (Outcome.PASS, Outcome.INCONCLUSIVE)]
        whole = self._overheads.of(state.candidate)
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
