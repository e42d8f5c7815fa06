"""From an ONNX graph to a program with its weights: operator by operator, in the order of the graph."""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

import onnx
import torch
from torch import Tensor, fx

from rushhour.errors import ModelError, RushhourError
from rushhour.models.converted.builder import Builder, Unbounded, Unsupported, Value, dtype_name
from rushhour.models.converted.node import DTYPES, Node, tensor_of
from rushhour.models.converted.operators import OPERATORS
from rushhour.models.converted.patterns import Written, layer_norm
from rushhour.models.converted.program import Program, network_of

OPSETS: Final = range(11, 23)
_STANDARD: Final = ("", "ai.onnx")
_QUANTISED: Final = {
    *("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "QLinearConv", "QLinearMatMul", "ConvInteger"),
    "MatMulInteger",
}
_NAMED: Final = 8
_COLOURS: Final = (1, 3)
_KIND: Final = "pkg.torch.export.graph_signature.InputSpec.kind"
_PARAMETER: Final = "PARAMETER"
_FOLDED_FROM: Final = "pkg.onnxscript.optimizer.folded_from"
_NO_PARAMETER: Final = re.compile(r"val_\d+|(.*\.)?lifted_tensor_\d+")
_FIX: Final = "it can be served, and made int8, f16 or w8; to train it, name its torch module as module:factory"


class NotTrainable(ModelError):
    """A graph that cannot become a torch network; it can still be served."""


@dataclasses.dataclass(frozen=True, eq=False)
class Converted:
    """A torch network from an ONNX graph.

    Attributes:
        program: what it computes.
        state: the weights that the file has, by their name in the network.
        output: the tensor of the graph that the network gives.
        gives_logits: whether a softmax at the end of the graph was left out.
        tensors: result in the program -> the tensor of the graph that it is, the last of several.
        limits: input of whole numbers -> one more than the largest that it may hold, where that is known.
        notes: what else was found, for people.
    """

    program: Program
    state: dict[str, Tensor]
    output: str
    gives_logits: bool
    tensors: Mapping[str, str]
    limits: Mapping[str, int]
    notes: tuple[str, ...]

    def network(self) -> fx.GraphModule:
        """A new network with these weights, in evaluation mode."""
        network = network_of(self.program)
        network.load_state_dict(self.state, strict=True)
        return network.eval()


def convert(model: onnx.ModelProto, name: str, *, logits: bool = False) -> Converted:
    """The torch network of the first output of a model.

    Args:
        model: checked, as of `read_onnx`.
        name: of the model, for messages.
        logits: leave out a softmax at the end.

    Raises:
        NotTrainable: if it has operators that cannot be converted; the message lists them.
        ModelError: if it would take more memory than a machine has.
    """
    opset = next((each.version for each in model.opset_import if each.domain in _STANDARD), 0)
    try:
        _check_operators(model, opset, name)
        return _Conversion(model.graph, opset).run(logits=logits)
    except NotTrainable:
        raise
    except Unbounded as error:
        raise ModelError(f"will not run {name}", str(error), "check where the file comes from") from error
    except Unsupported as error:
        raise NotTrainable(f"{name} cannot be trained", str(error), _FIX) from error
    except (RushhourError, RuntimeError, ValueError, TypeError, IndexError, KeyError, AttributeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise NotTrainable(f"{name} cannot be trained", f"its network cannot be built: {lines[0]}", _FIX) from error


def _check_operators(model: onnx.ModelProto, opset: int, name: str) -> None:
    """Raise unless every operator that the first output needs is in the table.

    Raises:
        NotTrainable: if not.
    """
    needed = _needed(model.graph)
    quantised = sum(node.op_type in _QUANTISED for node in needed)
    unknown = Counter(
        f"{node.domain}.{node.op_type}" if node.domain not in _STANDARD else node.op_type
        for node in needed
        if node.domain not in _STANDARD or node.op_type not in OPERATORS
    )
    why = ""
    if quantised:
        why = f"it is quantised ({quantised} operators), and training takes full precision"
    elif unknown:
        listed = [f"{op} ({count} node{'s' * (count > 1)})" for op, count in unknown.most_common(_NAMED)]
        more = f" and {len(unknown) - _NAMED} more" if len(unknown) > _NAMED else ""
        why = f"operators {', '.join(listed)}{more} cannot be converted"
    elif opset not in OPSETS:
        why = f"its opset is {opset}, and {OPSETS[0]} to {OPSETS[-1]} can be converted"
    elif model.graph.sparse_initializer:
        why = "its weights are sparse"
    if why:
        raise NotTrainable(f"{name} cannot be trained", why, _FIX)


def _needed(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """The operators that the first output needs, in order."""
    wanted = {graph.output[0].name}
    found = []
    for node in reversed(graph.node):
        if wanted & set(node.output):
            found.append(node)
            wanted |= set(node.input)
    return found[::-1]


def _fixed(graph: onnx.GraphProto) -> set[str]:
    """The initializers of which torch's exporter says that they are no parameters: buffers, and constants it folded.

    Other exporters do not tell them apart, so there they count as weights.
    """
    found = set()
    for value in graph.value_info:
        said = {entry.key: entry.value for entry in value.metadata_props}
        folded = re.findall(r"'([^']*)'", said.get(_FOLDED_FROM, ""))
        if said.get(_KIND, _PARAMETER) != _PARAMETER or (folded and all(map(_NO_PARAMETER.fullmatch, folded))):
            found.add(value.name)
    return found


class _Conversion:
    """One graph on its way."""

    def __init__(self, graph: onnx.GraphProto, opset: int) -> None:
        self._graph = graph
        self._opset = opset
        self._builder = Builder()
        self._values: dict[str, Value] = {}
        self._raw: dict[str, Value] = {}
        self._initializers = {tensor.name: tensor for tensor in graph.initializer}
        self._fixed = _fixed(graph)
        self._is_single = sum(value.name not in self._initializers for value in graph.input) == 1
        self._nodes = _needed(graph)
        self._producers = {name: node for node in self._nodes for name in node.output if name}
        self._uses = Counter(name for node in self._nodes for name in node.input)
        self._uses[graph.output[0].name] += 1
        self._tensors: dict[str, str] = {}
        self._notes: list[str] = []

    def run(self, *, logits: bool) -> Converted:
        """Convert all operators."""
        used = {name for node in self._nodes for name in node.input}
        for value in self._graph.input:
            if value.name not in self._initializers:
                self._input(value, is_used=value.name in used)
        written = Written(self._producers.get, self._value)
        for proto in self._nodes:
            label = proto.name or next(iter(proto.output), "")
            self._builder.begin(f"{proto.op_type} {label}")
            try:
                self._convert(proto, written)
            except (Unsupported, Unbounded) as error:
                raise type(error)(f"{proto.op_type} {label}: {error}") from error
            except (RuntimeError, ValueError, TypeError, IndexError, KeyError, AssertionError) as error:
                lines = str(error).strip().splitlines() or [type(error).__name__]
                raise Unsupported(f"{proto.op_type} {label} fails: {lines[0]}") from error
        output = self._graph.output[0].name
        before = self._before_softmax(output) if logits else ""
        output = before or output
        program, state = self._builder.program(self._value(output))
        notes = tuple(dict.fromkeys(self._notes))
        return Converted(program, state, output, bool(before), self._tensors, self._builder.limits, notes)

    def _input(self, value: onnx.ValueInfoProto, *, is_used: bool) -> None:
        tensor = value.type.tensor_type
        dtype = DTYPES.get(tensor.elem_type)
        if dtype is None:
            raise Unsupported(f"its input {value.name} is of a type that torch does not have")
        shape = [dimension.dim_value for dimension in tensor.shape.dim[1:]]
        if not tensor.shape.dim or min(shape, default=1) < 1:
            raise Unsupported(f"its input {value.name} has open sizes beside the batch")
        if not is_used:
            raise Unsupported(f"its output does not depend on its input {value.name}")
        made = self._builder.input(value.name, torch.float32 if self._is_single else dtype, shape)
        self._raw[value.name] = made
        if dtype != made.dtype:
            self._builder.begin(f"input {value.name}")
            made = self._builder.call("cast", made, dtype_name(dtype))
            made.input = value.name
        if len(shape) == 3 and shape[2] in _COLOURS and shape[0] not in _COLOURS and self._has_convolutions():
            self._builder.begin(f"input {value.name}")
            made.source = self._builder.call("permute", made, [0, 3, 1, 2])  # a picture with channels last
        self._values[value.name] = made

    def _has_convolutions(self) -> bool:
        return any(node.op_type == "Conv" for node in self._nodes)

    def _value(self, name: str) -> Value:
        """A value of the graph; a weight is read when it is first used."""
        if name not in self._values:
            fixed = name in self._fixed
            constant = tensor_of(self._initializers[name])
            self._values[name] = Value(constant=constant, initializer="" if fixed else name, no_weight=fixed)
        return self._values[name]

    def _convert(self, proto: onnx.NodeProto, written: Written) -> None:
        node = Node.of(proto, self._opset, self._value, self._uses)
        results: Any = self._raw_number(proto) or layer_norm(self._builder, node, proto, written)
        if results is not None and node.op != "Cast":
            self._notes.append("layer normalisation was joined from its parts")
        if results is None:
            results = OPERATORS[node.op](self._builder, node)
        values = [results] if isinstance(results, Value) else list(results)
        passed_on = [self._values[name] for name in proto.input if name and self._uses[name] > 1]
        for name, value in zip(proto.output, values, strict=False):
            if not name:
                continue
            if any(value is each for each in passed_on):
                value.layer = ""  # others use it too: no constant may be put into the layer that gave it
            self._values[name] = value
            if value.ref is not None and value.ref.item < 0:
                self._tensors[value.ref.name] = name

    def _raw_number(self, proto: onnx.NodeProto) -> Value | None:
        """An input of whole numbers that is cast to float at once is used as it is: samples arrive as float32."""
        if proto.op_type != "Cast" or proto.input[0] not in self._raw:
            return None
        to = next((each.i for each in proto.attribute if each.name == "to"), 0)
        raw = self._raw[proto.input[0]]
        return raw if DTYPES.get(to) == raw.dtype else None

    def _before_softmax(self, output: str) -> str:
        """The input of the softmax over classes that gives the output; empty where there is none."""
        node = self._producers.get(output)
        while node is not None and node.op_type == "Identity":
            node = self._producers.get(node.input[0])
        if node is None or node.op_type != "Softmax" or self._value(node.input[0]).rank != 2:
            return ""
        axis = next((each.i for each in node.attribute if each.name == "axis"), 1)
        return node.input[0] if axis in (1, -1) else ""
