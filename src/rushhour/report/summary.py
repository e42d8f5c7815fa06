"""The table at the end of `rushhour demo`: baseline, plan and their ratio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderResult
from rich.table import Table
from rich.text import Text

from rushhour.plan import Evidence, Plan
from rushhour.records.journal import JOURNAL
from rushhour.report import wording
from rushhour.report.comparison import Row, side_by_side
from rushhour.report.findings import Findings, evidence_of

_BAR = 22
_LEAST_WIDE = 70
"""Columns of the terminal that the table needs."""
_CLOSEST = "This plan is closest to the goal."
_LOOSEN = "Loosen the goal, or use more cores."
_EIGHTHS = " ▏▎▍▌▋▊▉█"


class SummaryTable:
    """Baseline and plan side by side, in 80 columns, readable without colour; below each other on a narrow terminal.

    Args:
        plan: with evidence.
        run: its folder, with the windows of load that tell latencies near an estimate; None where there is only a plan.

    Raises:
        PlanError: if the plan has no evidence.
        StorageError: if what was measured cannot be read.
    """

    def __init__(self, plan: Plan, run: Path | None = None) -> None:
        evidence_of(plan)
        self._plan = plan
        capacities = None
        if run is not None and (run / JOURNAL).is_file():
            found = Findings.read(run)
            capacities = found.baseline_capacity, found.plan_capacity
        self._rows = side_by_side(plan, capacities)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield (_wide if options.max_width >= _LEAST_WIDE else _narrow)(self._plan, self._rows)
        for line in notes(self._plan):
            yield Text(line)


def _narrow(plan: Plan, rows: Sequence[Row]) -> Group:
    better = "this plan" if plan.feasible else "nearest miss"
    lines = [_title(plan)]
    for row in rows:
        lines.append(Text(f"{row.what}{f', {row.gain}' if row.gain else ''}", style="bold"))
        lines += [
            Text(f"  {name}: {value}") for name, value in (("baseline", row.baseline), (better, row.plan)) if value
        ]
    return Group(*lines)


def notes(plan: Plan) -> list[str]:
    """Sentences about a plan: how good it is among all plans, why this one, and what a change of the goal would buy; of
    a miss, what it would take."""
    found = evidence_of(plan)
    changes = "; ".join(wording.relaxation(each) for each in found.relaxations)
    if not plan.feasible:
        either = "one of: " if len(found.relaxations) > 1 else ""
        return [_CLOSEST, f"It would take {either}{changes}." if changes else _LOOSEN]
    said = [f"{found.certificate.statement}."] if found.certificate else []
    said += [f"Why this plan: {found.choice}."] if found.choice else []
    return [*said, f"If you allowed: {changes}."] if changes else said


def _title(plan: Plan) -> Text:
    goal = f"{plan.goal.slo}, drop at most {plan.goal.budget}"
    title = f"Highest capacity within {goal}" if plan.feasible else f"NEAREST MISS: no plan meets {goal}"
    return Text(title, style="bold" if plan.feasible else "bold yellow")


def _wide(plan: Plan, rows: Sequence[Row]) -> Table:
    found = evidence_of(plan)
    table = Table(
        title=_title(plan),
        box=box.ROUNDED,
        padding=(0, 1),
        header_style="bold",
    )
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("baseline")
    table.add_column("this plan" if plan.feasible else "nearest miss")
    table.add_column("", justify="right", style="bold green", no_wrap=True)
    for row in rows:
        # `Text`, because names come from users, and rich reads [brackets] as markup.
        table.add_row(*(Text(cell) for cell in row), style="bold" if row.what == "capacity" else "")
        if row.what == "capacity":
            before, after = _bars(found)
            table.add_row("", Text(before, style="yellow"), Text(after, style="green"), "", end_section=True)
    return table


def _bars(found: Evidence) -> tuple[str, str]:
    """Both capacities to one scale, in eighths of a character, so that a ratio of 50 is visible."""
    most = max(found.baseline_capacity_rps, found.capacity_rps)

    def bar(rps: float) -> str:
        eighths = max(1, round(_BAR * 8 * rps / most)) if rps > 0 else 0
        return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()

    return bar(found.baseline_capacity_rps), bar(found.capacity_rps)
