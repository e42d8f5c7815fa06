"""The ONNX graph of a deployed network, and whether it answers as the torch module does."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils import parametrize

from rushhour.bundle import OpenDimension, columns_of
from rushhour.errors import ModelError
from rushhour.models.batch_dependence import batch_dependence
from rushhour.models.deployed.heads import Boxes
from rushhour.models.deployed.module import Deployed, tensors_of
from rushhour.models.failure import why_failed
from rushhour.records.answers import deviation
from rushhour.system.machine import cores
from rushhour.system.telemetry import disable_telemetry

_VERIFIED_BATCHES = (1, 3, 32)

_COMPARED = 5
"""Samples whose answers alone and in one batch are compared."""
_GRAPH_TOLERANCE = 1e-3
_SHAPES_LOG = "torch.fx.experimental.symbolic_shapes"

_ON_THE_WIRE = ".wire"
"""Suffix of the names of inputs and outputs until the exporter is done: no name that it makes up ends so."""


def graph_of(
    deployed: Deployed,
    name: str,
    samples: NDArray[Any],
    input_names: list[str],
    output_name: str,
    dimensions: Sequence[OpenDimension] = (),
) -> onnx.ModelProto:
    """Export a network.

    Args:
        deployed: settled, in evaluation mode.
        name: of the network, for messages.
        samples: one or more, as in `export`.
        input_names: on the wire.
        output_name: on the wire.
        dimensions: that stay free besides the batch.

    Raises:
        ModelError: if it cannot be exported.
    """
    example = tensors_of(_batch(samples, 2))  # 0 and 1 become constants
    return exported_graph(deployed, example, name, input_names, (output_name,), dimensions=dimensions)


def exported_graph(
    module: nn.Module,
    example: tuple[torch.Tensor, ...],
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    *,
    optimize: bool = True,
    dimensions: Sequence[OpenDimension] = (),
) -> onnx.ModelProto:
    """The ONNX graph of any module, with a free batch.

    Args:
        module: in evaluation mode; its `forward` takes `*samples`.
        example: two samples or more, a tensor for each input.
        name: of the network, for messages.
        input_names: in the graph.
        output_names: in the graph.
        optimize: join operators; a batch normalisation is put into its convolution then. Else constants are computed
            only, with the sequences of tensors that a split becomes.
        dimensions: the further ones that stay free.

    Raises:
        ModelError: if it cannot be exported.
    """
    batch, free = torch.export.Dim("batch"), [torch.export.Dim(each.name, max=each.largest) for each in dimensions]
    shapes = (
        tuple(
            {0: batch, **{1 + of.axes[each]: dim for of, dim in zip(dimensions, free, strict=True) if each in of.axes}}
            for each in input_names
        ),
    )
    return _exported(
        _without_parametrizations(module), name, input_names, output_names, args=example, dynamic_shapes=shapes,
        optimize=optimize,
    )  # fmt: skip


def graph_of_program(
    program: torch.export.ExportedProgram, name: str, input_names: Sequence[str], output_names: Sequence[str]
) -> onnx.ModelProto:
    """The ONNX graph of what `torch.export` gave, with the dimensions that are free in it; see `exported_graph`."""
    return _exported(program, name, input_names, output_names, optimize=False)


def _exported(
    model: nn.Module | torch.export.ExportedProgram,
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    **settings: Any,
) -> onnx.ModelProto:
    from onnxscript.optimizer import fold_constants, remove_unused_nodes

    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                model,
                dynamo=True,
                input_names=[each + _ON_THE_WIRE for each in input_names],
                output_names=[each + _ON_THE_WIRE for each in output_names],
                verbose=False,
                **settings,
            )
            assert program is not None
            if not settings["optimize"]:
                fold_constants(program.model)
                remove_unused_nodes(program.model)
        graph: onnx.ModelProto = program.model_proto
    except Exception as error:  # the exporter may fail in any way on a user's model
        raise ModelError(
            f"cannot export {name} to ONNX",
            why_failed(error),
            "use operations that torch.onnx can export, independent of the values and the number of samples",
        ) from error
    strip_origin(graph)
    _name_tensors(graph.graph, (*input_names, *output_names))
    return graph


def _without_parametrizations(network: nn.Module) -> nn.Module:
    """A copy with plain weights in place of computed ones (`torch.nn.utils.parametrize`), which ONNX may not have."""
    if not any(map(parametrize.is_parametrized, network.modules())):
        return network
    try:
        plain = copy.deepcopy(network)
        with torch.no_grad():
            for module in list(plain.modules()):
                if parametrize.is_parametrized(module):
                    # not by `remove_parametrizations`, which changes the class that both copies share
                    values = {
                        name: getattr(module, name).clone() for name in cast(nn.ModuleDict, module.parametrizations)
                    }
                    module.__class__ = type(module).__bases__[0]
                    del module.parametrizations
                    for name, value in values.items():
                        module.register_parameter(name, nn.Parameter(value, requires_grad=False))
    except Exception:  # a user's network or parametrization may be of any kind: then the computation is exported
        return network
    return plain


def _name_tensors(graph: onnx.GraphProto, names: tuple[str, ...]) -> None:
    """Give inputs and output their names on the wire; inner tensors with one of these names get another.

    The exporter does not check for equal names: a network with an inner tensor `embedding` and an output of that name
    became a graph that no engine loads.
    """

    def renamed(name: str) -> str:
        return name.removesuffix(_ON_THE_WIRE) if name.endswith(_ON_THE_WIRE) else f"{name}.inner"

    new = {old: renamed(old) for name in names for old in (name, name + _ON_THE_WIRE)}
    for named in (*graph.input, *graph.output, *graph.initializer, *graph.value_info):
        named.name = new.get(named.name, named.name)
    for node in graph.node:
        for tensors in (node.input, node.output):
            for index, name in enumerate(tensors):
                tensors[index] = new.get(name, name)
        for attribute in node.attribute:
            for inner in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
                _name_tensors(inner, names)


def strip_origin(graph: onnx.ModelProto) -> None:
    """Remove, in place, what tools record about the origin of a graph: stack traces, paths, comments.

    They name folders of this machine, differ from run to run, and can be larger than a small model.
    """
    pieces: list[Any] = [graph, graph.graph, *graph.functions]
    while pieces:
        piece = pieces.pop()
        for field in ("metadata_props", "doc_string"):
            if field in piece.DESCRIPTOR.fields_by_name:
                piece.ClearField(field)
        for field in ("node", "initializer", "sparse_initializer", "value_info", "input", "output", "attribute"):
            held = getattr(piece, field, ())
            pieces += [child for child in held if not isinstance(child, str)]  # a node's inputs are names only
        if isinstance(piece, onnx.AttributeProto):
            pieces += [piece.g, *piece.graphs] if piece.HasField("g") else piece.graphs


def verify(file: Path | bytes, deployed: Deployed, name: str, names: list[str], samples: NDArray[Any]) -> None:
    """Raise unless the ONNX graph, in a file or in bytes, answers as torch does, and each sample independently.

    Raises:
        ModelError: if it does not.
    """
    disable_telemetry()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(
            f"ONNX Runtime cannot run the graph of {name}",
            why_failed(error),
            "compute in float32: no autocast, .half() or .bfloat16() in the network",
        ) from error

    def run(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        try:
            (answer,) = session.run(None, dict(zip(names, columns, strict=True)))
        except Exception as error:  # its exceptions have no common base class
            raise ModelError(
                f"the ONNX graph of {name} does not run on {len(columns[0])} samples",
                why_failed(error),
                "compute with whole batches: no loop over samples, no fixed number of samples (len(x) gives one: use "
                "x.shape[0])",
            ) from error
        return np.asarray(answer)

    for size in _VERIFIED_BATCHES:
        batch = columns_of(_batch(samples, size))
        with torch.no_grad():
            expected = deployed(*map(torch.from_numpy, batch)).numpy()
        answer = run(batch)
        off, tolerance = _gap(deployed, answer, expected)
        if not off <= tolerance:
            raise ModelError(
                f"the ONNX graph of {name} does not answer as its torch module does",
                f"at batch {size} they differ by {off:.2g}, and {tolerance:.2g} is allowed",
                "check the model for random or batch-dependent operations, and its weights for NaN",
            )
    gap = None if deployed.outputs is not None else partial(_gap_of_choices, deployed)
    dependence = batch_dependence(run, columns_of(samples[:_COMPARED]), _GRAPH_TOLERANCE, gap)
    if dependence is not None:
        raise ModelError(f"cannot seal {name}", dependence, "remove operations that mix samples, and train it again")


def _gap(deployed: Deployed, answer: NDArray[Any], expected: NDArray[Any]) -> tuple[float, float]:
    """How far an answer is from what is expected, and how far it may be."""
    if deployed.outputs is None:
        return _gap_of_choices(deployed, answer, expected), _GRAPH_TOLERANCE
    tolerance = _GRAPH_TOLERANCE * max(1e-1, float(np.abs(expected).max()))
    return (float(np.abs(answer - expected).max()) if answer.shape == expected.shape else float("inf")), tolerance


def _gap_of_choices(deployed: Deployed, answer: NDArray[Any], expected: NDArray[Any]) -> float:
    """The same of a head that chooses, among which rounding decides ties: the share of the answer that is another."""
    return deviation({"": expected}, {"": answer}, ("",) if isinstance(deployed.head, Boxes) else ())


def _batch(samples: NDArray[Any], size: int) -> NDArray[Any]:
    """`size` samples; they are repeated where there are too few."""
    batch: NDArray[Any] = samples[np.arange(size) % len(samples)]
    return batch


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the exporter's warnings, logs and graphs, which need no action."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", _SHAPES_LOG, "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
