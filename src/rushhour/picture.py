"""Decoding of pictures into samples, the same in training and in serving.

The EXIF orientation is applied, transparent pixels are put on white, and the picture is brought to the sample's size
(stretched, bilinear with antialiasing) and channels. Values of more than 8 bits are scaled so that white becomes 255.
`bundle.Decoding` records all that. A large JPEG is decoded at a half, quarter or eighth of its size, as long as that is
at least twice the sample's: for 12 megapixels and a sample of 224x224 that takes 39 ms of CPU instead of 127. Other
decoders on the same files: simplejpeg 115 ms, OpenCV 110 ms; all of them use libjpeg-turbo.
"""

from __future__ import annotations

import functools
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

from rushhour.bundle import Decoding
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
_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
_GREY = ("1", "L", "LA", "La", "F")
_AS_DECODED = Decoding()
_LOSSY = ("JPEG", "MPO")
_LARGE_BYTES = 2**20
"""Pixels of at least this size are taken over without holding up other threads."""


class PictureInfo(NamedTuple):
    """Properties of a picture file.

    Attributes:
        height: of the picture with its orientation applied, in pixels.
        width: of the same.
        colour: whether it is not grey.
        frames: whether the file has more pictures; only the first is read.
        deep: the largest value of 16-bit or 32-bit grey; 0 for others.
        real: the largest value of grey in floats; 0 for others.
        cut: the largest value of 16-bit colours, of which Pillow reads the upper 8 bits; 255 for others.
    """

    height: int
    width: int
    colour: bool
    frames: bool = False
    deep: int = 0
    real: float = 0.0
    cut: int = 255


def inspect_picture(source: Path | BinaryIO, *, max_pixels: int) -> PictureInfo:
    """The properties of a picture. Its values are read only if it is grey of more than 8 bits.

    Raises:
        DataError: if it cannot be read.
    """
    with _opened(source, max_pixels, None) as picture:
        info = _info_of(picture)
        if picture.mode.startswith("I") or picture.mode == "F":
            picture.load()
            info = _measured(picture, info)
    return info


def picture_size(source: BinaryIO, *, max_pixels: int, formats: tuple[str, ...]) -> tuple[int, int]:
    """Height and width of a picture by its header alone, with the orientation that the header has.

    Raises:
        DataError: as `decode`.
    """
    with _opened(source, max_pixels, formats) as picture:
        info = _info_of(picture)
    return info.height, info.width


def decode(
    source: Path | BinaryIO,
    into: NDArray[np.uint8],
    *,
    max_pixels: int,
    formats: tuple[str, ...] | None = None,
    decoding: Decoding = _AS_DECODED,
) -> PictureInfo:
    """Write a picture as a sample.

    Args:
        source: encoded.
        into: shape `(height, width, channels)`: 1 channel for grey, 3 for red, green and blue.
        max_pixels: a picture with more is refused before it is decoded.
        formats: Pillow's names of the allowed ones; all that it knows by default.
        decoding: which value is white in grey of more than 8 bits. Brighter values become white too; the returned
            properties tell whether there are any.

    Raises:
        DataError: if it is damaged, too large, of another format, or has invalid values.
    """
    height, width, channels = into.shape
    pixels, info = _decoded(source, channels, (height, width), max_pixels, formats, decoding)
    into[:] = pixels.reshape(into.shape)
    return info


def decode_labels(source: Path | BinaryIO, *, max_pixels: int) -> NDArray[np.uint8]:
    """A picture whose pixels are labels, `(height, width)`: grey values, or the colours of a palette by number.

    Raises:
        DataError: if it is damaged, too large, in colours, or has labels above 255.
    """
    with _opened(source, max_pixels, None) as picture:
        if picture.format in _LOSSY:
            raise ValueError(f"a {picture.format} changes labels at their borders: save it as PNG")
        picture.load()
        labels = np.asarray(picture)
        if labels.ndim == 3:
            channels = labels[..., :3] if labels.shape[2] >= 3 else labels[..., :1]
            if (channels != channels[..., :1]).any():
                raise ValueError("it is in colours, and a class map has one label for each pixel: grey, or a palette")
            labels = channels[..., 0]
        if labels.dtype.kind == "f" or (labels.size and (labels.min() < 0 or labels.max() > 255)):
            raise ValueError("its labels are not whole numbers from 0 to 255")
        return labels.astype(np.uint8)


def decode_whole(
    source: Path | BinaryIO,
    channels: int,
    *,
    max_pixels: int,
    formats: tuple[str, ...] | None = None,
    decoding: Decoding = _AS_DECODED,
) -> tuple[NDArray[np.uint8], PictureInfo]:
    """A picture at its own size, `(height, width, channels)`, and its properties; else as `decode`.

    Raises:
        DataError: as `decode`.
    """
    pixels, info = _decoded(source, channels, None, max_pixels, formats, decoding)
    return pixels.reshape(*pixels.shape[:2], channels), info


