"""What a run found: its plan and every window of load behind it, and the few questions that a report asks of them."""

from __future__ import annotations

from pathlib import Path

from rushhour.errors import PlanError
from rushhour.journal import Entry, Journal
from rushhour.machine import Machine
from rushhour.measurement import Measurement, Outcome
from rushhour.plan import Evidence, Plan, Trial


class Findings:
    """A run's plan with its journal. Read with `Findings.read`.

    Attributes:
        name: of the run: its folder's.
        plan: the plan.
        evidence: the plan's; a run without any has nothing to report.
        entries: every line of the journal, in the order they were measured.
        windows: those of them that are load, with their measurement.
    """

    def __init__(self, name: str, plan: Plan, entries: tuple[Entry, ...]) -> None:
        self.name = name
        self.plan = plan
        self.evidence = evidence_of(plan)
        self.entries = entries
        self.windows: tuple[tuple[Entry, Measurement], ...] = tuple(
            (entry, entry.reading) for entry in entries if isinstance(entry.reading, Measurement)
        )

    @classmethod
    def read(cls, run: Path) -> Findings:
        """Read `plan.json` and `measurements.jsonl` of the folder `run`.

        Raises:
            PlanError: if either is missing, or the plan is damaged or carries no evidence.
            StorageError: if the disk does not give them, or the journal is damaged.
        """
        plan = Plan.load(run / "plan.json")
        journal = run / "measurements.jsonl"
        if not journal.is_file():
            raise PlanError(
                f"there are no measurements at {journal}",
                "a report shows what was measured, and the file does not exist",
                "restore it beside the plan, or make the run anew with `rushhour tune`",
            )
        return cls(run.resolve().name, plan, tuple(Journal(journal)))

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

    def proof(self, candidate: str, rps: float, p99_ms: float | None) -> Measurement | None:
        """The window that shows a candidate at its capacity: the one with this p99, else the longest at this rate.

        A confirmation goes before a window of the search. None where nothing within 1% of the rate is on file.
        """
        near = [
            (window.p99_ms == p99_ms, entry.phase == "confirm", window.outcome is Outcome.PASS, window.n, window)
            for entry, window in self.windows
            if entry.subject == candidate and abs(window.rate_rps - rps) <= 0.01 * rps
        ]
        return max(near, key=lambda found: found[:-1])[-1] if near else None


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
