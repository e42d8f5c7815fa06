"""The joint search: goal in, Plan out. The cheap steps come first, and real load decides.

    time       each engine alone, batch by batch: seconds                    -> failed
    judge      each compiled artefact on held-out data                       -> over budget
    predict    a simulated batching server on the measured service times     -> dominated
    race       two real servers at a time, interleaved, under real load       -> beaten, tied
    confirm    the winner on fresh seeds and the untouched test set          -> won

The untouched baseline is always measured too. Every measurement is on file before the next one starts, and what is
asked next depends on nothing but the measurements, and on the time that is left where there is a budget: a killed
search goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.capacity import Overhead, ServiceProfile, best_batch, predicted_capacity
from rushhour.clock import Clock, WallClock
from rushhour.compress import judge, outputs_of
from rushhour.data import Dataset, Split
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.journal import Journal
from rushhour.load import Estimate, Generator, Probe, Race, estimate, find_capacity, race
from rushhour.machine import cores, describe
from rushhour.measurement import Accuracy, Measurement, Outcome, ServiceTimes
from rushhour.plan import Evidence, Fate, OperatingPoint, Plan, Rung, Trial
from rushhour.progress import Progress
from rushhour.tune.space import Candidate, baseline, candidates, plain
from rushhour.tune.trial import Bench, Loaded, plan_of

_PUSH, _PUSHES, _FULL = 1.25, 5, 0.95
"""More than a candidate is thought to carry: by so much, doubled so often while it answers so much of it in time."""
_START = 0.75
"""Of what meets the limit when more is asked than can be carried: where the search for the capacity begins."""
_RACE_S, _RACE_LIMITS, _RACE_N = 0.3, 6.0, 60
"""A race's windows are so long, at least so many times the limit, and hold at least so many requests."""
_RUNNERS_UP = 1
"""That are tried where the winner cannot be confirmed."""
_NEARLY = 0.9
"""Of what is estimated of the winner, a runner-up has to be proven to carry."""
_PROOFS = 6
"""Windows of one confirmation, at most."""
_LONGEST_PROOF = 6.0
"""Times `TuneSettings.proof_s`, at most, that a window of a confirmation grows to."""
_LOWER = 0.85
"""Of an estimate: a proof begins no lower, however uncertain the estimate."""
_ROUGH = 2.0
"""How much coarser and shorter the searches are that only show what a step bought."""
_FOR_PROOF, _FOR_RUNGS, _FOR_WAY = 0.5, 0.12, 0.2
"""Shares of the budget: left for the winner's capacity and its proof; left for the ladder's other steps; for the
estimate of one capacity, at most."""
_IN_WORDS = {
    Outcome.PASS: "holds",
    Outcome.FAIL: "does not hold",
    Outcome.INCONCLUSIVE: "not clear yet",
    Outcome.UNSTABLE: "the server fell behind",
    Outcome.GENERATOR_LIMITED: "the load generator was at its limit",
    Outcome.VOID: "the machine was disturbed",
}


class TuneSettings(msgspec.Struct, frozen=True):
    """How the search goes about it.

    Attributes:
        seed: of all arrival schedules; equal seeds ask equal questions.
        keep: a candidate predicted below this share of the best prediction is not raced.
        race: candidates that are raced, at most.
        resolution: highest passing over lowest failing rate at the end of a search, at most 1 + this.
        window_s: length of one load window on the way; longer where the SLO needs more requests.
        proof_s: length of a window that something is claimed from. A queue is slow in long waves; a short window
            near its capacity proves little.
        budget_s: seconds that all of it may take, about: what decides least is left out, and said so. None: as long as
            it takes. A search that goes on has all of it again.
    """

    seed: int = 0
    keep: float = 0.7
    race: int = 4
    resolution: float = 0.05
    window_s: float = 3.0
    proof_s: float = 10.0
    budget_s: float | None = None


