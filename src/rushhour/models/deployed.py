"""A network as it is served: the wire's samples in, the task's answers out; and its way to a bundle and back."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr, suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from rushhour.bundle import Bundle, Manifest, Preprocessing, Signature, Source, Step, TensorSpec
from rushhour.errors import ModelError, RushhourError
from rushhour.models.company import apart_in_company
from rushhour.models.failure import why_failed
from rushhour.models.source import build
from rushhour.models.trust import remember, trusted_of
from rushhour.records.answers import TOLERANCES, deviation
from rushhour.system.machine import cores
from rushhour.system.storage import explained
from rushhour.system.telemetry import keep_home
from rushhour.task import Task, are_probabilities

_LARGEST_BYTES = 1_900_000_000
"""Of the weights in one ONNX file: protobuf ends at 2 GiB, and the graph and tools need some of it."""

_VERIFIED_BATCHES = (1, 3, 32)

_COMPANY = 5
"""Samples that are asked for alone and together."""
_GRAPH_TOLERANCE = 1e-3
_SHAPES_LOG = "torch.fx.experimental.symbolic_shapes"

_MAIN = ("logits", "out", "output", "outputs", "main", "prediction", "predictions", "y")
"""Names of the output that counts, where a network gives several."""

Meaning = Literal["logits", "probabilities", "chances"]
"""What a network's own numbers are: `logits` (of a classification, or any values of another task); `probabilities` that
sum to 1, as after a softmax; or `chances` of each class for itself, as after a sigmoid."""

_RESHAPING = ("View", "UnsafeView", "Reshape", "Squeeze", "Unsqueeze", "ToCopy", "Clone", "Alias", "Transpose", "Slice")
"""Steps of autograd that change no number, by the beginnings of their names."""

_ON_THE_WIRE = ".wire"
"""Ends the names of inputs and outputs until the exporter is done; no name that it makes up has it."""


class Preprocess(nn.Module):
    """What `Preprocessing` says, in torch: any dtype in the wire's layout to float32 in the network's layout.

    Attributes:
        contiguous: whether pictures are copied into torch's standard memory format, as networks expect them that call
            `view`; else they stay channels-last.
    """

    factor: Tensor
    offset: Tensor

    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.pictures = preprocessing.layout == "NHWC->NCHW"
        self.contiguous = True
        std = np.asarray(preprocessing.std or (1.0,), dtype=np.float64)
        mean = np.asarray(preprocessing.mean or (0.0,), dtype=np.float64)
        if not (np.isfinite(std) & (std != 0)).all():
            raise ModelError(
                f"cannot scale samples by the standard deviations {preprocessing.std}",
                "a channel that never changes cannot be scaled",
                "use std=1 for it, or leave that channel out",
            )
        trailing = (-1, 1, 1) if self.pictures else (-1,)
        factor, offset = preprocessing.scale / std, -mean / std
        self.plain = bool((factor == 1).all() and (offset == 0).all())
        self.register_buffer("factor", torch.from_numpy(factor).float().reshape(trailing), persistent=False)
        self.register_buffer("offset", torch.from_numpy(offset).float().reshape(trailing), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        """`(n, h, w, c)` to `(n, c, h, w)` for pictures (channels-last in memory by default), else the same shape."""
        if self.pictures:
            samples = samples.permute(0, 3, 1, 2)
            if self.contiguous:  # `contiguous()` would leave the strides of a single channel as they are
                samples = samples.clone(memory_format=torch.contiguous_format)
        samples = samples.to(torch.float32)
        return samples if self.plain else samples * self.factor + self.offset


class Deployed(nn.Module):
    """Preprocessing, network and the task's head: what a bundle's ONNX graph computes, in torch.

    In training mode, parts that the network's factory left in evaluation mode stay in it.

    Args:
        network: gives logits (classification), values (regression) or an embedding, `(n, outputs)`; as its factory
            left it. Where it gives several outputs, `main_output` says which one counts.
        task: decides the head: softmax for classification, else nothing.
        preprocessing: what happens to samples first; a network of several inputs gets them as they are.

    Attributes:
        meaning: of the network's own numbers; logits until `settle` has found out.
        outputs: length of one answer.

    Raises:
        ModelError: if the preprocessing cannot be computed.
    """

    def __init__(self, network: nn.Module, task: Task, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocess = Preprocess(preprocessing)
        self.network = network
        self.head: nn.Module = nn.Softmax(dim=-1) if task.kind == "classification" else nn.Identity()
        self.meaning: Meaning = "logits"
        self.outputs = task.outputs
        self._resting = [module for module in network.modules() if not module.training]

    def train(self, mode: bool = True) -> Deployed:
        """As of any module, but what the factory left in evaluation mode stays in it."""
        super().train(mode)
        for module in self._resting:
            module.training = False
        return self

    def logits(self, *samples: Tensor) -> Tensor:
        """What the loss wants, `(n, outputs)`; see `as_logits`."""
        return self.as_logits(self._asked(*samples))

    def as_logits(self, given: Any) -> Tensor:
        """What the network gave, as logits or values; see `as_logits`."""
        return as_logits(given, self.outputs, self.meaning)

    def forward(self, *samples: Tensor) -> Tensor:
        """Answers `(n, outputs)` to samples `(n, *shape)` as the wire carries them, a tensor for each input."""
        given = self._asked(*samples)
        if self.meaning == "probabilities":
            return main_output(given, self.outputs)
        out: Tensor = self.head(self.as_logits(given))
        return out

    def settle(self, samples: NDArray[Any], model: str) -> None:
        """Ask the network once, in evaluation mode: lazy layers take their sizes, and `meaning` is found.

        Args:
            samples: one or more, as in `export`.
            model: its name, for the message.

        Raises:
            ModelError: if the network cannot take samples of this shape, or gives no tensor of answers.
        """
        self.meaning = "logits"
        self.answer_shape(samples, model)
        if isinstance(self.head, nn.Identity):
            return
        columns = [torch.from_numpy(column) for column in _columns(samples[:2])]
        with torch.no_grad():
            out = self.logits(*columns)
        if are_probabilities(out.float().numpy()):
            self.meaning = "probabilities"
        elif bool(((out >= 0) & (out <= 1)).all()) and self._ends_in_sigmoid(columns):
            self.meaning = "chances"

    def _ends_in_sigmoid(self, columns: list[Tensor]) -> bool:
        """Whether the last thing that the network computes is a sigmoid."""
        with torch.enable_grad():
            asked = [self.preprocess(columns[0])] if len(columns) == 1 else columns
            asked = [column.requires_grad_() if column.is_floating_point() else column for column in asked]
            node: Any = main_output(self.network(*asked), self.outputs).grad_fn
        while node is not None and node.name().startswith(_RESHAPING) and node.next_functions:
            node = node.next_functions[0][0]
        return node is not None and node.name().startswith("SigmoidBackward")

    def answer_shape(self, sample: NDArray[Any], model: str) -> tuple[int, ...]:
        """The shape of the answer to one sample, found by asking; leaves the module in evaluation mode.

        Args:
            sample: one or more samples, as in `export`.
            model: its name, for the message.

        Raises:
            ModelError: if the network cannot take samples of this shape.
        """
        self.eval()
        try:
            with torch.no_grad():
                out = self(*(torch.from_numpy(column) for column in _columns(sample[:2])))
        except RushhourError:
            raise
        except Exception as error:  # a user's network may fail in any way
            raise ModelError(
                f"the model {model} cannot take samples of shape {tuple(sample.shape[1:])}",
                why_failed(error),
                "give the model arguments that fit the data, or data that fits the model",
            ) from error
        return tuple(out.shape[1:])

    def _asked(self, *samples: Tensor) -> Any:
        return self.network(*samples) if len(samples) > 1 else self.network(self.preprocess(samples[0]))


def as_logits(given: Any, outputs: int, meaning: Meaning) -> Tensor:
    """What a network gave as logits or values `(n, outputs)`: its main output, and no probabilities.

    Softmax gives the probabilities back.
    """
    out = main_output(given, outputs)
    if meaning == "probabilities":
        return out.float().clamp_min(torch.finfo(torch.float32).tiny).log()
    if meaning == "chances":
        return torch.logit(out.float(), eps=1e-7)
    return out


def main_output(given: Any, outputs: int) -> Tensor:
    """The output that counts, `(n, outputs)`, of all that a network gives.

    A network may give several tensors: some do in training only, for losses beside the main one. Of a tuple, list,
    dictionary or dataclass that is the one named `logits`, `out`, `output` ..., or else the first of fitting shape.
    Dimensions of 1 beside the answers are left out, and added where `(n,)` is one value for each sample.

    Raises:
        ModelError: if there is no tensor in it.
    """
    main, tensors = _main(given, outputs)
    out = tensors[main]
    return out.reshape(out.shape[0], outputs) if out.dim() != 2 and _fits(out, outputs) else out


def named_outputs(given: Any, outputs: int) -> tuple[str, tuple[str, ...]]:
    """The name, or else the place, of the output that counts, and those of all tensors that a network gives."""
    main, tensors = _main(given, outputs)
    return main, tuple(tensors)


def try_export(deployed: Deployed, name: str, sample: TensorSpec, samples: NDArray[Any], task: Task) -> None:
    """Raise unless the network can be exported, and keep nothing of it.

    Args:
        deployed: as `export` makes it.
        name: of the network, for the message.
        sample: what one sample is on the wire.
        samples: a few.
        task: gives the output its name.

    Raises:
        ModelError: if it cannot be exported, or answers otherwise then.
    """
    deployed.settle(samples, name)
    graph = _graph(deployed, name, samples, [sample.name], task.output_name)
    _verify(graph.SerializeToString(), deployed, name, [sample.name], samples)


def _main(given: Any, outputs: int) -> tuple[str, dict[str, Tensor]]:
    tensors = dict(_tensors(given))
    if not tensors:
        raise ModelError(
            f"the network gives a {type(given).__name__}",
            "it holds no tensor, and a network answers with one of logits or values",
            "return a tensor",
        )
    fitting = [name for name, tensor in tensors.items() if _fits(tensor, outputs)]
    named = [name for name in _MAIN if name in fitting]
    return next(iter(named or fitting or tensors)), tensors


def _tensors(given: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(given, Tensor):
        yield name, given
        return
    parts: Any = ()
    if isinstance(given, Mapping):
        parts = given.items()
    elif hasattr(given, "_asdict"):
        parts = given._asdict().items()
    elif isinstance(given, tuple | list):
        parts = enumerate(given)
    elif hasattr(given, "__dataclass_fields__"):
        parts = vars(given).items()
    for key, part in parts:
        yield from _tensors(part, f"{name}.{key}" if name else str(key))


def _fits(tensor: Tensor, outputs: int) -> bool:
    return tensor.dim() > 0 and [size for size in tensor.shape[1:] if size != 1] == [outputs] * (outputs != 1)


def export(
    network: nn.Module,
    *,
    name: str,
    task: Task,
    sample_spec: TensorSpec | tuple[TensorSpec, ...],
    preprocessing: Preprocessing,
    source: Source | None,
    lineage: tuple[Step, ...],
    samples: NDArray[Any],
    path: Path,
) -> Bundle:
    """Write `network` as a bundle whose ONNX graph answers as the torch module does, at any batch size.

    Equal weights give an equal bundle: the graph is stripped of all that names this machine. The network is left in
    evaluation mode and in torch's standard memory format.

    Args:
        network: gives logits or values, `(n, outputs)`.
        name: of the bundle.
        sample_spec: the input: `image` for pictures, `input` otherwise; of several inputs each, in the network's order.
        source: how to build the network again; None if it cannot be.
        lineage: how it came to be.
        samples: a few real inputs, `(k, *shape)` with k of 1 or more; of several inputs a structured array of shape
            `(k,)`, with a field for each in the same order.
        path: the bundle's folder; an older one is replaced.

    Raises:
        TaskError: if the network's output does not fit the task; nothing is written then.
        ModelError: if it cannot be exported, or ONNX Runtime's answers differ from torch's.
        StorageError: if the disk does not take it.
    """
    specs = sample_spec if isinstance(sample_spec, tuple) else (sample_spec,)
    columns = _columns(samples)
    wanted = [(spec.shape, np.dtype(spec.dtype)) for spec in specs]
    if [(column.shape[1:], column.dtype) for column in columns] != wanted or len(samples) == 0:
        raise ModelError(
            f"cannot export {name} with samples of {samples.dtype}{samples.shape}",
            f"the signature says one or more of {', '.join(f'{spec.dtype}{spec.shape}' for spec in specs)}",
            "give samples as the wire carries them",
        )
    weights_bytes = sum(parameter.numel() * parameter.element_size() for parameter in network.parameters())
    if weights_bytes > _LARGEST_BYTES:
        raise ModelError(
            f"cannot export {name}",
            f"its weights take {weights_bytes / 1e9:.1f} GB, and one ONNX file holds {_LARGEST_BYTES / 1e9:.1f} GB",
            "use a smaller model",
        )
    network.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    deployed = Deployed(network, task, preprocessing)
    deployed.settle(samples, name)
    task.check_output(deployed.answer_shape(samples, name), name)
    names = [spec.name for spec in specs]
    graph = _graph(deployed, name, samples, names, task.output_name)
    manifest = Manifest(
        name=name,
        signature=Signature(inputs=specs, outputs=(TensorSpec(task.output_name, "float32", (task.outputs,)),)),
        task=task,
        preprocessing=preprocessing,
        source=source,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        lineage=lineage,
    )

    def model(file: Path) -> None:
        onnx.save(graph, file)
        _verify(file, deployed, name, names, samples)

    def weights(file: Path) -> None:
        from safetensors.torch import save

        # clones, because safetensors refuses tensors that share their memory (tied weights) or lie in another order
        state = {
            key: value.detach().clone(memory_format=torch.contiguous_format)
            for key, value in network.state_dict().items()
        }
        file.write_bytes(save(state))

    bundle = Bundle.create(path, manifest, model, weights, dict(zip(names, columns, strict=True)))
    remember(bundle)
    return bundle


def load_deployed(bundle: Bundle, trusted: tuple[str, ...] = ()) -> Deployed:
    """The torch module of a bundle, with its weights, in evaluation mode.

    Args:
        bundle: must carry a source and weights.
        trusted: factories that may be imported besides those of this package; see `build`.

    Raises:
        ModelError: if the bundle carries no torch module, or it cannot be built, or the weights do not fit it.
        StorageError: if the weights cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    source, file = bundle.manifest.source, bundle.weights
    if source is None or file is None:
        raise ModelError(
            f"the bundle {bundle.manifest.name} has no torch module",
            "it carries only its ONNX graph" if bundle.manifest.precision != "int8" else "it is quantised",
            "run it on openvino or onnxruntime",
        )
    with torch.random.fork_rng(devices=[]):  # the fresh weights are thrown away; the caller's seed must not be
        network = build(source, trusted_of(bundle, trusted))
    try:
        with explained(f"read {file}"):
            state = load_file(file)
        network.load_state_dict(state, strict=True)
    except (RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"the weights of {bundle.manifest.name} do not fit its model {source.factory}",
            str(error),
            "make the bundle anew with the code that is installed",
        ) from error
    deployed = Deployed(network, bundle.manifest.task, bundle.manifest.preprocessing)
    samples, name = _structured(bundle), bundle.manifest.name
    with suppress(ModelError) if bundle.answers() is not None else nullcontext():  # `_check_answers` says it then
        deployed.settle(samples, name)
    if deployed.preprocess.pictures:  # faster, where the network can take it
        deployed.preprocess.contiguous = False
        try:
            deployed.answer_shape(samples, name)
        except ModelError:
            deployed.preprocess.contiguous = True
    deployed.eval()
    _check_answers(deployed, bundle, source)
    return deployed


