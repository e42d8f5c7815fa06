"""Whether a converted network answers as its ONNX graph does, at several batch sizes and ranges of values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from rushhour.models.converted.conversion import Converted, NotTrainable
from rushhour.models.failure import why_failed
from rushhour.models.graph_answers import Columns, GraphAnswers, gap, tolerance_of

_BATCHES: Final = (1, 3, 16)


def verify(
    model: onnx.ModelProto, converted: Converted, name: str, samples: Mapping[str, NDArray[Any]] | None = None
) -> float:
    """The largest difference between the network's answers and ONNX Runtime's, as a share of the largest answer.

    Args:
        model: the graph.
        converted: from it.
        name: of the model, for messages.
        samples: real inputs by name, `(k, *shape)`; compared beside random ones.

    Raises:
        NotTrainable: if they differ by more than rounding; the message names the operator where they begin to.
        ModelError: if ONNX Runtime cannot run the graph.
    """
    network = converted.network()
    graph = GraphAnswers(model, name, [converted.output])
    tolerance, worst = tolerance_of(model), 0.0
    for batch in _BATCHES:
        for values, columns in graph.drawn(batch, converted.limits, samples):
            (expected,) = graph(columns)
            try:
                with torch.no_grad():
                    answer = network(*_given([columns[each] for each in graph.inputs]))
            except Exception as error:  # torch has an error of its own for every operator
                raise _differs(name, f"at batch {batch} it fails: {why_failed(error)}") from error
            off = gap(answer.numpy(), expected)
            if not off <= tolerance:
                place = _first_difference(model, network, converted, columns, tolerance, name)
                raise _differs(name, f"at batch {batch}, inputs {values}, they differ by {off:.2g}{place}")
            worst = max(worst, off)
    return worst


def _differs(name: str, why: str) -> NotTrainable:
    return NotTrainable(
        f"{name} cannot be trained",
        f"its torch network does not answer as its graph does: {why}",
        "it can be served, and made int8, f16 or w8; please report the operator",
    )


def _given(arrays: Sequence[NDArray[Any]]) -> list[Tensor]:
    """As training gives samples: a single input as float32, several as they are."""
    if len(arrays) == 1:
        return [torch.from_numpy(arrays[0].astype(np.float32))]
    return [torch.from_numpy(array) for array in arrays]


class _Recorded(fx.Interpreter):
    """Runs a network and keeps all its results."""

    def __init__(self, network: fx.GraphModule) -> None:
        super().__init__(network, garbage_collect_values=False)
        self.results: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        """The result of one operation."""
        self.results[n.name] = super().run_node(n)
        return self.results[n.name]


def _first_difference(
    model: onnx.ModelProto, network: fx.GraphModule, converted: Converted, columns: Columns, tolerance: float, name: str
) -> str:
    """The operator at which results begin to differ, in words; empty where it is not found."""
    recorded = _Recorded(network)
    origins = {call.name: call.origin for call in converted.program.calls}
    wanted = {result: tensor for result, tensor in converted.tensors.items() if result in origins}
    try:
        with torch.no_grad():
            recorded.run(*_given(list(columns.values())))
        expected = dict(zip(wanted, GraphAnswers(model, name, list(wanted.values()))(columns), strict=True))
    except Exception:  # only the place stays unknown
        return ""
    for result in wanted:
        found = recorded.results.get(result)
        if isinstance(found, Tensor) and not gap(found.numpy(), expected[result]) <= tolerance:
            return f", first at {origins[result]} ({gap(found.numpy(), expected[result]):.2g})"
    return ""
