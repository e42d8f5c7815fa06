"""The joint search: goal in, Plan out. The cheap steps come first, and real load decides.

    time       each engine alone, batch by batch: seconds                    -> failed
    judge      each compiled artefact on held-out data                       -> over budget
    predict    a simulated batching server on the measured service times     -> dominated
    race       a real server under real load, at the incumbent's rate        -> beaten
    confirm    the winner on fresh seeds and the untouched test set          -> won

The untouched baseline is always measured too. Every measurement is on file before the next one starts, and what is
asked next depends on nothing but the measurements: a killed search goes on where it was.
"""

from __future__ import annotations

import dataclasses
import datetime
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.capacity import ServiceProfile, best_batch, predicted_capacity
from rushhour.compress import judge, outputs_of
from rushhour.data import Dataset, Split
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.journal import Journal
from rushhour.load import Estimate, Generator, Probe, estimate, find_capacity
from rushhour.machine import cores, describe
from rushhour.measurement import Accuracy, Measurement, Outcome, ServiceTimes
from rushhour.plan import Evidence, Fate, OperatingPoint, Plan, Rung, Trial
from rushhour.progress import Progress
from rushhour.tune.space import Candidate, baseline, candidates, plain
from rushhour.tune.trial import Bench, plan_of

_ATTEMPTS = 2
_RUNNERS_UP = 1
"""That are tried where the winner cannot be confirmed."""
_NEARLY = 0.9
"""Of what is estimated of the winner, a runner-up has to be proven to carry."""
_PROOFS = 6
"""Windows of one confirmation, at most."""
_LONGEST_PROOF = 6.0
"""Times `TuneSettings.proof_s`, at most, that a window of a confirmation grows to."""
_ROUGH = 2.0
"""How much coarser and shorter the searches are that only show what a step bought."""


class TuneSettings(msgspec.Struct, frozen=True):
    """How the search goes about it.

    Attributes:
        seed: of all arrival schedules; equal seeds ask equal questions.
        keep: a candidate predicted below this share of the best prediction is not loaded. Predictions leave out what
            serving costs beside the engine, which is the same for all, so they are trusted this far and no further.
        race: candidates that are loaded, at most, beside those that the ladder needs.
        resolution: highest passing over lowest failing rate at the end of a search, at most 1 + this.
        window_s: length of one load window on the way; longer where the SLO needs more requests.
        proof_s: length of a window that something is claimed from. A queue is slow in long waves; a short window
            near its capacity proves little.
    """

    seed: int = 0
    keep: float = 0.6
    race: int = 4
    resolution: float = 0.05
    window_s: float = 3.0
    proof_s: float = 10.0


@dataclasses.dataclass
class _State:
    """A candidate and what is known of it so far."""

    candidate: Candidate
    accuracy: Accuracy | None = None
    predicted: float | None = None
    capacity: float | None = None
    proven: bool = False
    p99_ms: float | None = None
    windows: list[Measurement] = dataclasses.field(default_factory=list)
    """Of load, in the order asked. Not those on file: a search that goes on must ask what it asked before."""
    fate: Fate | None = None
    why: str = ""

    def end(self, fate: Fate, why: str) -> None:
        self.fate, self.why = fate, why


def tune(
    bundles: dict[str, Bundle],
    dataset: Dataset,
    goal: Goal,
    *,
    run: Path,
    settings: TuneSettings,
    progress: Progress,
    trusted: tuple[str, ...] = (),
) -> Plan:
    """Find the way to serve that carries the most requests per second inside the goal, and prove it.

    Args:
        bundles: role -> bundle, each in the folder `bundles/ROLE` of the run; `reference` must be among them.
        dataset: for accuracy: validation decides, test confirms.
        goal: the limits.
        run: the run's folder; `measurements.jsonl` there is used and added to.
        settings: of the search.
        progress: hears of every step.
        trusted: as in `open_engine`, for the torch baseline.

    Returns:
        The plan. Where nothing met the goal it is the nearest miss, with `feasible` false. It is not saved here.

    Raises:
        EngineError: if not even the reference can be run.
        LoadError: if load cannot be generated.
        StorageError: if the disk does not take a measurement.
    """
    return _Tuner(bundles, dataset, goal, run, settings, progress, trusted).plan()


