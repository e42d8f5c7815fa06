"""Part 5 of bench-noise: what predictions are worth, from the capacities that were predicted and measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from bench.parts import Part
from bench.record import Table, rank_correlation, verdict


def prediction_part(found: Sequence[dict[str, Any]]) -> Part:
    """Errors and order of predictions.

    Args:
        found: of each plan, `network`, `plan`, `engine_alone`, `predicted`, `corrected`, `measured`, `interval`.
    """
    errors, corrected = (
        [abs(each[key] / each["measured"] - 1) for each in found] for key in ("predicted", "corrected")
    )
    predictions, measured = ([each[key] for each in found] for key in ("predicted", "measured"))
    correlation = rank_correlation(predictions, measured)
    n = len(found)
    checks = [
        verdict("5.plans", "plans whose capacity was predicted and measured", ">= 20", float(n), None, n, unit=""),
        verdict(
            "5.error",
            "predicted against measured, median error",
            "<= 0.15",
            statistics.median(errors),
            None,
            n,
            unit="",
        ),
        verdict(
            "5.corrected",
            "the same with the residuals of plans measured before, median error",
            "<= 0.1",
            statistics.median(corrected),
            None,
            n,
            unit="",
        ),
        verdict("5.rank", "predicted against measured, rank correlation", ">= 0.9", correlation, None, n, unit=""),
    ]
    rows = tuple(
        (
            f"{each['network']}: {each['plan']}",
            each["engine_alone"],
            each["predicted"],
            each["corrected"],
            each["measured"],
            each["interval"],
        )
        for each in found
    )
    columns = ("plan", "engine alone, /s", "predicted, /s", "corrected, /s", "measured, /s", "its interval")
    return Part(tuple(checks), (Table("Predicted and measured capacity", columns, rows),), found)
