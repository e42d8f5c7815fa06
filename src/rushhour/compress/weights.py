"""Weights in fewer bits, without data and without training: smaller on disk, computed as before.

Neither form makes a batch faster on a CPU: weights become floats again before they are multiplied. They save memory:
of a model that many processes hold, or whose weights are read again for every small batch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from rushhour.bundle import MODEL, Bundle, Step
from rushhour.compress.derived import engine_versions, existing_bundle, seal
from rushhour.compress.quantize import check_plain, quiet_nncf
from rushhour.errors import ModelError
from rushhour.models.deployed import strip_origin
from rushhour.progress import Progress

_FAITHFUL_INT8 = 0.05
_FAITHFUL_F16 = 0.01
"""How far answers may move on average, as a share of their range: a wrong conversion moves them further."""
_SMALL = 1_024
"""Numbers of the smallest tensor that is stored in f16: smaller ones are not worth a node."""


class ReducedPrecision(msgspec.Struct, frozen=True, tag_field="step", tag="precision"):
    """Fewer bits, without data.

    Attributes:
        form: `bf16`: engines compute in bfloat16; `f16`: weights are stored in float16, and engines compute in f32;
            `w8`: the same with 8 bits. The last two make it smaller on disk, not faster.
    """

    form: Literal["bf16", "f16", "w8"] = "bf16"


def compress_weights(bundle: Bundle, out: Path, *, progress: Progress) -> Bundle:
    """The bundle with weights in int8, a scale and zero point for each channel, and everything else in f32.

    It runs wherever the parent runs, in the same precisions: its own is not `int8`.

    Args:
        bundle: an f32 bundle; its graph is enough.
        out: the new bundle's folder; any other bundle there is replaced.

    Raises:
        ModelError: if it is compressed already, has no weights to compress, or its answers move too far.
        StorageError: if the disk does not take it.
    """
    check_plain(bundle)
    step = _step("compress_weights", bundle, "nncf")
    existing = existing_bundle(out, bundle, step)
    if existing is not None:
        return existing
    progress.start(f"int8 weights of {bundle.manifest.name}")
    with quiet_nncf(bundle) as nncf:
        graph: onnx.ModelProto = nncf.compress_weights(onnx.load(bundle.model), mode=nncf.CompressWeightsMode.INT8_ASYM)
    strip_origin(graph)
    _flatten_scales(graph.graph)
    if not any(node.op_type == "DequantizeLinear" for node in graph.graph.node):
        raise _nothing(bundle, "no matrix product or table of embeddings with weights of its own")
    return _sealed(bundle, out, graph, step, _FAITHFUL_INT8, progress)


def halve_weights(bundle: Bundle, out: Path, *, progress: Progress) -> Bundle:
    """The bundle with weights stored in f16, which engines convert to f32 (or bf16) when they load it.

    Exact to three digits, for any network whose weights f16 can hold; a tensor that it cannot hold stays as it is.
    Computing in f16 is not offered: ONNX Runtime has few such kernels for processors, OpenVINO needs AMX-FP16.

    Args:
        bundle: an f32 bundle; its graph is enough.
        out: the new bundle's folder; any other bundle there is replaced.

    Raises:
        ModelError: if it is compressed already, has no weights to halve, or its answers move too far.
        StorageError: if the disk does not take it.
    """
    check_plain(bundle)
    step = _step("halve_weights", bundle)
    existing = existing_bundle(out, bundle, step)
    if existing is not None:
        return existing
    progress.start(f"f16 weights of {bundle.manifest.name}")
    graph = onnx.load(bundle.model)
    casts = []
    for tensor in graph.graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) < _SMALL:
            continue
        values = numpy_helper.to_array(tensor)
        if not np.abs(values).max() <= np.finfo(np.float16).max:
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(values.astype(np.float16), f"{name}.f16"))
        casts.append(helper.make_node("Cast", [f"{name}.f16"], [name], to=TensorProto.FLOAT))
    if not casts:
        raise _nothing(bundle, f"no tensor of {_SMALL:,} or more weights that f16 can hold")
    nodes = [*casts, *graph.graph.node]
    del graph.graph.node[:]
    graph.graph.node.extend(nodes)
    return _sealed(bundle, out, graph, step, _FAITHFUL_F16, progress)


def _flatten_scales(graph: onnx.GraphProto) -> None:
    """Make scales and zero points vectors, as DequantizeLinear specifies them (opset 13 and later).

    NNCF 3.4 gives those of convolutions the shape `(channels, 1, 1)`, which ONNX Runtime takes and OpenVINO does not.
    """
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type != "DequantizeLinear":
            continue
        for name in node.input[1:]:
            dims = tensors[name].dims if name in tensors else []
            if len(dims) > 1 and max(dims) == np.prod(dims):
                dims[:] = [max(dims)]


def _step(what: str, bundle: Bundle, *tools: str) -> Step:
    return Step(what, {"parent": bundle.manifest.files[MODEL].sha256, **engine_versions(*tools)})


def _sealed(bundle: Bundle, out: Path, graph: onnx.ModelProto, step: Step, near: float, progress: Progress) -> Bundle:
    samples = bundle.samples()
    result = seal(bundle, out, graph, step=step, precision="f32", samples=samples, near_parent=near)
    progress.done(f"{bundle.model_bytes / 1e6:.1f} MB -> {result.model_bytes / 1e6:.1f} MB")
    return result


def _nothing(bundle: Bundle, why: str) -> ModelError:
    return ModelError(f"cannot compress the weights of {bundle.manifest.name}", f"it has {why}", "serve it as it is")
