"""What a search covered: how many plans there were, which rule removed how many, and the certificate of the one left.

A plan of the space is a network on an engine at a precision, in a layout of the cores, with a batch bound. A candidate
stands for all its batch bounds, and a network that left before the search for all plans that it and its int8 would have
had.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from rushhour.measurement import Interval
from rushhour.plan import Certificate, Cut, Fate, Preference, Trial
from rushhour.system.machine import cores
from rushhour.tune.answer import NO_NETWORKS
from rushhour.tune.certificate import CONFIDENCE, Option, Ratio, Regret, regret_of
from rushhour.tune.load_tests import LoadTests
from rushhour.tune.prediction import Predictor
from rushhour.tune.space import LARGEST_BATCH, Candidate, all_layouts, ways
from rushhour.tune.state import CandidateState

_STEPS: Final = ("shape", "train", "make", "time", "simulate", "accuracy", "predict", "race")
_NORMAL: Final = 2 * 1.96
"""Standard deviations in a 95% interval."""
_LEAST: Final = 0.01
_ROUGH: Final = 0.1
"""Standard deviation of a log capacity without an interval."""
_FEASIBLE: Final[tuple[Fate | None, ...]] = (None, "won", "tied", "beaten", "dominated", "skipped")
"""Fates of candidates that are known to be within the accuracy budget."""

_UNTRAINED: Final = ("shape", "train", "make")
"""Steps after which a plan that left is not known to be within the accuracy budget."""

_Rule = tuple[str, Fate, str]
"""Step, fate and words of a `Cut`."""
_CANNOT_RUN: Final[_Rule] = ("time", "failed", "its engine cannot run it")
_NO_TIME: Final[_Rule] = ("time", "skipped", "no time was left to time its engine")
_NOT_JUDGED: Final[_Rule] = ("accuracy", "skipped", "no time was left to measure its accuracy")
_OTHER_BOUND: Final[_Rule] = ("simulate", "dominated", "another batch bound of the candidate is as good")
_OVER_BUDGET: Final[_Rule] = ("accuracy", "over budget", "its accuracy drop is not shown within the budget")
_UNTIMED: Final[_Rule] = ("predict", "dominated", "a layout of the cores that was not timed: others are far ahead")


def certified(
    states: Sequence[CandidateState],
    beside: Sequence[CandidateState],
    outside: Sequence[Trial],
    winner: CandidateState,
    predictor: Predictor,
    load_tests: LoadTests,
    *,
    feasible: bool,
    prefer: Preference,
    count: int,
) -> Certificate:
    """The certificate of a search. Nothing is measured here.

    Args:
        states: the candidates of the search, the winner among them.
        beside: what was loaded for comparison only.
        outside: candidates that ended before the search.
        winner: that was chosen.
        predictor: of the search.
        load_tests: of the search.
        feasible: whether the winner meets the goal.
        prefer: what decided among candidates within the goal. The bound is about those that could be preferred.
        count: load tests so far.
    """
    space = _Space(states, outside, winner, prefer)
    cuts = space.cuts()
    plans = 1 + sum(cut.plans for cut in cuts)
    found, why = None, "" if feasible else "no plan met the goal, and the nearest miss has no regret"
    if feasible:
        options = _options(space, beside, predictor, load_tests)
        known = {option.name: option for option in options}
        if winner.capacity and str(winner.candidate) in known:
            found = regret_of(options, _ratios(load_tests, known), str(winner.candidate))
        else:
            why = "the capacity of the chosen plan was not predicted and measured"
    covered = space.covered() if found else 0
    return Certificate(
        statement=_statement(found, covered, plans, count, prefer, feasible=feasible),
        plans=plans,
        networks=space.networks(),
        simulated=sum(len(state.bounds) for state in states),
        measured=len({str(state.candidate) for state in (*states, *beside) if _is_measured(state)}),
        load_tests=count,
        cuts=cuts,
        covered=covered,
        expected_regret=found.expected if found else None,
        regret_bound=found.bound if found else None,
        confidence=CONFIDENCE,
        sigma=found.sigma if found else None,
        residuals=found.residuals if found else 0,
        not_covered=tuple(space.not_covered(cuts)),
        why=why,
    )


def _statement(
    found: Regret | None, covered: int, plans: int, count: int, prefer: Preference, *, feasible: bool
) -> str:
    tests = f"In {count} load test{'' if count == 1 else 's'} of {plans:,} plan{'' if plans == 1 else 's'}: "
    if found is None:
        return f"{tests}{'no bound of what a better plan may carry' if feasible else 'no plan within the goal'}"
    if covered == 1:
        return f"{tests}the only one that is known to be within the accuracy budget"
    percent = max(1, math.ceil(100 * found.bound - 1e-9))
    best = "the best" if prefer == "capacity" else f"the best by {prefer}"
    return f"{tests}within {percent}% of {best} at {CONFIDENCE:.0%}"


# The space.


class _Space:
    """The plans of a search by what became of them.

    Args:
        states: candidates of the search.
        outside: candidates that ended before.
        winner: one of `states`.
        prefer: what decided among candidates within the goal.
    """

    def __init__(
        self,
        states: Sequence[CandidateState],
        outside: Sequence[Trial],
        winner: CandidateState,
        prefer: Preference,
    ) -> None:
        self._prefer = prefer
        self._outside = [trial for trial in outside if trial.engine != "torch" and trial.bundle != NO_NETWORKS]
        self._no_networks = [trial.why for trial in outside if trial.bundle == NO_NETWORKS]
        self._bounds = max((len(state.bounds) for state in states), default=0) or 1
        """Batch bounds of a candidate that was not timed."""
        self.timed = [state for state in states if state.bounds]
        self._failed = [state for state in states if not state.bounds and state.predicted is None]
        """Also those that were not timed, as the time was up."""
        self.single = [state for state in states if not state.bounds and state.predicted is not None]
        """Forced tests of another batch bound, or in a layout that was not timed for it."""
        self._whole = {state.candidate.with_batch(LARGEST_BATCH) for state in self.timed}
        bundle = winner.candidate.bundle if prefer == "memory" else None
        self.eligible = [
            state
            for state in (*self.timed, *self.single)
            if state is winner
            or (state.fate in _FEASIBLE and state.is_judged and bundle in (None, state.candidate.bundle))
        ]
        """Candidates that could have been chosen."""
        self.networks_inside = [trial for trial in self._outside if _is_inside(trial) and prefer == "capacity"]
        """Trained and within the accuracy budget, and not in the search."""

    def networks(self) -> int:
        """Different networks; one and its int8 are the same."""
        served = {_network(state.candidate.bundle) for state in (*self.timed, *self._failed)}
        return len(served | {_network(trial.bundle) for trial in self._outside})

    def covered(self) -> int:
        """Plans that the bound is about."""
        known = sum(len(state.bounds) for state in self.eligible)
        known += sum(not self._is_counted(state) for state in self.eligible if not state.bounds)
        return known + sum(self._plans(trial) for trial in self.networks_inside)

    def cuts(self) -> tuple[Cut, ...]:
        """All plans but the winner's, by the rule that removed them, in the order of the search."""
        plans: Counter[_Rule] = Counter()
        candidates: Counter[_Rule] = Counter()

        def cut(rule: _Rule, count: int) -> None:
            plans[rule] += count
            candidates[rule] += count > 0

        for trial in self._outside:
            cut(_rule_outside(trial), self._plans(trial))
        for state in self._failed:
            cut(_NO_TIME if state.fate == "skipped" else _CANNOT_RUN, self._bounds)
        for state in self.timed:
            cut(_OTHER_BOUND, len(state.bounds) - 1)
            cut(_rule(state), state.fate != "won")
        for state in self.single:
            cut(_OTHER_BOUND, -self._is_counted(state))
            cut(_rule(state), state.fate != "won")
        for rule, count in self._untimed():
            cut(rule, count)
        ordered = sorted(plans, key=lambda rule: _STEPS.index(rule[0]))
        return tuple(Cut(*rule, plans[rule], candidates[rule]) for rule in ordered if plans[rule])

    def not_covered(self, cuts: Sequence[Cut]) -> Iterator[str]:
        """What the bound says nothing about, in sentences."""
        for why in self._no_networks:
            yield f"Smaller networks were not searched: {why}"
        for each in cuts:
            if each.step in _UNTRAINED and (each.step, each.fate) != ("train", "dominated"):
                kind = f"{each.candidates} network{'s' * (each.candidates > 1)}"
                yield f"{each.plans:,} plans of {kind} not known to be within the accuracy budget: {each.rule}"
        for fate, words in (
            ("over budget", "not shown within the accuracy budget"),
            ("failed", "that failed"),
            ("not preferred", f"not preferred by {self._prefer}"),
        ):
            yield from _counted(sum(c.plans for c in cuts if c.fate == fate and c.step not in _UNTRAINED), words)
        late = sum(cut.plans for cut in cuts if (cut.step, cut.fate, cut.rule) in (_NO_TIME, _NOT_JUDGED))
        yield from _counted(late, "for which no time was left to time the engine or to measure the accuracy")
        if self._prefer == "memory":
            yield "Candidates with another model than the chosen one: memory is preferred"
        untimed = sum(count for rule, count in self._untimed() if rule == _UNTIMED)
        yield from _counted(untimed, "in layouts of the cores that were not timed")

    def _untimed(self) -> Iterator[tuple[_Rule, int]]:
        """Plans of each artefact in layouts that were not timed, with their rule."""
        by_artefact: dict[str, list[CandidateState]] = {}
        for state in (*self.timed, *self._failed, *self.single):
            by_artefact.setdefault(state.candidate.artefact, []).append(state)
        for group in by_artefact.values():
            fates, layouts = {state.fate for state in group}, {state.candidate.layout for state in group}
            rule = _UNTIMED
            if fates == {"failed"}:
                rule = _CANNOT_RUN
            elif "over budget" in fates:
                rule = _OVER_BUDGET
            yield rule, self._bounds * (len(all_layouts(cores())) - len(layouts))

    def _is_counted(self, state: CandidateState) -> bool:
        """Whether a plan is one of the batch bounds of a candidate that was timed."""
        return state.candidate.with_batch(LARGEST_BATCH) in self._whole

    def _plans(self, trial: Trial) -> int:
        """That a network would have had, with its int8; or its int8 alone, if that is what could not be made."""
        runs = ways("int8") + (0 if trial.precision == "int8" else ways("f32"))
        return runs * len(all_layouts(cores())) * self._bounds


