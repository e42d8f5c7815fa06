"""The verdict on one window of open-loop load: pass, fail, or why neither can be concluded.

judge, decide         the decision, with and without the figures
InterimAnalysis       one analysis of a window that still grows
Evidence              what late requests and the tail of the latency prove
variance_inflation    what autocorrelated requests are worth
"""

from rushhour.load.verdict.autocorrelation import variance_inflation
from rushhour.load.verdict.decision import decide, judge
from rushhour.load.verdict.evidence import Evidence
from rushhour.load.verdict.interim import InterimAnalysis

__all__ = ["Evidence", "InterimAnalysis", "decide", "judge", "variance_inflation"]
