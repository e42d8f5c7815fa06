"""JSON headers with large tensors: lists are cut out without being parsed, and read in pieces.

Source: RFC 8259.
"""

from __future__ import annotations

import binascii
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import Any

import msgspec
import numpy as np

from rushhour.errors import WireError
from rushhour.wire import pieces
from rushhour.wire.pieces import WHOLE_BYTES, pause, too_long

_SMALL_BYTES = 256
"""Of the first piece after a text: many texts are short."""
_DEEPEST = 64
"""Lists within lists."""
_TEXTS = 256
"""Texts that are found without a pause."""
_KEY = re.compile(rb'(?<!\\)"data"[ \t\r\n]*:[ \t\r\n]*(?=\[)')
_TEXT = re.compile(rb'(?:[^"\\]++|\\.)*+', re.DOTALL)
_MAY_OVERFLOW = re.compile(rb"[eE]\+?0*[1-9][0-9]{2}|[0-9]{300}")
_SPACES, _MARKS = b" \t\r\n", b"[],"
_NO_MARKS = bytes(set(range(256)) - set(_MARKS))
_OPEN, _CLOSE, _COMMA = b"[],"
_STEPS = np.zeros(256, np.int8)
_STEPS[_OPEN], _STEPS[_CLOSE] = 1, -1
_CUT = ""
"""The one key of the placeholder for a list that was cut out; no client has a reason to send it."""

_decode = msgspec.json.Decoder().decode


def cut_json(header: memoryview, most_texts: int) -> tuple[bytes, list[JsonTensor]]:
    """Cut the lists named `data` out of a JSON header.

    Args:
        header: UTF-8.
        most_texts: in one list, at most.

    Returns:
        The header with a placeholder for each list, for `put_back`; and the lists.

    Raises:
        WireError: if something else in the header is large, or a list does not end.
    """
    left: list[bytes] = []
    tensors: list[JsonTensor] = []
    at, room = 0, WHOLE_BYTES
    while True:
        match = _KEY.search(header, at, min(len(header), at + room + 1))
        end = len(header) if match is None else match.end()
        room -= end - at
        if room < 0:
            raise too_long("the request's JSON")
        left.append(bytes(header[at:end]))
        if match is None:
            return b"".join(left), tensors
        try:
            at, texts = _end_of_list(header, end, most_texts)
        except ValueError as error:
            raise WireError("the request's JSON cannot be read", str(error), "send 'data' as a list") from error
        left.append(msgspec.json.encode({_CUT: str(len(tensors))}))
        tensors.append(JsonTensor(header[end:at], [(start - end, stop - end) for start, stop in texts]))


def put_back(values: Sequence[Any], tensors: Sequence[JsonTensor]) -> list[Any]:
    """Replace placeholders by the lists that were cut out.

    Args:
        values: of all places where a list may have been.
        tensors: all that were cut out.

    Raises:
        WireError: if one was cut out in another place.
    """
    by_number = {str(number): tensor for number, tensor in enumerate(tensors)}

    def found(value: Any) -> Any:
        if not (isinstance(value, dict) and list(value) == [_CUT] and isinstance(value[_CUT], str)):
            return value
        return by_number.get(value[_CUT], value)

    back = list(map(found, values))
    if [value for value in back if isinstance(value, JsonTensor)] != list(tensors):
        raise WireError("the request's JSON has 'data' outside an input", "", "send it once for each input")
    return back


