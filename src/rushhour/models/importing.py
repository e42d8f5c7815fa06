"""A model from elsewhere becomes a bundle that can be trained, pruned, factorised and distilled.

Its torch network is rebuilt from the ONNX graph and has its weights. Where that is not possible the bundle has the
graph as it is, and `Understood.why_untrainable` says what stands in the way.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np
import onnx
import torch
from numpy.typing import NDArray

from rushhour.bundle import Bundle, Preprocessing, Signature, Source, Step, TensorSpec, columns_of, joined
from rushhour.errors import DataError, ModelError, TaskError
from rushhour.models.converted import Converted, NotTrainable, channels_first, convert, verify
from rushhour.models.deployed import Deployed, export
from rushhour.models.doors import Arrival, Brought, verify_arrival
from rushhour.models.doors.onnx_graph import OnnxDoor
from rushhour.models.imported import from_graph, signature_of, with_limits
from rushhour.models.open_dimensions import fix_sizes
from rushhour.task import Task

FACTORY: Final = "rushhour.models:converted"
"""The factory of every network that was rebuilt from a graph; its argument is the program."""
_SAMPLES: Final = 16
_JUDGED: Final = 256
"""Samples by which a scaling is chosen."""
_IMAGENET: Final = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


class Understood(msgspec.Struct, frozen=True):
    """What was understood of a model.

    Attributes:
        file: its path, or what kind of object it was.
        format: a word: `onnx`, `keras`.
        origin: what it was, for people; empty where the graph says it itself.
        opset: the version of its operators.
        producer: what wrote it.
        signature: its inputs and outputs.
        layout: of its pictures, `NCHW` or `NHWC`; empty where its input is none.
        task: what it is for.
        task_from: how that is known.
        preprocessing: of samples on the wire, before the network.
        preprocessing_from: how that is known.
        operators: of the graph -> how often.
        layers: of the network -> how often; empty where it cannot be trained.
        parameters: its weights.
        notes: what was joined, folded or left out.
        why_untrainable: empty where it can be trained.
        difference: between the answers of network and graph, at most, as a share of the largest.
        from_original: the same between graph and original; None where the graph is the original.
    """

    file: str
    format: str
    origin: str
    opset: int
    producer: str
    signature: Signature
    layout: str
    task: Task
    task_from: str
    preprocessing: Preprocessing
    preprocessing_from: str
    operators: dict[str, int]
    layers: dict[str, int]
    parameters: int
    notes: tuple[str, ...]
    why_untrainable: str
    difference: float
    from_original: float | None = None


class Given(msgspec.Struct, frozen=True):
    """Data that a model is imported for.

    Attributes:
        samples: as on the wire, `(k, *shape)`, of several inputs as the model takes them (`Dataset.fitted_to`); the
            first few are looked at.
        targets: of these, as of the task; empty where there are none.
        preprocessing: as the data has it: for a network that is trained from scratch.
    """

    samples: NDArray[Any]
    targets: NDArray[Any]
    preprocessing: Preprocessing


def signature_of_arrival(arrival: Arrival, name: str) -> Signature:
    """What a model takes and gives.

    Raises:
        ModelError: if it cannot be served.
    """
    return with_limits(signature_of(arrival.graph, name, arrival.dimensions), arrival.limits)


def at_one_size(arrival: Arrival, samples: NDArray[Any], name: str) -> tuple[Arrival, str]:
    """A model whose open dimensions get the sizes of samples, so that it can be trained, and a note.

    Args:
        arrival: its graph is changed.
        samples: as the model takes them.
        name: of the model.

    Returns:
        The model as it is where it has no open dimension, or samples do not fit it.
    """
    signature = signature_of_arrival(arrival, name)
    columns = dict(zip((spec.name for spec in signature.inputs), columns_of(samples[:1]), strict=False))
    if not signature.dimensions or len(columns) != len(signature.inputs):
        return arrival, ""
    sizes = signature.sizes_of(columns)
    if any(signature.shape(spec, sizes) != columns[spec.name].shape[1:] for spec in signature.inputs):
        return arrival, ""
    fix_sizes(arrival.graph, signature.dimensions, sizes)
    pairs = zip(signature.dimensions, sizes, strict=True)
    note = " and ".join(f"its {each.name} is open: it is trained at {size}, as the data" for each, size in pairs)
    return dataclasses.replace(arrival, dimensions=(), tokenizer=None), f"{note}, and takes no other from then on"


def picture_size(spec: TensorSpec) -> tuple[int, int] | None:
    """Height and width of an input, if it looks like a picture of 1 or 3 channels."""
    layout = layout_of(spec)
    return {"NCHW": spec.shape[1:], "NHWC": spec.shape[:2]}.get(layout)  # type: ignore[return-value]


def layout_of(spec: TensorSpec) -> str:
    """`NCHW` or `NHWC` of a picture of 1 or 3 channels, else empty."""
    if len(spec.shape) != 3:
        return ""
    return "NCHW" if spec.shape[0] in (1, 3) else "NHWC" if spec.shape[2] in (1, 3) else ""


def import_onnx(
    file: Path,
    out: Path,
    *,
    task: Task | None = None,
    preprocessing: Preprocessing | None = None,
    given: Given | None = None,
    name: str | None = None,
) -> tuple[Bundle, Understood]:
    """The bundle of an ONNX file; see `import_arrival`."""
    brought = Brought(file, OnnxDoor())
    return import_arrival(
        brought.open(), out, shown=brought.shown, name=name or brought.name, task=task, preprocessing=preprocessing,
        given=given,
    )  # fmt: skip


def import_arrival(
    arrival: Arrival,
    out: Path,
    *,
    shown: str,
    name: str,
    task: Task | None = None,
    preprocessing: Preprocessing | None = None,
    given: Given | None = None,
) -> tuple[Bundle, Understood]:
    """The bundle of a model that came through a door, with a torch network where its graph can be converted.

    Args:
        arrival: its graph is changed.
        out: the bundle's folder; an older one is replaced.
        shown: names it for people: its path.
        name: of the bundle.
        task: what its first output means; by default as the model says, or read off the graph: classes where it ends
            in a softmax.
        preprocessing: of samples on the wire; by default as the model says for pixels, or, of pictures in `given`, the
            usual scaling with which the model is most accurate on them; else none.
        given: data for it.

    Raises:
        ModelError: if it cannot be served, or its graph does not answer as it does.
        TaskError: if its answers do not fit the task.
        DataError: if samples do not fit its input.
        StorageError: if the disk does not take it.
    """
    model = arrival.graph
    signature = signature_of_arrival(arrival, shown)
    asked = preprocessing
    if asked is None and (given is None or given.samples.dtype == np.uint8):
        preprocessing = arrival.preprocessing
    from_original = verify_arrival(arrival, name, _as_given(given, signature), signature)
    converted, why, difference = _converted(model, signature, name)
    if arrival.task is None:
        wanted, task_from = _task(model, signature, name, known=task)
    else:
        wanted, task_from = arrival.task, arrival.task_from
    if task is not None:
        binary = wanted.is_binary and task.kind == "classification" and task.outputs == 2
        wanted, task_from = (Task.multilabel(task.classes[1:]) if binary else task.unscaled), "given"
    wanted.check_output(_flat(signature.outputs[0].shape), name, signature.inputs[0].shape)
    if converted is not None and converted.gives_logits and wanted.head != "softmax":
        converted = convert(model, name)
    scaled, scaled_from = preprocessing or Preprocessing(), "given" if preprocessing is not None else "none"
    moved = None if converted is None else channels_first(converted)
    converted = moved or converted
    bundle: Bundle | None = None
    step = _step(arrival)
    if converted is not None:
        try:
            specs, scaled, scaled_from = _on_the_wire(
                converted, signature, wanted, preprocessing, given, name, moved=moved is not None
            )
            bundle = _sealed(converted, name, step, wanted, specs, scaled, given, out)
        except (ModelError, TaskError) as error:
            why = f"{error.what}: {error.why}"
            scaled, scaled_from = Preprocessing(), "none"
    if bundle is None:
        samples = given.samples[:_SAMPLES] if given is not None and _fits(given.samples, signature) else arrival.samples
        bundle = from_graph(
            model, name, wanted, out, step=step, samples=samples, shown=shown, dimensions=arrival.dimensions,
            limits=arrival.limits, tokenizer=arrival.tokenizer,
        )  # fmt: skip
    if scaled_from == "given" and asked is None:
        scaled_from = arrival.preprocessing_from
    notes = arrival.notes if converted is None else (*arrival.notes, *converted.notes)
    if converted is not None and converted.gives_logits:
        notes = (*notes, "the softmax at the end is left out in training, and is a part of the served graph")
    return bundle, Understood(
        file=shown,
        format=arrival.format,
        origin=arrival.origin,
        opset=next((each.version for each in model.opset_import if not each.domain), 0),
        producer=_producer(model),
        signature=signature,
        layout=layout_of(signature.inputs[0]),
        task=wanted,
        task_from=task_from,
        preprocessing=scaled,
        preprocessing_from=scaled_from,
        operators=dict(Counter(node.op_type for node in model.graph.node).most_common()),
        layers={} if why or converted is None else _layers(converted),
        parameters=bundle.manifest.parameters,
        notes=notes,
        why_untrainable=why,
        difference=difference,
        from_original=from_original,
    )


def _as_given(given: Given | None, signature: Signature) -> dict[str, NDArray[Any]] | None:
    """Real samples as the graph takes them; None where they are scaled or laid out otherwise on the wire."""
    if given is None or not _fits(given.samples, signature):
        return None
    some = given.samples[:_SAMPLES]
    return {name: some[name] for name in some.dtype.names or ()} or {signature.inputs[0].name: some}


def _producer(model: onnx.ModelProto) -> str:
    return f"{model.producer_name} {model.producer_version}".strip()


def _step(arrival: Arrival) -> Step:
    """The first step of a bundle's lineage."""
    weights = sum(int(np.prod(tensor.dims)) for tensor in arrival.graph.graph.initializer)
    settings: dict[str, int | float | str | bool] = {"format": arrival.format, "weights": weights}
    if producer := arrival.origin or _producer(arrival.graph):
        settings["producer"] = producer
    return Step("import", settings)


