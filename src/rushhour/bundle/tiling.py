"""`Tiling`: how a picture or recording larger than a model's input is cut into tiles, and how their answers become one.

Along each side, or along time, tiles begin every `tile - overlap` pixels or steps. Everything here is arithmetic on
sizes; the serving side cuts and merges (`rushhour.serve.scheduling.tiles`).
"""

from __future__ import annotations

import math
from typing import Annotated, Final, Literal, get_args

import msgspec

from rushhour.bundle.signature import OpenDimension, Signature, TensorSpec
from rushhour.errors import BundleError

Merge = Literal["mean", "max", "crop", "blend", "boxes"]
MAPS: Final = ("crop", "blend")
"""Merges of outputs that have a value for each place of the tile."""
FIXED: Final = ("mean", "max")
"""Merges whose answer has the shape of one tile's."""


_LARGEST_SIDE: Final = 16_384
"""Of a picture that is sent as a tensor."""
_UNITS: Final = {1: "steps", 2: "pixels"}
_LONGEST: Final = 2**24
"""Steps of a recording."""
_LONGEST_BYTES: Final = 2**30


def tiled_axes(spec: TensorSpec) -> tuple[int, ...]:
    """The axes of a sample along which tiles are cut: height and width of a picture, the longest one of a recording.

    Args:
        spec: of a picture, uint8 `(height, width, channels)`; or of a recording: `(steps,)`, `(steps, channels)` or
            `(channels, steps)`, with more steps than channels.

    Returns:
        Empty where it is neither.
    """
    shape = spec.shape
    if spec.dtype == "uint8" and len(shape) == 3:
        return 0, 1
    if len(shape) == 1 or (len(shape) == 2 and shape[0] != shape[1]):
        return (shape.index(max(shape)),)
    return ()


