"""Builds a program step by step, and knows of each value whether it is constant, and its shape for any batch.

Every step is computed for tensors on the meta device, at three sizes of the batch. What is equal at all of them does
not depend on the batch; a size that does is `times * batch + plus`. So no batch size is written into a program.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final, cast, get_args

import torch
from torch import Tensor

from rushhour.models.converted.functions import FUNCTIONS
from rushhour.models.converted.layers import LAYERS
from rushhour.models.converted.program import Call, Constant, DType, Layer, Program, Ref, is_reserved

PROBES: Final = (5, 7, 11)
"""Sizes of the batch at which every step is computed."""
_MOST_FOLDED: Final = 1 << 27
"""Elements of a constant that is computed."""
_MOST_COMPUTED: Final = 1 << 31
"""Elements of a result at one of `PROBES`."""
_MOST_SIZES: Final = 64
_INPUT: Final = "x"
_MOVING: Final = {"cut", "flatten", "permute", "pick", "reshape", "squeeze", "take", "unsqueeze"}
"""Functions whose result has the elements of their first tensor: of a weight it is a weight too."""


class Unsupported(Exception):
    """Why an operator cannot be converted."""


class Unbounded(Exception):
    """Why a graph must not be run at all: it would take the memory of the machine."""


@dataclasses.dataclass(frozen=True)
class Size:
    """A size that grows with the batch: `times * batch + plus`."""

    times: int
    plus: int


@dataclasses.dataclass(eq=False)
class Value:
    """A tensor of the graph: constant, or whole numbers that follow from the batch, or computed by the network.

    Attributes:
        constant: its value, where it has one.
        sizes: its value at each of `PROBES`, where that follows from the batch.
        ref: the result in the program.
        metas: at each of `PROBES` a tensor on the meta device.
        initializer: the name of the weight in the ONNX file that it is, or whose elements it has; else empty.
        no_weight: whether the file says that it is no weight: it is not trained, whatever layer has it.
        layer: the layer whose call gave it.
        input: the name of the network's input that it is, maybe in another type.
        source: the value that it is with its channels moved from the second axis to the last.
        source_alone: whether nothing else uses that value.
        flat: the value with channels first of which it has all axes behind the batch as one, channels last.
    """

    constant: Tensor | None = None
    sizes: tuple[Tensor, ...] = ()
    ref: Ref | None = None
    metas: tuple[Tensor, ...] = ()
    initializer: str = ""
    no_weight: bool = False
    layer: str = ""
    input: str = ""
    source: Value | None = None
    source_alone: bool = False
    flat: Value | None = None

    @property
    def is_known(self) -> bool:
        """Whether it does not depend on samples."""
        return self.ref is None

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self._one.dtype

    @property
    def rank(self) -> int:
        """Its number of axes."""
        return self._one.dim()

    @property
    def shape(self) -> tuple[int | Size, ...]:
        """Its sizes; those that grow with the batch as such."""
        if not self.metas:
            return tuple(self._one.shape)
        return tuple(map(affine, zip(*(meta.shape for meta in self.metas), strict=True)))

    def fixed(self, axis: int) -> int:
        """The size of an axis.

        Raises:
            Unsupported: if it depends on the batch.
        """
        size = self.shape[axis]
        if isinstance(size, Size):
            raise Unsupported(f"axis {axis} of its input grows with the batch")
        return size

    def at(self, probe: int) -> Tensor:
        """Its value at one of `PROBES`, by position; on the meta device where samples decide."""
        if self.constant is not None:
            return self.constant
        return self.sizes[probe] if self.sizes else self.metas[probe]

    @property
    def _one(self) -> Tensor:
        return self.at(0)


def affine(sizes: Sequence[int]) -> int | Size:
    """The size that has these values at `PROBES`.

    Raises:
        Unsupported: if none has.
    """
    if len(set(sizes)) == 1:
        return int(sizes[0])
    times, rest = divmod(sizes[1] - sizes[0], PROBES[1] - PROBES[0])
    plus = sizes[0] - times * PROBES[0]
    if rest or any(size != times * batch + plus for size, batch in zip(sizes, PROBES, strict=True)):
        raise Unsupported("a size depends on the batch, and not in proportion")
    return Size(int(times), int(plus))


class Builder:
    """Collects layers, constants and calls."""

    def __init__(self) -> None:
        self.state: dict[str, Tensor] = {}
        self.limits: dict[str, int] = {}
        """Input -> one more than the largest index that it may hold."""
        self._inputs: list[str] = []
        self._layers: dict[str, Layer] = {}
        self._constants: dict[str, Constant] = {}
        self._calls: list[Call] = []
        self._metas: dict[str, Any] = {}
        self._names: set[str] = set()
        self._same_layer: dict[Any, str] = {}
        self._times_called: dict[str, int] = {}
        self._first_of: dict[tuple[str, str], str] = {}
        self._tied: dict[str, str] = {}
        self._batch: dict[Size, Ref] = {}
        self._promoted: dict[str, Ref] = {}
        self._moved = 0
        self._origin = ""

    def begin(self, origin: str) -> None:
        """Say from which operator the next calls come."""
        self._origin = origin

    def input(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> Value:
        """An input `(batch, *shape)`, of the type that training gives: float32 of a single one, its own of several."""
        own = self._free(_INPUT if not self._inputs else name)
        self._inputs.append(own)
        metas = tuple(torch.empty((batch, *shape), dtype=dtype, device="meta") for batch in PROBES)
        return Value(ref=Ref(own), metas=metas, input=name)

    def call(self, function: str, *arguments: Any) -> Value:
        """The result of a function of one tensor; computed now where all is known.

        Args:
            function: of `FUNCTIONS`.
            arguments: values, lists of values, and settings; a `Size` is computed from the batch.

        Raises:
            Unsupported: if it depends on the batch in a way that cannot be expressed.
            Unbounded: if it is too large.
        """
        return self._call(function, arguments)[0]

    def call_several(self, function: str, *arguments: Any) -> list[Value]:
        """The same of a function of several results."""
        return self._call(function, arguments)

    def layer(
        self,
        kind: str,
        settings: Mapping[str, Any],
        weights: Mapping[str, Value],
        inputs: Sequence[Value | None],
        hint: str,
    ) -> list[Value]:
        """The results of a new layer, or of the one that has the same weights.

        Args:
            kind: of `LAYERS`.
            settings: arguments of its class.
            weights: name in the layer's state -> a constant.
            inputs: of the call.
            hint: a name for the layer.
        """
        key = (
            kind,
            repr(sorted(settings.items())),
            tuple(sorted((own, w.initializer or str(id(w.constant)), w.no_weight) for own, w in weights.items())),
        )
        name = self._same_layer.get(key, "")
        if not name:
            name = self._free(hint)
            self._same_layer[key] = name
            with torch.device("meta"):
                self._metas[name] = LAYERS[kind](**settings).eval()
            trained = dict(self._metas[name].named_parameters())
            frozen = tuple(own for own, value in weights.items() if value.no_weight and own in trained)
            self._layers[name] = Layer(kind, dict(settings), frozen)
            for own, value in weights.items():
                self._hold(f"{name}.{own}", value)
        self._times_called[name] = self._times_called.get(name, 0) + 1
        while inputs and inputs[-1] is None:
            inputs = inputs[:-1]
        module = self._metas[name]
        values = [value if value is None or value.ref else self._promote(value) for value in inputs]
        with torch.no_grad():
            results = [
                module(*(None if value is None else value.at(probe).to("meta") for value in values))
                for probe in range(len(PROBES))
            ]
        made = self._emit(name, [None if value is None else value.ref for value in values], results)
        for value in made:
            value.layer = name
        return made

    def sole_layer(self, value: Value) -> tuple[str, Layer] | None:
        """The layer that gave a value, where it is called once and shares no weights."""
        name = value.layer
        if (
            not name
            or self._times_called[name] > 1
            or any(key.startswith(f"{name}.") or other.startswith(f"{name}.") for key, other in self._tied.items())
        ):
            return None
        return name, self._layers[name]

    def with_bias(self, name: str) -> None:
        """Give a layer a bias, which `state` has then."""
        layer = self._layers[name]
        self._layers[name] = Layer(layer.kind, {**layer.settings, "bias": True}, layer.frozen)
        self._forget(name)

    def changed(self, name: str) -> None:
        """Note that the weights of a layer in `state` were changed: no other operator may share it."""
        self._forget(name)

    def ints(self, value: Value) -> list[int | Size]:
        """Whole numbers that do not depend on samples, such as a shape.

        Raises:
            Unsupported: if they do.
        """
        if not value.is_known:
            raise Unsupported("a shape, an axis or a bound depends on the samples")
        per_probe = [value.at(probe).reshape(-1).tolist() for probe in range(len(PROBES))]
        return [affine([int(each) for each in entry]) for entry in zip(*per_probe, strict=True)]

    def program(self, output: Value) -> tuple[Program, dict[str, Tensor]]:
        """The program that computes a value, and the state of its network: only what it needs."""
        if output.ref is None:
            raise Unsupported("its output does not depend on its input")
        calls, needed = [], {output.ref.name}
        for call in reversed(self._calls):
            if call.name in needed:
                calls.append(call)
                needed |= {ref.name for ref in _refs(call.arguments)} | {call.what}
        layers = {name: layer for name, layer in self._layers.items() if name in needed}
        constants = {name: constant for name, constant in self._constants.items() if name in needed}
        held = {key: value for key, value in self.state.items() if key.partition(".")[0] in (*layers, *constants)}
        tied = {key: other for key, other in self._tied.items() if key in held and other in held}
        program = Program(tuple(self._inputs), layers, constants, tied, tuple(reversed(calls)), output.ref)
        return program, held

    # Inside.

    def _call(self, function: str, arguments: Sequence[Any]) -> list[Value]:
        compute = FUNCTIONS[function]
        values = [each for each in _values(arguments) if each is not None]
        if all(value.is_known for value in values):
            known = self._computed(compute, arguments)
            if known is not None:
                if function in _MOVING and known[0].constant is not None:
                    known[0].no_weight = values[0].no_weight
                    if values[0].initializer:
                        self._moved += 1
                        known[0].initializer = f"{values[0].initializer}.{function}{self._moved}"
                return known
        arguments = _mapped(arguments, lambda value: value if value.ref else self._promote(value))
        results = [_on_meta(compute, arguments, probe) for probe in range(len(PROBES))]
        return self._emit(function, arguments, results)

    def _computed(self, compute: Callable[..., Any], arguments: Sequence[Any]) -> list[Value] | None:
        """The results, where they are constants or follow from the batch; None where the network must compute them."""
        depends = any(value.sizes for value in _values(arguments)) or any(True for _ in _sizes(arguments))
        probes = range(len(PROBES)) if depends else range(1)
        found: list[tuple[Tensor, ...]] = []
        for probe in probes:
            largest = max(result.numel() for result in _results(_on_meta(compute, arguments, probe)))
            if largest > _MOST_FOLDED:
                raise Unbounded(f"it computes a constant of {largest:,} elements")
            if depends and largest > _MOST_SIZES:
                return None
            found.append(_results(compute(*_mapped(arguments, partial(Value.at, probe=probe), probe))))
        values = []
        for results in zip(*found, strict=True):
            first = results[0]
            if all(torch.equal(first, other) for other in results[1:]):
                values.append(Value(constant=first))
            elif first.dim() <= 1 and all(each.shape == first.shape for each in results):
                values.append(Value(sizes=results))
            else:
                return None
        return values

    def _emit(self, what: str, arguments: Sequence[Any], results: Sequence[Any]) -> list[Value]:
        for probe, result in zip(PROBES, results, strict=True):
            largest = max(each.numel() for each in _results(result))
            if largest > _MOST_COMPUTED:
                raise Unbounded(f"for {probe} samples it computes {largest:,} elements")
        name = self._free(f"v{len(self._calls)}")
        encoded = [self._encoded(each) for each in arguments]
        self._calls.append(Call(name, what, encoded, self._origin))
        if isinstance(results[0], Tensor):
            return [Value(ref=Ref(name), metas=tuple(results))]
        several = zip(*results, strict=True)
        return [Value(ref=Ref(name, item), metas=tuple(metas)) for item, metas in enumerate(several)]

    def _encoded(self, argument: Any) -> Any:
        if isinstance(argument, Value):
            return argument.ref
        if isinstance(argument, Size):
            if argument not in self._batch:
                name = self._free("batch")
                self._calls.append(
                    Call(name, "batch_size", [Ref(self._inputs[0]), argument.times, argument.plus], self._origin)
                )
                self._batch[argument] = Ref(name)
            return self._batch[argument]
        return [self._encoded(each) for each in argument] if isinstance(argument, list) else argument

    def _promote(self, value: Value) -> Value:
        """A constant as a part of the network: a parameter if the file has it as a weight, else a buffer."""
        if value.constant is None:
            raise Unsupported("it computes with the number of samples")
        tensor = value.constant
        is_weight = bool(value.initializer) and tensor.is_floating_point() and tensor.numel() > 1
        trained = is_weight and bool(tensor.isfinite().all())  # a mask of -inf is none
        key = value.initializer or f"id {id(tensor)}"
        ref = self._promoted.get(key)
        if ref is None:
            name = self._free(value.initializer or "constant")
            ref = self._promoted[key] = Ref(name)
            self._constants[name] = Constant(tuple(tensor.shape), dtype_name(tensor.dtype), trained)
            self._hold(name, value)
        return Value(constant=tensor, ref=ref, metas=(tensor.to("meta"),) * len(PROBES), initializer=value.initializer)

    def _hold(self, key: str, value: Value) -> None:
        """Keep a weight; one that another layer has too is tied to it."""
        assert value.constant is not None
        self.state[key] = value.constant
        if value.initializer and value.constant.is_floating_point():
            first = self._first_of.setdefault((value.initializer, str(tuple(value.constant.shape))), key)
            if first != key and self._is_trained(first) and self._is_trained(key):
                self._tied[key] = first

    def _is_trained(self, key: str) -> bool:
        layer, _, leaf = key.rpartition(".")
        if not layer:
            return self._constants[leaf].trained
        return key.partition(".")[2] in dict(self._metas[layer.partition(".")[0]].named_parameters())

    def _forget(self, name: str) -> None:
        self._same_layer = {key: layer for key, layer in self._same_layer.items() if layer != name}
        self._first_of = {key: own for key, own in self._first_of.items() if not own.startswith(f"{name}.")}

    def _free(self, hint: str) -> str:
        """An unused name in letters, digits and underscores."""
        plain = re.sub(r"[^A-Za-z0-9_]+", "_", hint).strip("_")[:60] or "layer"
        plain = plain if plain[0].isalpha() else f"layer_{plain}"
        if is_reserved(plain) or not plain.isascii():
            plain = f"{plain}_"
        name, number = plain, 1
        while name in self._names or name in FUNCTIONS:
            number += 1
            name = f"{plain}_{number}"
        self._names.add(name)
        return name


def _on_meta(compute: Callable[..., Any], arguments: Sequence[Any], probe: int) -> Any:
    """The results without their values, at one of `PROBES`."""
    with torch.device("meta"):
        return compute(*_mapped(arguments, lambda value: value.at(probe).to("meta"), probe))


def _results(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def _values(arguments: Any) -> list[Value]:
    found: list[Value] = []
    for each in arguments:
        if isinstance(each, Value):
            found.append(each)
        elif isinstance(each, list):
            found += _values(each)
    return found


def _sizes(arguments: Any) -> list[Size]:
    found: list[Size] = []
    for each in arguments:
        if isinstance(each, Size):
            found.append(each)
        elif isinstance(each, list):
            found += _sizes(each)
    return found


def _mapped(arguments: Any, of_value: Callable[[Value], Any], probe: int | None = None) -> list[Any]:
    """The arguments with values replaced, and, at one of `PROBES`, sizes as numbers."""
    mapped: list[Any] = []
    for each in arguments:
        if isinstance(each, Value):
            mapped.append(of_value(each))
        elif isinstance(each, Size) and probe is not None:
            mapped.append(each.times * PROBES[probe] + each.plus)
        elif isinstance(each, list):
            mapped.append(_mapped(each, of_value, probe))
        else:
            mapped.append(each)
    return mapped


def _refs(arguments: Any) -> list[Ref]:
    found: list[Ref] = []
    for each in arguments:
        if isinstance(each, Ref):
            found.append(each)
        elif isinstance(each, list):
            found += _refs(each)
    return found


def dtype_name(dtype: torch.dtype) -> DType:
    """A type as a program names it.

    Raises:
        Unsupported: if it has none.
    """
    name = str(dtype).removeprefix("torch.")
    for known in get_args(DType):
        if known == name:
            return cast(DType, known)
    raise Unsupported(f"a tensor of {name}")


def elements(value: Value) -> int:
    """How many elements a constant has."""
    return math.prod(value.at(0).shape)
