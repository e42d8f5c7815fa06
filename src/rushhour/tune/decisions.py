"""The decision journal of a tuning run: each step with what was seen, what was decided, why, and what it cost.

The measurements are in `measurements.jsonl`; here is what followed from them. A run that was killed makes the same
decisions again, and measurements that it finds in that file count with the seconds that they took when they were made.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

import msgspec

from rushhour.clock import Clock, WallClock
from rushhour.load import Race
from rushhour.plan import Decision, Fate, Trial
from rushhour.system.storage import write_whole
from rushhour.tune.state import CandidateState

_MOST_NAMED = 4
"""Candidates that one sentence names; further ones are counted."""
_TOOK = "seconds.json"

T = TypeVar("T")


class Decisions:
    """Collects the decisions of one run. What is spent, and every load test, belongs to the next decision.

    Args:
        clock: the time of trainings is read on it.

    Attributes:
        clock: the same, or the machine's.
    """

    def __init__(self, clock: Clock | None = None) -> None:
        self.clock = clock or WallClock()
        self._made: list[Decision] = []
        self._spent_s = 0.0
        self._load_tests = 0
        self._counted: set[Path] = set()
        self._ended: Counter[Fate] = Counter()
        """Candidates of the search by fate, when it was last looked at."""

    @property
    def made(self) -> tuple[Decision, ...]:
        """All so far, in order."""
        return tuple(self._made)

    @property
    def load_tests(self) -> int:
        """How many so far; see `Decision.load_tests`."""
        return self._load_tests + sum(decision.load_tests for decision in self._made)

    def spend(self, seconds: float) -> None:
        """Count seconds of a measurement."""
        self._spent_s += seconds

    def load_test(self) -> None:
        """Count one candidate that is put under load, or one race."""
        self._load_tests += 1

    def note(self, step: str, seen: str, decided: str, why: str) -> None:
        """Add a decision; see `Decision`."""
        self._made.append(Decision(step, seen, decided, why, round(self._spent_s, 3), self._load_tests))
        self._spent_s, self._load_tests = 0.0, 0

    def repeat(self, earlier: Iterable[Decision]) -> None:
        """Add decisions that an earlier call made, and whose results are still valid."""
        self._made += earlier

    def made_in(self, folder: Path, make: Callable[[], Iterable[T]], path_of: Callable[[T], Path]) -> list[T]:
        """What `make` gives, one after another; each counts once, with the seconds that it took when it was made.

        Args:
            folder: a file in it keeps the seconds.
            make: makes things that are on the disk then, or finds them there.
            path_of: where each of them is.
        """
        things: list[T] = []
        began = self.clock.now()
        for thing in make():
            took_s, began = self.clock.now() - began, self.clock.now()
            things.append(thing)
            path = path_of(thing)
            if path not in self._counted:
                self._counted.add(path)
                self.spend(_kept(folder / _TOOK, path.name, took_s))
        return things

    # What the search for smaller networks says.

    def shaped(self, whole: float, shapes: Mapping[str, CandidateState], left: Sequence[str]) -> None:
        """Shapes were made with inherited weights, and timed.

        Args:
            whole: the predicted capacity of the whole network.
            shapes: role -> the shape.
            left: roles of those that may be trained.
        """
        rates = [f"{role} {state.predicted or 0:,.0f}/s" for role, state in shapes.items()]
        self.note(
            "shape",
            f"{_count(rates, 'shape')} predicted, the whole network {whole:,.0f}/s" + "".join(f", {r}" for r in rates),
            f"{', '.join(left)} may be trained" if left else "none is worth training",
            "one that removes more has to be predicted faster; speed hardly depends on the values of weights",
        )

    def rung(
        self, rung: int, shapes: Mapping[str, CandidateState], inside: Sequence[str], further: Sequence[str]
    ) -> None:
        """A rung of training was judged.

        Args:
            rung: its number, from 1.
            shapes: role -> the shape, of all that were in it.
            inside: roles of those within the accuracy budget now.
            further: roles of those that are trained further.
        """
        if not shapes:
            return
        judged = [(role, state.accuracy) for role, state in shapes.items() if state.accuracy is not None]
        drops = [
            f"{role} drops by {found.drop * 100:.2f} points, at most {found.drop_interval[1] * 100:.2f}"
            for role, found in judged
        ]
        ended = [role for role, state in shapes.items() if state.fate is not None and role not in inside]
        parts = (("within the budget", inside), ("trained further", further), ("ended", ended))
        self.note(
            f"rung {rung}",
            "; ".join(drops) or "none could be trained",
            "; ".join(f"{what}: {', '.join(roles)}" for what, roles in parts if roles) or "nothing is left to train",
            "of those that can still come into the budget and are faster than what is in it, the half with the "
            "smallest drop is trained further",
        )

    def joined(self, roles: Sequence[str], ended: Sequence[Trial]) -> None:
        """The smaller networks for the search were chosen.

        Args:
            roles: theirs.
            ended: all others.
        """
        fates = Counter(trial.fate for trial in ended)
        self.note(
            "networks",
            f"{len(roles) + len(ended)} smaller networks in all",
            f"{', '.join(roles)} join the search, with their int8" if roles else "the network stays as it is",
            "; ".join(f"{count} {fate}" for fate, count in fates.items()) or "none ended",
        )

    # What the search says.

    def timed(self, states: Sequence[CandidateState]) -> None:
        """Each engine was timed alone."""
        run = [state for state in states if state.fate is None]
        self._ended += _fates(states)
        if not run:
            return
        best = max(run, key=lambda state: state.predicted_rps)
        plans = sum(len(state.bounds) for state in run)
        timed = [state for state in states if state.fate != "skipped"]
        late = f"; for {len(states) - len(timed)} no time was left" if len(timed) < len(states) else ""
        self.note(
            "time",
            f"{_count(timed, 'candidate')} timed, the engine alone, batch by batch; {len(timed) - len(run)} fail{late}",
            f"{len(run)} go on, the best prediction is {best.predicted or 0:,.0f}/s ({best.candidate.name})",
            f"the capacity of {plans:,} plans was simulated on these times; of its batch bounds each candidate has the "
            "smallest within 2% of the best",
        )

    def judged(self, part: str, states: Sequence[CandidateState], budget: object) -> None:
        """Accuracy was measured on a part of the data.

        Args:
            part: of the data.
            states: all candidates.
            budget: of the drop.
        """
        left = sum(state.fate is None for state in states)
        ended, self._ended = _fates(states) - self._ended, _fates(states)
        judged = left + ended.total()
        rule = {
            "validation": f"the whole interval of a drop, paired with the reference, has to be within {budget}",
            "test": f"each once, the smallest drop first, up to the first that is not within {budget}",
        }[part]
        self.note(
            "accuracy",
            f"the compiled artefacts of {judged} candidates on the {part} part",
            "; ".join([f"{left} go on", *(f"{count} {fate}" for fate, count in ended.items())]),
            rule,
        )

    def less_accurate(self, top: CandidateState, states: Sequence[CandidateState]) -> None:
        """Accuracy is preferred: what is measurably less accurate than the most accurate one was left."""
        left = [state for state in states if state.fate == "not preferred"]
        self.note(
            "accuracy",
            f"{top.candidate.name} is the most accurate; {_count(left, 'candidate')} measurably less accurate",
            f"{sum(state.fate is None for state in states)} go on",
            "accuracy is preferred: the whole interval of a difference, paired, has to be above 0",
        )

    def overheads(self, measured: Sequence[CandidateState], best: CandidateState) -> None:
        """One candidate of each layout was under load."""
        seen = _named(measured, lambda state: f"{state.throughput or 0:,.0f}/s in time")
        self.note(
            "probe",
            f"{_count(measured, 'candidate')} in a closed and an open loop: {seen}",
            f"{best.candidate.name} leads",
            "the first of each layout, and a slow one, show what serving costs beside the engine; the highest "
            "throughput is the one to beat",
        )

    def ranked(self, best: CandidateState, rivals: Sequence[CandidateState], keep: float, most: int) -> None:
        """Candidates were predicted again.

        Args:
            best: the one to beat.
            rivals: all others; those without a fate race.
            keep: least share of the best prediction.
            most: candidates that race, with the best.
        """
        racing = [state for state in rivals if state.fate is None]
        self.note(
            "predict",
            f"{_count(rivals, 'rival')} of {best.candidate.name} predicted again, with the cost of serving",
            f"{len(racing)} race: {_predicted(racing)}" if racing else "no other is worth a race",
            f"those below {keep:.0%} of the best prediction, and all after the first {most}, are dominated",
        )

    def raced(self, incumbent: CandidateState, rival: CandidateState, result: Race) -> None:
        """A race was run."""
        names = incumbent.candidate.name, rival.candidate.name
        if names[0] == names[1]:  # they differ in the batch bound alone
            bounds = incumbent.candidate.policy.max_batch, rival.candidate.policy.max_batch
            names = f"{names[0]}, batches up to {bounds[0]}", f"{names[1]}, batches up to {bounds[1]}"
        why = {
            "faster": "significantly more answers in time",
            "slower": "significantly more answers in time",
            "tie": "no significant difference; the higher estimate leads",
        }[result.order]
        why = f"{why} ({rival.rule})" if rival.rule else why
        self.note(
            "race",
            f"{names[1]} against {names[0]}: {result}",
            f"{names[1] if result.rival_leads else names[0]} leads",
            why,
        )

    def estimated(self, state: CandidateState) -> None:
        """The capacity of a candidate was estimated."""
        rate = f"about {state.capacity:,.0f}/s" if state.capacity else "no rate holds"
        self.note(
            "capacity",
            f"{state.candidate.name}: {_count(state.windows, 'window')} of load in all",
            rate,
            "the rate is raised and lowered until what holds and what does not are close",
        )

    def confirmed(self, state: CandidateState, *, proven: bool) -> None:
        """A candidate's capacity was to be proven."""
        self.note(
            "confirm",
            f"{state.candidate.name}: {_count(state.windows, 'window')} of load in all, the last on fresh seeds",
            f"{state.capacity or 0:,.0f}/s proven" if proven else f"not proven: {state.why}",
            "a pass on seeds that no decision has used; all windows of a proof together err at most 5%",
        )

    def runner_up(self, winner: CandidateState, state: CandidateState) -> None:
        """The winner of the races could not be proven, and another one was."""
        self.note(
            "runner-up",
            f"{winner.candidate.name} could not be proven, {state.candidate.name} at {state.capacity or 0:,.0f}/s",
            f"{state.candidate.name} takes its place",
            "a proof of nearly the winner's estimate is the better answer",
        )

    def skipped(self, what: str) -> None:
        """Something was not measured, as the time was up."""
        self.note("skip", f"the time is up before {what} is measured", "it is not measured", "it decides least")

    def ended(self, step: str, state: CandidateState) -> None:
        """A candidate left the search, alone, by what `state.why` says."""
        self.note(step, state.why, f"{state.candidate.name}: {state.fate}", "it ends alone; the others go on")


def _kept(file: Path, name: str, took_s: float) -> float:
    """The seconds on file under this name; where there are none, these are written."""
    try:
        known = msgspec.json.decode(file.read_bytes(), type=dict[str, float])
    except (OSError, msgspec.DecodeError):
        known = {}
    if name not in known:
        known[name] = round(took_s, 3)
        write_whole(file, msgspec.json.encode(known))
    return known[name]


def _fates(states: Iterable[CandidateState]) -> Counter[Fate]:
    return Counter(state.fate for state in states if state.fate is not None)


def _count(things: Sequence[object], name: str) -> str:
    return f"{len(things)} {name}{'' if len(things) == 1 else 's'}"


def _predicted(states: Sequence[CandidateState]) -> str:
    return _named(states, lambda state: f"predicted {state.predicted or 0:,.0f}/s")


def _named(states: Sequence[CandidateState], say: Callable[[CandidateState], str]) -> str:
    """The first few with what is said of each."""
    named = [f"{state.candidate.name} ({say(state)})" for state in states[:_MOST_NAMED]]
    more = len(states) - len(named)
    return ", ".join(named) + (f" and {more} more" if more else "")