def _counted(plans: int, words: str) -> Iterator[str]:
    if plans:
        yield f"{plans:,} plan{'s' * (plans > 1)} of the search {words}"


def _network(bundle: str) -> str:
    """The network of a bundle's role: `prune-0.5` of `prune-0.5-int8`."""
    name = bundle.removesuffix("-vnni").removesuffix("int8").removesuffix("-")
    return name or "reference"


def _is_inside(trial: Trial) -> bool:
    """Whether a network that ended before the search is trained and within the accuracy budget."""
    return trial.fate == "dominated" and trial.accuracy is not None


def _rule_outside(trial: Trial) -> _Rule:
    if trial.precision == "int8":
        late = "no time was left to make its int8"
        return "make", trial.fate, late if trial.fate == "skipped" else "its int8 could not be made"
    if _is_inside(trial):
        return "train", trial.fate, "another network within the accuracy budget is predicted faster"
    if trial.accuracy is not None:
        return "train", trial.fate, "its accuracy drop is not within the budget after distillation"
    rules: dict[Fate, _Rule] = {
        "failed": ("shape", "failed", "it could not be made, timed or trained"),
        "skipped": ("train", "skipped", "no time was left to time or train it"),
    }
    dominated = "it removes more than another network and is predicted no faster"
    return rules.get(trial.fate, ("shape", "dominated", dominated))


