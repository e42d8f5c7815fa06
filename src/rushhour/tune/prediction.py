"""Prediction: the capacity of a candidate by simulation, from service times and the overhead of serving."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping

from rushhour.bundle import Bundle
from rushhour.capacity import Overhead, ServiceProfile, best_batch, predicted_capacity
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.goal import SLO
from rushhour.measurement import Outcome, ServiceTimes
from rushhour.records.journal import Journal
from rushhour.system.machine import cores
from rushhour.tune.space import Candidate, torch_code
from rushhour.tune.state import CandidateState


class Predictor:
    """Predicts capacities, with the overhead of serving once it is known.

    Args:
        journal: of the service times.
        bundles: role -> bundle.
        slo: of the capacities.
        time_s: how long each size of a batch is timed.
        trusted: as in `open_engine`.
    """

    def __init__(
        self, journal: Journal, bundles: Mapping[str, Bundle], slo: SLO, time_s: float, trusted: tuple[str, ...]
    ) -> None:
        self._journal = journal
        self._bundles = bundles
        self._slo = slo
        self._time_s = time_s
        self._trusted = trusted
        self._overheads: dict[tuple[int, int, int], Overhead] = {}
        """Of serving, by layout, from the first candidate of each layout under load."""

    def service_times(self, candidate: Candidate) -> ServiceTimes:
        """How long the engine alone takes for batches of each size.

        Raises:
            EngineError: if it cannot run the bundle. Engines raise other errors, too.
        """
        config, limit_s = candidate.engine_config(), self._slo.limit_s
        return self._journal.measure(
            "service",
            candidate.compiled,
            f"up to {config.max_batch} samples or {limit_s * 1e3:g} ms",
            ServiceTimes,
            self._time,
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
        bound, state.predicted = best_batch(
            times, streams=state.candidate.streams, slo=self._slo, overhead=self._overhead_of(state.candidate)
        )
        state.candidate = state.candidate.with_batch(bound)
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
        return predicted_capacity(
            ServiceProfile(self.service_times(candidate)),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            slo=self._slo,
            overhead=self._overhead_of(candidate) if overhead is None else overhead,
        )

    def learn_overheads(
        self,
        states: Iterable[CandidateState],
        measure_throughput: Callable[[CandidateState], bool],
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[CandidateState]:
        """Measure the overhead of serving in each layout, from the first candidate of it that runs.

        It differs by layout: processes parse requests on cores of their own, and threads of one batch wait for each
        other.

        Args:
            states: best prediction first.
            measure_throughput: sets the throughput of a candidate, if it runs (`LoadTests.measure_throughput`).
            is_over: whether the time is up; the first measurement always takes place.

        Returns:
            The candidates whose throughput was measured. Their predictions include the overhead.
        """
        measured: list[CandidateState] = []
        for state in states:
            if measured and is_over():
                break
            candidate = state.candidate
            if candidate.layout in self._overheads or not measure_throughput(state):
                continue
            self._overheads[candidate.layout] = Overhead.from_throughput(
                ServiceProfile(self.service_times(candidate)),
                streams=candidate.streams,
                max_batch=candidate.policy.max_batch,
                spare=candidate.spare(cores()),
                most_rps=state.throughput or 1.0,
            )
            self.predict(state)
            measured.append(state)
        return measured

    def forget_overheads(self) -> None:
        """Forget what was learnt, where it was learnt from servers that failed later."""
        self._overheads.clear()

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
