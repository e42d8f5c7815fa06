"""The findings of a run: its plan and all its windows of load, with the queries that a report needs."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import msgspec

from rushhour.errors import PlanError
from rushhour.measurement import Interval, Measurement, Outcome
from rushhour.plan import SO_FAR, Evidence, LadderStep, Plan, Trial
from rushhour.records.journal import JOURNAL, Entry, Journal
from rushhour.system.machine import Machine


class Capacity(NamedTuple):
    """A capacity with its evidence, as every page and table shows it.

    Attributes:
        rps: requests per second; 0 where no rate was within the SLO.
        proven: whether a window passed at this rate; else it is an estimate.
        interval_rps: of the estimate, 95%; None where it is proven or not known.
        p99_ms: at this rate; None for an estimate, because nothing was measured there.
        p99_interval_ms: its 95% interval, where the plan states it.
        window: its window of load: the proof, or for an estimate the fastest window within the SLO up to this rate.
            None where there is none.
    """

    rps: float
    proven: bool
    interval_rps: Interval | None = None
    p99_ms: float | None = None
    p99_interval_ms: Interval | None = None
    window: Measurement | None = None

    @property
    def proof(self) -> Measurement | None:
        """The window that passed at this rate, where there is one."""
        return self.window if self.proven else None


class Findings:
    """A run's plan with its journal. Read with `Findings.read`.

    Attributes:
        name: of the run: its folder's.
        plan: the plan, with one number for each capacity that it states in several places.
        evidence: the plan's.
        entries: every line of the journal, in the order of measurement.
        windows: the entries that are open-loop load against the plan's SLO, with their measurement.
        is_finished: whether the search ended; else the plan is the best one before the interruption.
    """

    def __init__(self, name: str, plan: Plan, entries: tuple[Entry, ...], *, is_finished: bool = True) -> None:
        self.is_finished = is_finished
        self.name = name
        self.plan = _consistent(plan)
        self.evidence = evidence_of(self.plan)
        self.entries = entries
        self.windows: tuple[tuple[Entry, Measurement], ...] = tuple(
            (entry, entry.reading)
            for entry in entries
            if isinstance(entry.reading, Measurement) and entry.reading.slo == plan.goal.slo
        )
        named: tuple[LadderStep | Trial, ...] = (*self.evidence.ladder, *self.evidence.trials)
        self._names = {each.candidate: each.name for each in named if each.name}

    @classmethod
    def read(cls, run: Path) -> Findings:
        """Read the plan (of an interrupted run the best so far) and `measurements.jsonl` of the folder `run`.

        Raises:
            PlanError: if either is missing, or the plan is damaged or has no evidence.
            StorageError: if they cannot be read, or the journal is damaged.
        """
        plan, is_finished = read_plan(run)
        journal = run / JOURNAL
        if not journal.is_file():
            raise PlanError(
                f"there are no measurements at {journal}",
                "the file does not exist, and a report shows what was measured",
                "restore it beside the plan, or repeat the run with `rushhour tune`",
            )
        return cls(run.resolve().name, plan, tuple(Journal(journal)), is_finished=is_finished)

    @property
    def machines(self) -> tuple[Machine, ...]:
        """The machines of the measurements; those of different machines are hard to compare."""
        return tuple({repr(entry.machine): entry.machine for entry in self.entries}.values())

    @property
    def seeds(self) -> tuple[int, ...]:
        """The seeds of all arrival schedules, ascending."""
        return tuple(sorted({window.seed for _, window in self.windows}))

    def of(self, candidate: str) -> list[Measurement]:
        """All windows of load on one candidate."""
        return [window for entry, window in self.windows if entry.subject == candidate]

    def name_of(self, candidate: str) -> str:
        """The name of a candidate for people; where the plan has none, the journal's key."""
        return self._names.get(candidate, candidate)

    def capacity(self, candidate: str, rps: float, p99_ms: float | None) -> Capacity:
        """A capacity that the plan states, with its windows.

        The plan says whether its own capacity is proven. Any other one is proven where a window passed at this rate,
        or where there is no window, but a p99.
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
        below = [window for window in windows if is_within_slo(window) and window.rate_rps <= 1.001 * rps]
        return Capacity(
            rps, False, interval, window=max(below, key=lambda window: (window.rate_rps, window.n), default=None)
        )

    @property
    def plan_capacity(self) -> Capacity:
        """Of the plan."""
        winner, evidence = winner_of(self.plan), self.evidence
        if winner is None:
            return stated_capacities(self.plan)[1]
        return self.capacity(winner.candidate, evidence.capacity_rps, evidence.p99_ms)

    @property
    def baseline_capacity(self) -> Capacity:
        """Of the untouched model."""
        baseline, evidence = baseline_of(self.plan), self.evidence
        if baseline is None:
            return stated_capacities(self.plan)[0]
        return self.capacity(baseline.candidate, evidence.baseline_capacity_rps, evidence.baseline_p99_ms)

    @property
    def fastest_pass(self) -> Measurement | None:
        """The passing window of the plan with the highest rate."""
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
"""Two rates that differ by less than this share are the same: plans round them."""


def read_plan(run: Path) -> tuple[Plan, bool]:
    """The plan in a run's folder, and whether it is the final one: an interrupted run has only the best so far.

    Raises:
        PlanError: if there is none, it is damaged, or the best so far was not measured yet.
    """
    file, so_far = run / "plan.json", run / SO_FAR
    if file.exists() or not run.is_dir():
        return Plan.load(file), True
    if not so_far.exists():
        if not (run / JOURNAL).is_file():
            return Plan.load(file), True  # raises the error that there is none
        raise PlanError(f"there is no plan in {run} yet", "the run was interrupted before it found one", _CONTINUE)
    plan = Plan.load(so_far)
    if plan.evidence is None:
        raise PlanError(
            f"there is nothing to report of {run} yet",
            f"the run was interrupted before its best plan so far, {plan.variants[0].name}, was confirmed",
            f"{_CONTINUE}; `rushhour serve {run}` serves that plan",
        )
    return plan, False


_CONTINUE = "run the same command again to continue"


def is_within_slo(window: Measurement) -> bool:
    """Whether a window passed, or is inconclusive with no more late requests than the SLO allows."""
    return window.outcome is Outcome.PASS or (window.outcome is Outcome.INCONCLUSIVE and window.keeps_slo)


def stated_capacities(plan: Plan) -> tuple[Capacity, Capacity]:
    """The capacities of baseline and plan as the plan states them, without their windows.

    A plan states a p99 only for a proven capacity. An SLO below p99 can be proven with too few samples for a p99.

    Raises:
        PlanError: if the plan has no evidence.
    """
    found = evidence_of(plan)
    p99_ms = found.baseline_p99_ms
    is_proven = p99_ms is not None or not found.baseline_capacity_rps or plan.goal.slo.percentile < 99
    before = Capacity(found.baseline_capacity_rps, is_proven, p99_ms=p99_ms)
    if not found.proven:
        return before, Capacity(found.capacity_rps, False, found.capacity_interval_rps)
    return before, Capacity(found.capacity_rps, True, None, found.p99_ms, found.p99_interval_ms)


def _consistent(plan: Plan) -> Plan:
    """The plan with the confirmed capacities of winner and baseline in its candidates and its steps too.

    Those may still have the capacity that the search found before the confirmation.
    """
    found, winner, baseline = evidence_of(plan), winner_of(plan), baseline_of(plan)
    confirmed: dict[str, dict[str, float | None]] = {}
    if baseline is not None:
        confirmed[baseline.candidate] = {"capacity_rps": found.baseline_capacity_rps, "p99_ms": found.baseline_p99_ms}
    if winner is not None:
        confirmed[winner.candidate] = {"capacity_rps": found.capacity_rps, "p99_ms": found.p99_ms}
    replace = msgspec.structs.replace
    evidence = replace(
        found,
        trials=tuple(replace(trial, **confirmed.get(trial.candidate, {})) for trial in found.trials),
        ladder=tuple(replace(step, **confirmed.get(step.candidate, {})) for step in found.ladder),
    )
    return replace(plan, evidence=evidence)


def evidence_of(plan: Plan) -> Evidence:
    """The plan's evidence.

    Raises:
        PlanError: if the plan has none.
    """
    if plan.evidence is None:
        raise PlanError(
            f"the plan with {plan.variants[0].name!r} has no evidence",
            "it was written by hand or not measured, so there is nothing to report",
            "measure it with `rushhour tune`",
        )
    return plan.evidence


def winner_of(plan: Plan) -> Trial | None:
    """The trial that the plan serves; for a nearest miss, the one closest to the goal."""
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