def _rule(state: CandidateState) -> _Rule:
    """Why a candidate that was timed was not chosen."""
    rules: dict[Fate | None, _Rule] = {
        "over budget": _OVER_BUDGET,
        "not preferred": ("accuracy", "not preferred", "within the goal, and not what was preferred"),
        "dominated": ("predict", "dominated", "predicted too far below the best"),
        "skipped": ("race", "skipped", "the time was up before its race"),
        "tied": ("race", "tied", "no significant difference under load, and a lower estimate"),
        "beaten": ("race", "beaten", "a lower throughput under load, or not proven on fresh seeds"),
        "failed": ("race", "failed", "its server failed under load"),
    }
    if not state.is_judged:
        return _NOT_JUDGED
    if state.fate == "failed" and state.accuracy is None:
        return "accuracy", "failed", "its answers could not be judged"
    return rules.get(state.fate, ("race", "skipped", "not raced"))


# The options.


def _options(
    space: _Space, beside: Sequence[CandidateState], predictor: Predictor, load_tests: LoadTests
) -> list[Option]:
    """Every candidate that could have been chosen; each network that could have; and what was loaded beside them."""
    known = {str(state.candidate): state for state in space.eligible}
    for state in (*space.timed, *space.single, *beside):
        if state.capacity and state.candidate.engine != "torch":
            known.setdefault(str(state.candidate), state)
    own: dict[Candidate, set[int]] = {}
    for state in known.values():
        own.setdefault(state.candidate.with_batch(LARGEST_BATCH), set()).add(state.candidate.policy.max_batch)
    eligible = {state.candidate.with_batch(LARGEST_BATCH) for state in space.eligible}
    found: dict[str, Option] = {}
    rates_of = predictor.by_bound([state.candidate for state in known.values()])
    for (name, state), rates in zip(known.items(), rates_of, strict=True):
        candidate, bound = state.candidate, state.candidate.policy.max_batch
        predicted, (capacity, spread) = rates.get(bound, 0.0), _measured(state, load_tests)
        if capacity is not None:  # at the speed of the host that predictions are for
            capacity *= predictor.speed / state.speed
        if predicted > 0:
            whole, alike = candidate.with_batch(LARGEST_BATCH), (*candidate.layout, bound > 1)
            others = tuple(rate for at, rate in rates.items() if rate > 0 and state.bounds and at not in own[whole])
            found[name] = Option(name, alike, predicted, others, capacity, spread, whole in eligible)
    networks = [option for trial in space.networks_inside for option in _of_network(trial, space, found, predictor)]
    return [*found.values(), *networks]


