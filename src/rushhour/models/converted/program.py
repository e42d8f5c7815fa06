"""What a converted network computes, as data: its layers, constants and calls. A bundle carries it, and no code.

A program can name only the layers of `LAYERS` and the functions of `FUNCTIONS`, so building one from a file that came
from elsewhere runs nothing else.
"""

from __future__ import annotations

import base64
import binascii
import keyword
import math
import zlib
from typing import Annotated, Any, Final, Literal

import msgspec
import torch
from torch import Tensor, fx, nn

from rushhour.errors import ModelError
from rushhour.models.converted.functions import FUNCTIONS
from rushhour.models.converted.layers import LAYERS

DType = Literal["float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64"]
Name = Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z_][A-Za-z0-9_]*$", max_length=80)]

_LARGEST_TEXT: Final = 64_000_000
_LARGEST_BYTES: Final = 1_900_000_000


class Ref(msgspec.Struct, frozen=True, array_like=True, tag="of"):
    """An argument that is the result of an earlier call, an input, or a constant.

    Attributes:
        name: of it.
        item: which of several results; -1 for the only one.
    """

    name: Name
    item: int = -1


Argument = Ref | list[Any] | bool | int | float | str | None


class Layer(msgspec.Struct, frozen=True):
    """A layer with weights.

    Attributes:
        kind: of `LAYERS`.
        settings: arguments of its class.
        frozen: its parameters that are not trained.
    """

    kind: str
    settings: dict[str, Any]
    frozen: tuple[str, ...] = ()


class Constant(msgspec.Struct, frozen=True):
    """A tensor that is no weight of a layer.

    Attributes:
        trained: a parameter; else a buffer.
    """

    shape: tuple[Annotated[int, msgspec.Meta(ge=0)], ...]
    dtype: DType
    trained: bool = False


class Call(msgspec.Struct, frozen=True):
    """One operation.

    Attributes:
        name: of its result.
        what: a layer of the program, or a function of `FUNCTIONS`.
        arguments: in order.
        origin: the operator and tensor of the ONNX graph that it came from, for messages.
    """

    name: Name
    what: Name
    arguments: list[Any]
    origin: str = ""


class Program(msgspec.Struct, frozen=True):
    """A network without its weights.

    Attributes:
        inputs: names, in order.
        layers: by name.
        constants: by name.
        tied: a tensor of the network's state -> the one that it shares its values with.
        calls: in an order in which they can be computed.
        output: what it gives.
    """

    inputs: tuple[Name, ...]
    layers: dict[Name, Layer]
    constants: dict[Name, Constant]
    tied: dict[str, str]
    calls: tuple[Call, ...]
    output: Ref

    def to_text(self) -> str:
        """Compact, for a bundle's manifest."""
        return base64.b64encode(zlib.compress(msgspec.msgpack.encode(self), 9)).decode()

    @classmethod
    def from_text(cls, text: str) -> Program:
        """Read what `to_text` gave.

        Raises:
            ModelError: if it cannot be read.
        """
        try:
            inflate = zlib.decompressobj()
            content = inflate.decompress(base64.b64decode(text, validate=True), _LARGEST_TEXT)
            if not inflate.eof:
                raise ValueError("it is cut short, or too large")
            return msgspec.msgpack.decode(content, type=cls)
        except (binascii.Error, zlib.error, msgspec.DecodeError, ValueError, RecursionError) as error:
            raise _damaged(str(error)) from error


def converted(program: str) -> nn.Module:
    """The network of a program, with fresh weights; its constants are zero until weights are loaded.

    Args:
        program: as `Program.to_text` gives it.

    Raises:
        ModelError: if it is damaged.
    """
    return network_of(Program.from_text(program))


def network_of(program: Program) -> fx.GraphModule:
    """The network of a program, with fresh weights; its constants are zero until weights are loaded.

    Raises:
        ModelError: if the program names what is not there, or is too large.
    """
    root = nn.Module()
    try:
        _check_size(program)
        for name, layer in program.layers.items():
            _check_name(name)
            module = LAYERS[layer.kind](**layer.settings)
            for own in layer.frozen:
                module.get_parameter(own).requires_grad_(False)
            root.add_module(name, module)
        for name, constant in program.constants.items():
            _check_name(name)
            tensor = torch.zeros(constant.shape, dtype=getattr(torch, constant.dtype))
            if constant.trained:
                root.register_parameter(name, nn.Parameter(tensor))
            else:
                root.register_buffer(name, tensor)
        for name, other in program.tied.items():
            place, _, leaf = name.rpartition(".")
            setattr(root.get_submodule(place), leaf, root.get_parameter(other))
        return fx.GraphModule(root, _graph(program), class_name="Converted")
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        raise _damaged(f"{type(error).__name__}: {error}") from error


def _damaged(why: str) -> ModelError:
    return ModelError("the description of a converted network is damaged", why, "import the ONNX file again")


def _check_name(name: str) -> None:
    if keyword.iskeyword(name) or is_reserved(name):
        raise ValueError(f"a layer cannot have the name {name}")


def is_reserved(name: str) -> bool:
    """Whether a torch module has an attribute of this name already."""
    return hasattr(fx.GraphModule, name) or hasattr(nn.Module(), name) or name in ("graph", "meta", "torch", "device")


def _check_size(program: Program) -> None:
    """Raise before memory is taken for what no bundle can hold."""
    with torch.device("meta"):
        layers = [LAYERS[layer.kind](**layer.settings) for layer in program.layers.values()]
    count = sum(tensor.numel() for layer in layers for tensor in layer.state_dict().values())
    count += sum(math.prod(constant.shape) for constant in program.constants.values())
    if count * 4 > _LARGEST_BYTES:
        raise ValueError(f"it has {count:,} weights")


def _graph(program: Program) -> fx.Graph:
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}

    def resolved(argument: Any) -> Any:
        if isinstance(argument, list):
            if len(argument) in (2, 3) and argument[0] == "of":
                argument = msgspec.convert(argument, type=Ref)
            else:
                return [resolved(each) for each in argument]
        if not isinstance(argument, Ref):
            return argument
        if argument.name in program.constants and argument.name not in nodes:
            nodes[argument.name] = graph.get_attr(argument.name)
        node = nodes[argument.name]
        return node if argument.item < 0 else graph.call_function(_item, (node, argument.item))

    for name in program.inputs:
        _check_name(name)
        nodes[name] = graph.placeholder(name)
    for call in program.calls:
        arguments = tuple(resolved(each) for each in call.arguments)
        kind = "call_module" if call.what in program.layers else "call_function"
        target = call.what if call.what in program.layers else FUNCTIONS[call.what]
        nodes[call.name] = graph.create_node(kind, target, arguments, name=call.name)
    graph.output(resolved(program.output))
    return graph


def _item(several: tuple[Tensor, ...], index: int) -> Tensor:
    return several[index]
