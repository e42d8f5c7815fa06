"""Prediction: the capacity of a candidate by simulation, from service times and the overhead of serving.

The overhead is learnt under load, from the first candidate of each layout and one that is much slower. A closed loop
alone would promise too much: its requests come together, just when others were answered, and it waits where the host
is slow. So each gets a short window of open-loop load beside it (docs/decisions/0037).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from rushhour.bundle import Bundle
from rushhour.capacity import (
    Overhead,
    Saturation,
    ServiceProfile,
    best_batch,
    predicted_capacity,
    steady_share,
)
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.goal import SLO
from rushhour.measurement import Outcome, ServiceTimes
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.tune.measuring import MeasurementSource
from rushhour.tune.residuals import Residuals
from rushhour.tune.space import Candidate, torch_code
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
    """

    def __init__(
        self,
        journal: Journal,
        bundles: Mapping[str, Bundle],
        slo: SLO,
        time_s: float,
        trusted: tuple[str, ...],
        source: MeasurementSource | None = None,
    ) -> None:
        self._journal = journal
        self._bundles = bundles
        self._slo = slo
        self._time_s = time_s
        self._trusted = trusted
        self._source = source
        self._overheads: dict[tuple[int, int, int], Overhead] = {}
        """Of serving, by layout, from the first candidate of each layout under load."""
        self._slowdown = 1.0
        self._speeds: list[float] = []
        """Of the host, in each 100 ms of the windows that the overheads were learnt from, relative to their median."""
        self._residuals = Residuals()

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        """How long the engine alone takes for batches of each size.

        Raises:
            EngineError: if it cannot run the bundle. Engines raise other errors, too.
        """
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
        bound, simulated = best_batch(
            times, streams=state.candidate.streams, slo=self._slo, overhead=self._overhead_of(state.candidate)
        )
        state.candidate = state.candidate.with_batch(bound)
        state.predicted = simulated * self._correction(state.candidate)
        return times

    def predict(self, state: CandidateState) -> None:
        """Set the predicted capacity; the batch bound stays, because windows are in the journal under its name."""
        state.predicted = self.capacity(state.candidate)

    def capacity(self, candidate: Candidate, overhead: Overhead | None = None) -> float:
        """The predicted capacity in requests per second.

        Args:
            candidate: with its batch bound.
            overhead: of serving; None for what is known of its layout.
        """
        return self._simulated(candidate, overhead) * self._correction(candidate)

    def _simulated(self, candidate: Candidate, overhead: Overhead | None = None) -> float:
        return predicted_capacity(
            ServiceProfile(self.service_times(candidate)),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            slo=self._slo,
            overhead=self._overhead_of(candidate) if overhead is None else overhead,
        )

    def _correction(self, candidate: Candidate) -> float:
        """What the simulation does not know: the host's waves, and the residuals of what was measured."""
        return self._steady() * self._residuals.factor(candidate.engine, candidate.layout)

    def _steady(self) -> float:
        together = max(_TOGETHER, round(2 * self._slo.limit_s / _INTERVAL_S))
        return steady_share(self._speeds, self._slo.allowed_miss_rate, together=together)

    def learn_residual(self, state: CandidateState) -> None:
        """Compare a candidate's measured capacity with its prediction; later predictions are corrected by it."""
        if state.capacity:
            simulated = self._simulated(state.candidate) * self._steady()
            candidate = state.candidate
            self._residuals.learn(str(candidate), candidate.engine, candidate.layout, simulated, state.capacity)

    def learn_overheads(
        self,
        states: Iterable[CandidateState],
        measure_throughput: Callable[[CandidateState], bool],
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[CandidateState]:
        """Measure the overhead of serving in each layout, from the first candidate of it that runs.

        It differs by layout: processes parse requests on cores of their own, and threads of one batch wait for each
        other. In the first layout the slowest candidate is measured too, if it is much slower: it shows how much
        longer batches take beside serving.

        Args:
            states: best prediction first.
            measure_throughput: sets the throughput of a candidate, if it runs (`LoadTests.measure_throughput`), and
                adds a window of open-loop load.
            is_over: whether the time is up; the first measurement always takes place.

        Returns:
            The candidates whose throughput was measured. Their predictions include the overhead.
        """
        measured: list[CandidateState] = []
        states = list(states)
        for state in states:
            if measured and is_over():
                break
            candidate = state.candidate
            if candidate.layout in self._overheads or not measure_throughput(state):
                continue
            seen = [self._saturation(state)]
            measured.append(state)
            if len(measured) == 1:
                slow = self._much_slower(state, states)
                if slow is not None and not is_over() and measure_throughput(slow):
                    seen.append(self._saturation(slow))
                    measured.append(slow)
            overhead = Overhead.explaining(seen, spare=candidate.spare(cores()), slowdown=self._slowdown)
            if len(seen) > 1:
                self._slowdown = overhead.slowdown
            self._overheads[candidate.layout] = overhead
        for state in measured:
            self._learn_speeds(state)
        for state in measured:
            self.predict(state)
        return measured

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
            ServiceProfile(self.service_times(candidate)),
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
        self._slowdown = 1.0

    def _overhead_of(self, candidate: Candidate) -> Overhead:
        """The overhead of its layout; where that is not known, that of the first layout measured."""
        known = self._overheads.get(candidate.layout) or next(iter(self._overheads.values()), Overhead())
        return dataclasses.replace(known, spare=candidate.spare(cores()))

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
