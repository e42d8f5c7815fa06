"""The JSON header of a request: its fields, its id, and literals that JSON does not have."""

from __future__ import annotations

import re
import reprlib
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from rushhour.wire.json_pieces import with_literals

HEADER_LENGTH = "Inference-Header-Content-Length"
_ID_KEY = re.compile(rb'"id"[ \t\r\n]*:')
_ID = re.compile(rb'"id"[ \t\r\n]*:[ \t\r\n]*"([^"\\\x00-\x1f]+)"')

if TYPE_CHECKING:
    _Parameters = dict[str, Any]
    _Text = str
else:  # null is read as absent, once, by `__post_init__`: the types of a header do not show it
    _Parameters = dict[str, Any] | None
    _Text = str | None

_T = TypeVar("_T")

_shorten = reprlib.Repr()
_shorten.maxstring = _shorten.maxother = 100
_shorten.maxlist = 12
shown = _shorten.repr
"""`repr` of what a client sent, shortened: an error does not repeat megabytes."""


class InputHeader(msgspec.Struct):
    """The description of an input in a request. Nothing is checked yet.

    Attributes:
        data: the tensor's values, flat or nested; None where they are not in the header.
        parameters: `binary_data_size` where its bytes follow the header, `shared_memory_region` and so on where they
            are in shared memory.
    """

    name: str
    datatype: str
    shape: list[int]
    data: Any = None
    parameters: _Parameters = {}

    def __post_init__(self) -> None:
        self.parameters = _without_null(self.parameters)


class OutputHeader(msgspec.Struct):
    """The description of a requested output."""

    name: str
    parameters: _Parameters = {}

    def __post_init__(self) -> None:
        self.parameters = _without_null(self.parameters)


if TYPE_CHECKING:
    _Outputs = list[OutputHeader]
else:
    _Outputs = list[OutputHeader] | None


class RequestHeader(msgspec.Struct):
    """The header of a request. Nothing is checked yet."""

    inputs: list[InputHeader]
    outputs: _Outputs = []
    id: _Text = ""
    parameters: _Parameters = {}

    def __post_init__(self) -> None:
        self.outputs, self.id = self.outputs or [], self.id or ""
        self.parameters = _without_null(self.parameters)


def _without_null(parameters: dict[str, Any] | None) -> dict[str, Any]:
    if parameters is None:
        return {}
    if None in parameters.values():
        return {name: value for name, value in parameters.items() if value is not None}
    return parameters


request_decoder = msgspec.json.Decoder(RequestHeader)


def parsed(text: bytes, decoder: msgspec.json.Decoder[_T]) -> _T:
    """JSON that may hold the literals `NaN`, `Infinity` and `-Infinity`.

    Raises:
        msgspec.DecodeError, ValueError, RecursionError: if it is not JSON, or not of the decoder's type, or a number
            is beyond 64-bit floats.
    """
    try:
        return decoder.decode(text)
    except msgspec.DecodeError:
        if b"NaN" not in text and b"Infinity" not in text:
            raise
    converted: _T = msgspec.convert(with_literals(text), decoder.type)
    return converted


def without_id(header: bytes) -> tuple[bytes, str]:
    """A JSON header with an empty id, and its id; unchanged and without one if it is not clear which text is the id."""
    key = _ID_KEY.search(header)
    match = None if key is None else _ID.match(header, key.start())
    if match is None or b"\\" in header or _ID_KEY.search(header, match.end()):
        return header, ""
    start, stop = match.span(1)
    try:
        return header[:start] + header[stop:], header[start:stop].decode()
    except UnicodeDecodeError:
        return header, ""


def id_span(header: bytes) -> tuple[int, int]:
    """Where the id begins and ends in a JSON header for which `without_id` finds one."""
    match = _ID.search(header)
    assert match is not None
    return match.span(1)
