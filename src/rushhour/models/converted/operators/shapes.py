"""Operators that move elements and compute no new ones, and operators on shapes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch

from rushhour.models.converted.builder import PROBES, Builder, Size, Unsupported, Value, affine, dtype_name
from rushhour.models.converted.node import DTYPES, Node, axis_of, scalar, whole
from rushhour.models.converted.operators.layout import axis_before, flat, to_last, turned
from rushhour.models.converted.operators.operator import Operator

_MOST: Final = 2**31


def reshape(b: Builder, node: Node) -> Value:
    """Reshape: as the merging of neighbouring axes where it is that, else with at most one open size."""
    x, wanted = node.input(0), node.ints(b, "shape", 1)
    if wanted is None:
        raise Unsupported("it has no shape")
    before = x.shape
    if not node.attribute("allowzero", 0):
        wanted = [before[at] if size == 0 else size for at, size in enumerate(wanted)]
    return reshaped(b, x, _filled(before, wanted))


def reshaped(b: Builder, x: Value, shape: Sequence[int | Size]) -> Value:
    """A value in another shape."""
    before, shape = x.shape, list(shape)
    if list(before) == shape:
        return x
    for first in range(len(before)):
        last = first + len(before) - len(shape)
        if last <= first or [*before[:first], *before[last + 1 :]] != [*shape[:first], *shape[first + 1 :]]:
            continue
        if _product(before[first : last + 1]) == _product(shape[first : first + 1]):
            if first == 1 and last == len(before) - 1 and x.source is not None:
                return flat(b, x, x.source)
            return b.call("flatten", x, first, last if last < len(before) - 1 else -1)
    grown = [at for at, size in enumerate(shape) if isinstance(size, Size)]
    if len(grown) == 1:
        shape[grown[0]] = -1
    return b.call("reshape", x, shape)


def _product(sizes: Sequence[int | Size]) -> tuple[int, ...]:
    """At each of `PROBES`."""
    return tuple(
        math.prod(size.times * batch + size.plus if isinstance(size, Size) else size for size in sizes)
        for batch in PROBES
    )


def _filled(before: Sequence[int | Size], wanted: Sequence[int | Size]) -> list[int | Size]:
    """The shape with a size in place of -1."""
    if -1 not in wanted:
        return list(wanted)
    at = list(wanted).index(-1)
    rest = _product([*wanted[:at], *wanted[at + 1 :]])
    if 0 in rest or any(whole_ % part for whole_, part in zip(_product(before), rest, strict=True)):
        raise Unsupported("its input does not fit its shape")
    size = affine([whole_ // part for whole_, part in zip(_product(before), rest, strict=True)])
    return [*wanted[:at], size, *wanted[at + 1 :]]


def flatten(b: Builder, node: Node) -> Value:
    """Flatten, into two axes."""
    x = node.input(0)
    axis = node.attribute("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    if axis == 1 and x.rank > 2:
        return b.call("flatten", x, 1, -1) if x.source is None else flat(b, x, x.source)
    if axis == 1 and x.rank == 2:
        return x
    return reshaped(b, x, _filled(x.shape, [_one(x.shape[:axis]), -1]))


def _one(sizes: Sequence[int | Size]) -> int | Size:
    return affine(_product(sizes))


def squeeze(b: Builder, node: Node) -> Value:
    """Squeeze."""
    x, axes = node.input(0), node.fixed_ints(b, "axes", 1)
    chosen = [at for at, size in enumerate(x.shape) if size == 1] if axes is None else axes
    return b.call("squeeze", x, sorted(axis_of(axis, x.rank) for axis in chosen))


def unsqueeze(b: Builder, node: Node) -> Value:
    """Unsqueeze."""
    x, axes = node.input(0), node.fixed_ints(b, "axes", 1) or []
    return b.call("unsqueeze", x, sorted(axis_of(axis, x.rank + len(axes)) for axis in axes))


def transpose(b: Builder, node: Node) -> Value:
    """Transpose."""
    x = node.input(0)
    return turned(b, x, node.attribute("perm", list(range(x.rank))[::-1]), alone=node.sole[0])


def concat(b: Builder, node: Node) -> Value:
    """Concat."""
    values = [node.input(at) for at in range(len(node.inputs))]
    axis = axis_of(node.attribute("axis", 0), values[0].rank)
    sources = [value.source for value in values if value.source is not None]
    if len(sources) == len(values) > 1:
        return to_last(b, b.call("concat", sources, axis_before(values[0], axis)))
    return values[0] if len(values) == 1 else b.call("concat", values, axis)


def split(b: Builder, node: Node) -> Sequence[Value]:
    """Split."""
    x = node.input(0)
    axis = axis_of(node.attribute("axis", 0), x.rank)
    sizes, count = node.fixed_ints(b, "split", 1), len(node.outputs)
    if sizes is None:
        width = x.fixed(axis)
        part = math.ceil(width / count)
        sizes = [min(part, width - part * at) for at in range(count)]
    return b.call_several("split", x, sizes, axis)


def slice_(b: Builder, node: Node) -> Value:
    """Slice, one axis after another."""
    x = node.input(0)
    starts, ends = node.ints(b, "starts", 1), node.ints(b, "ends", 2)
    if starts is None or ends is None:
        raise Unsupported("it has no bounds")
    axes = node.fixed_ints(b, "axes", 3) or list(range(len(starts)))
    steps = node.fixed_ints(b, "steps", 4) or [1] * len(starts)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        x = _sliced(b, x, axis_of(axis, x.rank), start, end, step)
    return x


def _sliced(b: Builder, x: Value, axis: int, start: int | Size, end: int | Size, step: int) -> Value:
    size = x.shape[axis]
    if isinstance(size, Size):
        to_end = end == size or (isinstance(end, int) and end >= _MOST - 1)
        if not to_end or isinstance(start, Size) or start < 0 or step < 1:
            raise Unsupported("it cuts the batch")
        return x if (start, step) == (0, 1) else b.call("full_batch", x, axis, start, step)
    first, last = whole(start), whole(end)
    first, last = (each + size if each < 0 else each for each in (first, last))
    if step > 0:
        first, last = min(max(first, 0), size), min(max(last, 0), size)
    else:
        first, last = min(max(first, -1), size - 1), min(max(last, -1), size - 1)
    if (first, step) == (0, 1) and last == size:
        return x
    if step > 0:
        last = max(first, last)
    return b.call("cut", x, axis, first, last, step)


def expand(b: Builder, node: Node) -> Value:
    """Expand, which broadcasts both ways."""
    x, wanted = node.input(0), node.ints(b, "shape", 1)
    assert wanted is not None
    before = [*[1] * (len(wanted) - x.rank), *x.shape]
    after = [*[1] * (len(before) - len(wanted)), *wanted]
    return b.call("expand", x, [old if new == 1 else new for old, new in zip(before, after, strict=True)])


def tile(b: Builder, node: Node) -> Value:
    """Tile."""
    repeats = node.ints(b, "repeats", 1)
    assert repeats is not None
    return b.call("tile", node.input(0), repeats)


def shape(b: Builder, node: Node) -> Value:
    """Shape: never computed by the network."""
    x = node.input(0)
    start, end = node.attribute("start", 0), node.attribute("end", None)
    return _known([torch.tensor(list(x.at(probe).shape)[start:end], dtype=torch.long) for probe in range(len(PROBES))])


def size(b: Builder, node: Node) -> Value:
    """Size: never computed by the network."""
    return _known([torch.tensor(node.input(0).at(probe).numel()) for probe in range(len(PROBES))])


def _known(values: Sequence[torch.Tensor]) -> Value:
    if all(torch.equal(values[0], other) for other in values[1:]):
        return Value(constant=values[0])
    return Value(sizes=tuple(values))


def constant(b: Builder, node: Node) -> Value:
    """Constant."""
    for name, dtype in (("value_float", torch.float32), ("value_int", torch.long)):
        if name in node.attributes:
            return Value(constant=torch.tensor(node.attributes[name], dtype=dtype))
        if f"{name}s" in node.attributes:
            return Value(constant=torch.tensor(node.attributes[f"{name}s"], dtype=dtype))
    value: Any = node.attributes.get("value")
    if not isinstance(value, torch.Tensor):
        raise Unsupported("it holds text, or a sparse tensor")
    return Value(constant=value)


def constant_of_shape(b: Builder, node: Node) -> Value:
    """ConstantOfShape."""
    given: Any = node.attribute("value", torch.zeros(1))
    return b.call("full", list(b.ints(node.input(0))), given.item(), dtype_name(given.dtype))


def count_up(b: Builder, node: Node) -> Value:
    """Range."""
    bounds = [node.input(at) for at in range(3)]
    numbers = [scalar(value) for value in bounds]
    dtype = dtype_name(bounds[0].dtype)
    if None not in numbers:
        if numbers[2] == 0 or (numbers[1] - numbers[0]) / numbers[2] > _MOST:
            raise Unsupported("it counts too far")
        return b.call("count_up", *numbers, dtype)
    if not all(value.is_known for value in bounds) or bounds[0].dtype.is_floating_point:
        raise Unsupported("its bounds depend on the samples")
    return b.call("count_up", *(b.ints(value)[0] for value in bounds), dtype)


def pad(b: Builder, node: Node) -> Value:
    """Pad."""
    x, widths, mode = node.input(0), node.fixed_ints(b, "pads", 1), node.attribute("mode", "constant")
    if widths is None or mode not in ("constant", "reflect", "edge", "wrap"):
        raise Unsupported(f"mode {mode}")
    axes = node.fixed_ints(b, "axes", 3)
    if axes is not None:
        chosen = [axis_of(axis, x.rank) for axis in axes]
        full = [0] * (2 * x.rank)
        for at, axis in enumerate(chosen):
            full[axis], full[axis + x.rank] = widths[at], widths[at + len(chosen)]
        widths = full
    filler = node.optional(2)
    value = 0 if filler is None else scalar(filler)
    if value is None:
        raise Unsupported("its value is computed")
    if not any(widths):
        return x
    if x.source is not None and mode == "constant":
        back = [axis_before(x, axis) for axis in range(x.rank)]
        ends = [0] * (2 * x.rank)
        for axis, place in enumerate(back):
            ends[place], ends[place + x.rank] = widths[axis], widths[axis + x.rank]
        return to_last(b, b.call("pad", x.source, ends, mode, float(value)))
    if mode != "constant" and any(
        (widths[at] or widths[at + x.rank]) and isinstance(x.shape[at], Size) for at in range(x.rank)
    ):
        raise Unsupported("it pads the batch")
    return b.call("pad", x, widths, mode, float(value) if x.dtype.is_floating_point else value)


def depth_to_space(b: Builder, node: Node) -> Value:
    """DepthToSpace."""
    return b.call("depth_to_space", node.input(0), node.attribute("blocksize", 1), node.attribute("mode", "DCR"))


def space_to_depth(b: Builder, node: Node) -> Value:
    """SpaceToDepth."""
    return b.call("space_to_depth", node.input(0), node.attribute("blocksize", 1))


def triangle(b: Builder, node: Node) -> Value:
    """Trilu."""
    diagonal = node.optional(1)
    number = 0 if diagonal is None else scalar(diagonal)
    if number is None:
        raise Unsupported("its diagonal is computed")
    return b.call("triangle", node.input(0), int(number), bool(node.attribute("upper", 1)))


def one_hot(b: Builder, node: Node) -> Value:
    """OneHot."""
    indices, depth, values = node.input(0), scalar(node.input(1)), node.input(2)
    if depth is None:
        raise Unsupported("its depth is computed")
    return b.call("one_hot", indices, int(depth), values, axis_of(node.attribute("axis", -1), indices.rank + 1))


def eye_like(b: Builder, node: Node) -> Value:
    """EyeLike of a known size."""
    rows, columns = (node.input(0).fixed(axis) for axis in range(2))
    dtype = DTYPES.get(node.attribute("dtype", 0), node.input(0).dtype)
    ones = b.call("full", [rows, columns], 1, dtype_name(dtype))
    diagonal = int(node.attribute("k", 0))
    return b.call("triangle", b.call("triangle", ones, diagonal, True), diagonal, False)


OPERATORS: Final[dict[str, Operator]] = {
    "Reshape": reshape, "Flatten": flatten, "Squeeze": squeeze, "Unsqueeze": unsqueeze, "Transpose": transpose,
    "Concat": concat, "Split": split, "Slice": slice_, "Expand": expand, "Tile": tile, "Shape": shape, "Size": size,
    "Constant": constant, "ConstantOfShape": constant_of_shape, "Range": count_up, "Pad": pad,
    "DepthToSpace": depth_to_space, "SpaceToDepth": space_to_depth, "Trilu": triangle, "OneHot": one_hot,
    "EyeLike": eye_like,
}  # fmt: skip
"""Operator -> its conversion."""
