"""`Ladder`: moves a cell along the variants of its plan as the load changes, and never outside the accuracy budget.

A controller decides every 100 ms; the next batch obeys, and what waits keeps its place. An account is kept of each
batch, so that the budget holds between two decisions too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rushhour.ladder import LadderPoint
from rushhour.plan import Plan
from rushhour.serve.observability import log
from rushhour.serve.observability.statistics import ModelState, Totals
from rushhour.serve.scheduling.account import Account
from rushhour.serve.scheduling.batcher import Part
from rushhour.serve.scheduling.controller import INTERVAL_S, Controller, Load, Rung
from rushhour.serve.scheduling.job import Job
from rushhour.serve.scheduling.stream import Stream
from rushhour.serve.scheduling.variant import Variant

if TYPE_CHECKING:
    from rushhour.serve.scheduling.cell import Cell


_ENOUGH = 100
"""Answered requests by which the mean number of samples in one is known."""


class Ladder:
    """Chooses the variant of each batch of a cell.

    Args:
        cell: whose variants are those of the plan's ladder, or what is left of them, in its order.
        plan: with a ladder.
        before: of the cell that this one replaces; if it has the same ladder its account goes on. None where there is
            none.

    Attributes:
        account: of the accuracy that answers have cost.
    """

    def __init__(self, cell: Cell, plan: Plan, before: Ladder | None = None) -> None:
        points = {point.variant: point for point in plan.ladder}
        self._cell = cell
        self._points = [points[variant.name] for variant in cell.variants]
        self._key = (plan.ladder, plan.goal.budget, plan.accuracy_window)
        at, continues = 0, before is not None and before._key == self._key
        self.account = Account(plan.goal.budget.max_drop, plan.accuracy_window)
        if before is not None and continues:
            self.account = before.account
            names = [variant.name for variant in cell.variants]
            at = names.index(before._cell.active.name) if before._cell.active.name in names else 0
        rungs = [
            Rung(_carried(point, variant, plan), point.upper_drop)
            for point, variant in zip(self._points, cell.variants, strict=True)
        ]
        self._costs = [np.array(point.charges or (point.upper_drop,)) for point in self._points]
        self._most = {variant: float(costs.max()) for variant, costs in zip(cell.variants, self._costs, strict=True)}
        self._output = cell.codec.signature.outputs[0].name
        self._controller = Controller(
            *(rungs, plan.goal.slo.limit_s, self.account.affords, self._spent_share),
            budget=self.account.budget,
            window=self.account.window,
            at=at,
        )
        self._cell.use(cell.variants[at])
        self._switches = 0
        self._spent = 0.0
        self._seen, self._shed, self._is_used = 0, 0, False
        self._last = cell.clock.now()
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = self._loop.call_later(INTERVAL_S, self._tick)

    def take(self) -> list[Part[Job]]:
        """The next batch of the queue, for the cell's active variant, which is changed here where that is due."""
        cell, batcher = self._cell, self._cell.batcher
        wanted = cell.variants[self._controller.at]
        if wanted is not cell.active:
            # A request larger than a batch is computed by one variant, unless the account does not allow that.
            rest = batcher.take_begun() if self._pays_for(cell.active) else []
            if rest:
                return self._begun(rest)
            self._switch(wanted)
        while not self._pays_for(cell.active):
            self._controller.empty(cell.clock.now())
            self._switch(cell.variants[self._controller.at])
        return self._begun(batcher.take())

    def ended(self, stream: Stream, parts: Sequence[Part[Job]], error: BaseException | None) -> None:
        """A batch that was taken has been answered, or has failed. Its outputs are still valid."""
        rows, most = sum(part.rows for part in parts), self._most[stream.of]
        if error is not None:
            self.account.fail(rows, most)
            return
        cost = self._cost_of(stream, rows)
        self._spent += cost
        self.account.end(rows, most, cost)

    def count(self, totals: Totals) -> None:
        """Write what was counted here."""
        totals.switches, totals.spent = self._switches, self._spent

    def describe(self, state: ModelState) -> None:
        """Write the present state."""
        state.drop = self.account.mean

    def shown(self) -> Mapping[str, Any]:
        """For `/config`."""
        return {
            "points": self._points,
            "accuracy_window": self.account.window,
            "accuracy_budget": self.account.budget,
            "accuracy_drop": self.account.mean,
            "switches": self._switches,
            "why": self._controller.why,
        }

    def close(self) -> None:
        """Stop deciding. Further calls have no effect."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _tick(self) -> None:
        """Decide, and come back in 100 ms."""
        self._timer = self._loop.call_later(INTERVAL_S, self._tick)
        try:
            load = self._load()
            self._is_used = self._is_used or load.arrived > 0
            if self._is_used:  # not while it is prepared beside what is served: it would climb
                self._controller.decide(load)
            if self._cell.waiting:
                self._cell.dispatch_soon()
        except Exception as error:  # the variant stays, and the next decision may succeed
            log.failure("the ladder is not moved", error)

    def _load(self) -> Load:
        """What came since the decision before. The counters of the cell are enough: nothing is counted per request."""
        cell, now = self._cell, self._cell.clock.now()
        counters = cell.counters
        seen, shed = counters.rows + cell.waiting, counters.shed_queue + counters.shed_deadline
        rows_each = counters.rows / counters.answered if counters.answered > _ENOUGH else 1.0
        new_shed = (shed - self._shed) * rows_each
        new = max(0.0, seen - self._seen + new_shed)
        # The event loop may be late: what came is scaled to one interval.
        share = INTERVAL_S / max(INTERVAL_S / 10, now - self._last)
        self._seen, self._shed, self._last = seen, shed, now
        # Rungs carry what they carry alone: where other models compute, too, the same load weighs more.
        share *= cell.lanes.slow
        return Load(now, new * share, new_shed * share, round(cell.waiting * cell.lanes.slow))

    def _pays_for(self, variant: Variant) -> bool:
        """Whether the account allows a batch of this variant; the most accurate is always allowed."""
        if variant is self._cell.variants[0]:
            return True
        rows = min(variant.max_batch, max(1, self._cell.waiting))
        return self.account.allows(rows, self._most[variant])

    def _begun(self, parts: list[Part[Job]]) -> list[Part[Job]]:
        if parts:
            self.account.begin(sum(part.rows for part in parts), self._most[self._cell.active])
        return parts

    def _cost_of(self, stream: Stream, rows: int) -> float:
        """The sum of the expected drops of a batch's answers, by the class of each where that is known."""
        costs = self._costs[self._cell.variants.index(stream.of)]
        if len(costs) == 1:
            return rows * float(costs[0])
        return float(costs[stream.slot.outputs[self._output].argmax(axis=1)].sum())

    def _spent_share(self) -> float:
        """The share that is spent of what the most accurate variant leaves."""
        least = self._points[0].upper_drop / self.account.budget if self.account.budget else 1.0
        return (self.account.share - least) / (1 - least) if least < 1 else 1.0

    def _switch(self, to: Variant) -> None:
        if to is not self._cell.active:
            self._switches += 1
            why = self._controller.why
            log.event(logging.INFO, "variant", model=self._cell.codec.model, variant=to.name, why=why)
            self._cell.use(to)


def _carried(point: LadderPoint, variant: Variant, plan: Plan) -> float:
    """Samples per second that a variant carries in this process: as measured, or what its engine gives here if less."""
    planned = point.rate_rps * plan.goal.workload.rows / plan.policy.cells
    if not variant.is_sure:
        return planned
    rows = variant.max_batch
    return min(planned, len(variant.engine.slots) * rows / variant.expected_s(rows))
