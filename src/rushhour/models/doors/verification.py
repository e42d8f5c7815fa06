"""Whether the graph of an import answers as its original does, and to each sample independently of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature
from rushhour.errors import ModelError, RushhourError
from rushhour.models.batch_dependence import batch_dependence
from rushhour.models.doors.door import Answers, Arrival
from rushhour.models.failure import why_failed
from rushhour.models.graph_answers import Columns, GraphAnswers, gap, tolerance_of

_BATCHES: Final = (1, 3, 8)
_SIZES: Final = (7, 16, 40)
"""Of open dimensions, in these batches."""


def verify_arrival(
    arrival: Arrival, name: str, samples: Mapping[str, NDArray[Any]] | None = None, signature: Signature | None = None
) -> float | None:
    """The largest difference between the graph's answers and the original's, as a share of the largest answer.

    Compared at batches of 1, 3 and 8, for normal values, 0 to 1, 0 to 255, and real samples.

    Args:
        arrival: the graph and its original.
        name: of the model, for messages.
        samples: real inputs by name, `(k, *shape)`.
        signature: of the graph, where it has open dimensions: then samples of several sizes are compared.

    Returns:
        None where the graph is the original.

    Raises:
        ModelError: if they differ by more than rounding, if none is a finite number, or if the answer to a sample
            depends on the others of its batch: a server puts requests of several users into one.
    """
    graph = GraphAnswers(arrival.graph, name)
    worst = None
    if arrival.answers is not None:
        worst = max(
            _compared(arrival, arrival.answers, name, columns, graph(columns), f"at batch {batch}, inputs {values}")
            for batch, size in zip(_BATCHES, _SIZES, strict=True)
            for values, columns in graph.drawn(batch, arrival.limits, samples, _shapes(signature, size))
        )
    shapes = _shapes(signature, _SIZES[-1])
    drawn = [columns for _, columns in graph.drawn(_BATCHES[-1], arrival.limits, samples, shapes)]
    _check_numbers(graph, drawn, name)
    tolerance = max(arrival.tolerance, tolerance_of(arrival.graph))
    _check_independence(graph, drawn[0] if samples is None else drawn[-1], tolerance, name)
    return worst


def _check_numbers(graph: GraphAnswers, drawn: Sequence[Columns], name: str) -> None:
    """Raise if no answer to any kind of sample is a finite number: a weight is not."""
    if not any(np.isfinite(answer).any() for columns in drawn for answer in graph(columns)[:1]):
        raise ModelError(
            f"cannot import {name}",
            "all its answers are NaN or infinite, whatever the samples",
            "check its weights for NaN, and how it was exported",
        )


def _shapes(signature: Signature | None, size: int) -> dict[str, tuple[int, ...]] | None:
    """The shapes of samples whose open dimensions have this size, as far as their bounds allow it."""
    if signature is None or not signature.dimensions:
        return None
    sizes = tuple(min(each.largest, max(each.smallest, size)) for each in signature.dimensions)
    return {spec.name: signature.shape(spec, sizes) for spec in signature.inputs}


def _compared(
    arrival: Arrival, original: Answers, name: str, columns: Columns, answers: Sequence[NDArray[Any]], where: str
) -> float:
    try:
        originals = original(columns)
    except RushhourError:
        raise
    except Exception as error:  # any package's code may fail in any way
        raise ModelError(
            f"cannot check the import of {name}", f"{where} the original fails: {why_failed(error)}", "check the model"
        ) from error
    if len(originals) != len(answers):
        raise ModelError(
            f"the graph of {name} is not the model",
            f"it has {len(answers)} outputs, and the original {len(originals)}",
            "please report it",
        )
    off = max(gap(answer, np.asarray(original)) for answer, original in zip(answers, originals, strict=True))
    if not off <= arrival.tolerance:
        raise ModelError(
            f"the graph of {name} does not answer as the model does",
            f"{where}, they differ by {off:.2g} of the largest answer, and {arrival.tolerance:.2g} is allowed",
            "export it to ONNX with the tools of its own framework, and import that file",
        )
    return off


def _check_independence(graph: GraphAnswers, columns: Columns, tolerance: float, name: str) -> None:
    """Raise if the answer to a sample depends on the others of its batch."""
    names = list(columns)
    for index in range(len(graph(columns))):

        def predict(given: Sequence[NDArray[Any]], index: int = index) -> NDArray[Any]:
            return np.asarray(graph(dict(zip(names, given, strict=True)))[index])

        dependence = batch_dependence(predict, [columns[each] for each in names], tolerance)
        if dependence is not None:
            raise ModelError(f"cannot import {name}", dependence, "remove what mixes samples")
