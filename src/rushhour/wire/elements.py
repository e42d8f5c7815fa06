"""BYTES tensors, and the encoded pictures and the texts in them."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any

from rushhour.errors import WireError
from rushhour.wire.header import InputHeader
from rushhour.wire.json_pieces import JsonTensor
from rushhour.wire.pieces import BYTES_AT_ONCE, pause
from rushhour.wire.protobuf_pieces import Packed, Texts
from rushhour.wire.request import Encoded

MAX_PICTURE_BYTES = 16 * 2**20
"""Of an encoded picture: larger than camera files."""
MAX_TEXT_BYTES = 2**16
"""Of a text: many times what the models of the field read."""


def bytes_tensor(words: Sequence[str]) -> bytes:
    """A BYTES tensor as bytes: each element's length in four bytes, then the element."""
    return b"".join(len(word).to_bytes(4, "little") + word for word in map(str.encode, words))


def elements_of(content: memoryview, number: int) -> list[memoryview]:
    """The elements of a BYTES tensor, as `bytes_tensor` writes them; views, not copies."""
    found: list[memoryview] = []
    at, end = 0, len(content)
    while at + 4 <= end and len(found) < number:
        stop = at + 4 + int.from_bytes(content[at : at + 4], "little")
        if stop > end:
            break
        found.append(content[at + 4 : stop])
        at = stop
    if at != end or len(found) != number:
        raise WireError(
            f"the BYTES tensor holds {len(found)} complete elements in {at} of its {end} bytes",
            f"its shape says {number}",
            "send each element's length in four bytes, little-endian, and then the element",
        )
    return found


def from_elements(entry: InputHeader, *, of_texts: bool = False) -> Sequence[Encoded]:
    """The pictures or texts in a header: in JSON pictures as Base64 and texts as they are; over gRPC both as bytes."""
    data, fix = entry.data, "send texts" if of_texts else "send pictures in Base64"
    if isinstance(data, JsonTensor | Packed | Texts):
        try:
            data = _elements(data, of_texts)
        except ValueError as error:
            raise WireError(f"the data of the input {entry.name!r} cannot be read", str(error), fix) from error
    if len(entry.shape) == 2 and isinstance(data, list) and all(isinstance(row, list) for row in data):
        data = [element for row in data for element in row]
    if not isinstance(data, list) or not all(isinstance(element, str | bytes | memoryview) for element in data):
        raise WireError(f"the data of the input {entry.name!r} cannot be read", "it is not a list of text", fix)
    if len(data) != entry.shape[0]:
        raise WireError(
            f"the data of the input {entry.name!r} has {len(data)} elements",
            f"its shape is {entry.shape}",
            f"send one element for each {'text' if of_texts else 'picture'}",
        )
    return [memoryview(element) if isinstance(element, bytes) else element for element in data]


def _elements(tensor: JsonTensor | Packed | Texts, of_texts: bool) -> Sequence[Any]:
    if of_texts and isinstance(tensor, JsonTensor):
        return tensor.strings(6 * MAX_TEXT_BYTES)  # JSON may write a byte in six characters
    return tensor.texts()


def text_of(text: Encoded, number: int) -> str:
    """A text that was sent as text or as UTF-8.

    Args:
        text: as it was sent.
        number: of it in its request, from 1, for errors.

    Raises:
        WireError: if it is too long, or no UTF-8.
    """
    if len(text) > MAX_TEXT_BYTES:
        limit = f"it has {len(text)} bytes, and the limit is {MAX_TEXT_BYTES}"
        raise WireError(f"text {number} is too long", limit, "send a shorter one", status=413)
    try:
        if isinstance(text, str):
            text.encode()  # half of a surrogate pair has no bytes
            return text
        return str(text, "utf-8")
    except UnicodeError as error:
        raise WireError(f"text {number} is not UTF-8", str(error), "send text in UTF-8") from error


def content_of(picture: Encoded) -> bytes:
    """The bytes of a picture that was sent as bytes or as Base64.

    Raises:
        WireError: if it is text, but not Base64.
    """
    if len(picture) > MAX_PICTURE_BYTES:
        limit = f"the limit is {MAX_PICTURE_BYTES} bytes, encoded"
        raise WireError(f"a picture of {len(picture)} bytes is too large", limit, "send a smaller one", status=413)
    if not isinstance(picture, str):
        whole = io.BytesIO()
        for at in range(0, len(picture), BYTES_AT_ONCE):
            if at:
                pause()
            whole.write(picture[at : at + BYTES_AT_ONCE])
        return whole.getvalue()
    try:
        return base64.b64decode(picture, validate=True)
    except ValueError as error:
        raise WireError("a picture is not Base64", str(error), "send pictures in JSON as Base64") from error
