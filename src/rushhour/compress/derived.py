"""A bundle made from another's graph, without its torch module: verified on both engines, then sealed."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.bundle import SAMPLES, Bundle, Step
from rushhour.engines import EngineConfig, Runner, open_engine, saturates_here
from rushhour.errors import BundleError, ModelError
from rushhour.plan import EngineName, Precision
from rushhour.records.answers import TOLERANCES, deviation, graph_answers

_ENGINES: Final[tuple[EngineName, ...]] = ("openvino", "onnxruntime")

_VERIFIED_BATCHES = (1, 3, 32)

_AGREEMENT = 0.05
"""Mean difference allowed between two engines' answers, as a share of their range: they round int8 differently."""

_MARGIN: Final = 3.0
"""The recorded tolerance over the deviation found here: other versions and processors round differently."""

OUTCOME: Final = "control"
"""The setting of a step in the lineage that is a result: what accuracy control did."""

Answers = list[dict[str, NDArray[Any]]]
"""For each verified batch: output name -> array."""


def engine_versions(*tools: str) -> dict[str, str]:
    """Package -> version: of the engines that verify a bundle, and of the tools that make it."""
    return {package: importlib.metadata.version(package) for package in (*tools, *_ENGINES)}


def existing_bundle(out: Path, parent: Bundle, step: Step) -> Bundle | None:
    """The bundle at `out`, if it came from this step on this parent; None if it is another, or damaged.

    Args:
        step: its settings; the bundle's own step may have `OUTCOME` besides.
    """
    try:
        existing = Bundle.open(out)
    except BundleError:
        return None
    *before, last = existing.manifest.lineage or (Step(""),)
    settings = {name: value for name, value in last.settings.items() if name != OUTCOME}
    same = tuple(before) == parent.manifest.lineage and last.what == step.what and settings == step.settings
    return existing if same else None


def seal(
    parent: Bundle,
    out: Path,
    graph: onnx.ModelProto,
    *,
    step: Step,
    precision: Precision,
    samples: Mapping[str, NDArray[Any]],
    near_parent: float | None = None,
) -> Bundle:
    """The bundle with `graph` at `out`, once both engines run it at any batch size and agree on its answers.

    It carries neither source nor weights: its answers are no longer those of the torch module.

    Args:
        parent: what it was made from.
        out: its folder; any other bundle there is replaced.
        step: the end of its lineage.
        precision: that engines run it in.
        samples: real inputs, one or more: name -> array of shape `(n, *shape)`.
        near_parent: how far its answers may be from the parent's on average, as a share of their range.

    Raises:
        ModelError: if the engines do not agree on the graph, or its answers are too far from the parent's.
        EngineError: if an engine is missing, or cannot run it on this machine.
        StorageError: if the disk does not take it.
    """
    manifest = msgspec.structs.replace(
        parent.manifest,
        source=None,
        precision=precision,
        lineage=(*parent.manifest.lineage, step),
        metrics={},
        files={},
    )

    def model(file: Path) -> dict[Precision, float]:
        onnx.save(graph, file)
        return _verify(Bundle(file.parent, manifest), parent, samples, near_parent)

    carried = parent.samples() if SAMPLES in parent.manifest.files else None
    return Bundle.create(out, manifest, model, samples=carried, tokenizer=parent.read_tokenizer())


def _verify(
    bundle: Bundle, parent: Bundle, samples: Mapping[str, NDArray[Any]], near_parent: float | None
) -> dict[Precision, float]:
    """The tolerance of an engine's answers, from the deviations of the engines here."""
    # OpenVINO refuses it on this machine, which it is not for
    engines = _ENGINES[1:] if saturates_here(bundle) else _ENGINES
    precision = bundle.manifest.precision
    found = {engine: _answers(bundle, engine, precision, samples) for engine in engines}
    first, last = found[engines[0]], found[engines[-1]]
    _check_near(
        first,
        last,
        _AGREEMENT,
        f"{bundle.manifest.name} answers differently on {engines[0]} and {engines[-1]}",
    )
    if near_parent is not None:
        meant = parent.manifest.precision
        before = _answers(parent, _ENGINES[1], "f32" if meant == "bf16" else meant, samples)
        _check_near(before, last, near_parent, f"{bundle.manifest.name} does not answer as {parent.manifest.name}")
    largest = _VERIFIED_BATCHES[-1]
    whole = {name: np.resize(array, (largest, *array.shape[1:])) for name, array in samples.items()}
    exact = graph_answers(bundle.model, whole)
    off = max(deviation(exact, answers[-1], bundle.manifest.signature.boxes) for answers in found.values())
    return {precision: max(TOLERANCES[precision], _MARGIN * off)}


def _answers(bundle: Bundle, engine: EngineName, precision: Precision, samples: Mapping[str, NDArray[Any]]) -> Answers:
    opened = open_engine(bundle, EngineConfig(engine, precision, max_batch=max(_VERIFIED_BATCHES)))
    try:
        runner = Runner(opened)
        return [
            runner.infer({name: np.resize(array, (size, *array.shape[1:])) for name, array in samples.items()})
            for size in _VERIFIED_BATCHES
        ]
    finally:
        opened.close()


def _check_near(first: Answers, second: Answers, share: float, what: str) -> None:
    # The range of all samples: that of one sample with one value is 0.
    allowed_for = {name: share * max(1e-3, float(np.ptp(array))) for name, array in first[-1].items()}
    for size, left, right in zip(_VERIFIED_BATCHES, first, second, strict=True):
        for name in left:
            difference = float(np.abs(left[name].astype(np.float64) - right[name]).mean())
            allowed = allowed_for[name]
            if not difference <= allowed:
                raise ModelError(
                    what,
                    f"at batch {size} answers differ by {difference:.2g} on average, and {allowed:.2g} is allowed",
                    "serve it in f32 or bf16",
                )