def _converted(model: onnx.ModelProto, signature: Signature, name: str) -> tuple[Converted | None, str, float]:
    """The network, or why there is none, and how far its answers differ from the graph's."""
    if len(signature.outputs) > 1:
        names = ", ".join(spec.name for spec in signature.outputs)
        return None, f"it has {len(signature.outputs)} outputs ({names}), and training takes one: export it alone", 0.0
    if signature.dimensions:
        open_ones = " and ".join(each.name for each in signature.dimensions)
        return (
            None,
            f"its {open_ones} is open, and training takes one size: `rushhour train` fixes that of its data",
            0.0,
        )
    try:
        found = convert(model, name, logits=True)
        return found, "", verify(model, found, name)
    except NotTrainable as error:
        return None, error.why, 0.0


def _task(model: onnx.ModelProto, signature: Signature, name: str, *, known: Task | None) -> tuple[Task, str]:
    """What a model is for, read off its graph; as is known, where its answers are no vectors.

    Raises:
        TaskError: if it is not known.
    """
    outputs = signature.outputs[0]
    if len(shape := _flat(outputs.shape)) > 1:
        if known is not None:
            return known, "given"
        raise TaskError(
            f"cannot tell what {name} is for",
            f"an answer of its output {outputs.name} has the shape {shape}, and that of a classification, of values or "
            "of an embedding is a vector",
            "give --data with class maps, boxes or tags that it answers with, or export it with a vector as its first "
            "output",
        )
    (width,) = shape
    producers = {name: node for node in model.graph.node for name in node.output}
    last = producers.get(model.graph.output[0].name)
    while last is not None and last.op_type in ("Identity", "Flatten", "Reshape", "Squeeze"):
        last = producers.get(last.input[0])
    if last is not None and last.op_type in ("Softmax", "LogSoftmax") and width > 1:
        return Task.classification(tuple(map(str, range(width)))), "it ends in a softmax"
    if last is not None and last.op_type == "Sigmoid":
        numbers = range(width) if width > 1 else (1,)
        return Task.multilabel(tuple(map(str, numbers))), "it ends in a sigmoid: each output is the chance of a label"
    return Task("regression", outputs=width), "it ends in no softmax or sigmoid: name its classes if it has some"


