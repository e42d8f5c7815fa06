"""Convolutions, pooling and resizing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor

from rushhour.models.converted.builder import Builder, Size, Unsupported, Value, elements
from rushhour.models.converted.node import Node
from rushhour.models.converted.operators.dense import hint
from rushhour.models.converted.operators.operator import Operator


class _Window:
    """The attributes of an operator with a window, for the axes behind the first two."""

    def __init__(self, node: Node, x: Value, kernel: Sequence[int]) -> None:
        count = x.rank - 2
        if not 1 <= count <= 3 or len(kernel) != count:
            raise Unsupported(f"its input has {x.rank} axes")
        self.kernel = list(kernel)
        self.stride: list[int] = list(node.attribute("strides", [1] * count))
        self.dilation: list[int] = list(node.attribute("dilations", [1] * count))
        pads: list[int] = list(node.attribute("pads", [0] * 2 * count))
        self.before, self.after = pads[:count], pads[count:]
        mode = node.attribute("auto_pad", "NOTSET")
        if mode == "VALID":
            self.before, self.after = [0] * count, [0] * count
        elif mode in ("SAME_UPPER", "SAME_LOWER"):
            for at in range(count):
                size = x.fixed(at + 2)
                extent = (self.kernel[at] - 1) * self.dilation[at] + 1
                missing = max(0, (math.ceil(size / self.stride[at]) - 1) * self.stride[at] + extent - size)
                small, large = missing // 2, missing - missing // 2
                self.before[at], self.after[at] = (small, large) if mode == "SAME_UPPER" else (large, small)

    @property
    def is_even(self) -> bool:
        """Whether as much is padded behind as in front."""
        return self.before == self.after

    @property
    def widths(self) -> list[int]:
        """As `pad` takes them."""
        return [0, 0, *self.before, 0, 0, *self.after]

    def padded(self, b: Builder, x: Value, value: float) -> Value:
        """The input with uneven padding; nothing is left to pad then."""
        made = b.call("pad", x, self.widths, "constant", value)
        self.before = self.after = [0] * len(self.kernel)
        return made


def convolution(b: Builder, node: Node) -> Value:
    """Conv."""
    x, weight, bias = node.input(0), node.input(1), node.optional(2)
    window = _Window(node, x, [weight.fixed(at + 2) for at in range(weight.rank - 2)])
    if not window.is_even or min(window.before) < 0:
        x = window.padded(b, x, 0.0)
    groups = int(node.attribute("group", 1))
    if weight.constant is None or (bias is not None and bias.constant is None):
        return b.call("convolve", x, weight, bias, window.stride, window.before, window.dilation, groups)
    outputs, inputs = weight.constant.shape[:2]
    settings = {
        "in_channels": inputs * groups, "out_channels": outputs, "kernel_size": window.kernel, "stride": window.stride,
        "padding": window.before, "dilation": window.dilation, "groups": groups, "bias": bias is not None,
    }  # fmt: skip
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})
    return b.layer(f"Conv{x.rank - 2}d", settings, weights, [x], hint(weight, node))[0]


def transposed(b: Builder, node: Node) -> Value:
    """ConvTranspose."""
    x, weight, bias = node.input(0), node.input(1), node.optional(2)
    if weight.constant is None or (bias is not None and bias.constant is None):
        raise Unsupported("its weights are computed")
    window = _Window(_without_padding(node), x, list(weight.constant.shape[2:]))
    count = x.rank - 2
    extra: list[int] = list(node.attribute("output_padding", [0] * count))
    before, after = _transposed_pads(node, x, window, extra)
    if min(*before, *after) < 0:
        raise Unsupported("its padding is below 0")
    is_even = before == after
    limits = zip(extra, window.stride, window.dilation, strict=True)
    if any(more >= max(stride, dilation) for more, stride, dilation in limits):
        raise Unsupported("its output padding is as large as its stride")
    groups = int(node.attribute("group", 1))
    inputs, outputs = weight.constant.shape[:2]
    settings = {
        "in_channels": inputs, "out_channels": outputs * groups, "kernel_size": window.kernel, "stride": window.stride,
        "padding": before if is_even else [0] * count, "output_padding": extra, "groups": groups,
        "bias": bias is not None, "dilation": window.dilation,
    }  # fmt: skip
    weights = {"weight": weight} | ({} if bias is None else {"bias": bias})
    made = b.layer(f"ConvTranspose{count}d", settings, weights, [x], hint(weight, node))[0]
    if is_even:
        return made
    widths = [0, 0, *(-width for width in before), 0, 0, *(-width for width in after)]
    return b.call("pad", made, widths, "constant", 0.0)


def _without_padding(node: Node) -> Node:
    kept = {name: value for name, value in node.attributes.items() if name not in ("auto_pad", "pads")}
    return Node(node.op, node.label, node.opset, node.inputs, node.outputs, kept, node.sole)


def _transposed_pads(node: Node, x: Value, window: _Window, extra: list[int]) -> tuple[list[int], list[int]]:
    """What is cut off in front and behind; see the specification of ConvTranspose."""
    count = len(window.kernel)
    shape, mode = node.attribute("output_shape", None), node.attribute("auto_pad", "NOTSET")
    if shape is None and mode not in ("SAME_UPPER", "SAME_LOWER"):
        pads = list(node.attribute("pads", [0] * 2 * count)) if mode == "NOTSET" else [0] * 2 * count
        return pads[:count], pads[count:]
    before, after = [], []
    for at in range(count):
        size = x.fixed(at + 2)
        wanted = size * window.stride[at] if shape is None else list(shape)[-count:][at]
        extent = (window.kernel[at] - 1) * window.dilation[at] + 1
        total = window.stride[at] * (size - 1) + extra[at] + extent - wanted
        half = total // 2
        first = half if mode == "SAME_UPPER" else total - half
        before.append(first)
        after.append(total - first)
    return before, after


def max_pool(b: Builder, node: Node) -> Value:
    """MaxPool, without the places of the largest."""
    x = node.input(0)
    if any(node.outputs[1:]):
        raise Unsupported("the places of the largest are used")
    window = _Window(node, x, node.attribute("kernel_shape", []))
    ceiling = bool(node.attribute("ceil_mode", 0))
    if not _fits_torch(window):
        x = window.padded(b, x, -math.inf)
    return b.call("max_pool", x, window.kernel, window.stride, window.before, window.dilation, ceiling)


def average_pool(b: Builder, node: Node) -> Value:
    """AveragePool."""
    x = node.input(0)
    window = _Window(node, x, node.attribute("kernel_shape", []))
    ceiling, counts = bool(node.attribute("ceil_mode", 0)), bool(node.attribute("count_include_pad", 0))
    if any(each != 1 for each in window.dilation):
        raise Unsupported("its windows are dilated")
    if not _fits_torch(window):
        if ceiling:
            raise Unsupported("ceil_mode with uneven padding")
        if not counts:
            return b.call("average_pool_unevenly", x, window.kernel, window.stride, window.widths)
        x = window.padded(b, x, 0.0)
    return b.call("average_pool", x, window.kernel, window.stride, window.before, ceiling, counts)


def _fits_torch(window: _Window) -> bool:
    """Whether torch's pooling takes this padding: even, and at most half of the window."""
    return window.is_even and all(2 * pad <= size for pad, size in zip(window.before, window.kernel, strict=True))


