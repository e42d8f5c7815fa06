"""The operator table: what of ONNX (opsets 11 to 22) can be converted, and by which function."""

from __future__ import annotations

from typing import Final

from rushhour.models.converted.operators import dense, elementwise, reductions, shapes, windows
from rushhour.models.converted.operators.operator import Operator

OPERATORS: Final[dict[str, Operator]] = {
    **dense.OPERATORS,
    **elementwise.OPERATORS,
    **reductions.OPERATORS,
    **shapes.OPERATORS,
    **windows.OPERATORS,
}
"""Operator of the standard domain -> its conversion. All others cannot be trained."""

__all__ = ["OPERATORS", "Operator"]