def _check_answers(deployed: Deployed, bundle: Bundle, source: Source) -> None:
    """Raise unless the module answers as the bundle was recorded to: its code may be another by now."""
    recorded, manifest = bundle.answers(), bundle.manifest
    if recorded is None:
        return
    count = len(next(iter(recorded.values())))
    samples = bundle.samples()
    try:
        with torch.no_grad():
            answers = deployed(*(torch.from_numpy(samples[spec.name][:count]) for spec in manifest.signature.inputs))
        off = deviation(recorded, {manifest.signature.outputs[0].name: answers.float().numpy()})
        why = f"its answers are off by {off:.1%} of their range" if not off <= TOLERANCES["f32"] else ""
    except Exception as error:  # changed code may fail in any way
        why = f"it fails with {type(error).__name__}"
    if why:
        raise ModelError(
            f"{source.factory} is not the network that {manifest.name} was made of",
            f"with the bundle's weights {why}: its code has changed since",
            "restore the code, or train again",
        )


def _structured(bundle: Bundle) -> NDArray[Any]:
    """Two of a bundle's samples; of several inputs as a structured array."""
    columns = {name: array[:2] for name, array in bundle.samples().items()}
    if len(columns) == 1:
        return next(iter(columns.values()))
    kind = np.dtype([(name, array.dtype, array.shape[1:]) for name, array in columns.items()])
    whole: NDArray[Any] = np.zeros(min(map(len, columns.values())), kind)
    for name, array in columns.items():
        whole[name] = array[: len(whole)]
    return whole


