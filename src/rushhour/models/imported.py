"""An ONNX file from elsewhere becomes a bundle of its graph as it is, without a torch module: served, but not trained.

`rushhour.models.importing` makes one that can be trained, where the graph can be converted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.bundle import Bundle, DType, Manifest, OpenDimension, Preprocessing, Signature, Step, TensorSpec, Text
from rushhour.errors import ModelError
from rushhour.models.converted import read_onnx
from rushhour.models.deployed import strip_origin
from rushhour.models.graph_answers import GraphAnswers
from rushhour.models.open_dimensions import open_dimensions, padded
from rushhour.records.answers import INTEGER_PRODUCTS
from rushhour.system.telemetry import disable_telemetry
from rushhour.task import Task

_INT8 = INTEGER_PRODUCTS | {"QuantizeLinear"}
"""Operators of a graph whose activations are quantised, by any tool."""
_DYNAMIC = "export it with a dynamic first dimension (torch: dynamic_shapes or dynamic_axes)"


def from_onnx(file: Path, task: Task, out: Path, *, samples: NDArray[Any] | None = None) -> Bundle:
    """The bundle of an ONNX file. Its signature is the graph's own; inputs are not scaled.

    Args:
        file: weights inside or beside it.
        task: what the first output means.
        out: the bundle's folder; an older one is replaced.
        samples: a few real inputs, `(k, *shape)`, or a structured array with a field for each of several inputs;
            seeded noise is used where there are none.

    Raises:
        ModelError: if it cannot be read, its batch is fixed, an output has an open dimension of its own, or ONNX
            Runtime's answer to a sample depends on its batch.
        TaskError: if the first output does not fit the task.
        StorageError: if the disk does not take it.
    """
    step = Step("import", {"format": "onnx"})
    return from_graph(read_onnx(file), name_for(file), task, out, step=step, samples=samples, shown=str(file))


def from_graph(
    graph: onnx.ModelProto,
    name: str,
    task: Task,
    out: Path,
    *,
    step: Step,
    samples: NDArray[Any] | None = None,
    shown: str = "",
    dimensions: tuple[OpenDimension, ...] | None = None,
    limits: Mapping[str, int] | None = None,
    tokenizer: bytes | None = None,
) -> Bundle:
    """The bundle of a graph in memory; see `from_onnx`.

    Args:
        graph: as of `read_onnx`. What tools record about its origin is removed from it.
        name: of the bundle.
        task: as of `from_onnx`.
        out: as of `from_onnx`.
        step: the first of its lineage.
        samples: as of `from_onnx`.
        shown: names it in messages; `name` by default.
        dimensions: the open ones; by default all that have no number in the graph.
        limits: input of whole numbers -> one more than the largest that it may hold.
        tokenizer: a `tokenizer.json`, which makes texts into the tokens of its first input.

    Raises:
        RushhourError: as `from_onnx`.
    """
    signature = with_limits(signature_of(graph, shown or name, dimensions), limits or {})
    if signature.dimensions and not any(each.padding for each in signature.dimensions):
        signature = padded(GraphAnswers(graph, name), signature, limits or {})
    task.check_output(signature.outputs[0].shape, name, signature.inputs[0].shape)
    strip_origin(graph)
    manifest = Manifest(
        name=name,
        signature=signature,
        task=task,
        preprocessing=Preprocessing(),
        precision="int8" if any(node.op_type in _INT8 for node in graph.graph.node) else "f32",
        parameters=sum(int(np.prod(tensor.dims)) for tensor in graph.graph.initializer),
        lineage=(step,),
        text=msgspec.UNSET if tokenizer is None else Text({signature.inputs[0].name: "ids"}),
    )
    carried = None
    if samples is not None:
        carried = {name: samples[name] for name in samples.dtype.names or ()} or {signature.inputs[0].name: samples}

    def model(target: Path) -> None:
        onnx.save(graph, target)
        given = carried or Bundle(target.parent, manifest).samples()
        _check_batches(target, {name: np.resize(array, (3, *array.shape[1:])) for name, array in given.items()})

    return Bundle.create(out, manifest, model, samples=carried, tokenizer=tokenizer)


def signature_of(
    graph: onnx.ModelProto, file: Path | str, dimensions: tuple[OpenDimension, ...] | None = None
) -> Signature:
    """The inputs and outputs of a graph, without the batch.

    Args:
        graph: any.
        file: names it in messages.
        dimensions: the open ones; by default all that have no number in the graph.

    Raises:
        ModelError: if a batch is fixed, an open dimension of an output is none of the inputs', or a type is none that
            the protocol carries.
    """
    held = {tensor.name for tensor in graph.graph.initializer}
    inputs = [value for value in graph.graph.input if value.name not in held]
    if not inputs or not graph.graph.output:
        what = "output" if inputs else "input"
        raise ModelError(f"cannot serve {file}", f"it has no {what}", "check how it was exported")
    for value in (*inputs, *graph.graph.output):
        _check_batch(value, file)
    if dimensions is None:
        dimensions = open_dimensions(graph, str(file))
    found = dimensions or msgspec.UNSET
    return Signature(
        inputs=tuple(_spec(value, file, dimensions) for value in inputs),
        outputs=tuple(_spec(value, file, dimensions) for value in graph.graph.output),
        open=found,
    )


def with_limits(signature: Signature, limits: Mapping[str, int]) -> Signature:
    """A signature with bounds on whole numbers: input -> one more than the largest."""
    inputs = tuple(
        msgspec.structs.replace(spec, below=limits[spec.name])
        if spec.name in limits and np.dtype(spec.dtype).kind in "iu"
        else spec
        for spec in signature.inputs
    )
    return msgspec.structs.replace(signature, inputs=inputs)


def name_for(file: Path) -> str:
    """The name of a model from that of its file."""
    return "".join(c if c.isalnum() else "-" for c in file.stem).strip("-").lower()[:64] or "model"


def _check_batch(value: onnx.ValueInfoProto, file: Path | str) -> None:
    """Raise unless the first dimension is free."""
    if not value.type.HasField("tensor_type"):
        kind = value.type.WhichOneof("value")
        why = f"a {kind.removesuffix('_type')}, and no tensor" if kind else "of no known type and shape"
        raise ModelError(f"cannot serve {file}", f"{value.name} is {why}", "export it with tensors of known shapes")
    if not value.type.tensor_type.shape.dim:
        raise ModelError(f"cannot serve {file}", f"{value.name} has no dimension, so no batch", _DYNAMIC)
    first = value.type.tensor_type.shape.dim[0]
    if first.dim_value:
        raise ModelError(
            f"cannot serve {file}", f"the first dimension of {value.name} is fixed to {first.dim_value}", _DYNAMIC
        )


def _spec(value: onnx.ValueInfoProto, file: Path | str, dimensions: tuple[OpenDimension, ...]) -> TensorSpec:
    tensor = value.type.tensor_type
    shape = [dimension.dim_value for dimension in tensor.shape.dim[1:]]
    for each in dimensions:
        if value.name in each.axes:
            shape[each.axes[value.name]] = each.largest
    if not all(size > 0 for size in shape):
        sizes = ", ".join(str(dimension.dim_value or dimension.dim_param or "?") for dimension in tensor.shape.dim[1:])
        raise ModelError(
            f"cannot serve {file}",
            f"one sample of {value.name} has the shape ({sizes}), and not all of it is known",
            "fix the other dimensions when you export it",
        )
    dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name
    if dtype not in get_args(DType):
        raise ModelError(f"cannot serve {file}", f"{value.name} is {dtype}", "use numbers that the protocol carries")
    return TensorSpec(value.name, dtype, tuple(shape))


def _check_batches(file: Path, batch: dict[str, NDArray[Any]]) -> None:
    """Raise unless three samples in one batch get the same answers as each alone."""
    disable_telemetry()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        batched = session.run(None, batch)
        alone = [session.run(None, {name: array[row : row + 1] for name, array in batch.items()}) for row in range(3)]
    except Exception as error:  # its exceptions have no common base class
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError("ONNX Runtime cannot run the model", reason[0], _DYNAMIC) from error
    for index, answers in enumerate(batched):
        single = np.concatenate([each[index] for each in alone])
        near = answers.shape == single.shape and np.allclose(
            answers, single, rtol=1e-3, atol=1e-3 * max(1e-1, float(np.abs(single).max())), equal_nan=True
        )
        if not near:
            raise ModelError(
                "the model's answers depend on the batch",
                f"its output {session.get_outputs()[index].name} to 3 samples is not that to each of them alone",
                "remove what mixes samples",
            )
