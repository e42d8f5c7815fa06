"""Texts become tokens on threads, while the engine computes earlier requests.

The tokenizer is that of the bundle, in Hugging Face's format, run by their library `tokenizers`, which works without
Python's interpreter lock. It is imported only for a bundle that has one.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec
import numpy as np

from rushhour.bundle import Bundle, Sizes, Text
from rushhour.errors import BundleError, InstallError, WireError
from rushhour.serve.scheduling.decoding import Done
from rushhour.wire import MAX_TEXT_BYTES, PictureRequest, text_of

_AT_ONCE = 64
"""Texts that a thread tokenises before it takes the next task."""
_MEMORY = 0.05
"""Weight of the newest request in the speed of tokenising."""
_WARM_UP = "A text of a dozen words or so, as people send them, to measure the tokenizer's speed."


class TextSettings(msgspec.Struct, frozen=True):
    """How texts are tokenised: a part of `GET /config`.

    Attributes:
        threads: that tokenise.
        largest: tokens of a text; longer ones are cut.
        max_bytes: of a text in UTF-8; longer ones are refused.
    """

    threads: int
    largest: int
    max_bytes: int


class Tokeniser:
    """Makes the inputs of one model of texts. Created and closed on any thread, used on the event loop's.

    Args:
        bundle: of the model, with a tokenizer.
        threads: that tokenise.

    Raises:
        InstallError: if the library is not installed.
        BundleError: if the tokenizer cannot be read.
    """

    def __init__(self, bundle: Bundle, *, threads: int) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads of its own would take the engine's cores
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise InstallError(
                f"cannot serve texts with {bundle.manifest.name}",
                f"the package tokenizers is not installed: {error}",
                "run `pip install 'rushhour[text]'`",
            ) from error
        signature, text = bundle.manifest.signature, bundle.manifest.text
        assert isinstance(text, Text)
        try:
            self._tokenizer = Tokenizer.from_file(str(bundle.tokenizer))
        except Exception as error:  # the library raises bare exceptions
            raise BundleError(
                f"the tokenizer of {bundle.manifest.name} cannot be read", str(error), "import the model again"
            ) from error
        (dimension,) = signature.dimensions
        self._signature, self._text = signature, text
        self._smallest, self._padding = dimension.smallest, dimension.padding
        self._tokenizer.enable_truncation(dimension.largest)
        self._tokenizer.no_padding()
        self.settings = TextSettings(threads, dimension.largest, MAX_TEXT_BYTES)
        self._pool = ThreadPoolExecutor(threads, "rushhour-tokenise")
        self._backlog = 0
        self._bytes: float = len(_WARM_UP)
        for _ in range(2):
            began = time.perf_counter()
            self.tensors(self.encoded([_WARM_UP]))
            self._seconds = time.perf_counter() - began

    def seconds(self, request: PictureRequest) -> float:
        """Seconds until a request that arrives now would be tokenised."""
        at_once = min(self.settings.threads, -(-request.rows // _AT_ONCE))
        size = sum(map(len, request.pictures))
        return self._seconds / self._bytes * (self._backlog / self.settings.threads + size / at_once)

    def start(self, request: PictureRequest, done: Done) -> Tokenising:
        """Tokenise the texts of a request, some at a time on the next thread that is free; `done` is called later."""
        tokenising = Tokenising(self, request, done)
        try:
            for first in range(0, request.rows, _AT_ONCE):
                self._pool.submit(tokenising.tokenise, first)
        except BaseException:
            tokenising.cancel()
            raise
        return tokenising

    def close(self) -> None:
        """End the threads when they have finished the current texts."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def encoded(self, texts: Sequence[str]) -> list[Any]:
        """The tokens of some texts. May be called on any thread."""
        encoded: list[Any] = self._tokenizer.encode_batch(list(texts))
        return encoded

    def tensors(self, encoded: Sequence[Any]) -> tuple[tuple[memoryview, ...], Sizes]:
        """The raw rows of each of the model's inputs, padded to the longest of these texts, and their sizes."""
        size = max(self._smallest, *(len(each.ids) for each in encoded))
        found = []
        for spec in self._signature.inputs:
            rows = np.full((len(encoded), size), self._padding.get(spec.name, 0), spec.dtype)
            kind = self._text.inputs[spec.name]
            for row, each in zip(rows, encoded, strict=True):
                values = getattr(each, kind)
                row[: len(values)] = values
            found.append(rows.reshape(-1).view(np.uint8).data)
        return tuple(found), (size,)

    def _took(self, size: int, seconds: float) -> None:
        # Outliers are capped at 4x the prediction: one very slow text must not cause all others to be shed.
        seconds = min(seconds, 4 * (size + 1) * self._seconds / self._bytes)
        self._bytes += _MEMORY * (size - self._bytes)
        self._seconds += _MEMORY * (seconds - self._seconds)


class Tokenising:
    """The texts of one request on the threads."""

    def __init__(self, tokeniser: Tokeniser, request: PictureRequest, done: Done) -> None:
        self._tokeniser = tokeniser
        self._request = request
        self._texts = request.pictures
        self._size = sum(map(len, request.pictures))
        self._encoded: list[Any] = [None] * request.rows
        self._done: Done | None = done
        self._loop = asyncio.get_running_loop()
        self._lock = threading.Lock()
        self._missing = request.rows
        self._seconds = 0.0
        self._error: WireError | None = None
        self._tensors: tuple[tuple[memoryview, ...], Sizes] = ((), ())
        tokeniser._backlog += self._size

    def cancel(self) -> None:
        """Skip what has not begun, and do not call `done`. Further calls have no effect."""
        if self._done is not None:
            self._done = None
            self._tokeniser._backlog -= self._size
            self._texts = ()

    def tokenise(self, first: int) -> None:
        """Tokenise some texts, unless they are not needed any more; on a thread."""
        began = time.perf_counter()
        error = None
        rows = min(_AT_ONCE, self._request.rows - first)
        if self._done is not None and self._error is None:
            try:
                texts = [
                    text_of(text, first + number + 1) for number, text in enumerate(self._texts[first : first + rows])
                ]
                self._encoded[first : first + len(texts)] = self._tokeniser.encoded(texts)
            except WireError as wrong:
                error = wrong
            except Exception as wrong:
                error = WireError("a text cannot be tokenised", repr(wrong), "", status=500)
        with self._lock:
            self._error = self._error or error
            self._seconds += time.perf_counter() - began
            self._missing -= rows
            if self._missing:
                return
        if self._done is not None and self._error is None:
            try:
                self._tensors = self._tokeniser.tensors(self._encoded)
            except Exception as wrong:
                self._error = WireError("a text cannot be tokenised", repr(wrong), "", status=500)
        self._loop.call_soon_threadsafe(self._finish)

    def _finish(self) -> None:
        done = self._done
        if done is None:
            return
        self.cancel()
        if self._error is not None:
            done(self._error)
            return
        self._tokeniser._took(self._size, self._seconds)
        tensors, sizes = self._tensors
        self._request.wanted = msgspec.structs.replace(self._request.wanted, sizes=sizes)
        done(tensors)