def _decoded(
    source: Path | BinaryIO,
    channels: int,
    sides: tuple[int, int] | None,
    max_pixels: int,
    formats: tuple[str, ...] | None,
    decoding: Decoding,
) -> tuple[NDArray[np.uint8], PictureInfo]:
    """The pixels of a picture, brought to this height and width; None keeps its own."""
    mode = "L" if channels == 1 else "RGB"
    with _opened(source, max_pixels, formats) as picture:
        info, wide = _info_of(picture), _has_wide_colours(picture)
        if sides is not None:
            reduced = _REDUCING_GAP * max(sides)
            picture.draft(mode, (reduced, reduced))
        picture.load()
        orientation = _orientation(picture)
        if picture.mode.startswith("I") or picture.mode == "F":
            info = _measured(picture, info)
            real = picture.mode == "F"
            eight = _of_floats(picture, decoding.real) if real else _scale(decoding.deep)[np.asarray(picture)]
            sample = Image.fromarray(eight).convert(mode)
        else:
            sample = _opaque(picture)
            if sample.mode != mode:  # else `convert` copies it
                sample = sample.convert(mode)
            if wide:
                info = info._replace(cut=int(np.asarray(sample).max()))
        if sides is not None:
            size = sides if orientation in _ON_ITS_SIDE else sides[::-1]
            if sample.size != size:
                sample = sample.resize(size, Image.Resampling.BILINEAR)
        if orientation in _TURNS:
            sample = sample.transpose(_TURNS[orientation])
        return _pixels(sample), info


def _pixels(picture: Image.Image) -> NDArray[np.uint8]:
    """The pixels of a loaded picture in grey or colours, read-only.

    Pillow hands them to numpy as a copy of a copy, and no other thread of Python runs meanwhile: with 12 megapixels a
    server answers nobody for tens of milliseconds. It writes files without Python's lock. So a large picture becomes a
    PPM, which is a header and then the pixels, in a file in memory.
    """
    size = picture.height * picture.width * len(picture.getbands())
    if size < _LARGE_BYTES or not hasattr(os, "memfd_create"):
        return np.asarray(picture)
    try:
        with os.fdopen(os.memfd_create("pixels"), "wb", buffering=0) as file:
            picture.save(file, "PPM")
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError:  # no descriptor is left, or the system allows no such files
        return np.asarray(picture)
    return np.frombuffer(mapped, np.uint8, offset=len(mapped) - size).reshape(picture.height, picture.width, -1)


def _info_of(picture: Image.Image) -> PictureInfo:
    """Before it is loaded."""
    height, width = picture.height, picture.width
    # Pillow turns a TIFF itself, and gives the size that it has then
    if picture.format != "TIFF" and _orientation(picture) in _ON_ITS_SIDE:
        height, width = width, height
    colour = not (picture.mode in _GREY or picture.mode.startswith("I"))
    # a phone's JPEG may carry a second, smaller picture of the same
    frames = picture.format not in ("JPEG", "MPO") and bool(getattr(picture, "is_animated", False))
    return PictureInfo(height, width, colour, frames)


def _measured(picture: Image.Image, info: PictureInfo) -> PictureInfo:
    """With the largest value of a loaded picture that is grey of more than 8 bits."""
    values = np.asarray(picture)
    low, high = float(values.min()), float(values.max())
    if not (np.isfinite(low) and np.isfinite(high)) or low < 0 or high > 65_535:
        raise ValueError(f"its values run from {low:g} to {high:g}, and pictures have 0..1, 0..255 or 0..65535")
    return info._replace(real=high) if picture.mode == "F" else info._replace(deep=int(high))


@functools.cache
def _scale(white: int) -> NDArray[np.uint8]:
    """The 8-bit value of each 16-bit value."""
    scaled: NDArray[np.uint8] = np.rint(np.arange(65_536).clip(0, white) * (255 / white)).astype(np.uint8)
    return scaled


def _of_floats(picture: Image.Image, white: float) -> NDArray[np.uint8]:
    scaled = np.asarray(picture) * np.float32(255 / white)
    return np.rint(scaled, out=scaled).clip(0, 255, out=scaled).astype(np.uint8)


def _has_wide_colours(picture: Image.Image) -> bool:
    """Whether its colours have 16 bits. Before it is loaded."""
    return not picture.mode.startswith("I") and any(";16" in str(tile[3]) for tile in getattr(picture, "tile", ()))


def _opaque(picture: Image.Image) -> Image.Image:
    """Over white, where it has an alpha channel or a transparent colour."""
    if picture.mode not in _ALPHA and "transparency" not in picture.info:
        return picture
    if picture.mode == "La":
        picture = picture.convert("LA")
    over = picture.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", over.size, "white"), over)


def _orientation(picture: Image.Image) -> object:
    return picture.getexif().get(_ORIENTATION, 1)


@contextmanager
def _opened(source: Path | BinaryIO, max_pixels: int, formats: tuple[str, ...] | None) -> Iterator[Image.Image]:
    """An opened picture; every error of it becomes a `DataError`."""
    try:
        with Image.open(source, formats=formats) as picture:
            if picture.width * picture.height > max_pixels:
                raise ValueError(f"it has {picture.width}x{picture.height} pixels, and {max_pixels:,} are allowed")
            yield picture
    except UnidentifiedImageError as error:
        known = "of a kind that Pillow knows" if formats is None else f"a {', '.join(formats[:-1])} or {formats[-1]}"
        raise _unreadable(f"it is damaged, or not {known}") from error
    except Exception as error:  # Pillow raises errors of many types on damaged pictures
        raise _unreadable(str(error) or type(error).__name__) from error


def _unreadable(why: str) -> DataError:
    return DataError("the picture cannot be read", why, "repair it, or leave it out")
