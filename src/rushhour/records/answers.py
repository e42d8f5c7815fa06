"""Recorded answers: a graph's outputs for its bundle's samples, which every engine has to reproduce.

They are computed by ONNX Runtime without any optimisation, node by node in f32, and for an int8 graph as the ONNX
standard defines it, so that they do not depend on the processor. An engine that compiles the same graph may round
differently, within a tolerance that is recorded too; one that deviates more is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import EngineError
from rushhour.records.graph import read_graph
from rushhour.system.machine import describe
from rushhour.system.telemetry import disable_telemetry
from rushhour.task import overlaps

Answers = Mapping[str, NDArray[Any]]
"""Output name -> array of shape `(n, *shape)`."""

TOLERANCES: Final = {"f32": 1e-3, "bf16": 3e-2, "int8": 1e-2}
"""Largest `deviation` by precision. For int8, engines round differently between layers; the effect is measured when a
graph is quantised, and this is the smallest tolerance."""

INTEGER_PRODUCTS: Final = frozenset({"QLinearMatMul", "QLinearConv", "QGemm", "MatMulInteger", "ConvInteger"})
"""Operators whose arithmetic depends on the processor, even without optimisation."""

_HALF: Final = 0.5
_SPREAD: Final = 1e-3
"""Outputs with a small range are compared by this share of their magnitude instead."""


def graph_answers(model: Path, samples: Answers) -> dict[str, NDArray[Any]]:
    """The outputs of the ONNX graph at `model`, computed node by node: name -> `(n, *shape)`, in the samples' order.

    Args:
        samples: input name -> array of shape `(n, *shape)`; they are run in batches of one.

    Raises:
        EngineError: if the graph multiplies integers and this processor may saturate: its outputs here prove nothing.
        Exception: of any type, if ONNX Runtime cannot run the graph.
    """
    if describe().saturates and _multiplies_integers(model):
        raise EngineError(
            f"cannot compute the outputs of {model}",
            "it multiplies 8-bit integers, and without VNNI this processor may saturate",
            "make the bundle on a machine with VNNI",
        )
    disable_telemetry()
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
    """Whether it multiplies integers, not floats between QuantizeLinear and DequantizeLinear."""
    return any(node.operator in INTEGER_PRODUCTS for node in read_graph(model).nodes)


def deviation(expected: Answers, found: Answers, boxes: Collection[str] = ()) -> float:
    """The deviation of `found` from `expected`: the root mean square of the differences, as a share of the output's
    range over all samples; the largest of all outputs.

    Samples whose expected output is not finite are left out. An output that is not finite where a finite one is
    expected, or that has another shape, counts as infinitely far. Of labels, which have no distances, it is the share
    that differ. Boxes may have another order: see `box_deviation`.

    Args:
        expected: by name.
        found: by name.
        boxes: names of outputs that are boxes, `(n, boxes, 6)`.
    """
    return max(
        (
            (box_deviation if name in boxes else _of_one)(expected[name], found[name])
            for name in expected
            if name in found
        ),
        default=0.0,
    )


def box_deviation(expected: NDArray[Any], found: NDArray[Any]) -> float:
    """How far boxes are from those expected, whatever their order: the root mean square over all boxes of both.

    Each box is compared with the one of its class that overlaps it most, if that is by half or more: in its score, and
    in its corners as a share of the range of all. A box without such a one differs by what its score is above the
    lowest score that there is: a score at the threshold may be a little above it here and a little below it there.

    Args:
        expected: shape `(n, boxes, 6)`: x1, y1, x2, y2, score, class; a score of 0 is no box.
        found: the same.
    """
    if expected.shape != found.shape or not np.isfinite(found).all():
        return float("inf")
    scores = np.concatenate([expected[..., 4].reshape(-1), found[..., 4].reshape(-1)]).astype(np.float64)
    if not (scores > 0).any():
        return 0.0
    least, scale = scores[scores > 0].min(), max(1e-9, float(np.ptp(expected[..., :4])), float(np.ptp(found[..., :4])))
    squares: list[float] = []
    for one, other in (*zip(expected, found, strict=True), *zip(found, expected, strict=True)):
        mine, theirs = (each[each[:, 4] > 0].astype(np.float64) for each in (one, other))
        shares = overlaps(mine, theirs) * (mine[:, None, 5] == theirs[None, :, 5])
        for row, box in enumerate(mine):
            best = int(shares[row].argmax()) if len(theirs) else -1
            if best < 0 or shares[row, best] < _HALF:
                squares.append(float((box[4] - least) ** 2))
            else:
                corners = (box[:4] - theirs[best, :4]) / scale
                squares.append(float((box[4] - theirs[best, 4]) ** 2 + (corners**2).mean()))
    return float(np.sqrt(np.mean(squares)))


def _of_one(expected: NDArray[Any], found: NDArray[Any]) -> float:
    if expected.shape != found.shape:
        return float("inf")
    if expected.dtype.kind in "iub":
        return float(np.mean(expected != found)) if expected.size else 0.0
    with np.errstate(invalid="ignore"):  # NaN is a deviation, not a warning
        wanted, given = (array.reshape(len(array), -1).astype(np.float64) for array in (expected, found))
    known = np.isfinite(wanted).all(axis=1)
    wanted, given = wanted[known], given[known]
    if not wanted.size:
        return 0.0
    if not np.isfinite(given).all():
        return float("inf")
    scale = max(float(np.ptp(wanted)), _SPREAD * float(np.abs(wanted).max()), 1e-9)
    return float(np.sqrt(np.mean((given - wanted) ** 2))) / scale
