"""Encoded pictures are decoded on threads, while the engine computes earlier requests.

Pillow decodes without the GIL, so the threads run in parallel, and the event loop goes on. It is imported only for a
model of pictures.
"""

from __future__ import annotations

import importlib
import io
import math
import time
import warnings
from collections.abc import Callable

import msgspec
import numpy as np

from rushhour.bundle import Decoding as Decoded
from rushhour.bundle import TensorSpec
from rushhour.errors import DataError, WireError
from rushhour.serve.scheduling.preparation import Done, Preparation, Preparer
from rushhour.wire import PictureRequest, content_of
from rushhour.wire.pieces import pause

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_MAGIC, _JPEG_SCAN = b"\xff\xd8", b"\xff\xda"
_COUNTED_BYTES = 2**20
"""Searched for scans in one go."""
_MAX_SCANS = 64
"""Of a progressive JPEG; encoders write about ten. Each costs a pass over all pixels, and next to no bytes."""


class PictureSettings(msgspec.Struct, frozen=True):
    """How pictures are decoded: a part of `GET /config`."""

    formats: tuple[str, ...]
    threads: int
    max_pixels: int


class Decoder(Preparer):
    """Decodes pictures for one model. Created and closed on any thread, used on the event loop's.

    Args:
        spec: of the samples: uint8 `(height, width, channels)`.
        max_pixels: of one picture; each thread needs 4 bytes for each.
        threads: that decode.
        decoding: how the bundle's pictures were decoded in training.
    """

    def __init__(self, spec: TensorSpec, *, max_pixels: int, threads: int, decoding: Decoded | None = None) -> None:
        from rushhour.picture import decode, decode_whole, picture_size

        self._read, self._read_whole, self._read_size = decode, decode_whole, picture_size
        self._decoding = decoding or Decoded()
        self.settings = PictureSettings(FORMATS, threads, max_pixels)
        self._shape = spec.shape
        super().__init__(threads, "rushhour-decode")
        # Pillow's warnings contain text from the picture, and Python keeps each of them for ever.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        self._bytes, self._seconds = self._warm_up()

    def decode(self, content: bytes, into: np.ndarray) -> tuple[int, int]:
        """Write one picture as a sample; returns the height and width that it had. May be called on any thread.

        Raises:
            DataError: if it is damaged, too large, or of another format.
        """
        self._check_scans(content)
        most = self.settings.max_pixels
        seen = self._read(io.BytesIO(content), into, max_pixels=most, formats=FORMATS, decoding=self._decoding)
        self._check_depth(seen.deep)
        return seen.height, seen.width

    def size(self, content: bytes) -> tuple[int, int]:
        """Height and width of a picture, by its header alone. May be called on any thread.

        Raises:
            DataError: as `decode`.
        """
        self._check_scans(content)
        return self._read_size(io.BytesIO(content), max_pixels=self.settings.max_pixels, formats=FORMATS)

    def whole(self, content: bytes) -> np.ndarray:
        """A picture at its own size: uint8 `(height, width, channels)`. May be called on any thread.

        Raises:
            DataError: as `decode`.
        """
        channels, most = self._shape[2], self.settings.max_pixels
        pixels, seen = self._read_whole(
            io.BytesIO(content), channels, max_pixels=most, formats=FORMATS, decoding=self._decoding
        )
        self._check_depth(seen.deep)
        return pixels

    def on_thread(self, function: Callable[[], None]) -> None:
        """Call a function on the next thread that is free."""
        self._pool.submit(function)

    @staticmethod
    def _check_scans(content: bytes) -> None:
        if content.startswith(_JPEG_MAGIC) and _scans(content) > _MAX_SCANS:
            raise DataError("the picture cannot be read", f"it has more than {_MAX_SCANS} scans", "use fewer scans")

    def _check_depth(self, deep: int) -> None:
        how = self._decoding
        if deep > how.deep:
            raise DataError(
                "the picture cannot be read",
                f"its grey values go up to {deep}, and the model expects up to {how.deep}",
                "send pictures of the depth that it was trained on",
            )

    def _warm_up(self) -> tuple[int, float]:
        """Load the picture codecs before the first request; returns the bytes of a picture and its seconds."""
        from PIL import Image

        # Where a format is not known yet, Pillow loads all forty that it has; it knows the others from the start.
        importlib.import_module("PIL.WebPImagePlugin")

        side = min(224, math.isqrt(self.settings.max_pixels))
        noise = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        size, seconds = 0, 0.0
        for name in reversed(FORMATS):
            encoded = io.BytesIO()
            Image.fromarray(noise).save(encoded, name)
            for _ in range(2):
                began = time.perf_counter()
                self.decode(encoded.getvalue(), np.empty(self._shape, np.uint8))
                size, seconds = len(encoded.getvalue()), time.perf_counter() - began
        return size, seconds

    def _preparation(self, request: PictureRequest, done: Done) -> Decoding:
        return Decoding(self, request, done)


def _scans(content: bytes) -> int:
    """The number of places where a scan of a JPEG may begin."""
    found = 0
    for at in range(0, len(content), _COUNTED_BYTES):
        if at:
            pause()
        found += content.count(_JPEG_SCAN, at, at + _COUNTED_BYTES + len(_JPEG_SCAN) - 1)
    return found


class Decoding(Preparation):
    """The pictures of one request on the threads."""

    FAILED = "a picture cannot be decoded"

    def __init__(self, decoder: Decoder, request: PictureRequest, done: Done) -> None:
        self._decoder = decoder
        self._samples = np.empty((request.rows, *decoder._shape), np.uint8)
        self._sides = request.sides
        super().__init__(decoder, request, done)

    def _prepare(self, first: int, rows: int) -> None:
        try:
            self._sides[first] = self._decoder.decode(content_of(self._items[first]), self._samples[first])
        except DataError as wrong:
            which = f"picture {first + 1} of {self._rows}"
            fix = f"send complete files in {', '.join(FORMATS)}"
            raise WireError(f"{which} cannot be read", wrong.why, fix) from wrong

    def _prepared(self) -> tuple[memoryview, ...]:
        return (self._samples.reshape(-1).data,)
