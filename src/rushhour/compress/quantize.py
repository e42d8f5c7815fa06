"""Post-training quantisation to int8: NNCF calibrates the bundle's graph and writes one QDQ graph for all engines."""

from __future__ import annotations

import importlib
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.bundle import MODEL, Bundle, Step
from rushhour.compress.derived import OUTCOME, engine_versions, existing_bundle, seal
from rushhour.compress.judge import judge, named_inputs, outputs_of
from rushhour.data.dataset import Dataset, Split
from rushhour.engines import EngineConfig, saturates_here
from rushhour.errors import EngineError, ModelError
from rushhour.measurement import Accuracy
from rushhour.models.deployed import strip_origin
from rushhour.plan import EngineName
from rushhour.progress import Progress
from rushhour.system.machine import cores, describe
from rushhour.system.signal_stack import restored_signal_stack
from rushhour.system.storage import explained
from rushhour.system.telemetry import disable_telemetry

_JUDGED = 2_000
"""Samples, at most, that decide whether plain quantisation is inside the accuracy budget."""
_RANKED = 500
"""Samples, at most, that accuracy control measures every attempt on."""
_VALUES: Final = 3e8
"""Values of tensors that calibration looks at, at most: NNCF takes about ten seconds for them on one core. With 300
samples it would take minutes of a graph for large pictures or long texts."""
_LEAST_CALIBRATION: Final = 64
"""Samples that a graph is calibrated on however large it is, where the data has as many."""
_ATTENTION = {"Attention", "MultiHeadAttention"}
_WIDE: Final = ("vnni", "amx")
_MULTIPLYING: Final = frozenset(
    {"Conv", "ConvTranspose", "Gemm", "MatMul", "Einsum", "LSTM", "GRU", "RNN", "If", "Loop"}
)
"""Operators, one of which is in every graph that int8 speeds up, perhaps in a graph inside of a graph."""
COSTLY: Final = 0.003
"""Accuracy drop of 7-bit weights above which a bundle with all 8 bits is made too."""

Target = Literal["any", "avx2", "vnni", "amx"]
"""The class of machine that an int8 bundle is for.

`any` and `avx2`: weights use 7 of their 8 bits, so that no processor saturates: correct on every machine. `vnni` and
`amx`: weights use all 8 bits: correct where products are summed in 32 bits. Elsewhere OpenVINO refuses such a bundle,
and ONNX Runtime takes slower kernels.
"""


class Quantize(msgspec.Struct, frozen=True, tag_field="step", tag="int8"):
    """int8 weights and activations; see `quantize`.

    Attributes:
        calibration: samples that the ranges of activations are found on.
        target: the machines that it is for: `any` and `avx2` use 7 bits of the weights, `vnni` and `amx` all 8.
    """

    calibration: int = 300
    target: Target = "any"

    def __post_init__(self) -> None:
        if self.calibration < 1:
            raise ModelError(f"cannot calibrate with {self.calibration} samples", "1 or more are needed", "use 300")


