"""What size the pictures of a folder get, and how they are decoded: from the headers of about a hundred of them."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rushhour.bundle import Bundle, Decoding
from rushhour.data.decoded import MAX_PIXELS, real_white_of, shown, white_of
from rushhour.errors import DataError
from rushhour.picture import PictureInfo, inspect_picture

SUFFIXES: Final = {
    *(".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jif", ".bmp", ".dib", ".webp", ".tif", ".tiff", ".gif"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".jp2", ".tga", ".avif"),
}
"""Of files that are pictures."""
_LARGEST_SIDE, _LARGEST_ALIKE = 224, 512
"""Of samples, where no size is given: of pictures of different sizes, and of pictures that all have one size."""
_PROBED = 100
"""Pictures, about, whose size and colours decide the shape of the samples."""


def probed(files: Sequence[Path]) -> list[tuple[PictureInfo, Path]]:
    """Size and colours of about a hundred of the pictures; `read` finds all pictures that cannot be read."""
    found, first = [], ""
    for file in files[:: max(1, len(files) // _PROBED)]:
        try:
            found.append((inspect_picture(file, max_pixels=MAX_PIXELS), file))
        except DataError as error:
            first = first or f"{shown(file)}: {error.why}"
    if not found:
        raise DataError(f"none of {len(files)} pictures can be read", first, "repair them")
    return found


def shape_of(
    found: list[tuple[PictureInfo, Path]],
    size: tuple[int, int] | None,
    *,
    square: bool,
    bundle: Bundle | None,
    folder: Path,
    largest: int = _LARGEST_SIDE,
) -> tuple[int, int, int]:
    """The shape of the samples: a model's own; else the size, and one channel where all are grey, else three.

    Args:
        found: as of `probed`.
        size: that the user wants; None: that of the pictures if all are equal, else the median, at most `largest`.
        square: whether that has equal sides.
        bundle: the model that they are for.
        folder: for messages.
        largest: longer side, where pictures are made smaller.

    Raises:
        DataError: if the model takes another size than the user wants.
    """
    if bundle is not None and (spec := bundle.manifest.signature.picture) is not None:
        height, width, channels = spec.shape
        if size not in (None, (height, width)):
            raise DataError(
                f"cannot resize the pictures of {shown(folder)} to {size[0]}x{size[1]}",
                f"{bundle.manifest.name} takes {height}x{width}",
                "leave out --size",
            )
        return height, width, channels
    channels = 3 if any(seen.colour for seen, _ in found) else 1
    if size is not None:
        return (*size, channels)
    sizes = {(seen.height, seen.width) for seen, _ in found}
    height, width = (
        int(statistics.median(each)) for each in zip(*((s.height, s.width) for s, _ in found), strict=True)
    )
    if max(height, width) > (largest if len(sizes) > 1 else _LARGEST_ALIKE):
        shrink = largest / max(height, width)
        height, width = max(1, round(height * shrink)), max(1, round(width * shrink))
    if square:
        height = width = max(height, width)
    return height, width, channels


def decoding_of(found: list[tuple[PictureInfo, Path]], bundle: Bundle | None) -> tuple[Decoding, bool]:
    """The value of white in pictures of more than 8 bits, as far as it is known; and whether a model decides it."""
    if bundle is not None and isinstance(how := bundle.manifest.preprocessing.decoding, Decoding):
        return how, True
    deep = max((seen.deep for seen, _ in found), default=0)
    real, file = max(((seen.real, file) for seen, file in found), key=lambda pair: pair[0])
    return Decoding(
        deep=white_of(deep) if deep else Decoding().deep, real=real_white_of(real, file) if real else 1.0
    ), False
