"""The joint search: goal in, Plan out. The cheap steps come first, and real load decides.

    time       each engine alone, batch by batch: seconds                    -> failed
    judge      each compiled artefact on the validation part; then on the    -> over budget
               test part, the gentlest first, up to the first that misses
    predict    a simulated batching server on the measured service times     -> dominated
    race       two real servers at a time, interleaved, under real load       -> beaten, tied
    confirm    the winner on fresh seeds                                      -> won

The untouched baseline is always measured too. A candidate that fails, in whatever way, ends alone, with its words.
Every measurement is on file before the next one starts, and what is
asked next depends on nothing but the measurements, and on the time that is left where there is a budget: a killed
search goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec
from numpy.typing import NDArray

from rushhour.bundle import Bundle
from rushhour.capacity import Overhead, ServiceProfile, best_batch, predicted_capacity
from rushhour.clock import Clock, WallClock
from rushhour.compress import judge, outputs_of, too_few, why_outside
from rushhour.data import Dataset, Split
from rushhour.engines import EngineConfig, open_engine, time_service
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.load import Generator
from rushhour.measurement import Accuracy, Measurement, Outcome, ServiceTimes
from rushhour.models import code_of
from rushhour.plan import Evidence, Fate, OperatingPoint, Plan, Policy, Rung, Trial
from rushhour.progress import Progress
from rushhour.records.journal import JOURNAL, Journal
from rushhour.system.machine import cores, describe
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.space import Candidate, baseline, candidates, plain
from rushhour.tune.track import Contender, Track, words
from rushhour.tune.trial import Bench, plan_of

Part = Literal["validation", "test"]

_RUNNERS_UP = 1
"""That are tried where the winner cannot be confirmed."""
_NEARLY = 0.9
"""Of what is estimated of the winner, a runner-up has to be proven to carry."""
_PAIRS, _WINDOWS, _PROOF_WINDOWS, _BESIDE_S = 22, 10, 3, 1.5
"""What a race, a search for a capacity and a proof take, as a rule: pairs of windows, windows, windows; and the seconds
beside each window. Only to say how long the rest will take."""
_WINNERS = 0.8
"""Of the error of a proof: the winner's. The runner-up has the rest, so that both together err no more than one."""


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
        left_out: role -> why, of bundles that could not be made; they are among the plan's trials.
        clock: what the budget is read on.
        so_far: is given the best plan whenever there is a better one; before its proof it has no evidence.

    Returns:
        The plan. Where nothing met the goal it is the nearest miss, with `feasible` false. It is not saved here.

    Raises:
        EngineError: if not even the reference can be run.
        LoadError: if load cannot be generated.
        StorageError: if the disk does not take a measurement.
    """
    tuner = _Tuner(bundles, dataset, goal, run, settings, progress, trusted, clock or WallClock(), so_far)
    return tuner.plan(left_out or {})


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
        self._journal = Journal(run / JOURNAL)
        self._reference_outputs: dict[str, NDArray[Any]] = {}
        self._overheads: dict[tuple[int, int, int], Overhead] = {}
        """Of serving, by layout, as the first candidate of each under load showed it."""
        self._budget, self._so_far = Budget(settings.budget_s, clock), so_far

    def plan(self, left_out: Mapping[str, str]) -> Plan:
        reference = self._bundles["reference"]
        self._never = [_never_made(role, why) for role, why in left_out.items()]
        states = [Contender(candidate) for candidate in candidates(self._bundles, cores())]
        self._time(states)
        self._plain = self._runnable(reference, states)
        first_rung = Contender(self._plain)
        self._judge(states)
        self._confirm_accuracy(states)
        alive = sorted((s for s in states if s.fate is None), key=lambda s: -(s.predicted or 0.0))
        if not alive:
            raise EngineError("nothing can be served", states[0].why, "mend the model, or name another")
        with Generator() as generator:
            bench = Bench(self._journal, generator, self._goal, self._run, self._trusted)
            self._track = Track(bench, self._bundles, self._goal, self._settings, self._progress, self._budget)
            self._foresee(races=self._settings.race, ways=2, rungs=3)
            base = self._measured_base(reference)
            winner, confirmed = self._settled(alive)
            self._so_far(self._answer(winner, confirmed, base, [base, *states], self._ladder(base, [], winner)))
            rungs = self._rungs(first_rung, states, winner)
        ladder = self._ladder(base, rungs, winner)
        measured = [first_rung] if first_rung.capacity is not None else []
        return self._answer(winner, confirmed, base, [base, *measured, *states], ladder)

    def _runnable(self, reference: Bundle, states: list[Contender]) -> Candidate:
        """The reference compiled and nothing else, as the first engine that runs it does: drops are measured from it.

        Raises:
            EngineError: if none does.
        """
        ways = plain(reference, cores())
        run = {state.candidate.artefact for state in states if state.fate != "failed"}
        for candidate in ways:
            if candidate.artefact in run:
                return candidate
        why = next(state.why for state in states if state.candidate.artefact == ways[0].artefact)
        raise EngineError("no engine can run the reference model", why)

    def _measured_base(self, reference: Bundle) -> Contender:
        """The baseline under load: what a user has today; compiled, where that cannot be had or does not run."""
        eager = baseline(reference, cores())
        base = Contender(self._plain)
        if eager is not None:
            base = Contender(eager)
            self._load_plainly(base)
            if base.fate != "failed":
                base.end("baseline", "the untouched model: torch eager, one sample at a time")
                return base
            self._progress.start("The baseline in torch is left out")
            self._progress.done(base.why, good=False)
            self._never.append(_trial(base))
            base = Contender(self._plain)
        self._load_plainly(base)
        base.end("baseline", "the untouched model: compiled, one sample at a time")
        return base

    # Service times: the engine alone.

    def _time(self, states: list[Contender]) -> None:
        self._progress.start("Timing each engine alone", len(states))
        for state in states:
            try:
                times = self._service_times(state.candidate)
            except Exception as error:  # an engine may fail in any way on a user's graph
                state.end("failed", words(error))
                self._progress.advance(note=f"{state.candidate.artefact}: {state.why}")
                continue
            self._predict(state, times)
            self._progress.advance(note=f"{state.candidate.compiled}: {max(times.throughput):,.0f}/s")
        best = max((state.predicted or 0.0 for state in states), default=0.0)
        self._progress.done(f"best prediction {best:,.0f} requests/s")
        if all(state.fate == "failed" for state in states):
            raise EngineError("no engine can run the reference model", states[0].why)

    def _service_times(self, candidate: Candidate) -> ServiceTimes:
        config, limit_s = candidate.engine_config(), self._goal.slo.limit_s
        return self._journal.measure(
            "service",
            candidate.compiled,
            f"up to {config.max_batch} samples or {limit_s * 1e3:g} ms",
            ServiceTimes,
            self._timed,
            bundle=self._bundles[candidate.bundle],
            config=config,
            code=self._code(candidate),
            limit_s=limit_s,
            seconds=self._settings.time_s,
        )

    def _timed(
        self, bundle: Bundle, config: EngineConfig, code: dict[str, str], limit_s: float, seconds: float
    ) -> ServiceTimes:
        engine = open_engine(bundle, config, trusted=self._trusted)
        try:
            return time_service(engine, bundle, limit_s, seconds)
        finally:
            engine.close()

    def _code(self, candidate: Candidate) -> dict[str, str]:
        """Of the torch module, where that is what answers: it is no part of the bundle."""
        source = self._bundles[candidate.bundle].manifest.source
        return code_of(source, self._trusted) if candidate.engine == "torch" and source is not None else {}

    def _predict(self, state: Contender, times: ServiceTimes) -> None:
        """Choose the batch bound by simulation, of the sizes timed."""
        bound, state.predicted = best_batch(
            times, streams=state.candidate.streams, slo=self._goal.slo, overhead=self._overhead_of(state.candidate)
        )
        state.candidate = state.candidate.with_batch(bound)

    # Accuracy: each compiled artefact on held-out data.

    def _judge(self, states: list[Contender]) -> None:
        alive = [state for state in states if state.fate is None]
        self._progress.start("Measuring accuracy on held-out data", len(alive))
        budget = self._goal.budget
        for state in alive:
            try:
                state.accuracy = self._accuracy(state.candidate, "validation")
            except Exception as error:  # answers that are no numbers, or none at all
                state.end("failed", words(error))
                self._progress.advance()
                continue
            if why := why_outside(state.accuracy, budget):
                state.end("over budget", why)
            self._progress.advance(note=f"{state.candidate.artefact}: {state.accuracy.value:.4f}")
        inside = sum(state.fate is None for state in alive)
        short = too_few(self._dataset.task, "validation", self._dataset.validation, budget)
        said = f"{inside} of {len(alive)} candidates inside {budget}"
        self._progress.done(f"{said}; {short}" if short else said, good=not short)

    def _confirm_accuracy(self, states: list[Contender]) -> None:
        """On the test part, each compiled artefact once: the gentlest first, up to the first that misses the budget.

        In such a fixed sequence each is tried at the level of one test, and all together err as seldom as one (Maurer,
        Hothorn and Lehmacher 1995). So whoever wins under load is inside the budget already, and a miss here has a
        gentler one to stand for it. What a gentler one is predicted to outrun is not tried.
        """
        by_artefact: dict[str, list[Contender]] = {}
        for state in states:
            if state.fate is None:
                by_artefact.setdefault(state.candidate.artefact, []).append(state)

        def most(group: list[Contender]) -> float:
            accuracy = group[0].accuracy
            return accuracy.drop_interval[1] if accuracy is not None else 0.0

        self._progress.start("Confirming accuracy on the test part", len(by_artefact))
        fastest, missed = 0.0, ""
        fate: Fate
        for group in sorted(by_artefact.values(), key=most):
            candidate, rate = group[0].candidate, max(state.predicted or 0.0 for state in group)
            self._progress.advance()
            if rate < self._settings.keep * fastest:
                fate, why = "dominated", f"predicted {rate:,.0f}/s, and {fastest:,.0f}/s of what costs less accuracy"
            elif missed:
                fate, why = "over budget", f"not tried on the test part: {missed} costs less accuracy, and missed there"
            else:
                try:
                    fate, why = "over budget", why_outside(self._accuracy(candidate, "test"), self._goal.budget)
                    missed = candidate.artefact if why else ""
                except Exception as error:  # as in `_judge`; of the others it says nothing
                    fate, why = "failed", words(error)
            if not why:
                fastest = max(fastest, rate)
                continue
            for state in group:
                state.end(fate, why)
        self._progress.done(f"{missed} misses {self._goal.budget} there" if missed else "all hold", good=not missed)

    def _accuracy(self, candidate: Candidate, part: Part) -> Accuracy:
        reference = self._plain
        return self._journal.measure(
            "accuracy",
            candidate.artefact,
            part,
            Accuracy,
            self._judged,
            bundle=self._bundles[candidate.bundle],
            config=_judging(candidate),
            code=self._code(candidate),
            reference=self._bundles[reference.bundle],
            beside=_judging(reference),
            data=self._dataset,
            part=part,
        )

    def _judged(
        self,
        bundle: Bundle,
        config: EngineConfig,
        code: dict[str, str],
        reference: Bundle,
        beside: EngineConfig,
        data: Dataset,
        part: Part,
    ) -> Accuracy:
        split: Split = getattr(data, part)
        if part not in self._reference_outputs:
            self._reference_outputs[part] = outputs_of(reference, beside, split, trusted=self._trusted)
        expected = self._reference_outputs[part]
        if (bundle, config) == (reference, beside):
            return judge(data.task, part, split.targets, expected, None)
        return judge(data.task, part, split.targets, outputs_of(bundle, config, split, trusted=self._trusted), expected)

    # Under load: real servers.

    def _settled(self, alive: list[Contender]) -> tuple[Contender, Measurement | None]:
        """The winner, confirmed if it can be; where all that raced broke down, of those that were left out before."""
        while True:
            winner, confirmed = self._confirmed(self._race(alive))
            alive = [state for state in alive if state.fate == "dominated"]
            if winner.fate != "failed" or not alive:
                return winner, confirmed
            self._overheads.clear()  # what is known of layouts was learnt from servers that broke down
            for state in alive:
                state.fate, state.why = None, ""

    def _race(self, alive: list[Contender]) -> list[Contender]:
        """The one that carries most, by races of two, then those that raced it, best first.

        Args:
            alive: those inside the budget, best prediction first.
        """
        incumbent = self._push_layouts(alive)
        self._so_far(self._plan_of(incumbent))
        rivals = self._rank(incumbent, [state for state in alive if state.fate is None and state is not incumbent])
        raced = [incumbent]
        self._foresee(races=len(rivals), ways=1, rungs=2)
        with contextlib.ExitStack() as stack:
            loaded = stack.enter_context(self._track.loaded(incumbent, "race"))
            for rival in rivals:
                if self._budget.left < Budget.FOR_PROOF:
                    rival.end("skipped", "the time was up before it could race")
                    continue
                with contextlib.ExitStack() as own:
                    theirs = own.enter_context(self._track.loaded(rival, "race"))
                    ended = self._track.duel(incumbent, loaded, rival, theirs, rivals=len(rivals))
                    raced.append(rival)
                    leads = incumbent.fate == "failed" if ended is None else ended.rival_leads
                    if not leads:
                        continue
                    stack.close()
                    stack.enter_context(own.pop_all())
                    incumbent, loaded = rival, theirs
                    self._so_far(self._plan_of(rival))
        others = [state for state in raced if state is not incumbent and state.fate != "failed"]
        return [incumbent, *sorted(others, key=lambda state: -(state.throughput or 0.0))]

    def _plan_of(self, state: Contender) -> Plan:
        """Served under the name of the model that was asked for, whichever of its bundles wins."""
        model, bundle = self._bundles["reference"].manifest.name, self._bundles[state.candidate.bundle]
        return plan_of(state.candidate, bundle, self._goal, model)

    def _push_layouts(self, alive: list[Contender]) -> Contender:
        """See what serving costs beside the engine in each layout, by its most promising candidate that runs.

        It differs: processes read and answer on cores of their own, and threads of one batch wait for each other.

        Returns:
            The one that answered most.
        """
        pushed: list[Contender] = []
        for state in alive:
            if pushed and self._budget.left < Budget.FOR_PROOF:
                break
            if state.candidate.layout not in self._overheads and self._track.push(state):
                self._learn_overhead(state)
                pushed.append(state)
        if not pushed:
            raise EngineError("nothing can be served", alive[0].why, "mend the model, or name another")
        return max(pushed, key=lambda state: state.throughput or 0.0)

    def _foresee(self, *, races: int, ways: int, rungs: int) -> None:
        """Tell how long the rest takes, about, where no budget says it.

        Args:
            races: that are still to be run.
            ways: searches for a capacity with a proof, or one without.
            rungs: searches that show what a step bought.
        """
        if self._settings.budget_s is not None:
            return
        settings = self._settings
        window_s, race_s = settings.window_s + _BESIDE_S, 2 * _PAIRS * max(0.5, 8 * self._goal.slo.limit_s)
        way_s = _WINDOWS * window_s
        proof_s = 0.0 if ways == 0 else _PROOF_WINDOWS * (settings.proof_s + _BESIDE_S)
        self._progress.limit(races * race_s + ways * way_s + proof_s + rungs * way_s / 2)

    def _learn_overhead(self, state: Contender) -> None:
        candidate = state.candidate
        self._overheads[candidate.layout] = Overhead.seen(
            ServiceProfile(self._service_times(candidate)),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            spare=candidate.spare(cores()),
            most_rps=state.throughput or 1.0,
        )
        self._predict_again(state)

    def _predict_again(self, state: Contender) -> None:
        """With what serving costs; its bound on batches stays, because windows are on file under that name."""
        state.predicted = self._predicted(state.candidate, self._overhead_of(state.candidate))

    def _predicted(self, candidate: Candidate, overhead: Overhead) -> float:
        return predicted_capacity(
            ServiceProfile(self._service_times(candidate)),
            streams=candidate.streams,
            max_batch=candidate.policy.max_batch,
            slo=self._goal.slo,
            overhead=overhead,
        )

    def _overhead_of(self, candidate: Candidate) -> Overhead:
        """What its layout was seen to cost; else what the first did."""
        known = self._overheads.get(candidate.layout) or next(iter(self._overheads.values()), Overhead())
        return dataclasses.replace(known, spare=candidate.spare(cores()))

    def _rank(self, incumbent: Contender, rivals: list[Contender]) -> list[Contender]:
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

    def _load_plainly(self, state: Contender) -> None:
        """A candidate that is measured for comparison only: how fast is it, and how right?"""
        try:
            self._predict_again(state)
            state.accuracy = self._accuracy(state.candidate, "validation")
        except Exception as error:  # as in `_judge`
            state.end("failed", words(error))
            return
        if self._track.push(state):
            self._track.approach(state, rough=True)
        if state.fate is None:
            state.end("beaten", "compiled, but one sample at a time: measured to show what batching buys")

    def _rungs(self, first: Contender, states: list[Contender], winner: Contender) -> list[tuple[str, Contender]]:
        """What is measured to show what each step bought, while there is time: compiled; then batched, too."""
        full = [s for s in states if s.candidate.bundle == "reference" and s.candidate.precision == "f32"]
        full = sorted((s for s in full if s.fate != "failed"), key=lambda s: -(s.predicted or 0.0))
        wanted = [("batched", full[0])] if full and winner not in full else []
        measured = []
        self._foresee(races=0, ways=0, rungs=1 + len(wanted))
        for step, state in [*wanted, ("compiled", first)]:
            if self._budget.left <= 0:
                self._progress.start(f'What "{step}" buys')
                self._progress.done("skipped: the time was up", good=False)
                continue
            if state is first:
                self._load_plainly(state)
            elif state.capacity is None and (state.throughput is not None or self._track.push(state)):
                self._track.approach(state, rough=True)
            if state.capacity is not None:
                measured.append((step, state))
        return measured[::-1]

    # The answer.

    def _confirmed(self, ranked: list[Contender]) -> tuple[Contender, Measurement | None]:
        """The winner of the races, confirmed; where it cannot be, a runner-up that can and carries nearly as much.

        Where there is none the winner keeps what is estimated of it: a proof of clearly less is no better answer.

        Args:
            ranked: the winner, then the others that raced.
        """
        winner, *others = ranked
        self._foresee(races=0, ways=1, rungs=2)
        confirmed = self._proven(winner)
        while winner.fate == "failed" and others:  # its server broke down since the race
            winner, *others = others
            confirmed = self._proven(winner)
        if confirmed is not None:
            return winner, confirmed
        least = _NEARLY * (winner.capacity or 0.0)
        for state in others[:_RUNNERS_UP]:
            if self._budget.left < Budget.FOR_RUNGS:
                break
            self._track.approach(state)
            if (state.capacity or 0.0) <= least:
                continue
            confirmed = self._track.confirm(state, (1 - _WINNERS) / _RUNNERS_UP)
            if confirmed is not None and confirmed.rate_rps >= least:
                winner.end("beaten", f"it could not be confirmed on fresh seeds: {winner.why}")
                return state, confirmed
        return winner, None

    def _proven(self, winner: Contender) -> Measurement | None:
        self._track.approach(winner)
        return self._track.confirm(winner, _WINNERS) if winner.capacity and winner.fate != "failed" else None

    def _ladder(self, base: Contender, rungs: list[tuple[str, Contender]], winner: Contender) -> tuple[Rung, ...]:
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
        winner: Contender,
        confirmed: Measurement | None,
        base: Contender,
        states: list[Contender],
        ladder: tuple[Rung, ...],
    ) -> Plan:
        reference, bundle = self._bundles["reference"], self._bundles[winner.candidate.bundle]
        before = self._accuracy(self._plain, "test")
        after = self._accuracy(winner.candidate, "test")
        found = self._track.estimate(winner)
        capacity = winner.capacity or 0.0
        holds = confirmed is not None or (capacity > 0 and not self._track.refuted(winner, capacity))
        feasible = holds and winner.fate != "failed" and not why_outside(after, self._goal.budget)
        why = "the highest confirmed rate" if confirmed is not None else f"the highest estimate: {winner.why}"
        winner.end("won", why if feasible else "the nearest miss: nothing met the whole goal")
        evidence = Evidence(
            capacity_rps=capacity,
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
            trials=(*(_trial(state) for state in states), *self._never),
            ladder=ladder,
            proven=confirmed is not None,
            capacity_interval_rps=found.interval_rps if found is not None else None,
            alone_rps=self._alone(winner),
        )
        return msgspec.structs.replace(
            self._plan_of(winner), operating_points=self._operating_points(winner), evidence=evidence, feasible=feasible
        )

    def _alone(self, state: Contender) -> float | None:
        """Its capacity without the generator on the same machine: measured with it, and predicted from there."""
        windows = [window for window in state.windows if window.outcome in (Outcome.PASS, Outcome.INCONCLUSIVE)]
        whole = self._overhead_of(state.candidate)
        if not windows or not state.capacity or not whole.request_s:
            return None
        window = max(windows, key=lambda window: window.rate_rps)
        candidate = state.candidate
        own_s = max(0.0, whole.request_s - window.generator_cpu / window.rate_rps)
        shared = self._predicted(candidate, whole)
        alone = self._predicted(candidate, dataclasses.replace(whole, request_s=own_s))
        return state.capacity * alone / shared if shared else None

    def _lowest_failing(self, state: Contender) -> float | None:
        capacity = state.capacity or 0.0
        failing = [window.rate_rps for window in state.windows if window.outcome.refutes and window.rate_rps > capacity]
        return min(failing, default=None)

    def _operating_points(self, state: Contender) -> tuple[OperatingPoint, ...]:
        windows = sorted(state.windows, key=lambda window: window.rate_rps)
        return tuple(
            OperatingPoint(window.rate_rps, window.p50_ms, window.p99_ms, window.outcome.value) for window in windows
        )


def _judging(candidate: Candidate) -> EngineConfig:
    """How an artefact is opened to be judged."""
    return EngineConfig(candidate.engine, candidate.precision, streams=cores(), threads=1, max_batch=64)


def _never_made(role: str, why: str) -> Trial:
    """A bundle that could not be made: a candidate that failed before it was one."""
    return Trial(
        candidate=role,
        bundle=role,
        engine="openvino",
        precision="int8",
        policy=Policy(),
        accuracy=None,
        accuracy_drop=None,
        accuracy_drop_interval=None,
        predicted_rps=None,
        capacity_rps=None,
        p99_ms=None,
        fate="failed",
        why=why,
        name=f"{role}, which could not be made",
    )


def _trial(state: Contender) -> Trial:
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
