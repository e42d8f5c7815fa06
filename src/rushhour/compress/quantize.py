"""int8 without training: NNCF calibrates the bundle's own graph and writes one QDQ graph for all engines."""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.bundle import MODEL, SAMPLES, Bundle, Step
from rushhour.compress.judge import check_fits
from rushhour.data.dataset import Dataset
from rushhour.engines import EngineConfig, Runner, open_engine
from rushhour.errors import BundleError, ModelError
from rushhour.models.deployed import strip_origin
from rushhour.plan import EngineName
from rushhour.progress import Progress
from rushhour.telemetry import keep_home

_ENGINES: Final[tuple[EngineName, ...]] = ("openvino", "onnxruntime")

_VERIFIED_BATCHES = (1, 3, 32)

_AGREEMENT = 0.05
"""Mean distance allowed between two engines' answers, as a share of their range. They round int8 differently."""


def quantize(
    bundle: Bundle,
    dataset: Dataset,
    out: Path,
    *,
    calibration: int = 300,
    seed: int = 0,
    progress: Progress,
) -> Bundle:
    """The bundle with int8 weights and activations, for OpenVINO and ONNX Runtime at any batch size.

    torch cannot run it, so it carries neither source nor weights. A bundle at `out` that came from the very same work
    on the very same graph is returned as it is.

    Args:
        bundle: an f32 bundle.
        dataset: calibration samples come from its training part.
        out: the new bundle's folder; any other bundle there is replaced.
        calibration: samples to find the ranges of activations with; fewer where the data has fewer.
        seed: of their choice.

    Raises:
        DataError: if the data does not fit the bundle's signature.
        ModelError: if the bundle is quantised already, or cannot be, or the engines do not agree on the result.
        EngineError: if an engine is missing, or cannot run int8 on this machine.
        StorageError: if the disk does not take it.
    """
    name = bundle.manifest.name
    if calibration < 1:
        raise ModelError(
            f"cannot quantise {name} with {calibration} calibration samples",
            "the ranges of activations are found on samples",
            "use one or more; 300 is usual",
        )
    if bundle.manifest.precision == "int8":
        raise ModelError(f"cannot quantise {name}", "it is quantised already", "name the bundle that it was made from")
    check_fits(bundle, dataset.train.inputs)
    calibration = min(calibration, len(dataset.train))
    step = Step(
        "quantize",
        {
            "calibration": calibration,
            "seed": seed,
            "dataset": dataset.name,
            "fingerprint": dataset.fingerprint,
            # of the graph, not of the bundle: adding a metric to the parent changes nothing here
            "parent": bundle.manifest.files[MODEL].sha256,
            "nncf": importlib.metadata.version("nncf"),
        },
    )
    lineage = (*bundle.manifest.lineage, step)
    there = _sealed(out, lineage)
    if there is not None:
        return there
    rows = np.random.default_rng(seed).choice(len(dataset.train), calibration, replace=False)
    progress.start(f"quantize {name}", calibration)
    graph = _calibrated(bundle, dataset.train.inputs, rows, progress)
    manifest = msgspec.structs.replace(
        bundle.manifest, name=f"{name}-int8", source=None, precision="int8", lineage=lineage, metrics={}, files={}
    )

    def model(file: Path) -> None:
        onnx.save(graph, file)
        _verify(Bundle(file.parent, manifest), dataset.train.inputs[rows])

    samples = bundle.samples() if SAMPLES in bundle.manifest.files else None
    made = Bundle.create(out, manifest, model, samples=samples)
    progress.done(f"{bundle.model_bytes / 1e6:.1f} MB -> {made.model_bytes / 1e6:.1f} MB")
    return made


def _calibrated(bundle: Bundle, inputs: NDArray[Any], rows: NDArray[np.int64], progress: Progress) -> onnx.ModelProto:
    """The QDQ graph."""
    name = bundle.manifest.signature.inputs[0].name

    def sample(row: int) -> dict[str, NDArray[Any]]:
        progress.advance()
        return {name: np.ascontiguousarray(inputs[row : row + 1])}

    with _quiet_nncf() as nncf:
        try:
            graph: onnx.ModelProto = nncf.quantize(
                onnx.load(bundle.model), nncf.Dataset(rows.tolist(), sample), subset_size=len(rows)
            )
        except Exception as error:  # NNCF may fail in any way on a graph from elsewhere
            reason = str(error).strip().splitlines() or [""]
            raise ModelError(
                f"cannot quantise {bundle.manifest.name}",
                f"{type(error).__name__}: {reason[0]}",
                "serve it in f32 or bf16",
            ) from error
    strip_origin(graph)
    return graph


@contextmanager
def _quiet_nncf() -> Iterator[Any]:
    """NNCF, imported here because it takes seconds, without its logs, warnings, progress bars and telemetry.

    Its bars would break the one that a face draws. Its telemetry reports every use to Google Analytics unless this
    variable is set while it is imported; a person who imports it before us has made another choice.
    """
    keep_home()
    told = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    logger, logger_class = logging.getLogger("nncf"), logging.getLoggerClass()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            nncf = importlib.import_module("nncf")
            track = importlib.import_module("nncf.common.logging.track_progress").track
        finally:
            logging.setLoggerClass(logger_class)  # NNCF leaves its own
            if told is None:
                del os.environ["NNCF_CI"]
        level, bar = logger.level, track.__iter__
        try:
            logger.setLevel(logging.ERROR)
            track.__iter__ = lambda self: iter(self.sequence)
            yield nncf
        finally:
            logger.setLevel(level)
            track.__iter__ = bar


def _verify(bundle: Bundle, samples: NDArray[Any]) -> None:
    """Raise unless both engines run the graph at any batch size, and mean the same."""
    wire, answer = bundle.manifest.signature.inputs[0], bundle.manifest.signature.outputs[0]
    batches = [np.resize(samples, (size, *wire.shape)) for size in _VERIFIED_BATCHES]
    answers: list[list[NDArray[Any]]] = []
    for engine_name in _ENGINES:
        engine = open_engine(
            bundle, EngineConfig(engine=engine_name, precision="int8", max_batch=max(_VERIFIED_BATCHES))
        )
        try:
            runner = Runner(engine)
            answers.append([runner.infer({wire.name: batch})[answer.name] for batch in batches])
        finally:
            engine.close()
    for size, first, second in zip(_VERIFIED_BATCHES, *answers, strict=True):
        apart = float(np.abs(first - second).mean())
        allowed = _AGREEMENT * max(1e-3, float(np.ptp(first)))
        if not apart <= allowed:
            raise ModelError(
                f"the quantised {bundle.manifest.name} is not the same model on {_ENGINES[0]} and {_ENGINES[1]}",
                f"at batch {size} their answers are {apart:.2g} apart on average, and {allowed:.2g} is allowed",
                "serve it in f32 or bf16",
            )


def _sealed(out: Path, lineage: tuple[Step, ...]) -> Bundle | None:
    """The bundle at `out`, if it came from this very work; a damaged one counts as none."""
    try:
        bundle = Bundle.open(out)
    except BundleError:
        return None
    return bundle if bundle.manifest.lineage == lineage else None