class _Tuner:
    def __init__(
        self,
        bundles: dict[str, Bundle],
        dataset: Dataset,
        goal: Goal,
        run: Path,
        settings: TuneSettings,
        progress: Progress,
        trusted: tuple[str, ...],
    ) -> None:
        self._bundles = bundles
        self._dataset = dataset
        self._goal = goal
        self._run = run
        self._settings = settings
        self._progress = progress
        self._trusted = trusted
        self._journal = Journal(run / "measurements.jsonl")
        self._reference_outputs: dict[str, NDArray[Any]] = {}
        self._ratio = 0.6
        """Capacity under load over prediction, as last seen: where the next search begins."""

    def plan(self) -> Plan:
        reference = self._bundles["reference"]
        base = _State(baseline(reference, cores()) or plain(reference, cores()))
        first_rung = _State(plain(reference, cores()))
        states = [_State(candidate) for candidate in candidates(self._bundles, cores())]
        self._time(states)
        self._judge(states)
        racing = self._rank(states)
        with Generator() as generator:
            self._bench = Bench(self._journal, generator, self._goal, self._run, self._trusted)
            winner = self._race(racing)
            compiled = self._compiled_rung(states, winner)
            self._load_plainly(first_rung, rough=True)
            self._load_plainly(base)
            base.end("baseline", "the untouched model: torch eager, one sample at a time")
            winner, confirmed = self._confirmed([winner, *(state for state in racing if state is not winner)])
        ladder = self._ladder(base, first_rung, compiled, winner)
        return self._answer(winner, confirmed, base, [base, first_rung, *states], ladder)

    # Service times: the engine alone.

    def _time(self, states: list[_State]) -> None:
        self._progress.start("Timing each engine alone", len(states))
        for state in states:
            try:
                times = self._service_times(state.candidate)
            except EngineError as error:
                state.end("failed", str(error))
                self._progress.advance(note=f"{state.candidate.artefact}: {error.what}")
                continue
            self._predict(state, times)
            self._progress.advance(note=f"{state.candidate.compiled}: {max(times.throughput):,.0f}/s")
        best = max((state.predicted or 0.0 for state in states), default=0.0)
        self._progress.done(f"best prediction {best:,.0f} requests/s")
        if all(state.fate == "failed" for state in states):
            raise EngineError("no engine can run the reference model", states[0].why)

    def _service_times(self, candidate: Candidate) -> ServiceTimes:
        bundle = self._bundles[candidate.bundle]

        def take() -> ServiceTimes:
            engine = open_engine(bundle, candidate.engine_config(), trusted=self._trusted)
            try:
                return time_service(engine, bundle, self._goal.slo.limit_s)
            finally:
                engine.close()

        return self._journal.measure("service", candidate.compiled, "", ServiceTimes, take)

    def _predict(self, state: _State, times: ServiceTimes) -> None:
        """Choose the batch bound by simulation, of the sizes timed."""
        bound, state.predicted = best_batch(times, streams=state.candidate.streams, slo=self._goal.slo)
        state.candidate = state.candidate.with_batch(bound)

    # Accuracy: each compiled artefact on held-out data.

    def _judge(self, states: list[_State]) -> None:
        alive = [state for state in states if state.fate is None]
        self._progress.start("Measuring accuracy on held-out data", len(alive))
        budget = self._goal.budget
        for state in alive:
            try:
                state.accuracy = self._accuracy(state.candidate, "validation", self._dataset.validation)
            except EngineError as error:
                state.end("failed", str(error))
                self._progress.advance()
                continue
            drop = state.accuracy.drop
            if drop > budget.max_drop:
                state.end("over budget", f"{state.accuracy.metric} falls by {drop * 100:.2f} points, allowed {budget}")
            self._progress.advance(note=f"{state.candidate.artefact}: {state.accuracy.value:.4f}")
        inside = sum(state.fate is None for state in alive)
        self._progress.done(f"{inside} of {len(alive)} candidates inside {budget}")

    def _accuracy(self, candidate: Candidate, part: str, split: Split) -> Accuracy:
        reference = plain(self._bundles["reference"], cores())

        def take() -> Accuracy:
            if part not in self._reference_outputs:
                self._reference_outputs[part] = self._outputs(reference, split)
            expected = self._reference_outputs[part]
            if candidate.artefact == reference.artefact:
                return judge(self._dataset.task, part, split.targets, expected, None)
            return judge(self._dataset.task, part, split.targets, self._outputs(candidate, split), expected)

        return self._journal.measure("accuracy", candidate.artefact, part, Accuracy, take)

    def _outputs(self, candidate: Candidate, split: Split) -> NDArray[Any]:
        config = EngineConfig(
            engine=candidate.engine, precision=candidate.precision, streams=cores(), threads=1, max_batch=64
        )
        return outputs_of(self._bundles[candidate.bundle], config, split, trusted=self._trusted)

    # The race: real servers under real load.

    def _rank(self, states: list[_State]) -> list[_State]:
        """Those worth loading, best prediction first; the others get their fate."""
        alive = sorted((s for s in states if s.fate is None), key=lambda s: -(s.predicted or 0.0))
        if not alive:
            raise EngineError("nothing can be served", states[0].why, "mend the model, or name another")
        best = alive[0].predicted or 0.0
        for position, state in enumerate(alive):
            predicted = state.predicted or 0.0
            if predicted < self._settings.keep * best or position >= self._settings.race:
                state.end("dominated", f"predicted {predicted:,.0f}/s, the best prediction is {best:,.0f}/s")
        return [state for state in alive if state.fate is None]

    def _race(self, racing: list[_State]) -> _State:
        incumbent: _State | None = None
        for state in racing:
            if incumbent is None or not incumbent.capacity:
                self._search(state)
                beaten = incumbent is None or (state.capacity or 0) > (incumbent.capacity or 0)
                incumbent = state if beaten else incumbent
            elif self._challenge(state, incumbent):
                self._search(state)
                if (state.capacity or 0) > (incumbent.capacity or 0):
                    incumbent = state
        assert incumbent is not None
        for state in racing:
            if state is not incumbent and state.fate is None:
                state.end("beaten", f"by {incumbent.candidate} at {incumbent.capacity or 0:,.0f}/s")
        return incumbent

    def _challenge(self, state: _State, incumbent: _State) -> bool:
        """Does it hold more than the incumbent does? One window at 3% above decides."""
        rate = float(f"{(incumbent.capacity or 0) * 1.03:.4g}")
        self._progress.start(f"Can {_short(state.candidate)} carry {rate:,.0f}/s?")
        try:
            with self._bench.load(state.candidate, self._bundles[state.candidate.bundle], "challenge") as probe:
                result = self._noted(state, probe(self._settings.proof_s))(rate, self._settings.seed)
        except EngineError as error:
            state.end("failed", str(error))
            self._progress.done(error.what)
            return False
        self._progress.done(f"{result.outcome}: {result.reason}")
        # Not proven is not beaten: only its own search can tell.
        undecided = result.outcome is Outcome.INCONCLUSIVE and result.late <= result.n * result.slo.allowed_miss_rate
        if result.outcome is Outcome.PASS or undecided:
            return True
        state.end("beaten", f"at {rate:,.0f}/s: {result.outcome}, {result.reason}")
        state.p99_ms = result.p99_ms
        return False

    def _search(self, state: _State, *, rough: bool = False) -> None:
        """Its capacity, confirmed on a fresh seed; `rough` for a step on the ladder, which decides nothing."""
        step = _ROUGH if rough else 1.0
        expected = (state.predicted or 100.0) * self._ratio
        self._progress.start(f"Searching the capacity of {_short(state.candidate)}")
        try:
            with self._bench.load(state.candidate, self._bundles[state.candidate.bundle], "search") as probe:
                for attempt in range(_ATTEMPTS):
                    search = find_capacity(
                        self._noted(state, probe(self._settings.window_s)),
                        confirm=self._noted(state, probe(self._settings.proof_s / step)),
                        start_rps=max(1.0, 0.8 * expected),
                        slo=self._goal.slo,
                        resolution=1 + step * self._settings.resolution,
                        seed=self._settings.seed + attempt,
                    )
                    if search.proven:
                        break
                    # A neighbour that takes the cores for a minute fails every window; it is gone the next time.
                    self._progress.advance(note=f"once more, because {search.reason}")
        except EngineError as error:
            state.end("failed", str(error))
            self._progress.done(error.what)
            return
        state.capacity, state.proven = search.capacity_rps, search.proven
        if search.confirmed is not None:
            state.p99_ms = search.confirmed.p99_ms
            if state.predicted:
                self._ratio = min(1.5, max(0.1, search.capacity_rps / state.predicted))
        how = "" if search.proven or not search.capacity_rps else ", estimated, not proven"
        self._progress.done(f"{search.capacity_rps:,.0f} requests/s inside {self._goal.slo}{how}")

    def _noted(self, state: _State, probe: Probe) -> Probe:
        def noted(rate: float, seed: int) -> Measurement:
            result = probe(rate, seed)
            state.windows.append(result)
            self._progress.advance(note=f"{rate:,.0f}/s: {result.outcome}")
            return result

        return noted

    def _load_plainly(self, state: _State, *, rough: bool = False) -> None:
        """A candidate that is measured for comparison only: how fast is it, and how right?"""
        profile = ServiceProfile(self._service_times(state.candidate))
        bound = state.candidate.policy.max_batch
        state.predicted = predicted_capacity(
            profile, streams=state.candidate.streams, max_batch=bound, slo=self._goal.slo
        )
        state.accuracy = self._accuracy(state.candidate, "validation", self._dataset.validation)
        self._search(state, rough=rough)
        if state.fate is None:
            state.end("beaten", "compiled, but one sample at a time: measured to show what batching buys")

    def _compiled_rung(self, states: list[_State], winner: _State) -> _State | None:
        """The best way to serve the reference in full precision, under load: what compiling and batching buy."""
        full = [s for s in states if s.candidate.bundle == "reference" and s.candidate.precision == "f32"]
        full = sorted((s for s in full if s.fate != "failed"), key=lambda s: -(s.predicted or 0.0))
        if not full or winner in full:
            return None
        if full[0].capacity is None:
            self._search(full[0], rough=True)
        return full[0]

    # The answer.

    def _confirmed(self, ranked: list[_State]) -> tuple[_State, Measurement | None]:
        """The winner of the race, confirmed; where it cannot be, a runner-up that can and carries nearly as much.

        Where there is none the winner keeps what is estimated of it: a proof of clearly less is no better answer.

        Args:
            ranked: the winner, then the others that raced.
        """
        winner, *others = ranked
        confirmed = self._confirm(winner) if winner.capacity else None
        if confirmed is not None or not winner.capacity:
            return winner, confirmed
        least = _NEARLY * winner.capacity
        for state in sorted(others, key=lambda state: -(state.capacity or state.predicted or 0.0))[:_RUNNERS_UP]:
            if state.capacity is None and state.fate != "failed":
                self._search(state)
            if (state.capacity or 0.0) < least:
                continue
            confirmed = self._confirm(state)
            if confirmed is not None and confirmed.rate_rps >= least:
                winner.end("beaten", f"it could not be confirmed on fresh seeds: {winner.why}")
                return state, confirmed
        return winner, None

    def _confirm(self, state: _State) -> Measurement | None:
        """A candidate again, on fresh seeds and longer windows.

        The first window is at the rate that its search gave. Each that is no proof lowers the rate to the lower end of
        what all windows of this candidate tell by then, and the next is longer, as far as the last one asks for it.
        Where none is a proof, the candidate keeps that estimate.
        """
        rate, window_s = state.capacity or 0.0, self._settings.proof_s
        self._progress.start(f"Confirming {_short(state.candidate)} on fresh seeds")
        with self._bench.load(state.candidate, self._bundles[state.candidate.bundle], "confirm") as probe:
            for attempt in range(_PROOFS):
                rate = float(f"{rate:.4g}")
                result = self._noted(state, probe(window_s))(rate, self._settings.seed + 10_000 + attempt)
                if result.outcome is Outcome.PASS:
                    state.capacity, state.proven, state.p99_ms = result.rate_rps, True, result.p99_ms
                    self._progress.done(f"{state.capacity:,.0f} requests/s")
                    return result
                if result.outcome.refutes or result.outcome is Outcome.INCONCLUSIVE:
                    found = self._estimate(state)
                    rate = min(0.97 * rate, found.interval_rps[0]) if found is not None else 0.9 * rate
                    asked = result.duration_s + (result.needs_s or 0.0)
                    window_s = float(f"{min(_LONGEST_PROOF * self._settings.proof_s, max(window_s, asked)):.3g}")
        found = self._estimate(state)
        state.capacity, state.proven, state.p99_ms = (found.rate_rps if found else 0.0), False, None
        state.why = f"{found} keep {self._goal.slo}" if found else "nothing could be confirmed"
        self._progress.done(state.why)
        return None

    def _estimate(self, state: _State) -> Estimate | None:
        """What all windows of a candidate tell."""
        return estimate(state.windows, self._goal.slo, seed=self._settings.seed)

    def _refuted(self, state: _State) -> bool:
        """Whether a window proved that it does not hold what it is said to."""
        capacity = state.capacity or 0.0
        return any(window.outcome.refutes and window.rate_rps <= capacity for window in state.windows)

    def _ladder(self, base: _State, first: _State, compiled: _State | None, winner: _State) -> tuple[Rung, ...]:
        last = "quantised" if winner.candidate.precision == "int8" else f"in {winner.candidate.precision}"
        steps = [("as it is", base), ("compiled", first)]
        if compiled is not None:
            steps.append(("batched", compiled))
        steps.append((last if compiled is not None else "batched", winner))
        return tuple(
            Rung(
                step=step,
                candidate=str(state.candidate),
                capacity_rps=state.capacity or 0.0,
                p99_ms=state.p99_ms,
                accuracy=state.accuracy.value if state.accuracy else None,
                name=state.candidate.name,
            )
            for step, state in steps
        )

    def _answer(
        self,
        winner: _State,
        confirmed: Measurement | None,
        base: _State,
        states: list[_State],
        ladder: tuple[Rung, ...],
    ) -> Plan:
        reference, bundle = self._bundles["reference"], self._bundles[winner.candidate.bundle]
        before = self._accuracy(plain(reference, cores()), "test", self._dataset.test)
        after = self._accuracy(winner.candidate, "test", self._dataset.test)
        found = self._estimate(winner)
        holds = confirmed is not None or (bool(winner.capacity) and not self._refuted(winner))
        feasible = holds and after.drop <= self._goal.budget.max_drop
        why = "the highest confirmed rate" if confirmed is not None else f"the highest estimate: {winner.why}"
        winner.end("won", why if feasible else "the nearest miss: nothing met the whole goal")
        evidence = Evidence(
            capacity_rps=winner.capacity or 0.0,
            lowest_failing_rps=self._lowest_failing(winner),
            p99_ms=confirmed.p99_ms if confirmed else None,
            p99_interval_ms=confirmed.p99_interval_ms if confirmed else None,
            metric=after.metric,
            accuracy=after.value,
            accuracy_interval=after.interval,
            accuracy_drop=after.drop,
            accuracy_drop_interval=after.drop_interval,
            reference_accuracy=before.value,
            reference_accuracy_interval=before.interval,
            baseline_capacity_rps=base.capacity or 0.0,
            baseline_p99_ms=base.p99_ms,
            parameters=bundle.manifest.parameters,
            model_bytes=bundle.model_bytes,
            reference_parameters=reference.manifest.parameters,
            reference_model_bytes=reference.model_bytes,
            machine=describe(),
            at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            trials=tuple(_trial(state) for state in states),
            ladder=ladder,
            proven=confirmed is not None,
            capacity_interval_rps=found.interval_rps if found is not None else None,
        )
        plan = plan_of(winner.candidate, bundle, self._goal)
        return msgspec.structs.replace(
            plan, operating_points=self._operating_points(winner), evidence=evidence, feasible=feasible
        )

    def _windows(self, state: _State) -> list[Measurement]:
        subject = str(state.candidate)
        return [
            entry.reading
            for entry in self._journal
            if entry.subject == subject and isinstance(entry.reading, Measurement) and entry.machine == describe()
        ]

    def _lowest_failing(self, state: _State) -> float | None:
        capacity = state.capacity or 0.0
        failing = [
            window.rate_rps for window in self._windows(state) if window.outcome.refutes and window.rate_rps > capacity
        ]
        return min(failing, default=None)

    def _operating_points(self, state: _State) -> tuple[OperatingPoint, ...]:
        windows = sorted(self._windows(state), key=lambda window: window.rate_rps)
        return tuple(
            OperatingPoint(window.rate_rps, window.p50_ms, window.p99_ms, window.outcome.value) for window in windows
        )


def _short(candidate: Candidate) -> str:
    policy = candidate.policy
    cells = f"{policy.cells} cells of " if policy.cells > 1 else ""
    return (
        f"{candidate.bundle} on {candidate.engine} {candidate.precision}, "
        f"{cells}{policy.streams}x{policy.threads} threads, batch <= {policy.max_batch}"
    )


def _trial(state: _State) -> Trial:
    accuracy = state.accuracy
    return Trial(
        candidate=str(state.candidate),
        bundle=state.candidate.bundle,
        engine=state.candidate.engine,
        precision=state.candidate.precision,
        policy=state.candidate.policy,
        accuracy=accuracy.value if accuracy else None,
        accuracy_drop=accuracy.drop if accuracy else None,
        accuracy_drop_interval=accuracy.drop_interval if accuracy else None,
        predicted_rps=state.predicted,
        capacity_rps=state.capacity,
        p99_ms=state.p99_ms,
        fate=state.fate or "failed",
        why=state.why,
        name=state.candidate.name,
    )