def _of_network(trial: Trial, space: _Space, found: Mapping[str, Option], predictor: Predictor) -> Iterator[Option]:
    """The best option of a network that did not join: that of one that did, by the ratio of their predictions.

    Both were predicted in f32 in one layout, before any load.
    """
    for state in space.timed:
        candidate, policy = state.candidate, state.candidate.policy
        way = candidate.engine, candidate.precision, policy.cells, policy.streams, policy.threads
        theirs = trial.engine, trial.precision, trial.policy.cells, trial.policy.streams, trial.policy.threads
        if way != theirs or candidate.bundle == "reference":
            continue
        family = {str(each.candidate) for each in space.timed if _network(each.candidate.bundle) == candidate.bundle}
        best = max((option.predicted for name, option in found.items() if name in family), default=0.0)
        alone = max(predictor.by_bound([candidate], alone=True)[0].values())
        if best and alone and trial.predicted_rps:
            yield Option(trial.candidate, trial.candidate, best * trial.predicted_rps / alone)
            return


def _measured(state: CandidateState, load_tests: LoadTests) -> tuple[float | None, float]:
    """The measured capacity of a candidate, with the standard deviation of its logarithm; None where there is none."""
    if not state.capacity:
        return None, 0.0
    found = load_tests.estimate(state)
    if found is None:
        return state.capacity, _ROUGH
    return found.rate_rps, _spread(found.interval_rps) if found.bounded else _ROUGH


def _ratios(load_tests: LoadTests, known: Mapping[str, Option]) -> list[Ratio]:
    return [
        Ratio(str(rival.candidate), str(incumbent.candidate), race.ratio, _spread(race.interval))
        for incumbent, rival, race in load_tests.races
        if str(rival.candidate) in known and str(incumbent.candidate) in known
    ]


def _spread(interval: Interval) -> float:
    low, high = interval
    return max(_LEAST, math.log(high / low) / _NORMAL) if low > 0 else _ROUGH


def _is_measured(state: CandidateState) -> bool:
    return state.throughput is not None or state.capacity is not None