def _graph(
    deployed: Deployed, name: str, samples: NDArray[Any], input_names: list[str], output_name: str
) -> onnx.ModelProto:
    example = tuple(torch.from_numpy(column) for column in _columns(_batch(samples, 2)))  # 0 and 1 become constants
    try:
        with _quiet(), torch.inference_mode(False), torch.no_grad():
            program = torch.onnx.export(
                deployed,
                example,
                dynamo=True,
                dynamic_shapes=(tuple({0: torch.export.Dim("batch")} for _ in example),),
                input_names=[name + _ON_THE_WIRE for name in input_names],
                output_names=[output_name + _ON_THE_WIRE],
                verbose=False,
            )
        assert program is not None
        graph: onnx.ModelProto = program.model_proto
    except Exception as error:  # the exporter may fail in any way on a user's model
        raise ModelError(
            f"cannot export {name} to ONNX",
            why_failed(error),
            "use what torch.onnx can export, and nothing that depends on the values or the number of samples",
        ) from error
    strip_origin(graph)
    _name_tensors(graph.graph, (*input_names, output_name))
    return graph


def _name_tensors(graph: onnx.GraphProto, names: tuple[str, ...]) -> None:
    """Give inputs and output their names on the wire; what has one of these inside the graph gets another.

    The exporter renames without looking: a network with an inner value `embedding` and an output of that name became a
    graph that no engine loads.
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
    """Remove, in place, what tools note about where a graph came from: stack traces, paths, comments.

    They name this machine's folders, differ from run to run, and can outweigh a small model.
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