class JsonTensor:
    """A list in JSON, of numbers or of Base64.

    Args:
        text: from its first bracket to its last.
        texts: where its texts begin and end, quotes included.
    """

    def __init__(self, text: memoryview, texts: list[tuple[int, int]]) -> None:
        self._text = text
        self._texts = texts
        self.most = len(text) // 2

    def batches(self) -> Iterator[Sequence[int | float]]:
        """Its numbers, flat. Nested lists must have the same length at each depth."""
        if self._texts:
            raise ValueError("found something other than numbers")
        nesting = _Nesting()
        at, end, depth, total = 0, len(self._text), 0, 0
        while at < end:
            piece = bytes(self._text[at : at + pieces.PIECE_BYTES])
            last = at + len(piece) == end
            if not last:
                cut = piece.rfind(b",")
                if cut < 0:
                    raise ValueError(f"a value has more than {pieces.PIECE_BYTES} characters")
                piece = piece[:cut]
            at += len(piece) + 1
            inner = piece.strip(_SPACES)
            if not inner or (depth and inner[0] == _CLOSE) or (not last and inner[-1] == _OPEN):
                raise ValueError("a value is missing beside a comma")
            before = depth
            depth += inner.count(b"[") - inner.count(b"]")
            if depth > _DEEPEST or last != (depth == 0):
                raise ValueError("its lists are nested too deep" if depth > _DEEPEST else "its lists do not end")
            values = _flat(_numbers(b"[" * before + inner + b"]" * depth))
            nesting.add(inner if last else inner + b",", before)
            total += len(values)
            yield values
            pause()
        nesting.check(total)

    def texts(self) -> Sequence[Any]:
        """Its texts, read as Base64."""
        return self._elements(lambda inner: memoryview(_from_base64(inner)))

    def strings(self, longest: int) -> Sequence[Any]:
        """Its texts as they are.

        Args:
            longest: characters of one, as JSON writes them.
        """
        return self._elements(lambda inner: _string(inner, longest))

    def _elements(self, read: Callable[[memoryview], Any]) -> Sequence[Any]:
        plain, at = [], 0
        for start, stop in self._texts:
            plain.append(bytes(self._text[at:start]))
            at = stop
        plain.append(bytes(self._text[at:]))
        if sum(map(len, plain)) > WHOLE_BYTES + 64 * len(plain):
            raise ValueError("it has more spaces than text")
        if b"".join(plain).translate(None, _SPACES + _MARKS):
            raise ValueError("it is not a list of text")
        numbered = [part for number, before in enumerate(plain) for part in (before, b"%d" % number)]
        try:
            order = _decode(b"".join(numbered[:-1]))
        except (msgspec.DecodeError, RecursionError) as error:
            raise ValueError(str(error)) from error
        found = [read(self._text[start + 1 : stop - 1]) for start, stop in self._texts]
        rows = [[found[each] for each in row] if isinstance(row, list) else found[row] for row in order]
        return rows


def _end_of_list(header: memoryview, start: int, most_texts: int) -> tuple[int, list[tuple[int, int]]]:
    """Where the list that begins at `start` ends, and where its texts are."""
    texts: list[tuple[int, int]] = []
    at, depth, size = start, 0, pieces.PIECE_BYTES
    while at < len(header):
        piece = bytes(header[at : at + size])
        quote = piece.find(b'"')
        plain = piece if quote < 0 else piece[:quote]
        if plain:
            depths = np.cumsum(_STEPS[np.frombuffer(plain, np.uint8)], dtype=np.int64) + depth
            ends = np.flatnonzero(depths <= 0)
            if len(ends):
                return at + int(ends[0]) + 1, texts
            depth = int(depths[-1])
            if depth > _DEEPEST:
                raise ValueError("its lists are nested too deep")
            at += len(plain)
        if quote >= 0:
            if len(texts) == most_texts:
                raise ValueError(
                    f"it holds more than {most_texts} texts" if most_texts else "found something other than numbers"
                )
            stop = _end_of_text(header, at + 1)
            texts.append((at, stop))
            at, size = stop, _SMALL_BYTES
        else:
            size = min(2 * size, pieces.PIECE_BYTES)
        if quote < 0 or len(texts) % _TEXTS == 0:
            pause()
    raise ValueError("a list does not end")


def _end_of_text(header: memoryview, at: int) -> int:
    """Where a text ends, including its quote; `at` is the first character after the opening quote."""
    size = _SMALL_BYTES
    while at < len(header):
        piece = bytes(header[at : at + size])
        match = _TEXT.match(piece)
        assert match is not None  # the pattern matches nothing, too
        at += match.end()
        if match.end() < len(piece):
            if piece[match.end()] == ord('"'):
                return at + 1
            if at + 1 >= len(header):
                break  # a backslash stands at the end
        size = min(2 * size, pieces.PIECE_BYTES)
        if size == pieces.PIECE_BYTES:
            pause()
    raise ValueError("a text does not end")