def pool_all(largest: bool) -> Operator:
    """GlobalAveragePool and GlobalMaxPool."""

    def operator(b: Builder, node: Node) -> Value:
        x = node.input(0)
        if not 3 <= x.rank <= 5:
            raise Unsupported(f"its input has {x.rank} axes")
        return b.call("pool_all", x, largest)

    return operator


def resize(b: Builder, node: Node) -> Value:
    """Resize: by torch's own function where that is the same, else by places or a matrix for each axis."""
    x = node.input(0)
    before = x.shape
    after, scales = _new_sizes(b, node, x)
    changed = [axis for axis in range(x.rank) if after[axis] != before[axis]]
    if not changed:
        return x
    mode = node.attribute("mode", "nearest")
    where = node.attribute("coordinate_transformation_mode", "half_pixel")
    rounding = node.attribute("nearest_mode", "round_prefer_floor")
    if node.attribute("antialias", 0) or where in ("tf_crop_and_resize", "half_pixel_symmetric"):
        raise Unsupported("antialias, tf_crop_and_resize or half_pixel_symmetric")
    behind = [axis for axis in changed if axis >= 2]
    exact = all(math.isclose(scales[axis], after[axis] / x.fixed(axis), rel_tol=1e-6) for axis in changed)
    if behind == changed and exact and 3 <= x.rank <= 5:
        found = _of_torch(mode, where, rounding, x.rank, [after[axis] for axis in changed])
        if found is not None:
            return b.call("interpolate", x, [after[axis] for axis in range(2, x.rank)], *found)
    for axis in changed:
        places = _places(x.fixed(axis), after[axis], scales[axis], where)
        if mode == "nearest":
            x = b.call("take", x, Value(constant=_rounded(places, rounding, x.fixed(axis))), axis)
        elif mode in ("linear", "cubic"):
            cubic = float(node.attribute("cubic_coeff_a", -0.75)) if mode == "cubic" else None
            if node.attribute("exclude_outside", 0):
                raise Unsupported("exclude_outside")
            x = b.call("mix", x, Value(constant=_matrix(places, x.fixed(axis), cubic)), axis)
        else:
            raise Unsupported(f"mode {mode}")
    return x