def _flat(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Without axes of 1 beside the answers."""
    wide = tuple(size for size in shape if size != 1)
    return wide if len(wide) == 1 else (1,) if not wide else shape


def _fits(samples: NDArray[Any], signature: Signature) -> bool:
    first, names = signature.inputs[0], samples.dtype.names
    if names:
        return names == tuple(spec.name for spec in signature.inputs)
    return len(signature.inputs) == 1 and samples.dtype.name == first.dtype and samples.shape[1:] == first.shape


def _on_the_wire(
    converted: Converted,
    signature: Signature,
    task: Task,
    preprocessing: Preprocessing | None,
    given: Given | None,
    name: str,
    *,
    moved: bool,
) -> tuple[tuple[TensorSpec, ...], Preprocessing, str]:
    """One sample as requests carry it, each input, and what is done to it before the network.

    Args:
        moved: whether the network takes channels first where the graph has them last.
    """
    if len(signature.inputs) > 1:
        if preprocessing not in (None, Preprocessing()):
            raise DataError(
                f"cannot scale the samples of {name}",
                f"it has {len(signature.inputs)} inputs, which it gets as they are",
                "leave out --scale, --mean and --std, and give samples as the network takes them",
            )
        specs = with_limits(signature, converted.limits).inputs
        return specs, Preprocessing(), "none: several inputs are taken as they are"
    (spec,) = signature.inputs
    if given is None:
        if preprocessing is not None and preprocessing.layout == "NHWC->NCHW":
            channels, *sides = spec.shape
            spec = TensorSpec(spec.name, "uint8", (*sides, channels))
        said = "none" if preprocessing is None else "given"
        scaled = preprocessing or Preprocessing()
        return (spec,), msgspec.structs.replace(scaled, layout="NHWC->NCHW") if moved else scaled, said
    shape, dtype = given.samples.shape[1:], given.samples.dtype.name
    layout: Any = "NHWC->NCHW" if moved and shape == spec.shape else _layout(spec, shape, name)
    wire = msgspec.convert({"name": spec.name, "dtype": dtype, "shape": shape}, type=TensorSpec)
    decoding = given.preprocessing.decoding
    if preprocessing is not None:
        return (wire,), msgspec.structs.replace(preprocessing, layout=layout, decoding=decoding), "given"
    plain = Preprocessing(layout=layout, decoding=decoding)
    if dtype == spec.dtype or not spec.dtype.startswith("float"):
        return (wire,), plain, "none: samples are as its input"
    found, why = _usual(converted, task, given, plain)
    return (wire,), found, why


def _layout(spec: TensorSpec, shape: tuple[int, ...], name: str) -> Any:
    if shape == spec.shape:
        return "none"
    if len(shape) == 3 and (shape[2], *shape[:2]) == spec.shape:
        return "NHWC->NCHW"
    raise DataError(
        f"{name} does not take these samples",
        f"its input {spec.name} has the shape {spec.shape}, and a sample has {shape}",
        "give data that it was made for",
    )


def _usual(converted: Converted, task: Task, given: Given, plain: Preprocessing) -> tuple[Preprocessing, str]:
    """The usual scaling of pixels with which a model is most accurate on labelled samples; 0 to 1 without labels."""
    scale = 1 / 255 if given.samples.dtype == np.uint8 else 1.0
    candidates: list[tuple[str, Preprocessing]] = []

    def add(words: str, scale: float, mean: Sequence[float] = (), std: Sequence[float] = ()) -> None:
        changed = {"scale": scale, "mean": tuple(mean), "std": tuple(std)}
        candidates.append((words, msgspec.structs.replace(plain, **changed)))

    add("0 to 1", scale)
    channels = given.samples.shape[-1] if given.samples.ndim == 4 else 0
    if channels == 3:
        add("ImageNet's mean and deviation", scale, *_IMAGENET)
    if channels:
        add("-1 to 1", 2 * scale, (1.0,) * channels, (1.0,) * channels)
    add("as they are", 1.0)
    own = given.preprocessing
    if own.mean and own.layout == plain.layout:
        add("the data's own mean and deviation", own.scale, own.mean, own.std)
    if not given.targets.size:
        return candidates[0][1], "0 to 1: there are no labels to compare scalings by"
    network, scores = converted.network(), {}
    samples = np.ascontiguousarray(given.samples[:_JUDGED])
    for words, candidate in candidates:
        with torch.no_grad():
            answers = Deployed(network, task, candidate).eval()(torch.from_numpy(samples)).numpy()
        scores[words] = task.evaluate(answers, given.targets[:_JUDGED])[0] if np.isfinite(answers).all() else -np.inf
    best = max(scores, key=lambda words: scores[words])
    listed = ", ".join(f"{words} {score:.3f}" for words, score in sorted(scores.items(), key=lambda pair: -pair[1]))
    return dict(candidates)[best], f"{best}, by {task.metric} on {len(samples)} samples: {listed}"


def _sealed(
    converted: Converted,
    name: str,
    step: Step,
    task: Task,
    specs: tuple[TensorSpec, ...],
    preprocessing: Preprocessing,
    given: Given | None,
    out: Path,
) -> Bundle:
    if given is None:
        samples = joined({spec.name: _noise(spec, converted) for spec in specs})
    else:
        samples = np.ascontiguousarray(given.samples[:_SAMPLES])
    return export(
        converted.network(),
        name=name,
        task=task,
        sample_spec=specs,
        preprocessing=preprocessing,
        source=Source(FACTORY, {"program": converted.program.to_text()}),
        lineage=(step,),
        samples=samples,
        path=out,
    )


def _noise(spec: TensorSpec, converted: Converted) -> NDArray[Any]:
    """Seeded random samples that the network can take."""
    random = np.random.default_rng(0)
    shape = (_SAMPLES, *spec.shape)
    if spec.dtype.startswith("float"):
        return random.random(shape).astype(spec.dtype)
    return random.integers(0, converted.limits.get(spec.name, 2), shape).astype(spec.dtype)


def _layers(converted: Converted) -> dict[str, int]:
    kinds: Iterator[str] = (layer.kind for layer in converted.program.layers.values())
    return dict(Counter(kinds).most_common())


def is_imported(bundle: Bundle) -> bool:
    """Whether a bundle's network was rebuilt from a graph."""
    source = bundle.manifest.source
    return source is not None and source.factory == FACTORY
