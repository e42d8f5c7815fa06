"""The table that ends `rushhour demo`: what was there, what there is now, how many times better."""

from __future__ import annotations

from rich import box
from rich.table import Table
from rich.text import Text

from rushhour.plan import Evidence, Plan
from rushhour.report.comparison import side_by_side
from rushhour.report.findings import evidence_of

_BAR = 22
_EIGHTHS = " ▏▎▍▌▋▊▉█"


def summary_table(plan: Plan) -> Table:
    """Baseline and plan side by side, in 80 columns, and readable without colour.

    Raises:
        PlanError: if the plan carries no evidence.
    """
    found = evidence_of(plan)
    goal = f"{plan.goal.slo}, drop at most {plan.goal.budget}"
    title = f"The most requests inside {goal}" if plan.feasible else f"NEAREST MISS: nothing met {goal}"
    table = Table(
        title=Text(title, style="bold" if plan.feasible else "bold yellow"),
        caption=None if plan.feasible else Text("This came closest. Loosen the goal, or give it more cores."),
        box=box.ROUNDED,
        padding=(0, 1),
        header_style="bold",
    )
    table.add_column("", style="dim", no_wrap=True)
    table.add_column("baseline")
    table.add_column("this plan" if plan.feasible else "nearest miss")
    table.add_column("", justify="right", style="bold green", no_wrap=True)
    for row in side_by_side(plan):
        # `Text`, because names come from users and rich would read [brackets] in them as markup.
        table.add_row(*(Text(cell) for cell in row), style="bold" if row.what == "capacity" else "")
        if row.what == "capacity":
            before, after = _bars(found)
            table.add_row("", Text(before, style="yellow"), Text(after, style="green"), "", end_section=True)
    return table


def _bars(found: Evidence) -> tuple[str, str]:
    """Both capacities to one scale, in eighths of a character, so that 1 in 50 can still be seen."""
    most = max(found.baseline_capacity_rps, found.capacity_rps)

    def bar(rps: float) -> str:
        eighths = max(1, round(_BAR * 8 * rps / most)) if rps > 0 else 0
        return "█" * (eighths // 8) + _EIGHTHS[eighths % 8].strip()

    return bar(found.baseline_capacity_rps), bar(found.capacity_rps)