@dataclasses.dataclass
class _State:
    """A candidate and what is known of it so far."""

    candidate: Candidate
    accuracy: Accuracy | None = None
    predicted: float | None = None
    goodput: float | None = None
    """Answers a second inside the limit where more was asked than it can carry."""
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
    clock: Clock | None = None,
    so_far: Callable[[Plan], None] = lambda plan: None,
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
        clock: what the budget is read on.
        so_far: is given the best plan whenever there is a better one; before its proof it has no evidence.

    Returns:
        The plan. Where nothing met the goal it is the nearest miss, with `feasible` false. It is not saved here.

    Raises:
        EngineError: if not even the reference can be run.
        LoadError: if load cannot be generated.
        StorageError: if the disk does not take a measurement.
    """
    return _Tuner(bundles, dataset, goal, run, settings, progress, trusted, clock or WallClock(), so_far).plan()


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
        clock: Clock,
        so_far: Callable[[Plan], None],
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
        self._overhead = Overhead()
        """Of serving, as the first candidate under load showed it; none before."""
        self._clock, self._so_far = clock, so_far
        self._budget_s = math.inf if settings.budget_s is None else settings.budget_s
        self._ends_at = clock.now() + self._budget_s

    def plan(self) -> Plan:
        reference = self._bundles["reference"]
        base = _State(baseline(reference, cores()) or plain(reference, cores()))
        first_rung = _State(plain(reference, cores()))
        states = [_State(candidate) for candidate in candidates(self._bundles, cores())]
        self._time(states)
        self._judge(states)
        alive = sorted((s for s in states if s.fate is None), key=lambda s: -(s.predicted or 0.0))
        if not alive:
            raise EngineError("nothing can be served", states[0].why, "mend the model, or name another")
        with Generator() as generator:
            self._bench = Bench(self._journal, generator, self._goal, self._run, self._trusted)
            self._load_plainly(base)
            base.end("baseline", "the untouched model: torch eager, one sample at a time")
            winner, confirmed = self._confirmed(self._race(alive))
            self._so_far(self._answer(winner, confirmed, base, [base, *states], self._ladder(base, [], winner)))
            rungs = self._rungs(first_rung, states, winner)
        ladder = self._ladder(base, rungs, winner)
        measured = [first_rung] if first_rung.capacity is not None else []
        return self._answer(winner, confirmed, base, [base, *measured, *states], ladder)

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
        bound, state.predicted = best_batch(
            times, streams=state.candidate.streams, slo=self._goal.slo, overhead=self._overhead_of(state.candidate)
        )
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

    # Under load: real servers.

    def _race(self, alive: list[_State]) -> list[_State]:
        """The one that carries most, by races of two, then those that raced it, best first.

        Args:
            alive: those inside the budget, best prediction first.
        """
        ready = (state for state in alive if state.fate is None and self._push(state))
        incumbent = next(ready, None)
        if incumbent is None:
            raise EngineError("nothing can be served", alive[0].why, "mend the model, or name another")
        self._learn_overhead(incumbent)
        self._so_far(plan_of(incumbent.candidate, self._bundles[incumbent.candidate.bundle], self._goal))
        rivals = self._rank(incumbent, [state for state in alive if state.fate is None and state is not incumbent])
        raced = [incumbent]
        with contextlib.ExitStack() as stack:
            loaded = stack.enter_context(self._loaded(incumbent, "race"))
            for rival in rivals:
                if self._left_s() < _FOR_PROOF * self._budget_s:
                    rival.end("skipped", "the time was up before it could race")
                    continue
                with contextlib.ExitStack() as own:
                    theirs = own.enter_context(self._loaded(rival, "race"))
                    ended = self._duel(incumbent, loaded, rival, theirs, len(rivals))
                    raced.append(rival)
                    if ended is None or ended.order != "faster":
                        continue
                    stack.close()
                    stack = own.pop_all()
                    incumbent, loaded = rival, theirs
                    self._so_far(plan_of(rival.candidate, self._bundles[rival.candidate.bundle], self._goal))
            stack.close()
        others = [state for state in raced if state is not incumbent and state.fate != "failed"]
        return [incumbent, *sorted(others, key=lambda state: -(state.goodput or 0.0))]

    def _loaded(self, state: _State, phase: str) -> contextlib.AbstractContextManager[Loaded]:
        return self._bench.load(state.candidate, self._bundles[state.candidate.bundle], phase)

    def _push(self, state: _State) -> bool:
        """See how many answers meet the limit where more is asked than it can carry; whether it runs at all."""
        rate = _PUSH * (state.predicted or 100.0)
        self._progress.start(f"{state.candidate.name}: how much at most?")
        try:
            with self._loaded(state, "push") as loaded:
                for attempt in range(_PUSHES):
                    rate = float(f"{rate:.4g}")
                    window = loaded.glances(1.0)(rate, self._settings.seed + 20_000 + attempt)
                    state.goodput = max(window.goodput_rps, 1 / window.duration_s)
                    if window.goodput_rps < _FULL * rate:
                        break
                    rate *= 2
        except EngineError as error:
            state.end("failed", str(error))
            self._progress.done(error.what, good=False)
            return False
        self._progress.done(f"about {state.goodput:,.0f} requests/s")
        return True

    def _learn_overhead(self, state: _State) -> None:
        """What serving costs beside the engine, from the first candidate that was loaded: it is the same for all."""
        candidate = state.candidate
        self._overhead = Overhead.seen(
            ServiceProfile(self._service_times(candidate)),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            spare=_spare(candidate),
            most_rps=state.goodput or 1.0,
        )
        self._predict_again(state)

    def _predict_again(self, state: _State) -> None:
        """With what serving costs; its bound on batches stays, because windows are on file under that name."""
        candidate = state.candidate
        state.predicted = predicted_capacity(
            ServiceProfile(self._service_times(candidate)),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            slo=self._goal.slo,
            overhead=self._overhead_of(candidate),
        )

    def _overhead_of(self, candidate: Candidate) -> Overhead:
        return dataclasses.replace(self._overhead, spare=_spare(candidate))

    def _rank(self, incumbent: _State, rivals: list[_State]) -> list[_State]:
        """Those worth a race, best prediction first; the others get their fate."""
        for state in rivals:
            self._predict(state, self._service_times(state.candidate))
        rivals = sorted(rivals, key=lambda state: -(state.predicted or 0.0))
        best = max(state.predicted or 0.0 for state in (incumbent, *rivals))
        for position, state in enumerate(rivals, 1):
            predicted = state.predicted or 0.0
            if predicted < self._settings.keep * best or position >= self._settings.race:
                state.end("dominated", f"predicted {predicted:,.0f}/s, the best prediction is {best:,.0f}/s")
        return [state for state in rivals if state.fate is None]

    def _duel(self, incumbent: _State, ours: Loaded, rival: _State, theirs: Loaded, rivals: int) -> Race | None:
        """Which of two carries more? None where the rival does not run."""
        most = incumbent.goodput or 1.0
        rate = float(f"{_PUSH * max(most, min(rival.predicted or 0.0, 2 * most)):.4g}")
        limit_s, seed = self._goal.slo.limit_s, self._settings.seed + 30_000
        window_s = float(f"{max(_RACE_S, _RACE_LIMITS * limit_s, _RACE_N / rate):.3g}")
        self._progress.start(f"{rival.candidate.name} against {incumbent.candidate.name}")

        def ask(loaded: Loaded) -> Callable[[int], Measurement]:
            probe = loaded.pushes(window_s, max(0.1, 3 * limit_s))

            def taken(with_seed: int) -> Measurement:
                window = probe(rate, with_seed)
                self._progress.advance()
                return window

            return taken

        try:
            for loaded in (ours, theirs):
                loaded.glances(0.5)(rate, seed - 1)  # a server just started
            ended = race(
                ask(ours),
                ask(theirs),
                seed=seed,
                rivals=rivals,
                is_over=lambda: self._left_s() < _FOR_PROOF * self._budget_s,
            )
        except EngineError as error:
            rival.end("failed", str(error))
            self._progress.done(error.what, good=False)
            return None
        incumbent.goodput, rival.goodput = ended.goodput_rps
        if ended.order == "faster":
            incumbent.end("beaten", f"{rival.candidate.name} carries {ended}")
        elif ended.order == "slower":
            rival.end("beaten", f"it carries {ended} of what {incumbent.candidate.name} does")
        else:
            rival.end("tied", f"it carries {ended} of what {incumbent.candidate.name} does")
        said = {"faster": "it carries more", "slower": "it carries less", "tie": "a tie"}[ended.order]
        self._progress.done(f"{said}: {ended}", good=ended.order == "faster")
        return ended

    def _approach(self, state: _State, *, rough: bool = False) -> None:
        """Its capacity, estimated; `rough` for a step on the ladder, which decides nothing."""
        step = _ROUGH if rough else 1.0
        self._progress.start(f"{state.candidate.name}: how much inside {self._goal.slo}?")
        try:
            with self._loaded(state, "search") as loaded:
                search = find_capacity(
                    self._noted(state, loaded.glances(self._settings.window_s / step)),
                    start_rps=_START * (state.goodput or 100.0),
                    slo=self._goal.slo,
                    resolution=1 + step * self._settings.resolution,
                    seed=self._settings.seed,
                    prove=False,
                    budget_s=_FOR_WAY / step * self._budget_s,
                )
        except EngineError as error:
            state.end("failed", str(error))
            self._progress.done(error.what, good=False)
            return
        state.capacity, state.proven = search.capacity_rps, False
        said = f"about {search.capacity_rps:,.0f} requests/s" if search.capacity_rps else "nothing: too slow"
        self._progress.done(said, good=search.capacity_rps > 0)

    def _noted(self, state: _State, probe: Probe) -> Probe:
        def noted(rate: float, seed: int) -> Measurement:
            result = probe(rate, seed)
            state.windows.append(result)
            self._progress.advance(note=f"{rate:,.0f}/s: {_IN_WORDS[result.outcome]}")
            return result

        return noted

    def _load_plainly(self, state: _State) -> None:
        """A candidate that is measured for comparison only: how fast is it, and how right?"""
        self._predict_again(state)
        state.accuracy = self._accuracy(state.candidate, "validation", self._dataset.validation)
        if self._push(state):
            self._approach(state, rough=True)
        if state.fate is None:
            state.end("beaten", "compiled, but one sample at a time: measured to show what batching buys")

    def _rungs(self, first: _State, states: list[_State], winner: _State) -> list[tuple[str, _State]]:
        """What is measured to show what each step bought, while there is time: compiled; then batched, too."""
        full = [s for s in states if s.candidate.bundle == "reference" and s.candidate.precision == "f32"]
        full = sorted((s for s in full if s.fate != "failed"), key=lambda s: -(s.predicted or 0.0))
        wanted = [("batched", full[0])] if full and winner not in full else []
        measured = []
        for step, state in [*wanted, ("compiled", first)]:
            if self._left_s() <= 0:
                self._progress.start(f'What "{step}" buys')
                self._progress.done("skipped: the time was up", good=False)
                continue
            if state is first:
                self._load_plainly(state)
            elif state.capacity is None and (state.goodput is not None or self._push(state)):
                self._approach(state, rough=True)
            if state.capacity is not None:
                measured.append((step, state))
        return measured[::-1]

    # The answer.

    def _confirmed(self, ranked: list[_State]) -> tuple[_State, Measurement | None]:
        """The winner of the races, confirmed; where it cannot be, a runner-up that can and carries nearly as much.

        Where there is none the winner keeps what is estimated of it: a proof of clearly less is no better answer.

        Args:
            ranked: the winner, then the others that raced.
        """
        winner, *others = ranked
        self._approach(winner)
        confirmed = self._confirm(winner) if winner.capacity else None
        if confirmed is not None:
            return winner, confirmed
        least = _NEARLY * (winner.capacity or 0.0)
        for state in others[:_RUNNERS_UP]:
            if self._left_s() < _FOR_RUNGS * self._budget_s:
                break
            self._approach(state)
            if (state.capacity or 0.0) <= least:
                continue
            confirmed = self._confirm(state)
            if confirmed is not None and confirmed.rate_rps >= least:
                winner.end("beaten", f"it could not be confirmed on fresh seeds: {winner.why}")
                return state, confirmed
        return winner, None

    def _confirm(self, state: _State) -> Measurement | None:
        """A proof of a candidate's capacity, on fresh seeds.

        It begins at the lower end of what all windows of this candidate tell by then. A proof raises the rate, half
        way to what was not proven; any other window lowers it to the lower end of the estimate as it is then, and the
        next one is longer, as far as the last one asks for it. Where none is a proof, the candidate keeps the estimate.
        """
        found = self._estimate(state)
        if found is None:
            return None
        proven: Measurement | None = None
        ceiling, window_s = found.interval_rps[1], self._settings.proof_s
        rate = max(found.interval_rps[0], _LOWER * found.rate_rps)
        self._progress.start(f"{state.candidate.name}: proof on fresh seeds")
        with self._loaded(state, "confirm") as loaded:
            for attempt in range(_PROOFS):
                if attempt and self._left_s() < _FOR_RUNGS * self._budget_s:
                    break
                rate = float(f"{rate:.4g}")
                probe = self._noted(state, loaded.windows(float(f"{window_s:.3g}")))
                result = probe(rate, self._settings.seed + 10_000 + attempt)
                if result.outcome is Outcome.PASS:
                    proven = result
                else:
                    ceiling = min(ceiling, rate)
                    asked_s = result.duration_s + (result.needs_s or 0.0)
                    window_s = min(_LONGEST_PROOF * self._settings.proof_s, max(window_s, asked_s))
                if proven is not None:
                    self._kept(state, proven)
                    if ceiling <= proven.rate_rps * (1 + self._settings.resolution):
                        break
                    rate = math.sqrt(proven.rate_rps * ceiling)
                elif result.outcome.refutes or result.outcome is Outcome.INCONCLUSIVE:
                    found = self._estimate(state)
                    rate = min(0.97 * rate, found.interval_rps[0]) if found is not None else 0.9 * rate
        if proven is not None:
            self._kept(state, proven)
            self._progress.done(f"{proven.rate_rps:,.0f} requests/s")
            return proven
        found = self._estimate(state)
        state.capacity, state.proven, state.p99_ms = (found.rate_rps if found else 0.0), False, None
        state.why = f"{found} keep {self._goal.slo}" if found else "nothing could be confirmed"
        self._progress.done(state.why, good=False)
        return None

    def _kept(self, state: _State, proven: Measurement) -> None:
        state.capacity, state.proven, state.p99_ms = proven.rate_rps, True, proven.p99_ms

    def _left_s(self) -> float:
        """Seconds of the budget that are left."""
        return self._ends_at - self._clock.now()

    def _estimate(self, state: _State) -> Estimate | None:
        """What all windows of a candidate tell."""
        return estimate(state.windows, self._goal.slo, seed=self._settings.seed)

    def _refuted(self, state: _State) -> bool:
        """Whether a window proved that it does not hold what it is said to."""
        capacity = state.capacity or 0.0
        return any(window.outcome.refutes and window.rate_rps <= capacity for window in state.windows)

    def _ladder(self, base: _State, rungs: list[tuple[str, _State]], winner: _State) -> tuple[Rung, ...]:
        last = "quantised" if winner.candidate.precision == "int8" else f"in {winner.candidate.precision}"
        if not any(step == "batched" for step, _ in rungs):
            last = "batched"
        return tuple(
            Rung(
                step=step,
                candidate=str(state.candidate),
                capacity_rps=state.capacity or 0.0,
                p99_ms=state.p99_ms,
                accuracy=state.accuracy.value if state.accuracy else None,
                name=state.candidate.name,
            )
            for step, state in [("as it is", base), *rungs, (last, winner)]
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
            alone_rps=self._alone(winner),
        )
        plan = plan_of(winner.candidate, bundle, self._goal)
        return msgspec.structs.replace(
            plan, operating_points=self._operating_points(winner), evidence=evidence, feasible=feasible
        )

    def _alone(self, state: _State) -> float | None:
        """Its capacity without the generator on the same machine: measured with it, and predicted from there."""
        windows = [window for window in state.windows if window.outcome in (Outcome.PASS, Outcome.INCONCLUSIVE)]
        if not windows or not state.capacity or not self._overhead.request_s:
            return None
        window = max(windows, key=lambda window: window.rate_rps)
        candidate, whole = state.candidate, self._overhead_of(state.candidate)
        own_s = max(0.0, whole.request_s - window.generator_cpu / window.rate_rps)
        shared, alone = (
            predicted_capacity(
                ServiceProfile(self._service_times(candidate)),
                streams=candidate.streams,
                max_batch=candidate.policy.max_batch,
                slo=self._goal.slo,
                overhead=overhead,
            )
            for overhead in (whole, dataclasses.replace(whole, request_s=own_s))
        )
        return state.capacity * alone / shared if shared else None

    def _windows(self, state: _State) -> list[Measurement]:
        subject = str(state.candidate)
        return [
            entry.reading
            for entry in self._journal
            if entry.subject == subject
            and entry.phase in ("search", "confirm")  # the others ask for more than can be carried
            and isinstance(entry.reading, Measurement)
            and entry.machine == describe()
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


def _spare(candidate: Candidate) -> int:
    """Cores that its engine leaves alone."""
    return max(0, cores() - candidate.streams * candidate.policy.threads)


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
