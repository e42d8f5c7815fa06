"""A picture as cameras and browsers give it becomes a sample: one way for training and for serving.

It is turned as its EXIF orientation says, brought to the sample's size (stretched, bilinear with antialiasing) and to
its channels. `bundle.Decoding` is how a bundle says so. A large JPEG is decoded at a half, quarter or eighth of its
size, as long as that is at least twice the sample's: for 12 megapixels and a sample of 224x224 that is 39 ms of CPU
instead of 127. Other decoders were measured on the same files (simplejpeg 115 ms, OpenCV 110 ms): libjpeg-turbo is
below all of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rushhour.errors import DataError

_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_REDUCING_GAP = 2


def look(source: Path | BinaryIO, *, max_pixels: int) -> tuple[bool, tuple[int, int]]:
    """Whether a picture is grey, and its height and width when it stands upright.

    Raises:
        DataError: if it cannot be read.
    """
    with _opened(source, max_pixels, None) as picture:
        grey = picture.mode in ("L", "1") or picture.mode.startswith("I")
        height, width = picture.height, picture.width
        on_its_side = _orientation(picture) in _ON_ITS_SIDE
    return grey, ((width, height) if on_its_side else (height, width))


def decode(
    source: Path | BinaryIO, into: NDArray[np.uint8], *, max_pixels: int, formats: tuple[str, ...] | None = None
) -> None:
    """Write a picture as a sample.

    Args:
        source: encoded.
        into: shape `(height, width, channels)`, with 1 channel for grey and 3 for red, green and blue.
        max_pixels: a picture with more is refused before anything of it is decoded.
        formats: Pillow's names of those that are read; all that it knows by default.

    Raises:
        DataError: if it is damaged, too large, or of another format.
    """
    height, width, channels = into.shape
    mode, reduced = ("L" if channels == 1 else "RGB"), _REDUCING_GAP * max(height, width)
    with _opened(source, max_pixels, formats) as picture:
        picture.draft(mode, (reduced, reduced))
        picture.load()
        orientation = _orientation(picture)
        size = (height, width) if orientation in _ON_ITS_SIDE else (width, height)
        if picture.mode.startswith("I"):  # 16 bits of grey; Pillow would clip them to 8
            sample = Image.fromarray((np.asarray(picture).clip(0, 65_535) >> 8).astype(np.uint8)).convert(mode)
        else:
            sample = picture.convert(mode)
        if sample.size != size:
            sample = sample.resize(size, Image.Resampling.BILINEAR)
        if orientation in _TURNS:
            sample = sample.transpose(_TURNS[orientation])
    into[:] = np.asarray(sample).reshape(into.shape)


def _orientation(picture: Image.Image) -> object:
    return picture.getexif().get(_ORIENTATION, 1)


@contextmanager
def _opened(source: Path | BinaryIO, max_pixels: int, formats: tuple[str, ...] | None) -> Iterator[Image.Image]:
    """An opened picture; whatever goes wrong with it becomes a `DataError`."""
    try:
        with Image.open(source, formats=formats) as picture:
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, and {max_pixels:,} are allowed")
            yield picture
    except UnidentifiedImageError as error:
        known = "of a kind that Pillow knows" if formats is None else f"a {', '.join(formats[:-1])} or {formats[-1]}"
        raise _unreadable(f"it is damaged, or not {known}") from error
    except Exception as error:  # there is little that Pillow does not raise on one damaged picture or another
        raise _unreadable(str(error) or type(error).__name__) from error


def _unreadable(why: str) -> DataError:
    return DataError("the picture cannot be read", why, "mend it, or leave it out")