def _verify(file: Path | bytes, deployed: Deployed, name: str, names: list[str], samples: NDArray[Any]) -> None:
    """Raise unless the ONNX graph, in a file or not, answers as torch does, and each sample for itself."""
    keep_home()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = cores()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def asked(columns: Sequence[NDArray[Any]]) -> NDArray[Any]:
        try:
            (answer,) = session.run(None, dict(zip(names, columns, strict=True)))
        except Exception as error:  # its exceptions have no base of their own
            raise ModelError(
                f"the ONNX graph of {name} does not run on {len(columns[0])} samples",
                why_failed(error),
                "compute with whole batches: no loop over samples, nothing that fixes their number",
            ) from error
        return np.asarray(answer)

    for size in _VERIFIED_BATCHES:
        batch = _columns(_batch(samples, size))
        with torch.no_grad():
            expected = deployed(*map(torch.from_numpy, batch)).numpy()
        answer = asked(batch)
        tolerance = 1e-3 * max(1e-1, float(np.abs(expected).max()))
        off = float(np.abs(answer - expected).max()) if answer.shape == expected.shape else float("inf")
        if not off <= tolerance:
            raise ModelError(
                f"the ONNX graph of {name} does not answer as its torch module does",
                f"at batch {size} they differ by {off:.2g}, and {tolerance:.2g} is allowed",
                "check the model for random or batch-dependent operations, and its weights for NaN",
            )
    apart = apart_in_company(asked, _columns(samples[:_COMPANY]), _GRAPH_TOLERANCE)
    if apart is not None:
        raise ModelError(f"cannot seal {name}", apart, "remove what mixes samples, and train it anew")


def _batch(samples: NDArray[Any], size: int) -> NDArray[Any]:
    """`size` of the samples, from the start again where there are too few."""
    batch: NDArray[Any] = samples[np.arange(size) % len(samples)]
    return batch


def _columns(samples: NDArray[Any]) -> list[NDArray[Any]]:
    """An array of its own for each input: the samples themselves, or the fields of a structured array."""
    return [np.ascontiguousarray(samples[name]) for name in samples.dtype.names or ()] or [np.array(samples)]


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's warnings, logs and graphs, which tell the reader nothing to act on, from screen and tests."""
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