def _of_torch(mode: str, where: str, rounding: str, rank: int, sizes: list[int]) -> tuple[str, bool | None] | None:
    """The mode of torch's function that does the same, and `align_corners`; None where there is none."""
    if mode == "nearest":
        return ("nearest", None) if (where, rounding) == ("asymmetric", "floor") else None
    if mode == "linear":
        aligned = {"half_pixel": False, "pytorch_half_pixel": False, "align_corners": True}.get(where)
        is_same = aligned is not None and (where != "pytorch_half_pixel" or min(sizes) > 1)
        return ({3: "linear", 4: "bilinear", 5: "trilinear"}[rank], aligned) if is_same else None
    return None


def _new_sizes(b: Builder, node: Node, x: Value) -> tuple[list[Any], list[float]]:
    """The size of each axis, and by what it is scaled; the axes of the batch and others may stay as they are."""
    axes = [axis % x.rank for axis in node.attribute("axes", list(range(x.rank)))]
    after: list[Any] = list(x.shape)
    factors = [1.0] * x.rank
    given, sizes = node.optional(2), node.optional(3)
    if sizes is not None and elements(sizes):
        if node.attribute("keep_aspect_ratio_policy", "stretch") != "stretch":
            raise Unsupported("keep_aspect_ratio_policy")
        for axis, size in zip(axes, b.ints(sizes), strict=True):
            if size != after[axis]:
                if isinstance(size, Size):
                    raise Unsupported("its size depends on the batch")
                after[axis], factors[axis] = size, size / x.fixed(axis)
    elif given is not None and given.constant is not None:
        for axis, factor in zip(axes, given.constant.reshape(-1).tolist(), strict=True):
            if factor != 1.0:
                after[axis], factors[axis] = math.floor(x.fixed(axis) * factor + 1e-6), factor
    else:
        raise Unsupported("its scales are computed")
    if any(isinstance(size, int) and size < 1 for size in after):
        raise Unsupported("it leaves nothing")
    return after, factors


def _places(old: int, new: int, scale: float, where: str) -> Tensor:
    """Where each new element is among the old ones."""
    at = torch.arange(new, dtype=torch.float64)
    if where == "asymmetric":
        return at / scale
    if where == "align_corners":
        return at * (old - 1) / (new - 1) if new > 1 else at * 0
    if where == "pytorch_half_pixel" and new == 1:
        return at * 0
    return (at + 0.5) / scale - 0.5


def _rounded(places: Tensor, how: str, size: int) -> Tensor:
    rounded = {
        "floor": torch.floor(places),
        "ceil": torch.ceil(places),
        "round_prefer_ceil": torch.floor(places + 0.5),
        "round_prefer_floor": torch.ceil(places - 0.5),
    }[how]
    return rounded.clamp(0, size - 1).long()


def _matrix(places: Tensor, size: int, cubic: float | None) -> Tensor:
    """What each new element takes of the old ones, `(new, old)`."""
    matrix = torch.zeros(len(places), size, dtype=torch.float64)
    first = torch.floor(places)
    part = places - first
    if cubic is None:
        shares = {0: 1 - part, 1: part}
    else:

        def near(d: Tensor) -> Tensor:
            return (cubic + 2) * d**3 - (cubic + 3) * d**2 + 1

        def far(d: Tensor) -> Tensor:
            return cubic * d**3 - 5 * cubic * d**2 + 8 * cubic * d - 4 * cubic

        shares = {-1: far(part + 1), 0: near(part), 1: near(1 - part), 2: far(2 - part)}
    rows = torch.arange(len(places))
    for offset, share in shares.items():
        matrix.index_put_((rows, (first + offset).clamp(0, size - 1).long()), share, accumulate=True)
    return matrix.float()


OPERATORS: Final[dict[str, Operator]] = {
    "Conv": convolution, "ConvTranspose": transposed, "MaxPool": max_pool, "AveragePool": average_pool,
    "GlobalAveragePool": pool_all(False), "GlobalMaxPool": pool_all(True), "Resize": resize,
}  # fmt: skip
"""Operator -> its conversion."""
