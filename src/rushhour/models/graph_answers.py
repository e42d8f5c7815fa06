"""The answers of an ONNX graph in memory, and the inputs with which two networks are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from rushhour.errors import ModelError
from rushhour.models.batch_dependence import largest_gap
from rushhour.models.failure import why_failed
from rushhour.system.telemetry import disable_telemetry

TOLERANCE: Final = 1e-3
HALF_TOLERANCE: Final = 3e-2
"""Of differences, as a share of the largest answer; of a graph that computes in half precision."""
FREE_BATCH: Final = "export it with a dynamic first dimension (torch: dynamic_shapes or dynamic_axes)"
_BEYOND: Final = "out of data bounds"
"""In ONNX Runtime's message for a whole number that a table does not have."""
_VOCABULARY: Final = "give whole numbers that the model's tables have"
_HALF: Final = (TensorProto.FLOAT16, TensorProto.BFLOAT16)
_FLOATS: Final = {"float": "float32", "double": "float64", "float16": "float16"}
_RANGES: Final = ("of normal distribution", "from 0 to 1", "from 0 to 255")
_SAMPLES: Final = "of your samples"

Columns = dict[str, NDArray[Any]]
"""An array `(n, *shape)` for each input, by name."""


class GraphAnswers:
    """ONNX Runtime on a graph.

    Args:
        model: the graph with its weights.
        outputs: the tensors that are answers, inner ones too; those of the graph by default.
        name: of the model, for messages.

    Attributes:
        inputs: the names of the graph's inputs, in its order.

    Raises:
        ModelError: if it cannot run the graph.
    """

    def __init__(self, model: onnx.ModelProto, name: str, outputs: Sequence[str] | None = None) -> None:
        disable_telemetry()
        import onnxruntime

        shown = model
        if outputs is not None:
            shown = onnx.ModelProto()
            shown.CopyFrom(model)
            del shown.graph.output[:]
            shown.graph.output.extend(onnx.ValueInfoProto(name=each) for each in outputs)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        self._name = name
        try:
            self._session = onnxruntime.InferenceSession(
                shown.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # its exceptions have no common base class
            raise ModelError(f"ONNX Runtime cannot run {name}", why_failed(error), "check the model") from error
        self.inputs = [value.name for value in self._session.get_inputs()]

    def __call__(self, columns: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """An array for each output.

        Raises:
            ModelError: if the graph does not run on them.
        """
        try:
            answers: list[NDArray[Any]] = self._session.run(None, dict(columns))
        except Exception as error:  # its exceptions have no common base class
            why = why_failed(error)
            fix = _VOCABULARY if _BEYOND in why else FREE_BATCH
            raise ModelError(f"ONNX Runtime cannot run {self._name}", why, fix) from error
        return answers

    def drawn(
        self,
        batch: int,
        limits: Mapping[str, int],
        samples: Mapping[str, NDArray[Any]] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Iterator[tuple[str, Columns]]:
        """What the values are, in words, and inputs of that kind: seeded random ones, then real samples.

        Args:
            batch: how many samples.
            limits: input of whole numbers -> one more than the largest that it may hold, where that is known.
            samples: real inputs by name, `(k, *shape)`; repeated where they are too few.
            shapes: of one sample of each input; by default the graph's.
        """
        random = np.random.default_rng(batch)
        for values in _RANGES:
            columns: Columns = {}
            for value in self._session.get_inputs():
                shape = (batch, *(value.shape[1:] if shapes is None else shapes[value.name]))
                kind = value.type.removeprefix("tensor(").removesuffix(")")
                if kind in _FLOATS:
                    drawn = random.normal(size=shape) if values == _RANGES[0] else random.random(shape)
                    columns[value.name] = (drawn * 255 if values == _RANGES[2] else drawn).astype(_FLOATS[kind])
                elif kind == "bool":
                    columns[value.name] = random.random(shape) < 0.5
                else:
                    end = limits.get(value.name, 256 if kind == "uint8" else 2)
                    columns[value.name] = random.integers(0, end, shape).astype(kind)
            yield values, columns
        if samples is not None:
            yield _SAMPLES, {name: np.resize(array, (batch, *array.shape[1:])) for name, array in samples.items()}


def gap(answer: NDArray[Any], expected: NDArray[Any]) -> float:
    """The largest difference, as a share of the largest expected value; infinite where the shapes differ."""
    if answer.shape != expected.shape:
        return float("inf")
    wide = expected.astype(np.float64)
    scale = max(0.1, float(np.abs(wide[np.isfinite(wide)]).max(initial=0)))
    return largest_gap(answer.astype(np.float64), wide) / scale


def tolerance_of(model: onnx.ModelProto) -> float:
    """The largest `gap` that is rounding, by the precision that the graph computes in."""
    is_half = any(tensor.data_type in _HALF for tensor in model.graph.initializer)
    return HALF_TOLERANCE if is_half else TOLERANCE
