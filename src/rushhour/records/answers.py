"""What a model answers to its bundle's samples: recorded when it is made, compared wherever it is opened.

The recorded answers are the graph's own: ONNX Runtime without any optimisation computes node by node in f32, and an
int8 graph as the standard has it, so no processor's shortcut is in them. An engine that compiles the same graph may
round otherwise, within a tolerance that is recorded too; one that answers something else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import EngineError
from rushhour.system.machine import describe
from rushhour.system.telemetry import keep_home

Answers = Mapping[str, NDArray[Any]]
"""Output name -> array of shape `(n, *shape)`."""

TOLERANCES: Final = {"f32": 1e-3, "bf16": 3e-2, "int8": 1e-2}
"""By precision; what `deviation` may be at most. int8: engines round differently between layers, and what that comes to
is measured when a graph is quantised; this is the least that is allowed."""

INTEGER_PRODUCTS: Final = frozenset({"QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger", "ConvInteger"})
"""Operators whose arithmetic is the processor's own, even where nothing is optimised."""

_SPREAD: Final = 1e-3
"""Answers that hardly differ are compared by this share of their size instead of by their range."""


def graph_answers(model: Path, samples: Answers) -> dict[str, NDArray[Any]]:
    """What the ONNX graph at `model` answers, node by node: output name -> `(n, *shape)`, in the samples' order.

    Args:
        samples: input name -> array of shape `(n, *shape)`; they are run one at a time, so no answer has company.

    Raises:
        EngineError: if the graph multiplies integers by itself and this processor may saturate on them: what it answers
            here proves nothing.
        Exception: whatever ONNX Runtime raises on a graph that it cannot run.
    """
    if describe().saturates and _multiplies_integers(model):
        raise EngineError(
            f"cannot tell what {model} answers",
            "it multiplies 8-bit numbers by itself, and without VNNI this processor may saturate on them",
            "make the bundle on a machine with VNNI",
        )
    keep_home()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    count = len(next(iter(samples.values())))
    rows = [
        session.run(names, {name: np.ascontiguousarray(array[row : row + 1]) for name, array in samples.items()})
        for row in range(count)
    ]
    return {name: np.concatenate([row[index] for row in rows]) for index, name in enumerate(names)}


def _multiplies_integers(model: Path) -> bool:
    """Whether integers are multiplied as such, not as floats between QuantizeLinear and DequantizeLinear."""
    import onnx

    return any(node.op_type in INTEGER_PRODUCTS for node in onnx.load(model, load_external_data=False).graph.node)


def deviation(expected: Answers, found: Answers) -> float:
    """How far `found` is from `expected`: the largest root mean square of the differences of any output, as a share of
    that output's range over all samples.

    Samples whose expected answer is not finite are left out; an answer that is not finite where one was expected
    counts as infinitely far, as does one of another shape.
    """
    return max((_of_one(expected[name], found[name]) for name in expected if name in found), default=0.0)


def _of_one(expected: NDArray[Any], found: NDArray[Any]) -> float:
    if expected.shape != found.shape:
        return float("inf")
    with np.errstate(invalid="ignore"):  # an engine may answer what is no number at all: that is far, not a warning
        wanted, given = (array.reshape(len(array), -1).astype(np.float64) for array in (expected, found))
    known = np.isfinite(wanted).all(axis=1)
    wanted, given = wanted[known], given[known]
    if not wanted.size:
        return 0.0
    if not np.isfinite(given).all():
        return float("inf")
    scale = max(float(np.ptp(wanted)), _SPREAD * float(np.abs(wanted).max()), 1e-9)
    return float(np.sqrt(np.mean((given - wanted) ** 2))) / scale
