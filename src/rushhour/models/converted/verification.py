"""Whether a converted network answers as its ONNX graph does, at several batch sizes and ranges of values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, fx

from rushhour.errors import ModelError
from rushhour.models.batch_dependence import largest_gap
from rushhour.models.converted.conversion import Converted, NotTrainable
from rushhour.models.failure import why_failed
from rushhour.system.telemetry import disable_telemetry

_BATCHES: Final = (1, 3, 16)
_RANGES: Final = ("of normal distribution", "from 0 to 1", "from 0 to 255", "of your samples")
_TOLERANCE: Final = 1e-3
_HALF_TOLERANCE: Final = 3e-2
"""Of differences, as a share of the largest answer; of a graph that computes in half precision."""
_HALF: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)

Columns = dict[str, NDArray[Any]]


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
    session = _session(model, [converted.output], name)
    names = [value.name for value in session.get_inputs()]
    is_half = any(tensor.data_type in _HALF for tensor in model.graph.initializer)
    tolerance, worst = _HALF_TOLERANCE if is_half else _TOLERANCE, 0.0
    for batch in _BATCHES:
        for values, columns in _inputs(session, converted, batch, samples):
            (expected,) = _run(session, [converted.output], columns, name)
            try:
                with torch.no_grad():
                    answer = network(*(_given(columns[each]) for each in names))
            except Exception as error:  # torch has an error of its own for every operator
                raise _differs(name, f"at batch {batch} it fails: {why_failed(error)}") from error
            gap = _gap(answer, expected)
            if not gap <= tolerance:
                place = _first_difference(model, network, converted, columns, tolerance, name)
                raise _differs(name, f"at batch {batch}, inputs {values}, they differ by {gap:.2g}{place}")
            worst = max(worst, gap)
    return worst


def _differs(name: str, why: str) -> NotTrainable:
    return NotTrainable(
        f"{name} cannot be trained",
        f"its torch network does not answer as its graph does: {why}",
        "it can be served, and made int8, f16 or w8; please report the operator",
    )


def _session(model: onnx.ModelProto, outputs: list[str], name: str) -> Any:
    """ONNX Runtime on the graph, with these tensors as outputs."""
    disable_telemetry()
    import onnxruntime

    shown = onnx.ModelProto()
    shown.CopyFrom(model)
    del shown.graph.output[:]
    shown.graph.output.extend(onnx.ValueInfoProto(name=each) for each in outputs)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(shown.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(f"ONNX Runtime cannot run {name}", why_failed(error), "check the file") from error


def _run(session: Any, outputs: list[str], columns: Columns, name: str) -> list[NDArray[Any]]:
    try:
        answers: list[NDArray[Any]] = session.run(outputs, columns)
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(
            f"ONNX Runtime cannot run {name}",
            why_failed(error),
            "export it with a dynamic first dimension (torch: dynamic_shapes or dynamic_axes)",
        ) from error
    return answers


def _inputs(
    session: Any, converted: Converted, batch: int, samples: Mapping[str, NDArray[Any]] | None
) -> Iterator[tuple[str, Columns]]:
    """What the values are, and arrays by name."""
    random = np.random.default_rng(batch)
    for values in _RANGES:
        if values == _RANGES[-1]:
            if samples is not None:
                yield values, {key: np.resize(array, (batch, *array.shape[1:])) for key, array in samples.items()}
            continue
        columns: Columns = {}
        for value in session.get_inputs():
            shape = (batch, *value.shape[1:])
            kind = value.type.removeprefix("tensor(").removesuffix(")")
            if kind in ("float", "double", "float16"):
                drawn = random.normal(size=shape) if values == _RANGES[0] else random.random(shape)
                drawn = drawn * 255 if values == _RANGES[2] else drawn
                columns[value.name] = drawn.astype({"float": "float32", "double": "float64"}.get(kind, kind))
            elif kind == "bool":
                columns[value.name] = random.random(shape) < 0.5
            else:
                end = converted.limits.get(value.name, 256 if kind == "uint8" else 2)
                columns[value.name] = random.integers(0, end, shape).astype(kind)
        yield values, columns


def _given(array: NDArray[Any]) -> Tensor:
    """As training gives samples: float32."""
    return torch.from_numpy(array.astype(np.float32))


def _gap(answer: Tensor, expected: NDArray[Any]) -> float:
    """The largest difference, as a share of the largest expected value."""
    given = answer.numpy()
    if given.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    scale = max(0.1, float(np.abs(wide[np.isfinite(wide)]).max(initial=0)))
    return largest_gap(given.astype(np.float64), wide) / scale


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
            recorded.run(*(_given(array) for array in columns.values()))
        session = _session(model, list(wanted.values()), name)
        expected = dict(zip(wanted, _run(session, list(wanted.values()), columns, name), strict=True))
    except Exception:  # only the place stays unknown
        return ""
    for result in wanted:
        found = recorded.results.get(result)
        if isinstance(found, Tensor) and not _gap(found, expected[result]) <= tolerance:
            return f", first at {origins[result]} ({_gap(found, expected[result]):.2g})"
    return ""
