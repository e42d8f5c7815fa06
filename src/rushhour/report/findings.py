"""What a run found: its plan and every window of load behind it, and the few questions that a report asks of them."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from rushhour.errors import PlanError
from rushhour.measurement import Interval, Measurement, Outcome
from rushhour.plan import SO_FAR, Evidence, Plan, Rung, Trial
from rushhour.records.journal import JOURNAL, Entry, Journal
from rushhour.system.machine import Machine


class Capacity(NamedTuple):
    """A capacity and what stands behind it: told in the same way wherever it appears.

    Attributes:
        rps: requests per second; 0 where the SLO held at no rate.
        proven: whether a window passed at this rate; else it is an estimate.
        interval_rps: of the estimate, 95%; None where it is proven or not known.
        p99_ms: at this rate; None for an estimate, because nothing was measured there.
        p99_interval_ms: its 95% interval, where the plan states it.
        window: the window of load that shows it: the proof, or for an estimate the fastest window that held, at most
            at this rate. None where none is at hand.
    """

    rps: float
    proven: bool
    interval_rps: Interval | None = None
    p99_ms: float | None = None
    p99_interval_ms: Interval | None = None
    window: Measurement | None = None

    @property
    def proof(self) -> Measurement | None:
        """The window that passed at this rate, where it is at hand."""
        return self.window if self.proven else None


class Findings:
    """A run's plan with its journal. Read with `Findings.read`.

    Attributes:
        name: of the run: its folder's.
        plan: the plan, with one number for each capacity that it states in several places.
        evidence: the plan's; a run without any has nothing to report.
        entries: every line of the journal, in the order they were measured.
        windows: those of them that are open-loop load against the plan's SLO, with their measurement.
        is_finished: whether the search came to its end; else the plan is the best until it was broken off.
    """

    def __init__(self, name: str, plan: Plan, entries: tuple[Entry, ...], *, is_finished: bool = True) -> None:
        self.is_finished = is_finished
        self.name = name
        self.plan = _agreed(plan)
        self.evidence = evidence_of(self.plan)
        self.entries = entries
        self.windows: tuple[tuple[Entry, Measurement], ...] = tuple(
            (entry, entry.reading)
            for entry in entries
            if isinstance(entry.reading, Measurement) and entry.reading.slo == plan.goal.slo
        )
        called: tuple[Rung | Trial, ...] = (*self.evidence.ladder, *self.evidence.trials)
        self._names = {each.candidate: each.name for each in called if each.name}

    @classmethod
    def read(cls, run: Path) -> Findings:
        """Read the plan, the best so far of a run that was broken off, and `measurements.jsonl` of the folder `run`.

        Raises:
            PlanError: if either is missing, or the plan is damaged or carries no evidence.
            StorageError: if the disk does not give them, or the journal is damaged.
        """
        plan, is_finished = read_plan(run)
        journal = run / JOURNAL
        if not journal.is_file():
            raise PlanError(
                f"there are no measurements at {journal}",
                "a report shows what was measured, and the file does not exist",
                "restore it beside the plan, or make the run anew with `rushhour tune`",
            )
        return cls(run.resolve().name, plan, tuple(Journal(journal)), is_finished=is_finished)

    @property
    def machines(self) -> tuple[Machine, ...]:
        """The machines that the measurements were made on; more than one makes them hard to compare."""
        return tuple({repr(entry.machine): entry.machine for entry in self.entries}.values())

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all arrival schedules, ascending."""
        return tuple(sorted({window.seed for _, window in self.windows}))

    def of(self, candidate: str) -> list[Measurement]:
        """All windows of load on one candidate."""
        return [window for entry, window in self.windows if entry.subject == candidate]

    def name_of(self, candidate: str) -> str:
        """What people call a candidate; what the journal does, where the plan has no name for it."""
        return self._names.get(candidate, candidate)

    def capacity(self, candidate: str, rps: float, p99_ms: float | None) -> Capacity:
        """A capacity that the plan states, with the windows behind it.

        Whether the plan's own is a proof, the plan says. Any other is one where a window passed at this rate, or where
        no window is at hand, but its p99 is.
        """
        winner, evidence = winner_of(self.plan), self.evidence
        windows = self.of(candidate)
        proof = self._proof(candidate, rps, p99_ms)
        if winner is not None and candidate == winner.candidate:
            proven, interval, p99_interval = evidence.proven, evidence.capacity_interval_rps, evidence.p99_interval_ms
        else:
            proven, interval, p99_interval = proof is not None if windows else p99_ms is not None, None, None
        if proven:
            return Capacity(rps, True, None, p99_ms, p99_interval, proof)
        below = [window for window in windows if holds(window) and window.rate_rps <= 1.001 * rps]
        return Capacity(
            rps, False, interval, window=max(below, key=lambda window: (window.rate_rps, window.n), default=None)
        )

    @property
    def plan_capacity(self) -> Capacity:
        """Of the plan."""
        winner, evidence = winner_of(self.plan), self.evidence
        if winner is None:
            return stated(self.plan)[1]
        return self.capacity(winner.candidate, evidence.capacity_rps, evidence.p99_ms)

    @property
    def baseline_capacity(self) -> Capacity:
        """Of the untouched model."""
        baseline, evidence = baseline_of(self.plan), self.evidence
        if baseline is None:
            return stated(self.plan)[0]
        return self.capacity(baseline.candidate, evidence.baseline_capacity_rps, evidence.baseline_p99_ms)

    @property
    def fastest_pass(self) -> Measurement | None:
        """The window of the highest rate that the plan passed at."""
        winner = winner_of(self.plan)
        passed = [window for window in self.of(winner.candidate) if window.outcome is Outcome.PASS] if winner else []
        return max(passed, key=lambda window: (window.rate_rps, window.n), default=None)

    def _proof(self, candidate: str, rps: float, p99_ms: float | None) -> Measurement | None:
        """The passing window at this rate: the one with this p99, else of the confirmation, else the longest."""
        near = [
            (window.p99_ms == p99_ms, entry.phase == "confirm", window.n, window)
            for entry, window in self.windows
            if entry.subject == candidate
            and window.outcome is Outcome.PASS
            and abs(window.rate_rps - rps) <= _SAME_RATE * rps
        ]
        return max(near, key=lambda found: found[:-1])[-1] if near else None


