"""The joint search: a goal in, a Plan out. The cheap steps come first, and real load decides.

    time       each engine alone, batch by batch: seconds                      -> failed
    validate   each compiled artefact on the validation part; then on the      -> over budget
               test part, the smallest drop first, up to the first that misses
    predict    a simulated batching server on the measured service times       -> dominated
    prefer     what is not preferred is left out: --prefer                     -> not preferred
    race       two real servers at a time, interleaved, under real load        -> beaten, tied
    confirm    the winner on fresh seeds                                       -> won
    cascade    pairs of candidates against the winner: --cascade               -> won, beaten

Then the unchanged baseline is measured, always, and what each step between the two bought. With a budget each step has
its share, and the most promising comes first. If a candidate fails, the others go on, and its error is in the plan.
Every measurement is in the journal before the next one starts, and what is measured next depends on the measurements
alone, and on the time left where there is a budget: a search that was killed resumes.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle
from rushhour.clock import Clock, WallClock
from rushhour.compress import why_outside
from rushhour.data import Dataset
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.load import Generator
from rushhour.measurement import Interval, Measurement, Priors
from rushhour.plan import Evidence, LadderStep, Plan, Trial
from rushhour.progress import Progress
from rushhour.records.journal import JOURNAL, Journal
from rushhour.system.machine import cores, describe
from rushhour.tune.accuracy import AccuracyJudge
from rushhour.tune.answer import failed_bundle, lowest_failing, operating_points, recipe_words, steps_of, trial_of
from rushhour.tune.bench import Bench
from rushhour.tune.cascades import Cascades, Pair, cascade_plan
from rushhour.tune.coverage import certified
from rushhour.tune.decisions import Decisions
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.front import Rated, choice, front, measurably_worse, rated
from rushhour.tune.ladder import with_ladder
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.measuring import MeasurementSource
from rushhour.tune.prediction import Predictor
from rushhour.tune.priors import Experience
from rushhour.tune.racing import USUAL, Racing
from rushhour.tune.relaxations import relaxations
from rushhour.tune.server import plan_of
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.space import Candidate, baseline, candidates, padded_lengths, plain
from rushhour.tune.state import CandidateState, failure_reason
from rushhour.tune.timing import Timing

_MEASURED = 10_000
"""Samples of the data whose lengths decide the buckets, at most."""
_RUNNERS_UP = 1
"""Runners-up that are tried where the winner cannot be confirmed."""
_NEARLY = 0.9
"""A runner-up has to be proven at this share of the winner's estimate."""
_WINDOWS, _PROOF_WINDOWS, _BESIDE_S = 10, 3, 1.5
"""Usual windows of a search for a capacity, windows of a proof, and the seconds beside each
window. Only to tell how long the rest takes."""
_WHOLE = ("int8", "int8-vnni")
"""The bundles of the reference's whole network in int8."""
_WINNERS = 0.8
"""The winner's share of the error of a proof. The runner-up has the rest, so both together err no more than one."""


def tune(
    bundles: dict[str, Bundle],
    dataset: Dataset,
    goal: Goal,
    *,
    run: Path,
    settings: TuneSettings,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    left_out: Mapping[str, str] | None = None,
    ended: Sequence[Trial] = (),
    clock: Clock | None = None,
    so_far: Callable[[Plan], None] = lambda plan: None,
    source: MeasurementSource | None = None,
    decisions: Decisions | None = None,
    experience: Experience | None = None,
) -> Plan:
    """Find the way to serve that has the highest capacity inside the goal, and prove it.

    Args:
        bundles: role -> bundle, each in the folder `bundles/ROLE` of the run; `reference` must be among them.
        dataset: for accuracy: validation decides, test confirms.
        goal: the limits.
        run: the run's folder; `measurements.jsonl` there is used and added to.
        settings: of the search.
        progress: receives each step.
        trusted: as in `open_engine`, for the torch baseline.
        left_out: role -> why, of bundles that could not be made; they are among the plan's trials.
        ended: candidates that ended before this search: shapes of the network. They are among the plan's trials.
        clock: the budget is read on it.
        so_far: receives the best plan whenever there is a better one; before its proof it has no evidence.
        source: knows the measurements; None for the engines, the servers and the load of this machine.
        decisions: of the run so far; those of the search are added.
        experience: of earlier runs on this machine; it receives what this search measures for later ones.

    Returns:
        The plan. Where nothing met the goal it is the nearest miss, with `feasible` false. It is not saved here.

    Raises:
        EngineError: if not even the reference can be run.
        LoadError: if load cannot be generated.
        StorageError: if a measurement cannot be written to the disk.
    """
    clock = clock or WallClock()
    decisions = decisions or Decisions(clock)
    experience = experience or Experience()
    search = _Search(
        *(bundles, dataset, goal, run, settings, progress, trusted, clock, so_far, source, decisions),
        priors=experience.priors,
    )
    with contextlib.closing(search):
        plan = search.plan([*(failed_bundle(role, why) for role, why in (left_out or {}).items()), *ended])
    experience.learnt.update(search.learnt())
    return plan


