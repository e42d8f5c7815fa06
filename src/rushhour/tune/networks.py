"""Smaller networks of a tuning run: found before any load test, and trained only where they can win.

    shape     the network made smaller, with inherited weights, on the engine alone             -> failed, dominated
    train     the remaining shapes learn from the reference in rungs of distillation, and are   -> failed, over budget,
              judged on the validation part after each (successive halving, Jamieson and           dominated, skipped
              Talwalkar 2016)

Where the time of a run is too short for that, only the most promising shape is made, and trained for as long as fits,
also for a share of an epoch.

Speed hardly depends on the values of weights, so shapes are timed before they are trained. Each rung continues the one
before with a learning-rate cycle of its own (warm restarts, Loshchilov and Hutter 2017), so nothing is trained twice.
The reference's answers to the training part are computed once, for all rungs and shapes.
Bundles are in the store of `compress`, times and accuracies in the journal: a search that was killed resumes.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rushhour.bundle import Bundle
from rushhour.compress import Builder, Store, Work, apply, why_outside
from rushhour.data import Dataset
from rushhour.errors import EngineError
from rushhour.goal import Goal
from rushhour.plan import EngineName, Fate, Trial
from rushhour.progress import Progress, Silent
from rushhour.records import identity
from rushhour.records.journal import JOURNAL, Journal
from rushhour.system.machine import cores, describe
from rushhour.train import TrainingJob, TrainSettings
from rushhour.tune.accuracy import AccuracyJudge
from rushhour.tune.ahead import Ahead
from rushhour.tune.answer import NO_NETWORKS, trial_of, unmeasured
from rushhour.tune.contestant import FASTER, Contestant, fastest_gentler
from rushhour.tune.decisions import Decisions
from rushhour.tune.engine_times import EngineTimes
from rushhour.tune.found_networks import FoundNetworks
from rushhour.tune.prediction import Predictor
from rushhour.tune.priors import Experience
from rushhour.tune.rungs import LENGTHS, Costs, RungRecord, short_lr, words
from rushhour.tune.settings import Budget, TuneSettings
from rushhour.tune.shapes import Shape, shapes_of, why_untrainable
from rushhour.tune.space import Candidate, candidates, plain
from rushhour.tune.state import CandidateState, failure_reason
from rushhour.tune.training_time import epoch_seconds

RUNGS: Final = (1, 2, 4)
"""Epochs of the rungs. Each is as long as all before it, and one epoch more."""
_REMAINING: Final = 1 / 3
"""A rung is taken to leave at least this share of the drop, so a shape beyond it cannot come into the budget."""
_JOINING: Final = 2
"""Networks that join the search, at most; one where the time is limited."""
_BATCH: Final = 128
_FEWEST: Final = 2
"""Shapes that must fit into the time, through all rungs, for the search to compare shapes."""
FOR_SEARCH, _FOR_SHORT_SEARCH = 0.40, 0.23
"""Shares of the budget that are kept for the search; the second where shapes cannot be compared. The search has the
first in any case, so such a run may end late."""
_FOR_INT8, _FOR_SHAPES, _LEAST = 0.05, 0.4, 0.05
"""Shares: of the budget, for int8 of what was trained; of the time for recipes, for making and timing shapes, at most;
of the budget, below which nothing is begun."""
_LEAST_S: Final = 30.0
"""As long takes, on any machine, to make one shape, time a step of its training, train a little and judge it."""
_BESIDE: Final = 0.6
"""Export and judgement of a trained network, as a share of the time that making and timing its shape took."""
_STORE: Final = ".recipes"
_NO_TIME: Final = "no time left to train it"
_FOR_CASCADE: Final = 2
"""Networks outside the accuracy budget that join a search for cascades, at most."""
_MUCH_FASTER: Final = 1.5
"""They are predicted so many times as fast as the fastest inside it, at least."""


def smaller_networks(
    reference: Bundle,
    dataset: Dataset,
    goal: Goal,
    *,
    run: Path,
    settings: TuneSettings,
    budget: Budget,
    progress: Progress,
    trusted: tuple[str, ...] = (),
    decisions: Decisions | None = None,
    experience: Experience | None = None,
    builder: Builder | None = None,
) -> tuple[dict[str, Bundle], tuple[Trial, ...]]:
    """Networks smaller than the reference that are faster and inside the accuracy budget on the validation part.

    A shape that fails ends alone.

    Args:
        reference: the teacher; a network that cannot be trained ends in one trial that says why.
        dataset: its training part trains, validation judges.
        goal: the limits.
        run: the run's folder, with the journal; the store is a hidden folder in it.
        settings: of the search.
        budget: of the whole run; the search keeps a share of it.
        progress: receives each decision.
        trusted: factories that may be imported.
        decisions: those that are made here are added.
        experience: of earlier runs on this machine; only times of training are of use here.
        builder: makes bundles elsewhere; None to make all of them here. All is timed and judged here in either case.

    Returns:
        Role -> trained bundle, in the store, the fastest first; and the trials of all other shapes. Where cascades are
        searched, much faster ones outside the budget are among them.

    Raises:
        StorageError: if the disk does not take it.
    """
    decisions = decisions or Decisions()
    store = Store(run / _STORE)
    key = identity.key(
        reference=reference,
        data=dataset,
        goal=goal,
        settings=settings,
        rungs=RUNGS,
        machine=describe(),
    )
    found = FoundNetworks.read(store, key)
    if found is None:
        record, before = RungRecord(store.folder, key), len(decisions.made)
        search = _Search(
            *(reference, dataset, goal, run, store, record, settings, budget, progress, trusted, decisions),
            experience=experience or Experience(),
            builder=builder,
        )
        with contextlib.closing(search):
            bundles, trials = search.found()
        names = {role: bundle.path.name for role, bundle in bundles.items()}
        FoundNetworks(names, trials, key, decisions.made[before:]).save(store)
        return bundles, trials
    decisions.repeat(found.decisions)
    return {role: Bundle.open(store.folder / name) for role, name in found.bundles.items()}, found.trials


class _Search:
    def __init__(
        self,
        reference: Bundle,
        dataset: Dataset,
        goal: Goal,
        run: Path,
        store: Store,
        record: RungRecord,
        settings: TuneSettings,
        budget: Budget,
        progress: Progress,
        trusted: tuple[str, ...],
        decisions: Decisions,
        *,
        experience: Experience,
        builder: Builder | None,
    ) -> None:
        self._reference = reference
        self._dataset = dataset
        self._goal = goal
        self._store = store
        self._record = record
        self._settings = settings
        self._budget = budget
        self._progress = progress
        self._trusted = trusted
        self._decisions = decisions
        self._journal = Journal(run / JOURNAL, decisions.clock, decisions.spend)
        self._experience = experience
        work = Work(reference, dataset, store, settings.seed, trusted=trusted)
        self._ahead = Ahead(builder, work, progress, decisions)
        self._bundles = {"reference": reference}
        self._times = EngineTimes(self._journal, self._bundles, goal.slo, settings.time_s, trusted)
        self._predictor = Predictor(self._times)
        self._engine: EngineName = "openvino"
        self._kept = _FOR_SHORT_SEARCH
        """Share of the budget for the search."""
        self._is_short = False
        """Whether the time is too short to compare shapes."""
        self._lr: float | None = None
        """Peak learning rate of distillation; None for the usual one."""
        self._costs = Costs()
        self._trials: list[Trial] = []
        self._outside: list[Contestant] = []
        """Those that were trained, and are not inside the accuracy budget."""

    def found(self) -> tuple[dict[str, Bundle], tuple[Trial, ...]]:
        """The trained bundles by role, and the trials of all that ended."""
        if why := why_untrainable(self._reference, self._trusted):
            return self._none(f"recipes that train are left out: {why}")
        time = self._seconds
        if time < max(_LEAST * self._budget.seconds, _LEAST_S if math.isfinite(time) else 0.0):
            return self._none("no time left for recipes: the search needs the rest")
        try:
            whole, self._costs.teacher_s = self._timed_reference()
        except Exception as error:  # a user's network may fail in any way
            return self._none(failure_reason(error))
        shortest = LENGTHS[0] * self._costs.teacher_s
        if shortest > self._seconds:
            answers = f"the answers to {LENGTHS[0]:g} of the training part alone take {shortest:,.0f} s"
            return self._none(f"no time left for recipes: {answers}, and the search needs all but {time:,.0f} s")
        contestants = self._shaped(whole, time)
        if self._is_short:
            winners = self._trained_as_time_allows(contestants)
        else:
            winners = self._trained(self._within_time(contestants)) if contestants else []
        fast = self._for_cascade(max((one.predicted for one in winners), default=whole))
        bundles = {one.shape.role: self._bundles[one.shape.role] for one in (*winners, *fast)}
        said = ", ".join(bundles) or "none is inside the budget; the network stays as it is"
        self._decisions.joined(list(bundles), self._trials)
        self._say("Smaller networks for the search", said, good=bool(bundles))
        return bundles, tuple(self._trials)

    def close(self) -> None:
        """Close the engine that is kept open."""
        self._times.close()

    def _none(self, why: str) -> tuple[dict[str, Bundle], tuple[Trial, ...]]:
        self._decisions.note("networks", why, "the network stays as it is", "smaller networks need a training")
        self._say("Smaller networks", why)
        return {}, (unmeasured(NO_NETWORKS, "skipped", why, name="smaller networks"),)

    def _say(self, what: str, result: str, *, good: bool = True) -> None:
        self._progress.start(what)
        self._progress.done(result, good=good)

    @property
    def _seconds(self) -> float:
        """That are left for recipes."""
        return (self._budget.left - self._kept - _FOR_INT8) * self._budget.seconds

    def _end(self, one: Contestant, fate: Fate, why: str) -> None:
        one.state.end(fate, why)
        self._trials.append(trial_of(one.state))
        self._say(one.shape.role, f"{fate}: {why}", good=False)

    def _end_unmeasured(self, shape: Shape, fate: Fate, why: str) -> None:
        self._trials.append(unmeasured(shape.role, fate, why))
        self._say(shape.role, f"{fate}: {why}", good=False)

    # Shape.

    def _timed_reference(self) -> tuple[float, float]:
        """The predicted capacity of the reference, on the first engine that runs it; the shapes run on that one. And
        the seconds that it takes for the training part, where the time is limited.

        Raises:
            EngineError: if none does.
        """
        why = ""
        for way in plain(self._reference, cores()):
            self._engine = way.engine
            state = CandidateState(self._candidate("reference"))
            try:
                times = self._predictor.choose_batch(state)
            except Exception as error:  # an engine may fail in any way on a user's graph
                why = failure_reason(error)
                continue
            self._judge = AccuracyJudge(
                *(self._journal, self._bundles, self._dataset, self._goal.budget),
                *(way, self._progress, self._trusted),
            )
            is_limited = not math.isinf(self._budget.seconds)
            return state.predicted_rps, len(self._dataset.train) / max(times.throughput) if is_limited else 0.0
        raise EngineError("no engine can run the reference model", why)

    def _candidate(self, role: str) -> Candidate:
        """A bundle in f32 with one batch per core."""
        return next(
            candidate
            for candidate in candidates({role: self._bundles[role]}, cores())
            if (candidate.engine, candidate.precision) == (self._engine, "f32")
            and (candidate.policy.cells, candidate.policy.streams) == (1, cores())
        )

    def _shaped(self, whole: float, time: float) -> list[Contestant]:
        """Shapes that are predicted faster than the reference and than every gentler shape, in order of promise.

        Args:
            whole: the predicted capacity of the reference.
            time: seconds for all recipes.
        """
        made: list[Contestant] = []
        shapes = shapes_of(self._reference, self._trusted)
        self._ahead.shapes(shapes[: 1 if self._record else None])
        for shape in shapes:
            if self._is_short and any(one.predicted > FASTER * whole for one in made):
                self._end_unmeasured(shape, "skipped", "no time left to compare shapes: a more promising one is tried")
                continue
            if self._seconds < (1 - _FOR_SHAPES) * time:
                self._end_unmeasured(shape, "skipped", "no time left to time this shape")
                continue
            before = self._budget.left
            try:
                *_, bundle = self._applied(shape, (), Silent())
                self._bundles[shape.role] = bundle
                state = CandidateState(self._candidate(shape.role))
                self._predictor.choose_batch(state)
            except Exception as error:  # a user's network may fail in any way; only this shape ends
                self._end_unmeasured(shape, "failed", failure_reason(error))
                continue
            made.append(Contestant(shape, state))
            self._say(f"{shape.role}, not trained yet", f"predicted {state.predicted or 0:,.0f} requests/s")
            if len(made) == 1 and not math.isinf(self._budget.seconds):
                self._costs.beside_s = _BESIDE * (before - self._budget.left) * self._budget.seconds
                self._is_short = self._cannot_compare(made[0], len(shapes))
                self._lr = short_lr(self._reference) if self._is_short else None
        left: list[Contestant] = []
        for one in made:
            name, rate = fastest_gentler(one, made, whole)
            if one.predicted <= FASTER * rate:
                why = f"predicted {one.predicted:,.0f}/s; {name} removes less and is predicted {rate:,.0f}/s"
                self._end(one, "dominated", why)
            else:
                left.append(one)
        self._decisions.shaped(whole, {one.shape.role: one.state for one in made}, [one.shape.role for one in left])
        return left

    def _cannot_compare(self, first: Contestant, shapes: int) -> bool:
        """Whether the time is too short to make all shapes, and train two like the first through all rungs."""
        if self._record:
            return True
        try:
            first.epoch_s = self._epoch_seconds(first.shape.role)
        except Exception:  # `_within_time` asks again, and reports it
            return False
        self._kept = FOR_SEARCH
        making = (shapes - 1) * self._costs.beside_s / _BESIDE
        if making + self._cost_of_all_rungs([first] * min(_FEWEST, shapes)) <= self._seconds:
            return False
        self._kept = _FOR_SHORT_SEARCH
        return True

    def _applied(self, shape: Shape, rungs: tuple[float, ...], progress: Progress) -> list[Bundle]:
        return self._decisions.made_in(
            self._store.folder,
            lambda: apply(
                shape.recipe(rungs, self._lr),
                self._reference,
                self._dataset,
                self._store,
                seed=self._settings.seed,
                progress=progress,
                trusted=self._trusted,
            ),
            lambda bundle: bundle.path,
        )

    # Train.

    def _within_time(self, contestants: list[Contestant]) -> list[Contestant]:
        """The first contestants, as many as can go through all rungs in the time that is left; at least one."""
        if math.isinf(self._budget.seconds):
            return contestants
        contestants = [one for one in contestants if self._timed_epoch(one)]
        count = len(contestants)
        while count > 1 and self._cost_of_all_rungs(contestants[:count]) > self._seconds:
            count -= 1
        for one in contestants[count:]:
            self._end(one, "skipped", _NO_TIME)
        return contestants[:count]

    def _timed_epoch(self, one: Contestant) -> bool:
        """Time an epoch of it; a shape that cannot be trained ends."""
        try:
            one.epoch_s = self._epoch_seconds(one.shape.role)
        except Exception as error:  # as in `_shaped`
            self._end(one, "failed", failure_reason(error))
        return one.alive

    def _epoch_seconds(self, role: str) -> float:
        source = self._bundles[role].manifest.source
        assert source is not None  # `why_untrainable`
        settings = TrainSettings(epochs=1, batch=min(self._dataset.fitting_batch(_BATCH), len(self._dataset.train)))
        job = TrainingJob(source, settings, self._store.folder, self._trusted)
        return epoch_seconds(self._journal, self._dataset, job, self._progress, experience=self._experience)

    def _cost(self, contestants: Sequence[Contestant], length: float) -> float:
        return self._costs.of([one.epoch_s for one in contestants], length)

    def _cost_of_all_rungs(self, contestants: Sequence[Contestant]) -> float:
        return self._costs.of_all_rungs([one.epoch_s for one in contestants], RUNGS)

    def _trained_as_time_allows(self, contestants: list[Contestant]) -> list[Contestant]:
        """The first that is inside the accuracy budget after a few rungs, each as long as the time allows."""
        winner: Contestant | None = None
        for one in contestants:
            if winner is None:
                self._timed_epoch(one)
            while winner is None and one.alive and (length := self._next_length(one)) is not None:
                self._teach(one, length)
                if one.alive and not why_outside(one.accuracy, self._goal.budget):
                    winner = one
                elif one.alive and one.accuracy.drop_interval[0] * _REMAINING > self._goal.budget.max_drop:
                    self._end_outside(one, "")
                role = one.shape.role
                self._decisions.rung(len(one.rungs), {role: one.state}, [role] if one is winner else [], [])
            if one is not winner and one.alive:
                self._end_outside(one, "no time left to train it further")
        return [] if winner is None else [winner]

    def _next_length(self, one: Contestant) -> float | None:
        """Epochs of its next rung: what was begun before, or the most that fits; None where nothing does."""
        done, begun = len(one.rungs), self._record.of(one.shape.role)
        if done < len(begun):
            return begun[done]
        fitting = [length for length in LENGTHS if self._cost([one], length) <= self._seconds]
        if not fitting or done == len(RUNGS):
            return None
        self._record.begin(one.shape.role, (*one.rungs, fitting[-1]))
        return fitting[-1]

    def _trained(self, contestants: list[Contestant]) -> list[Contestant]:
        """The fastest that are inside the accuracy budget after some rung, the fastest first."""
        ready: list[Contestant] = []
        for rung in range(len(RUNGS)):
            in_time = [one for one in contestants if self._cost([one], RUNGS[rung]) <= self._seconds]
            built = self._ahead.rung(in_time, RUNGS[rung], self._lr)
            for one in contestants:
                if one not in built and self._cost([one], RUNGS[rung]) > self._seconds:
                    self._end_outside(one, "no time left to train it further")
                else:
                    self._teach(one, RUNGS[rung])
            alive = [one for one in contestants if one.alive]
            inside = [one for one in alive if not why_outside(one.accuracy, self._goal.budget)]
            ready = sorted([*ready, *inside], key=lambda one: -one.predicted)
            trained = contestants
            contestants = self._continuing([one for one in alive if one not in inside], ready, rung)
            self._decisions.rung(
                *(rung + 1, {one.shape.role: one.state for one in trained}),
                *([one.shape.role for one in inside], [one.shape.role for one in contestants]),
            )
        joining = _JOINING if math.isinf(self._budget.seconds) else 1
        for one in ready[joining:]:
            why = f"predicted {one.predicted:,.0f}/s; {ready[0].shape.role} is predicted {ready[0].predicted:,.0f}/s"
            self._end(one, "dominated", why)
        return ready[:joining]

    def _teach(self, one: Contestant, length: float) -> None:
        """Train a rung of so many epochs more, and judge."""
        role, expected, before = one.shape.role, self._cost([one], length), self._seconds
        one.rungs = (*one.rungs, length)
        try:
            self._bundles[role] = self._applied(one.shape, one.rungs, self._progress)[-1]
            one.state.candidate = self._candidate(role)
            one.state.accuracy = found = self._judge.accuracy(one.state.candidate, "validation")
        except Exception as error:  # as in `_shaped`; training may diverge, too
            self._end(one, "failed", failure_reason(error))
            return
        self._costs.took(before - self._seconds, expected, length)
        drop, most = found.drop * 100, found.drop_interval[1] * 100
        result = f"{found.metric} {found.value:.4f}, drop {drop:.2f} points, at most {most:.2f}"
        self._say(f"{role} after {words(one.rungs)}", result)

    def _continuing(self, outside: list[Contestant], ready: list[Contestant], rung: int) -> list[Contestant]:
        """Those not inside the budget yet that are trained further, the smallest drop first; the others end."""
        left, going = len(RUNGS) - rung - 1, []
        for one in outside:
            best, least = ready[0] if ready else None, one.accuracy.drop_interval[0]
            if best is not None and one.predicted <= best.predicted:
                rates = f"predicted {one.predicted:,.0f}/s; {best.shape.role} is predicted {best.predicted:,.0f}/s"
                self._end(one, "dominated", f"{rates} and is inside the budget already")
            elif not left or least * _REMAINING**left > self._goal.budget.max_drop:
                self._end_outside(one, "")
            else:
                going.append(one)
        going.sort(key=lambda one: one.accuracy.drop)
        half = math.ceil(len(going) / 2)
        for one in going[half:]:
            self._end_outside(one, "shapes with a smaller drop are trained further")
        return going[:half]

    def _for_cascade(self, best: float) -> list[Contestant]:
        """Much faster networks outside the budget: in a cascade they answer what is easy.

        Args:
            best: the predicted capacity of the fastest inside it.
        """
        if not self._settings.cascade:
            return []
        fast = [one for one in self._outside if one.predicted >= _MUCH_FASTER * best]
        fast = sorted(fast, key=lambda one: one.accuracy.drop)[:_FOR_CASCADE]
        joined = {str(one.state.candidate) for one in fast}
        self._trials = [trial for trial in self._trials if trial.candidate not in joined]
        return fast

    def _end_outside(self, one: Contestant, also: str) -> None:
        """A shape ends that is not inside the accuracy budget as far as it was trained."""
        if one.state.accuracy is None:
            self._end(one, "skipped", _NO_TIME)
            return
        self._outside.append(one)
        why = f"after {words(one.rungs)} of distillation {why_outside(one.accuracy, self._goal.budget)}"
        self._end(one, "over budget", f"{why}; {also}" if also else why)