_SAME_RATE = 0.001
"""Two rates that differ by less than this are one: plans round."""


def read_plan(run: Path) -> tuple[Plan, bool]:
    """The plan in a run's folder, and whether it is the final one: a run that was broken off has only the best so far.

    Raises:
        PlanError: if there is none, it is damaged, or it is one so far that was not measured yet.
    """
    file, so_far = run / "plan.json", run / SO_FAR
    if file.exists() or not run.is_dir():
        return Plan.load(file), True
    if not so_far.exists():
        if not (run / JOURNAL).is_file():
            return Plan.load(file), True  # which says that there is none
        raise PlanError(f"there is no plan in {run} yet", "the run was broken off before it found one", _GO_ON)
    plan = Plan.load(so_far)
    if plan.evidence is None:
        raise PlanError(
            f"there is nothing to report of {run} yet",
            f"the run was broken off before its best plan so far, {plan.variants[0].name}, was confirmed",
            f"{_GO_ON}; `rushhour serve {run}` serves that plan",
        )
    return plan, False


_GO_ON = "the command that began it goes on where it was"


def holds(window: Measurement) -> bool:
    """Whether a window is a proof that the SLO holds, or at least none against it: no more late than is allowed."""
    return window.outcome is Outcome.PASS or (window.outcome is Outcome.INCONCLUSIVE and window.keeps_slo)


def stated(plan: Plan) -> tuple[Capacity, Capacity]:
    """The capacities of baseline and plan as far as the plan itself tells, without its windows.

    A p99 is stated only of what was proven; a percentile below it can be proven with too few samples for a p99.

    Raises:
        PlanError: if it carries no evidence.
    """
    found = evidence_of(plan)
    p99_ms = found.baseline_p99_ms
    is_proven = p99_ms is not None or not found.baseline_capacity_rps or plan.goal.slo.percentile < 99
    before = Capacity(found.baseline_capacity_rps, is_proven, p99_ms=p99_ms)
    if not found.proven:
        return before, Capacity(found.capacity_rps, False, found.capacity_interval_rps)
    return before, Capacity(found.capacity_rps, True, None, found.p99_ms, found.p99_interval_ms)


def _agreed(plan: Plan) -> Plan:
    """The plan with what its headline says of winner and baseline in the list of candidates and on the ladder too.

    The headline is what was confirmed last; the other two may still hold what the search found before.
    """
    found, winner, baseline = evidence_of(plan), winner_of(plan), baseline_of(plan)
    said: dict[str, dict[str, float | None]] = {}
    if baseline is not None:
        said[baseline.candidate] = {"capacity_rps": found.baseline_capacity_rps, "p99_ms": found.baseline_p99_ms}
    if winner is not None:
        said[winner.candidate] = {"capacity_rps": found.capacity_rps, "p99_ms": found.p99_ms}
    replace = msgspec.structs.replace
    evidence = replace(
        found,
        trials=tuple(replace(trial, **said.get(trial.candidate, {})) for trial in found.trials),
        ladder=tuple(replace(rung, **said.get(rung.candidate, {})) for rung in found.ladder),
    )
    return replace(plan, evidence=evidence)


def evidence_of(plan: Plan) -> Evidence:
    """The plan's evidence.

    Raises:
        PlanError: if it carries none.
    """
    if plan.evidence is None:
        raise PlanError(
            f"the plan with {plan.variants[0].name!r} carries no evidence",
            "it was written by hand or never measured, so there is nothing to report",
            "measure it with `rushhour tune`",
        )
    return plan.evidence


def winner_of(plan: Plan) -> Trial | None:
    """The trial that the plan serves; for a nearest miss, the one that came closest."""
    trials = evidence_of(plan).trials
    variant = plan.variants[0]
    served = (variant.engine, variant.precision, plan.policy)
    alike = (trial for trial in trials if (trial.engine, trial.precision, trial.policy) == served)
    by_name = (trial for trial in trials if trial.candidate == variant.name)
    won = (trial for trial in trials if trial.fate == "won")
    return next(won, None) or next(by_name, None) or next(alike, None)


def baseline_of(plan: Plan) -> Trial | None:
    """The trial of the untouched model."""
    return next((trial for trial in evidence_of(plan).trials if trial.fate == "baseline"), None)