def _numbers(text: bytes) -> Any:
    try:
        return _decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        if b"N" not in text and b"I" not in text:
            raise ValueError(str(error)) from error
    return with_literals(text)


def with_literals(text: bytes) -> Any:
    """JSON that may hold the literals `NaN`, `Infinity` and `-Infinity`.

    Raises:
        ValueError, RecursionError: if it is not JSON, or a number is beyond 64-bit floats.
    """
    # A number that overflows would become infinite; to check each number is slow, so only where one may overflow.
    exact = _finite if _MAY_OVERFLOW.search(text) else None
    return json.loads(text.decode(), parse_float=exact)


def _finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(f"the number {number[:40]} is too large")
    return value


def _flat(data: Any) -> list[int | float]:
    while (kinds := set(map(type, data))) == {list}:
        data = list(chain.from_iterable(data))
    if list in kinds:
        raise ValueError("its lists differ in length")
    if not kinds <= {int, float, bool}:
        raise ValueError("found something other than numbers")
    values: list[int | float] = data
    return values


class _Nesting:
    """Checks piece by piece that nested lists have the same length at each depth."""

    def __init__(self) -> None:
        self._lengths: dict[int, int] = {}
        self._lists: dict[int, int] = {}
        self._open: dict[int, int] = {}

    def add(self, piece: bytes, depth: int) -> None:
        """The next piece; `depth` lists are open where it begins."""
        marks = np.frombuffer(piece.translate(None, _NO_MARKS), np.uint8)
        if not len(marks):
            return
        after = np.cumsum(_STEPS[marks], dtype=np.int32) + depth
        closing = marks == _CLOSE
        level = after + closing  # of the list in which a comma stands, or which ends
        for each in range(int(level.min()), int(level.max()) + 1):
            here = level == each
            commas = np.cumsum(here & (marks == _COMMA))
            ends = commas[here & closing]
            before = self._open.get(each, 0)
            if len(ends):
                lengths = np.diff(ends, prepend=0) + 1
                lengths[0] += before
                expected = self._lengths.setdefault(each, int(lengths[0]))
                if (lengths != expected).any():
                    raise ValueError("its lists differ in length")
                self._lists[each] = self._lists.get(each, 0) + len(ends)
                before = -int(ends[-1])
            self._open[each] = before + int(commas[-1])

    def check(self, total: int) -> None:
        """Call this after the last piece, with the number of all numbers."""
        expected = 1
        for level in sorted(self._lists):
            if self._lists[level] != expected:
                raise ValueError("its lists differ in length")
            expected *= self._lengths[level]
        if total != expected:
            raise ValueError("its lists differ in length")


def _string(inner: memoryview, longest: int) -> str:
    if len(inner) > longest:
        limit = f"it has {len(inner)} characters, and up to {longest} are read"
        raise WireError("a text is too long", limit, "send a shorter one", status=413)
    try:
        text: str = _decode(b'"' + bytes(inner) + b'"')
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ValueError(str(error)) from error
    return text


def _from_base64(text: memoryview) -> bytearray:
    content, held = bytearray(), b""
    for at in range(0, len(text), pieces.PIECE_BYTES):
        piece = held + bytes(text[at : at + pieces.PIECE_BYTES])
        last = at + pieces.PIECE_BYTES >= len(text)
        held = b""
        if b"\\" in piece:
            if piece.endswith(b"\\") and not last:
                piece, held = piece[:-1], b"\\"
            piece = piece.replace(b"\\/", b"/")  # some encoders escape it
        usable = len(piece) if last else len(piece) - len(piece) % 4
        piece, held = piece[:usable], piece[usable:] + held
        try:
            content += binascii.a2b_base64(piece, strict_mode=True)
        except ValueError as error:
            raise _not_base64(error) from error
        if not last:
            if b"=" in piece:
                raise _not_base64(ValueError("Excess data after padding"))
            pause()
    return content


def _not_base64(error: ValueError) -> WireError:
    return WireError("a picture is not Base64", str(error), "send pictures in JSON as Base64")