class Tiling(msgspec.Struct, frozen=True):
    """How pictures or recordings are cut, and how the answers of their tiles are merged.

    Attributes:
        merge: `mean` or `max` of the tiles' values, for scores; `crop` or `blend` for maps: each place from the tile
            whose middle is nearest, or the average of all that cover it, weighted by the distance from their borders;
            `boxes` for detections: moved to their place in the picture, and those of several tiles that cover the same
            object reduced to the one with the highest score.
        overlap: pixels or steps that neighbouring tiles share, at least.
        border: what happens where the last tile would leave the picture: it is moved inside (`shift`), or the pixels
            beyond the picture have the value of `fill` (`pad`).
        fill: of pixels beyond the picture. A picture smaller than a tile is filled up in both cases.
        same: boxes of one class that overlap by more than this share of the smaller one are the same object.
    """

    merge: Merge
    overlap: Annotated[int, msgspec.Meta(ge=0, le=2**31)] = 0
    border: Literal["shift", "pad"] = "shift"
    fill: Annotated[int, msgspec.Meta(ge=0, le=255)] = 0
    same: Annotated[float, msgspec.Meta(gt=0, le=1)] = 0.5

    @property
    def is_fixed(self) -> bool:
        """Whether an answer has the shape of one tile's, whatever the picture's size."""
        return self.merge in FIXED

    def offsets(self, length: int, tile: int, stride: int = 1) -> list[int]:
        """Where the tiles of one side begin, in pixels.

        Args:
            length: of the side of the picture.
            tile: of the same side of a tile.
            stride: pixels for each place of a map; a tile that is moved inside still begins at a multiple of it.
        """
        step = tile - self.overlap
        count = self.count(length, tile)
        found = [number * step for number in range(count)]
        if self.border == "shift" and count > 1:
            found[-1] = -(-(length - tile) // stride) * stride
        return found

    def count(self, length: int, tile: int) -> int:
        """The number of tiles along one side."""
        return 1 if length <= tile else 1 - (-(length - tile) // (tile - self.overlap))

    def check(self, signature: Signature) -> None:
        """Raise unless pictures for a model of this signature can be cut and merged so.

        Raises:
            BundleError: naming what does not fit.
        """
        spec, axes = signature.inputs[0], tiled_axes(signature.inputs[0])
        if not axes or len(signature.inputs) > 1 or signature.dimensions:
            why = "its input is neither: uint8 (height, width, channels), or (steps,), (steps, channels)"
            raise _refusal("tiles are cut from pictures and recordings", why)
        try:
            msgspec.convert(msgspec.to_builtins(self), Tiling)
        except msgspec.ValidationError as error:
            raise _unreadable(str(msgspec.to_builtins(self)), str(error)) from error
        sides, unit = tuple(spec.shape[axis] for axis in axes), _UNITS[len(axes)]
        if self.overlap >= min(sides):
            raise _refusal(
                f"the overlap of tiles is {self.overlap} {unit}",
                f"a tile has {'x'.join(map(str, sides))}, and tiles that begin at the same place never end",
                f"give an overlap from 0 to {min(sides) - 1}",
            )
        if self.merge == "boxes" and len(axes) == 1:
            raise _refusal("tiles cannot be merged by 'boxes'", "its input is a recording", "merge by another way")
        for output in signature.outputs:
            if output.dtype not in ("float32", "float16", "float64") and self.merge != "crop":
                why = f"the output {output.name!r} is {output.dtype}, and the answers of tiles are merged as floats"
                raise _refusal("the model's answers cannot be merged", why)
            if self.merge in MAPS:
                self._check_map(output, sides)
        if self.merge == "boxes":
            box_columns(signature)

    def taken(self, signature: Signature) -> Signature:
        """The signature for clients of a model of this signature: a picture or recording of any size for a tile."""
        (spec,) = signature.inputs
        axes, shape = tiled_axes(spec), list(spec.shape)
        for axis in axes:
            most = _LARGEST_SIDE if len(axes) == 2 else min(_LONGEST, _LONGEST_BYTES * shape[axis] // spec.row_bytes)
            shape[axis] = max(most, shape[axis])
        return Signature(
            inputs=(TensorSpec(spec.name, spec.dtype, tuple(shape)),),
            outputs=signature.outputs,
            open=tuple(
                OpenDimension(name, shape[axis], {spec.name: axis})
                for axis, name in zip(axes, ("height", "width") if len(axes) == 2 else ("steps",), strict=True)
            ),
        )

    def declared(self, signature: Signature) -> dict[str, tuple[int, ...]]:
        """Output -> the shape of an answer, with -1 for sizes that depend on the picture; empty where none does."""
        found = {}
        sides = sides_of(signature)
        for output in signature.outputs if not self.is_fixed else ():
            shape = list(output.shape)
            if self.merge in MAPS:
                (axis, _) = map_axes(output.shape, sides) or (0, 0)
                shape[axis : axis + len(sides)] = [-1] * len(sides)
            else:
                shape[0] = -1
            found[output.name] = tuple(shape)
        return found

    def _check_map(self, output: TensorSpec, tile: tuple[int, ...]) -> None:
        places = map_axes(output.shape, tile)
        if places is None:
            raise _refusal(
                f"tiles cannot be merged by {self.merge!r}",
                f"the output {output.name!r} {list(output.shape)} is no map of a tile of {'x'.join(map(str, tile))}",
                "merge scores by mean or max",
            )
        _, stride = places
        for side in tile:
            if (side - self.overlap) % stride:
                raise _refusal(
                    f"the overlap of tiles is {self.overlap} {(unit := _UNITS[len(tile)])}",
                    f"the output {output.name!r} has a place for {stride} {unit}, and {side} - overlap is no multiple",
                    f"give an overlap of {self.overlap // stride * stride} or {(self.overlap // stride + 1) * stride}",
                )


def map_axes(shape: tuple[int, ...], tile: tuple[int, ...]) -> tuple[int, int] | None:
    """The first axis of a map's sides, and the pixels or steps for each place; None if it is no map.

    Args:
        shape: of the answer to one tile: `(height, width, ...)` or `(channels, height, width)`; of a recording's
            `(steps, ...)` or `(channels, steps)`.
        tile: its height and width, or its steps.
    """
    found = []
    for axis in (1, 0):
        sides = shape[axis : axis + len(tile)]
        if len(sides) == len(tile) and all(side % part == 0 for side, part in zip(tile, sides, strict=True)):
            strides = {side // part for side, part in zip(tile, sides, strict=True)}
            if len(strides) == 1:
                found.append((axis, strides.pop()))
    # Channels that fit as a side too would be a map of other proportions: the finer one is meant.
    return min(found, key=lambda each: each[1]) if found else None


def sides_of(signature: Signature) -> tuple[int, ...]:
    """Height and width of a tile, or its steps."""
    spec = signature.inputs[0]
    return tuple(spec.shape[axis] for axis in tiled_axes(spec))


def box_columns(signature: Signature) -> tuple[int, int, int]:
    """The positions of the outputs that hold boxes, scores and classes; all the same where one output holds all.

    One output `(n, 6)` holds x1, y1, x2, y2, score and class of each box, in pixels of the tile. Or three outputs hold
    boxes `(n, 4)`, then scores `(n,)`, then classes `(n,)`.

    Raises:
        BundleError: if the outputs are of neither kind.
    """
    shapes = [output.shape for output in signature.outputs]
    if len(shapes) == 1 and len(shapes[0]) == 2 and shapes[0][1] == 6:
        return 0, 0, 0
    if len(shapes) == 3:
        boxes = [number for number, shape in enumerate(shapes) if len(shape) == 2 and shape[1] == 4]
        flat = [number for number, shape in enumerate(shapes) if len(shape) == 1]
        if len(boxes) == 1 and len(flat) == 2 and len({shapes[number][0] for number in range(3)}) == 1:
            return boxes[0], flat[0], flat[1]
    raise _refusal(
        "tiles cannot be merged by 'boxes'",
        f"the outputs are {', '.join(str(list(shape)) for shape in shapes)}",
        "a model of boxes gives (n, 6): x1, y1, x2, y2, score, class; or (n, 4), (n,) and (n,)",
    )


def tiles_of(tiling: Tiling, signature: Signature, size: tuple[int, ...]) -> int:
    """The number of tiles of a picture or recording.

    Args:
        tiling: how it is cut.
        signature: of the model.
        size: height and width of the picture, or the steps of the recording.
    """
    return math.prod(tiling.count(length, tile) for length, tile in zip(size, sides_of(signature), strict=True))


def read_tiling(text: str) -> Tiling:
    """Tiles as words: `crop, overlap=32`, or `mean, overlap=16, border=pad, fill=255`.

    Raises:
        BundleError: if it cannot be read.
    """
    merge, *settings = (part.strip() for part in text.split(","))
    given = dict(setting.partition("=")[::2] for setting in settings)
    unknown = sorted(given.keys() - {"overlap", "border", "fill", "same"})
    if unknown or len(given) < len(settings):
        raise _unreadable(text, f"{unknown[0]!r} is no setting" if unknown else "a setting is given twice")
    try:
        return msgspec.convert({"merge": merge, **given}, Tiling, strict=False)
    except msgspec.ValidationError as error:
        raise _unreadable(text, str(error)) from error


def _unreadable(text: str, why: str) -> BundleError:
    merges = ", ".join(get_args(Merge))
    fix = f"give how they are merged ({merges}) and overlap, border, fill or same: crop,overlap=32"
    return BundleError(f"cannot cut tiles by {text!r}", why, fix)


def _refusal(what: str, why: str, fix: str = "leave the tiles out") -> BundleError:
    return BundleError(what, why, fix)
