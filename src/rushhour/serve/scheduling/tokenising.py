"""Texts become tokens on threads, while the engine computes earlier requests.

The tokenizer is that of the bundle, in Hugging Face's format, run by their library `tokenizers`, which works without
Python's interpreter lock. It is imported only for a bundle that has one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np

from rushhour.bundle import Bundle, Sizes, Text
from rushhour.errors import BundleError, InstallError
from rushhour.serve.scheduling.preparation import Done, Preparation, Preparer
from rushhour.wire import MAX_TEXT_BYTES, PictureRequest, TextRequest, text_of

_AT_ONCE = 64
"""Texts that a thread tokenises before it takes the next task."""
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


class Tokeniser(Preparer):
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
        super().__init__(threads, "rushhour-tokenise", _AT_ONCE)
        self._bytes = len(_WARM_UP)
        for _ in range(2):
            began = time.perf_counter()
            self.tensors(self.encoded([_WARM_UP]))
            self._seconds = time.perf_counter() - began

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

    def _preparation(self, request: PictureRequest, done: Done) -> Tokenising:
        return Tokenising(self, request, done)


class Tokenising(Preparation):
    """The texts of one request on the threads."""

    FAILED = "a text cannot be tokenised"

    def __init__(self, tokeniser: Tokeniser, request: PictureRequest, done: Done) -> None:
        self._tokeniser = tokeniser
        self._request = request
        self._encoded: list[Any] = [None] * request.rows
        self._tensors: tuple[tuple[memoryview, ...], Sizes] = ((), ())
        super().__init__(tokeniser, request, done)

    def _prepare(self, first: int, rows: int) -> None:
        items = self._items[first : first + rows]
        texts = [text_of(text, number) for number, text in enumerate(items, first + 1)]
        self._encoded[first : first + len(texts)] = self._tokeniser.encoded(texts)

    def _complete(self) -> None:
        self._tensors = self._tokeniser.tensors(self._encoded)

    def _prepared(self) -> tuple[memoryview, ...]:
        tensors, sizes = self._tensors
        if isinstance(self._request, TextRequest):
            self._request.tokens = sum(len(each.ids) for each in self._encoded)
        self._request.wanted = msgspec.structs.replace(self._request.wanted, sizes=sizes)
        return tensors