class _Search:
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
        source: MeasurementSource | None,
        decisions: Decisions,
        *,
        priors: Priors,
    ) -> None:
        self._bundles = bundles
        self._dataset = dataset
        self._goal = goal
        self._run = run
        self._settings = settings
        self._progress = progress
        self._trusted = trusted
        self._decisions = decisions
        self._journal = Journal(run / JOURNAL, clock, decisions.spend)
        self._times = EngineTimes(self._journal, bundles, goal.slo, settings.time_s, trusted, source)
        self._predictor = Predictor(self._times, priors)
        self._source = source
        self._budget, self._so_far = Budget(settings.budget_s, clock), so_far

    def plan(self, ended: list[Trial]) -> Plan:
        reference = self._bundles["reference"]
        self._outside = ended
        """Trials of what is not in the search."""
        lengths = padded_lengths(reference, self._dataset.train.inputs[:_MEASURED])
        every = candidates(self._bundles, cores(), lengths)
        self._states = states = [CandidateState(candidate) for candidate in every]
        timing = Timing(self._predictor, self._budget, self._size, self._progress, self._decisions)
        timing.first(states, plain(reference, cores())[0])
        if all(state.fate is not None for state in states):
            why = next(state.why for state in states if state.fate == "failed")
            raise EngineError("no engine can run the reference model", why)
        self._plain = self._first_plain(reference, states)
        self._accuracy = AccuracyJudge(
            *(self._journal, self._bundles, self._dataset, self._goal.budget),
            *(self._plain, self._progress, self._trusted, self._source),
        )
        compiled = CandidateState(self._plain)
        self._accuracy.validate(states, self._budget.allow(Budget.FOR_ACCURACY))
        self._decisions.judged("validation", states, self._goal.budget)
        self._accuracy.confirm(states, self._settings.keep, self._budget.allow(Budget.FOR_ACCURACY))
        self._decisions.judged("test", states, self._goal.budget)
        states += timing.widen(states, self._settings.keep)
        self._leave_less_accurate(states)
        alive = sorted((s for s in states if s.fate is None), key=lambda s: -s.predicted_rps)
        if not alive:
            raise EngineError("no candidate can be served", states[0].why, "correct the model, or use another")
        with contextlib.nullcontext(self._source) if self._source is not None else Generator() as load:
            bench = Bench(self._journal, load, self._goal, self._run, self._trusted)
            self._load_tests = LoadTests(
                *(bench, self._bundles, self._goal, self._settings, self._progress, self._budget, self._decisions),
                host_speed=self._times.speed_beside,
            )
            self._announce_rest(races=self._settings.race, searches=2, steps=3)
            winner, confirmed = self._settled(alive)
            cascade = self._cascade(winner)
            base = self._measured_base(reference)
            recipe = recipe_words(self._bundles[winner.candidate.bundle], reference)
            self._so_far(self._answer(winner, confirmed, base, [base, *states], steps_of(base, [], winner, recipe)))
            steps = self._steps(compiled, states, winner, bool(recipe))
        measured = [compiled] if compiled.capacity is not None else []
        plan = self._answer(winner, confirmed, base, [base, *measured, *states], steps_of(base, steps, winner, recipe))
        return plan if cascade is None else cascade_plan(plan, *cascade, self._bundles, self._load_tests)

    def close(self) -> None:
        """Close the engine that is kept open."""
        self._times.close()

    def learnt(self) -> dict[str, float]:
        """What was measured for later searches."""
        return self._predictor.learnt()

    def _first_plain(self, reference: Bundle, states: list[CandidateState]) -> Candidate:
        """The reference compiled and otherwise unchanged, on the first engine that runs it: drops are measured from it.

        Raises:
            EngineError: if none does.
        """
        ways = plain(reference, cores())
        for fate in (None, "skipped"):
            run = {state.candidate.artefact for state in states if state.fate == fate}
            for candidate in ways:
                if candidate.artefact in run:
                    return candidate
        why = next(state.why for state in states if state.candidate.artefact == ways[0].artefact)
        raise EngineError("no engine can run the reference model", why)

    def _measured_base(self, reference: Bundle) -> CandidateState:
        """The baseline under load: torch eager; the compiled reference where there is none or it does not run."""
        eager = baseline(reference, cores())
        base = CandidateState(self._plain)
        if eager is not None:
            base = CandidateState(eager)
            self._measure_for_comparison(base)
            if base.fate != "failed":
                base.end("baseline", "the unchanged model: torch eager, one sample at a time")
                return base
            self._progress.start("The baseline in torch is left out")
            self._progress.done(base.why, good=False)
            self._outside.append(trial_of(base))
            base = CandidateState(self._plain)
        self._measure_for_comparison(base)
        base.end("baseline", "the unchanged model: compiled, one sample at a time")
        return base

    def _leave_less_accurate(self, states: list[CandidateState]) -> None:
        """Where accuracy is preferred, what is measurably less accurate than the most accurate candidate is left."""
        alive = [state for state in states if state.fate is None and state.accuracy is not None]
        if self._settings.prefer != "accuracy" or not alive:
            return
        top = max(alive, key=lambda state: state.accuracy.value if state.accuracy else 0.0)
        judge = AccuracyJudge(
            *(self._journal, self._bundles, self._dataset, self._goal.budget),
            *(top.candidate, self._progress, self._trusted, self._source),
        )
        for state, why in measurably_worse(alive, top, lambda each: judge.accuracy(each.candidate, "validation")):
            state.end("not preferred", why)
        self._decisions.less_accurate(top, states)

    # Under load: real servers.

    def _settled(self, alive: list[CandidateState]) -> tuple[CandidateState, Measurement | None]:
        """The winner, confirmed if it can be; where all that raced failed, of those that were left out before."""
        while True:
            racing = Racing(
                *(self._load_tests, self._predictor, self._settings, self._budget, self._states, self._size),
                race_s=self._race_s,
                announce=lambda races: self._announce_rest(races=races, searches=1, steps=2),
                leads=lambda state: self._so_far(self._plan_of(state)),
            )
            winner, confirmed = self._confirmed(racing.ranked(alive))
            alive = [state for state in alive if state.fate in ("dominated", "not preferred")]
            if winner.fate != "failed" or not alive:
                return winner, confirmed
            self._predictor.forget_overheads()  # they were learnt from servers that failed
            for state in alive:
                state.fate, state.why = None, ""

    def _cascade(self, winner: CandidateState) -> tuple[Pair, Measurement | None] | None:
        """A cascade that carries more than the winner; None where there is none, or none is asked for."""
        if not self._settings.cascade or self._source is not None or winner.fate == "failed":
            return None
        cascades = Cascades(
            *(self._bundles, self._dataset, self._goal, self._plain, self._predictor, self._load_tests),
            *(self._budget, self._decisions, self._progress, self._trusted),
        )
        return cascades.better_than(winner, self._states)

    def _size(self, role: str) -> int:
        return self._bundles[role].model_bytes

    def _plan_of(self, state: CandidateState) -> Plan:
        """The plan of a candidate, under the name of the reference model, whichever of its bundles it serves."""
        model, bundle = self._bundles["reference"].manifest.name, self._bundles[state.candidate.bundle]
        return plan_of(state.candidate, bundle, self._goal, model)

    def _announce_rest(self, *, races: int, searches: int, steps: int) -> None:
        """Announce about how long the rest takes, where there is no budget.

        Args:
            races: still to be run.
            searches: of a capacity with a proof, or one without.
            steps: searches that show what a step bought.
        """
        if self._settings.budget_s is not None:
            return
        settings = self._settings
        search_s = _WINDOWS * (settings.window_s + _BESIDE_S)
        proof_s = 0.0 if searches == 0 else _PROOF_WINDOWS * (settings.proof_s + _BESIDE_S)
        self._progress.limit(races * self._race_s + searches * search_s + proof_s + steps * search_s / 2)

    @property
    def _race_s(self) -> float:
        """Seconds of a usual race."""
        return 2 * USUAL * max(0.5, 8 * self._goal.slo.limit_s)

    def _measure_for_comparison(self, state: CandidateState) -> None:
        """Accuracy and capacity, roughly, of a candidate that is measured for comparison only."""
        try:
            self._predictor.predict(state)
            state.accuracy = self._accuracy.accuracy(state.candidate, "validation")
        except Exception as error:  # an engine may fail in any way, or answer with values that are not finite
            state.end("failed", failure_reason(error))
            return
        if self._load_tests.measure_throughput(state):
            self._estimate(state, rough=True)
        if state.fate is None:
            state.end("beaten", "compiled, but one sample at a time: measured to show what batching buys")

    def _estimate(self, state: CandidateState, *, rough: bool = False) -> None:
        """Estimate a capacity under load; what is not decided yet is predicted again with what it teaches."""
        self._load_tests.estimate_capacity(state, rough=rough)
        self._predictor.learn_residual(state)
        self._predictor.correct(self._states)

    def _steps(
        self, compiled: CandidateState, states: list[CandidateState], winner: CandidateState, is_smaller: bool
    ) -> list[tuple[str, CandidateState]]:
        """What is measured to show what each step bought, while there is time: compiled; then batched, too; and
        quantised, where the winner is that and has a smaller network besides."""
        full = [s for s in states if s.candidate.bundle == "reference" and s.candidate.precision == "f32"]
        full = sorted((s for s in full if s.fate != "failed"), key=lambda s: -s.predicted_rps)
        wanted = [("batched", full[0])] if full and winner not in full else []
        if is_smaller and winner.candidate.precision == "int8":
            whole = [s for s in states if s.candidate.bundle in _WHOLE and s.fate not in ("failed", "over budget")]
            quantised = sorted(whole, key=lambda s: -s.predicted_rps)[:1]
            wanted = [*(("quantised", state) for state in quantised), *wanted]
        measured = []
        self._announce_rest(races=0, searches=0, steps=1 + len(wanted))
        for step, state in [*wanted, ("compiled", compiled)]:
            if self._budget.left <= 0:
                self._decisions.skipped(f'what the step "{step}" buys')
                self._progress.start(f'What the step "{step}" buys')
                self._progress.done("skipped: the time was up", good=False)
                continue
            if state is compiled:
                self._measure_for_comparison(state)
            elif state.capacity is None and (
                state.throughput is not None or self._load_tests.measure_throughput(state)
            ):
                self._estimate(state, rough=True)
            if state.capacity is not None:
                measured.append((step, state))
        return measured[::-1]

    # The answer.

    def _confirmed(self, ranked: list[CandidateState]) -> tuple[CandidateState, Measurement | None]:
        """The winner of the races, confirmed; where it cannot be, a runner-up that can, with nearly the same capacity.

        Where there is none the winner keeps its estimate: a proof of clearly less is no better answer.

        Args:
            ranked: the winner, then the others that raced.
        """
        winner, *others = ranked
        self._announce_rest(races=0, searches=1, steps=2)
        confirmed = self._proven(winner)
        while winner.fate == "failed" and others:  # its server failed since the race
            winner, *others = others
            confirmed = self._proven(winner)
        if confirmed is not None:
            return winner, confirmed
        least = _NEARLY * (winner.capacity or 0.0)
        for state in others[:_RUNNERS_UP]:
            if self._budget.left < Budget.FOR_STEPS:
                break
            self._estimate(state)
            if (state.capacity or 0.0) <= least:
                continue
            confirmed = self._load_tests.confirm(state, (1 - _WINNERS) / _RUNNERS_UP)
            if confirmed is not None and confirmed.rate_rps >= least:
                winner.end("beaten", f"it could not be confirmed on fresh seeds: {winner.why}")
                self._decisions.runner_up(winner, state)
                return state, confirmed
        return winner, None

    def _proven(self, winner: CandidateState) -> Measurement | None:
        self._estimate(winner)
        return self._load_tests.confirm(winner, _WINNERS) if winner.capacity and winner.fate != "failed" else None

    def _answer(
        self,
        winner: CandidateState,
        confirmed: Measurement | None,
        base: CandidateState,
        states: list[CandidateState],
        steps: tuple[LadderStep, ...],
    ) -> Plan:
        reference, bundle = self._bundles["reference"], self._bundles[winner.candidate.bundle]
        before = self._accuracy.accuracy(self._plain, "test")
        after = self._accuracy.accuracy(winner.candidate, "test")
        found = self._load_tests.estimate(winner)
        capacity = winner.capacity or 0.0
        holds = confirmed is not None or (capacity > 0 and not self._load_tests.refuted(winner, capacity))
        feasible = holds and winner.fate != "failed" and not why_outside(after, self._goal.budget)
        why = "the highest confirmed rate" if confirmed is not None else f"the highest estimate: {winner.why}"
        winner.end("won", why if feasible else "the nearest miss: no candidate met the whole goal")

        def interval(state: CandidateState) -> Interval | None:
            estimate = self._load_tests.estimate(state)
            return estimate.interval_rps if estimate is not None else None

        def rate(state: CandidateState) -> Rated:
            return rated(state, winner, confirmed is not None, interval, self._predictor.predicted)

        points = front(states, winner, rate, self._size)
        evidence = Evidence(
            capacity_rps=capacity,
            lowest_failing_rps=lowest_failing(winner),
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
            trials=(*map(trial_of, states), *self._outside),
            ladder=steps,
            proven=confirmed is not None,
            capacity_interval_rps=found.interval_rps if found is not None else None,
            alone_rps=self._predictor.capacity_alone(winner),
            prefer=self._settings.prefer,
            front=points,
            choice=choice(points, self._settings.prefer, after.metric),
            service_times=self._times.beside_load(winner.candidate, winner.speed),
            relaxations=relaxations(*(winner, states, self._outside, self._goal, self._predictor), feasible=feasible),
            decisions=self._decisions.made,
            certificate=certified(
                *(self._states, states[: -len(self._states)], self._outside, winner, self._predictor, self._load_tests),
                feasible=feasible,
                prefer=self._settings.prefer,
                count=self._decisions.load_tests,
            ),
        )
        plan = self._plan_of(winner)
        plan = msgspec.structs.replace(
            plan,
            operating_points=operating_points(winner.windows, plan.variants[0].name),
            evidence=evidence,
            feasible=feasible,
        )
        return self._laddered(plan, winner, states, rate) if self._settings.ladder and feasible else plan

    def _laddered(
        self, plan: Plan, winner: CandidateState, states: list[CandidateState], rate: Callable[[CandidateState], Rated]
    ) -> Plan:
        """The plan with a ladder of the candidates that were measured."""
        self._progress.start("Making a ladder of the candidates")
        made, words = with_ladder(
            *(plan, winner, states, self._bundles, rate, self._predictor.choose_batch),
            lambda state: self._accuracy.accuracy(state.candidate, "test"),
        )
        self._progress.done(words, good=bool(made.ladder))
        why = "each carries at least a quarter more; what is over the accuracy budget answers only in a rush"
        self._decisions.note("ladder", f"{len(states)} candidates", words, why)
        evidence = msgspec.structs.replace(plan.evidence, decisions=self._decisions.made) if plan.evidence else None
        return msgspec.structs.replace(made, evidence=evidence)
