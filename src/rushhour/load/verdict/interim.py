"""Interim analyses: a window may be judged while it grows, and ends as soon as it is decided.

Repeated tests find chance results more often than one, so each interim analysis may spend only a part of the error: a
group-sequential test with alpha spending (Lan and DeMets 1983; power family: Kim and DeMets 1987). With one analysis
it is the test of fixed n.
"""

from __future__ import annotations

import dataclasses

from rushhour.load.significance import ERROR

_POWER = 3.0


@dataclasses.dataclass(frozen=True)
class InterimAnalysis:
    """One analysis of a window that may grow.

    Attributes:
        share: of the planned requests, measured so far.
        before: the same at the analysis before; 0 at the first.
        error: how often all analyses together may pass a rate that does not hold; less than 5% where several windows
            are tried for one claim.
    """

    share: float = 1.0
    before: float = 0.0
    error: float = ERROR

    @property
    def spent(self) -> float:
        """The share of the error that this analysis may spend: little at first, where estimates are poor."""
        spent: float = self.share**_POWER - self.before**_POWER
        return spent

    @property
    def significance(self) -> float:
        """How often this analysis may pass a rate that does not hold."""
        return self.error * self.spent
