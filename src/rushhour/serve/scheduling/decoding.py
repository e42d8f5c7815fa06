"""Encoded pictures are decoded on threads, while the engine computes earlier requests.

Pillow decodes without the GIL, so the threads run in parallel, and the event loop goes on. It is imported only for a
model of pictures.
"""

from __future__ import annotations

import asyncio
import io
import math
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np

from rushhour.bundle import Decoding as Decoded
from rushhour.bundle import TensorSpec
from rushhour.errors import DataError, WireError
from rushhour.wire import PictureRequest, content_of
from rushhour.wire.pieces import pause

FORMATS = ("JPEG", "PNG", "WEBP")
_JPEG_MAGIC, _JPEG_SCAN = b"\xff\xd8", b"\xff\xda"
_COUNTED_BYTES = 2**20
"""Searched for scans in one go."""
_MAX_SCANS = 64
"""Of a progressive JPEG; encoders write about ten. Each costs a pass over all pixels, and next to no bytes."""
_MEMORY = 0.05
"""Weight of the newest request in the speed of decoding."""

Done = Callable[[tuple[memoryview, ...] | WireError], None]
"""Called once, on the event loop: the samples' raw rows of each input, or the error in one of them."""


class PictureSettings(msgspec.Struct, frozen=True):
    """How pictures are decoded: a part of `GET /config`."""

    formats: tuple[str, ...]
    threads: int
    max_pixels: int


class Decoder:
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
        self._pool = ThreadPoolExecutor(threads, "rushhour-decode")
        self._backlog = 0
        # Pillow's warnings contain text from the picture, and Python keeps each of them for ever.
        warnings.filterwarnings("ignore", module=r"PIL\b")
        self._bytes: float
        self._bytes, self._seconds = self._warm_up()

    def seconds(self, request: PictureRequest) -> float:
        """Seconds until a request that arrives now would be decoded."""
        at_once = min(self.settings.threads, request.rows)
        size = sum(map(len, request.pictures))
        return self._seconds / self._bytes * (self._backlog / self.settings.threads + size / at_once)

    def start(self, request: PictureRequest, done: Done) -> Decoding:
        """Decode the pictures of a request, each on the next thread that is free; `done` is called later."""
        decoding = Decoding(self, request, done)
        try:
            for index in range(request.rows):
                self._pool.submit(decoding.decode, index)
        except BaseException:
            decoding.cancel()
            raise
        return decoding

    def close(self) -> None:
        """End the threads when they have finished the current pictures."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def decode(self, content: bytes, into: np.ndarray) -> None:
        """Write one picture as a sample. May be called on any thread.

        Raises:
            DataError: if it is damaged, too large, or of another format.
        """
        self._check_scans(content)
        most = self.settings.max_pixels
        seen = self._read(io.BytesIO(content), into, max_pixels=most, formats=FORMATS, decoding=self._decoding)
        self._check_depth(seen.deep)

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

    def _took(self, size: int, seconds: float) -> None:
        # Outliers are capped at 4x the prediction: one very slow picture must not cause all others to be shed.
        seconds = min(seconds, 4 * size * self._seconds / self._bytes)
        self._bytes += _MEMORY * (size - self._bytes)
        self._seconds += _MEMORY * (seconds - self._seconds)


def _scans(content: bytes) -> int:
    """The number of places where a scan of a JPEG may begin."""
    found = 0
    for at in range(0, len(content), _COUNTED_BYTES):
        if at:
            pause()
        found += content.count(_JPEG_SCAN, at, at + _COUNTED_BYTES + len(_JPEG_SCAN) - 1)
    return found


class Decoding:
    """The pictures of one request on the threads."""

    def __init__(self, decoder: Decoder, request: PictureRequest, done: Done) -> None:
        self._decoder = decoder
        self._pictures = request.pictures
        self._size = sum(map(len, request.pictures))
        self._samples = np.empty((request.rows, *decoder._shape), np.uint8)
        self._done: Done | None = done
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._missing = request.rows
        self._seconds = 0.0
        self._error: WireError | None = None
        decoder._backlog += self._size

    def cancel(self) -> None:
        """Skip what has not begun, and do not call `done`. Further calls have no effect."""
        if self._done is not None:
            self._done = None
            self._decoder._backlog -= self._size
            self._pictures = ()  # a thread that is about to take one finds none, and its error is dropped

    def decode(self, index: int) -> None:
        """Decode one picture, unless it is not needed any more; on a thread."""
        began = time.perf_counter()
        error = None
        if self._done is not None and self._error is None:
            try:
                self._decoder.decode(content_of(self._pictures[index]), self._samples[index])
            except DataError as wrong:
                which = f"picture {index + 1} of {len(self._pictures)}"
                error = WireError(f"{which} cannot be read", wrong.why, f"send complete files in {', '.join(FORMATS)}")
            except WireError as wrong:
                error = wrong
            except Exception as wrong:
                error = WireError("a picture cannot be decoded", repr(wrong), "", status=500)
        with self._lock:
            self._error = self._error or error
            self._seconds += time.perf_counter() - began
            self._missing -= 1
            if self._missing:
                return
        self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        done = self._done
        if done is None:
            return
        self.cancel()
        if self._error is not None:
            done(self._error)
        else:
            self._decoder._took(self._size, self._seconds)
            done((self._samples.reshape(-1).data,))
