"""Whether an engine on this machine gives the answers that the bundle recorded: processors differ in int8.

Without VNNI the products of 8-bit numbers are added in pairs in 16 bits, and saturate where weights use all 8 bits: on
such a machine that graph is computed correctly only by an engine with slower kernels that avoid it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Bundle, cut
from rushhour.engines.engine import Engine, EngineConfig, Runner
from rushhour.errors import EngineError
from rushhour.records.answers import INTEGER_PRODUCTS, TOLERANCES, Answers, deviation
from rushhour.records.graph import Graph, read_graph
from rushhour.system.machine import describe

_SAFE = 64
"""Largest weight for which a pair of products with unsigned activations fits in 16 bits: 2 x 255 x 64 < 2^15."""
_PRODUCTS = INTEGER_PRODUCTS | {"MatMul", "Gemm", "Conv", "ConvTranspose", "Einsum", "LSTM", "GRU", "RNN"}
_PASSES_ON = {"DequantizeLinear", "Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Cast", "Identity"}
"""Operators that pass weights on to a product unchanged."""
_ALONE = 4
"""Samples that are also run one at a time: some engines have another graph for a batch of one."""


def check_answers(bundle: Bundle, engine: Engine) -> None:
    """Raise unless the engine answers the bundle's samples as recorded, within the recorded tolerance.

    A bundle without recorded answers (of an earlier version) passes.

    Raises:
        EngineError: if it does not, or a batch fails.
    """
    recorded, config = bundle.answers(), engine.config
    if recorded is None:
        return
    precisions = bundle.manifest.tolerance
    allowed = TOLERANCES[config.precision]
    if isinstance(precisions, dict):
        allowed = precisions.get(config.precision, allowed)
    count = len(next(iter(recorded.values())))
    samples = {name: array[:count] for name, array in bundle.samples().items()}
    runner = Runner(engine)
    boxes = bundle.manifest.signature.boxes
    off = deviation(recorded, runner.infer(samples), boxes)
    if config.max_batch > 1:
        rows = range(min(_ALONE, count))
        alone = [runner.infer({name: array[row : row + 1] for name, array in samples.items()}) for row in rows]
        found = {name: np.concatenate([answers[name] for answers in alone]) for name in alone[0]}
        off = max(off, deviation({name: array[: len(rows)] for name, array in recorded.items()}, found, boxes))
    if not off <= allowed:
        raise EngineError(
            f"{config.engine} in {config.precision} does not answer as the bundle {bundle.manifest.name} should",
            f"on this machine ({describe().isa}) its answers to the bundle's own samples differ by {off:.1%} of their "
            f"range, and {allowed:.1%} is allowed",
            _remedy(config),
        )
    _check_padding(bundle, runner, recorded, samples, allowed)


def _check_padding(
    bundle: Bundle, runner: Runner, recorded: Answers, samples: Mapping[str, NDArray[Any]], allowed: float
) -> None:
    """Raise unless a sample has the same answer with and without the padding behind it.

    Raises:
        EngineError: if it has not, or a batch fails.
    """
    signature = bundle.manifest.signature
    if signature.padded is None:
        return
    whole = signature.sizes_of(samples)
    for row, own in enumerate(bundle.sizes()[:_ALONE]):
        alone = {name: array[row : row + 1] for name, array in samples.items()}
        wanted = {name: array[row : row + 1] for name, array in recorded.items()}
        off = deviation(cut(signature, wanted, own), runner.infer(cut(signature, alone, own)))
        if not off <= allowed:
            dimension = signature.dimensions[signature.padded]
            raise EngineError(
                f"the answers of the bundle {bundle.manifest.name} change with padding",
                f"padded from {dimension.name} {own[signature.padded]} to {whole[signature.padded]}, a sample's answer "
                f"differs by {off:.1%} of its range, and {allowed:.1%} is allowed",
                f"make the bundle without `padding` of {dimension.name}, so that only samples of equal size share a "
                "batch",
            )


def saturates_here(bundle: Bundle) -> bool:
    """Whether this processor may saturate on the bundle's graph: int8 weights of the full range, and no VNNI.

    The graph is read only on a processor without VNNI.
    """
    return describe().saturates and full_range(bundle)


def full_range(bundle: Bundle) -> bool:
    """Whether the graph multiplies by int8 weights that use more than 7 of their 8 bits."""
    if bundle.manifest.precision != "int8":
        return False
    graph = read_graph(bundle.model)
    multiplied = _multiplied(graph)
    return any(
        int(np.abs(values.astype(np.int16) - (128 if values.dtype == np.uint8 else 0)).max()) > _SAFE
        for name, values in graph.constants.items()
        if name in multiplied and values.size > 1
    )


def _multiplied(graph: Graph) -> set[str]:
    """Tensors that are multiplied as they are, or dequantised: weights, but not embedding tables."""
    found = {name for node in graph.nodes if node.operator in _PRODUCTS for name in node.inputs}
    for node in reversed(graph.nodes):  # the graph is sorted, so later nodes are known
        if node.operator in _PASSES_ON and not found.isdisjoint(node.outputs):
            found.update(node.inputs)
    return found


def check_range(bundle: Bundle, config: EngineConfig) -> None:
    """Raise if this processor may saturate on the bundle's graph; for engines without kernels that avoid it.

    Raises:
        EngineError: if it may.
    """
    if config.precision == "int8" and saturates_here(bundle):
        raise EngineError(
            f"{config.engine} cannot run the bundle {bundle.manifest.name} in int8 on this machine ({describe().isa})",
            "its weights use all 8 bits, and without VNNI this processor adds products in 16 bits, which saturate",
            _remedy(config),
        )


def _remedy(config: EngineConfig) -> str:
    if config.precision == "int8":
        other = "serve it on onnxruntime, " if config.engine == "openvino" else ""
        return f"{other}quantise it again with `rushhour compress --for any`, or serve the bundle that it was made from"
    return "serve it in f32, or on another engine" if config.precision != "f32" else "serve it on another engine"