def quantize(
    bundle: Bundle,
    dataset: Dataset,
    out: Path,
    *,
    calibration: int = 300,
    seed: int = 0,
    max_drop: float | None = None,
    iterations: int = 8,
    target: Target = "any",
    progress: Progress,
) -> Bundle:
    """The bundle with int8 weights and activations, for OpenVINO and ONNX Runtime at any batch size.

    torch cannot run it, so it carries neither source nor weights. A bundle at `out` that came from the same step on the
    same graph is returned as it is. A graph with attention is quantised as a transformer: activations are smoothed
    (Xiao et al. 2022), and sensitive layers stay in f32.

    With an accuracy budget, accuracy control follows where the plain result exceeds it on random training samples: the
    layers that cost most return to f32, one after another. The better of both is kept, inside the budget or not: the
    caller judges the compiled bundle.

    The last step of the lineage says for which machines it is: `for` and `weight bits`.

    Args:
        bundle: an f32 bundle; its graph is enough.
        dataset: calibration samples come from its training part.
        out: the new bundle's folder; any other bundle there is replaced.
        calibration: samples that the ranges of activations are found on, at most: fewer where the data has fewer, and
            of graphs with so large tensors that it would take minutes.
        seed: of their choice.
        max_drop: of the task's metric, or of fidelity where there are no labels; as in `AccuracyBudget`. None takes
            the plain result as it is.
        iterations: layers that accuracy control returns to f32, at most.
        target: the machines that it is for.

    Raises:
        DataError: if the data does not fit the bundle's signature.
        ModelError: if the bundle is compressed already, or cannot be, or the engines do not agree on the result.
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
    check_plain(bundle)
    inputs = named_inputs(bundle, dataset.train.inputs)
    calibration = _affordable(bundle, inputs, min(calibration, len(dataset.train)))
    step = Step(
        "quantize",
        {
            "calibration": calibration,
            "seed": seed,
            "dataset": dataset.name,
            "fingerprint": dataset.fingerprint,
            # of the graph, not of the bundle: a metric that is added to the parent changes nothing here
            "parent": bundle.manifest.files[MODEL].sha256,
            **engine_versions("nncf"),
            "for": target,
            "weight bits": 8 if target in _WIDE else 7,
            **({} if max_drop is None else {"max_drop": max_drop, "iterations": iterations}),
        },
    )
    existing = existing_bundle(out, bundle, step)
    if existing is not None:
        return existing
    rows = np.random.default_rng(seed).choice(len(dataset.train), calibration, replace=False)
    samples = {name: np.ascontiguousarray(array[rows]) for name, array in inputs.items()}
    progress.start(f"quantize {name}", calibration)
    wide = target in _WIDE
    graph = _plain(bundle, samples, progress, wide)
    if max_drop is not None:
        control = _Control(bundle, dataset, max_drop, iterations, seed, wide)
        graph, outcome = control.best(graph, samples, out)
        step = msgspec.structs.replace(step, settings={**step.settings, OUTCOME: outcome})
    result = seal(bundle, out, graph, step=step, precision="int8", samples=samples)
    progress.done(f"{bundle.model_bytes / 1e6:.1f} MB -> {result.model_bytes / 1e6:.1f} MB")
    return result


def quantize_for_all(
    bundle: Bundle,
    dataset: Dataset,
    out: Path,
    *,
    calibration: int = 300,
    seed: int = 0,
    max_drop: float | None = None,
    progress: Progress,
) -> dict[Target, Bundle]:
    """int8 for any machine; and where its accuracy is more than `COSTLY` below that of int8 that needs VNNI, that too.

    Only a machine with VNNI can compare them: elsewhere there is the first alone. Both have the same graph with other
    weights; `make bench-machines` measures their speed.

    Args:
        bundle: as for `quantize`.
        dataset: as for `quantize`; its validation part decides.
        out: folder of the first; the second is in a folder beside it, with `-vnni` at the end of its name.
        max_drop: as for `quantize`.

    Raises:
        RushhourError: as `quantize`.
    """
    result: dict[Target, Bundle] = {
        "any": quantize(bundle, dataset, out, calibration=calibration, seed=seed, max_drop=max_drop, progress=progress)
    }
    if describe().saturates:
        return result
    split = dataset.validation.sample(_JUDGED, seed=seed)
    progress.start(f"accuracy drop of {bundle.manifest.name} with 7-bit weights")
    expected = _answers_of(bundle, split)

    def drop(of: Bundle) -> float:
        return judge(dataset.task, "validation", split.targets, _answers_of(of, split), expected, split.groups).drop

    cost = drop(result["any"])
    progress.done(f"{cost * 100:.2f} points")
    if cost <= COSTLY:
        return result
    beside = out.with_name(f"{out.name}-vnni")
    wide = quantize(
        bundle,
        dataset,
        beside,
        calibration=calibration,
        seed=seed,
        max_drop=max_drop,
        target="vnni",
        progress=progress,
    )
    if cost - drop(wide) > COSTLY:
        result["vnni"] = wide
    return result


def is_plain(bundle: Bundle) -> bool:
    """Whether the bundle's weights are neither quantised nor stored in fewer bits."""
    steps = {step.what for step in bundle.manifest.lineage}
    done = bundle.manifest.precision == "int8" or bool(steps & {"quantize", "compress_weights", "halve_weights"})
    return not done and all(node.op_type != "DequantizeLinear" for node in onnx.load(bundle.model).graph.node)


def check_plain(bundle: Bundle, doing: str = "quantise") -> None:
    """Raise if the bundle's weights are quantised or stored in fewer bits.

    Args:
        doing: what cannot be done then, for the message.

    Raises:
        ModelError: if they are.
    """
    steps = {step.what for step in bundle.manifest.lineage}
    if not is_plain(bundle):
        raise ModelError(
            f"cannot {doing} {bundle.manifest.name}",
            "its weights are stored in f16 already" if "halve_weights" in steps else "it is quantised already",
            "name the bundle that it was made from",
        )


def _check_operators(model: onnx.ModelProto, name: str) -> None:
    """Raise if nothing in the graph is faster in int8: then NNCF fails, in words about opsets.

    Raises:
        ModelError: if so.
    """
    found = dict.fromkeys(node.op_type for node in model.graph.node)
    if not _MULTIPLYING & found.keys():
        raise ModelError(
            f"cannot quantise {name}",
            f"int8 speeds up convolutions and matrix products, and it has none: its operators are {', '.join(found)}",
            "serve it in f32",
        )


def _affordable(bundle: Bundle, samples: Mapping[str, NDArray[Any]], wanted: int) -> int:
    """How many of the wanted samples a graph is calibrated on: it follows from the graph alone, so that the same step
    gives the same bundle on every machine."""
    if wanted <= _LEAST_CALIBRATION:
        return wanted
    model = onnx.load(bundle.model)
    for each in model.graph.input:
        if each.name in samples:
            shape = each.type.tensor_type.shape
            del shape.dim[:]
            for size in (1, *samples[each.name].shape[1:]):
                shape.dim.add().dim_value = size
    try:
        inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError):  # of operators that ONNX does not know, or above 2 GB
        return wanted
    values = sum(
        math.prod(max(0, dimension.dim_value) for dimension in each.type.tensor_type.shape.dim)
        for each in inferred.graph.value_info
    )
    return max(_LEAST_CALIBRATION, min(wanted, int(_VALUES // max(1, values))))


def _plain(bundle: Bundle, samples: Mapping[str, NDArray[Any]], progress: Progress, wide: bool) -> onnx.ModelProto:
    """The QDQ graph; `wide`: with weights of all 8 bits."""
    model, count = onnx.load(bundle.model), _count(samples)
    _check_operators(model, bundle.manifest.name)

    def sample(row: int) -> dict[str, NDArray[Any]]:
        progress.advance()
        return _row(samples, row)

    with quiet_nncf(bundle) as nncf:
        graph: onnx.ModelProto = nncf.quantize(
            model,
            nncf.Dataset(range(count), sample),
            subset_size=count,
            model_type=nncf.ModelType.TRANSFORMER if _attends(model.graph) else None,
            ignored_scope=_left_out(nncf, bundle),
            advanced_parameters=_advanced(nncf, wide),
        )
    strip_origin(graph)
    return graph


def _advanced(nncf: Any, wide: bool) -> Any:
    """Settings without which NNCF halves the range of the first layer's weights only.

    By default NNCF also gives the inputs of depthwise convolutions a scale for each channel, which ONNX Runtime cannot
    run.
    """
    fix = nncf.OverflowFix.DISABLE if wide else nncf.OverflowFix.ENABLE
    of_tensors = importlib.import_module("nncf.quantization.advanced_parameters").QuantizationParameters(
        per_channel=False
    )
    return nncf.AdvancedQuantizationParameters(overflow_fix=fix, activations_quantization_params=of_tensors)


def _left_out(nncf: Any, bundle: Bundle) -> Any:
    """What stays in f32: of a network for tables all but products with weights and the embeddings.

    A factorisation machine takes the difference of two nearly equal sums, which 8 bits lose; and on so few numbers
    int8 makes no elementwise operation faster.
    """
    if bundle.manifest.table is None:
        return None
    return nncf.IgnoredScope(types=["Add", "Mul", "Sub", "Pow", "ReduceSum"], validate=False)


class _Control:
    """Accuracy control: whether a plain result is inside the budget, and which layers return to f32 if it is not."""

    def __init__(
        self, bundle: Bundle, dataset: Dataset, max_drop: float, iterations: int, seed: int, wide: bool
    ) -> None:
        self._bundle = bundle
        self._wide = wide
        self._task = dataset.task
        self._max_drop = max_drop
        self._iterations = iterations
        # on training samples: validation and test are for judging the result
        self._split = dataset.train.sample(_JUDGED, seed=seed + 1)
        self._expected = self._outputs(bundle)
        rows = np.random.default_rng(seed).choice(len(self._split), min(_RANKED, len(self._split)), replace=False)
        self._ranked = Split(self._split.inputs[rows], self._split.targets[rows])
        self._expected_ranked = self._expected[rows]

    def best(
        self, plain: onnx.ModelProto, samples: Mapping[str, NDArray[Any]], near: Path
    ) -> tuple[onnx.ModelProto, str]:
        """The better graph, and what was done: `plain`, or the same with its costliest layers back in f32.

        Args:
            near: temporary files are written beside it.
        """
        with explained(f"write beside {near}"):
            near.parent.mkdir(parents=True, exist_ok=True)
            folder = tempfile.TemporaryDirectory(prefix=f".{near.name}.control-", dir=near.parent)
        with folder as at:
            accuracy = self._judged(plain, samples, Path(at))
            missed = accuracy.drop
            # the upper end of the interval must be inside the budget; on these samples it lies this far above the drop
            allowed = max(0.0, self._max_drop - (accuracy.drop_interval[1] - missed))
            if missed <= allowed:
                return plain, "not needed"
            try:
                graph = self._controlled(samples, allowed)
                given_back = _quantizers(plain) - _quantizers(graph)
                if not 0 < given_back < _quantizers(plain):
                    return plain, "found nothing to give back" if given_back == 0 else "nothing would be left in int8"
                drop = self._judged(graph, samples, Path(at)).drop
            except (EngineError, ModelError) as error:
                return plain, f"failed: {error}"  # the plain result misses the budget, but it is there
        return (graph, f"{given_back} quantizers given back") if drop < missed else (plain, "no better")

    def _judged(self, graph: onnx.ModelProto, samples: Mapping[str, NDArray[Any]], at: Path) -> Accuracy:
        """The accuracy of the compiled graph, against its parent."""
        step = Step("quantize")
        result = seal(self._bundle, at / "int8", graph, step=step, precision="int8", samples=samples)
        return judge(self._task, "train", self._split.targets, self._outputs(result), self._expected)

    def _outputs(self, bundle: Bundle) -> NDArray[Any]:
        return _answers_of(bundle, self._split)

    def _controlled(self, samples: Mapping[str, NDArray[Any]], allowed: float) -> onnx.ModelProto:
        model, count = onnx.load(self._bundle.model), _count(samples)
        with quiet_nncf(self._bundle) as nncf:
            graph: onnx.ModelProto = nncf.quantize_with_accuracy_control(
                model,
                nncf.Dataset(range(count), lambda row: _row(samples, row)),
                nncf.Dataset(range(len(self._ranked))),
                self._value,
                max_drop=allowed,
                drop_type=nncf.DropType.ABSOLUTE,
                subset_size=count,
                model_type=nncf.ModelType.TRANSFORMER if _attends(model.graph) else None,
                ignored_scope=_left_out(nncf, self._bundle),
                advanced_quantization_parameters=_advanced(nncf, self._wide),
                advanced_accuracy_restorer_parameters=nncf.AdvancedAccuracyRestorerParameters(
                    max_num_iterations=self._iterations, ranking_subset_size=min(100, len(self._ranked))
                ),
            )
        strip_origin(graph)
        return graph

    def _value(self, model: onnx.ModelProto, rows: Iterable[int]) -> tuple[float, None]:
        """The metric of a graph on these rows, for NNCF."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = cores()
        options.log_severity_level = 4
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        chosen = list(rows)
        inputs = named_inputs(self._bundle, self._ranked.inputs[chosen])
        output = self._bundle.manifest.signature.outputs[0].name
        parts = [slice(at, at + 32) for at in range(0, len(chosen), 32)]
        answers = np.concatenate(
            [
                session.run([output], {name: np.ascontiguousarray(array[part]) for name, array in inputs.items()})[0]
                for part in parts
            ]
        )
        if self._ranked.labelled:
            return self._task.evaluate(answers, self._ranked.targets[chosen])[0], None
        return self._task.fidelity(self._expected_ranked[chosen], answers)[0], None


def _answers_of(bundle: Bundle, split: Split) -> NDArray[Any]:
    """Answers of an engine that computes this bundle correctly on this machine."""
    engine: EngineName = "onnxruntime" if saturates_here(bundle) else "openvino"
    return outputs_of(bundle, EngineConfig(engine, bundle.manifest.precision, streams=cores(), max_batch=32), split)


def _count(samples: Mapping[str, NDArray[Any]]) -> int:
    return len(next(iter(samples.values())))


def _row(samples: Mapping[str, NDArray[Any]], row: int) -> dict[str, NDArray[Any]]:
    """A batch of one: transformers must be calibrated so, and other networks may be."""
    return {name: array[row : row + 1] for name, array in samples.items()}


def _quantizers(graph: onnx.ModelProto) -> int:
    return sum(node.op_type == "QuantizeLinear" for node in graph.graph.node)


def _attends(graph: onnx.GraphProto) -> bool:
    """Whether the graph has attention: a matrix product of the output of a softmax."""
    soft = {name for node in graph.node if node.op_type == "Softmax" for name in node.output}
    return any(
        node.op_type in _ATTENTION or (node.op_type == "MatMul" and not soft.isdisjoint(node.input))
        for node in graph.node
    )


@contextmanager
def quiet_nncf(bundle: Bundle) -> Iterator[Any]:
    """NNCF, imported here because it takes seconds, without its logs, warnings, progress bars and telemetry.

    Its bars would break ours. Its telemetry reports every use to Google Analytics unless this variable is set while it
    is imported; who imports it first has made another choice.

    Raises:
        ModelError: whatever goes wrong in the block: NNCF may fail in any way on a graph from elsewhere.
    """
    disable_telemetry()
    before = os.environ.get("NNCF_CI")
    os.environ["NNCF_CI"] = "1"
    logger, logger_class = logging.getLogger("nncf"), logging.getLoggerClass()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            nncf = importlib.import_module("nncf")
            track = importlib.import_module("nncf.common.logging.track_progress").track
        finally:
            logging.setLoggerClass(logger_class)  # NNCF sets its own
            if before is None:
                del os.environ["NNCF_CI"]
        level, bar = logger.level, track.__iter__
        try:
            logger.setLevel(logging.ERROR)
            track.__iter__ = lambda self: iter(self.sequence)
            with restored_signal_stack():  # NNCF runs OpenVINO
                yield nncf
        except Exception as error:
            reason = str(error).strip().splitlines() or [""]
            raise ModelError(
                f"cannot quantise {bundle.manifest.name}",
                f"{type(error).__name__}: {reason[0]}",
                "serve it in f32 or bf16",
            ) from error
        finally:
            logger.setLevel(level)
            track.__iter__ = bar
