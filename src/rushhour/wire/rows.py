"""Rows of named values over HTTP: what their requests and answers mean, and their bytes. No I/O here.

The rows of a request become a `RowsRequest`; a server makes samples of them as the bundle's table says, and they are
queued and batched as any other. Answers are in words: the name of a class, values by the names of the targets.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

import msgspec
import numpy as np

from rushhour.errors import WireError
from rushhour.wire.codec import Codec
from rushhour.wire.header import shown
from rushhour.wire.layouts import is_size
from rushhour.wire.pieces import pause
from rushhour.wire.request import Body, Encoded, Parts, PictureRequest, Wanted

ROWS: Final = "rows"
"""The last part of the path that takes rows."""
MAX_ROW_BYTES: Final = 2**16
"""Of one row in JSON."""
_MAX_BYTES: Final = 8 * 2**20
_AT_ONCE: Final = 64
"""Rows of an answer that are written before other threads may run."""
_TOP: Final = 5
"""Classes of an answer that are named with their probability."""

_decode_row = msgspec.json.Decoder(dict[str, str | int | float | bool | None]).decode


class RowsRequest(PictureRequest):
    """Rows that become samples, and whose answers are wanted in words.

    Args:
        rows: each as JSON.
        shared: columns that all rows have, beside their own.
        codec: of the model.
        wanted: the request's id and limits.
    """

    __slots__ = ("_codec", "shared")

    def __init__(self, rows: Sequence[Encoded], shared: dict[str, Any], codec: Codec, wanted: Wanted) -> None:
        super().__init__(rows, wanted)
        self.shared = shared
        self._codec = codec

    @property
    def is_large(self) -> bool:
        """Whether writing the answer takes long: then it must not be done on the event loop."""
        return self.rows > _AT_ONCE

    def encode(self, outputs: Sequence[memoryview]) -> Parts:
        """The answer's parts, in order.

        Args:
            outputs: the raw rows of each of the model's outputs; the first is the answer.
        """
        codec = self._codec
        values = np.frombuffer(outputs[0], codec.signature.outputs[0].dtype).reshape(self.rows, -1)
        begin: dict[str, Any] = {"model_name": codec.model, "model_version": codec.version}
        if self.wanted.id:
            begin["id"] = self.wanted.id
        parts: Parts = [msgspec.json.encode(begin)[:-1], b',"answers":[']
        for first in range(0, self.rows, _AT_ONCE):
            if first:
                pause()
                parts.append(b",")
            some = values[first : first + _AT_ONCE].astype(np.float64).tolist()
            parts.append(msgspec.json.encode([self._in_words(each) for each in some])[1:-1])
        parts.append(b"]}")
        return parts

    def _in_words(self, values: list[float]) -> dict[str, Any]:
        kind, names = self._codec.kind, self._codec.labels or self._codec.targets
        if kind == "classification" and len(names) == len(values):
            order = sorted(range(len(values)), key=lambda place: -values[place])[:_TOP]
            likely = {names[place]: round(values[place], 6) for place in order}
            return {"class": names[order[0]], "probability": round(values[order[0]], 6), "probabilities": likely}
        if kind == "multilabel" and len(names) == len(values):
            chances = {name: round(value, 6) for name, value in zip(names, values, strict=True)}
            return {"labels": [name for name, value in chances.items() if value >= 0.5], "probabilities": chances}
        if kind == "ranking":
            return {"score": round(values[0], 6)}
        plain = [float(f"{value:.7g}") for value in values]
        if len(names) == len(values):
            return {"values": dict(zip(names, plain, strict=True))}
        return {"values": plain}


class _Described(msgspec.Struct, forbid_unknown_fields=True):
    rows: list[msgspec.Raw]
    shared: dict[str, str | int | float | bool | None] = {}
    id: str | None = None
    parameters: dict[str, Any] | None = None


def decode_rows(codec: Codec, body: Body) -> RowsRequest:
    """Read a request of rows.

    Args:
        codec: of a model that takes them.
        body: JSON: `rows`, a list of objects; and where wanted `shared`, columns that all of them have, `id`, and
            `parameters` with `timeout` in microseconds and `priority`.

    Raises:
        WireError: if it is not valid. Rows are read later.
    """
    if len(body) > _MAX_BYTES:
        limit = f"the body has {len(body)} bytes, and the limit is {_MAX_BYTES}"
        raise WireError("the request is too large", limit, "send fewer rows, or 'shared' columns once", status=413)
    try:
        described = msgspec.json.decode(body, type=_Described)
        identity = described.id or ""
        identity.encode()  # it is echoed: half of a surrogate pair could not be
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        fix = 'send {"rows": [{"column": value, ...}, ...]}'
        raise WireError("the request's JSON cannot be read", str(error), fix) from error
    most, count = codec.elements, len(described.rows)
    if not 1 <= count <= most:
        raise WireError(
            f"the request has {count} rows",
            f"a request has 1 to {most}",
            "split it into several",
            status=413 if count else 400,
        )
    parameters = described.parameters or {}
    timeout, priority = parameters.get("timeout"), parameters.get("priority") or 0
    if not (timeout is None or is_size(timeout)) or not is_size(priority):
        raise WireError(
            f"the parameters are {shown(parameters)}",
            "timeout is a whole number of microseconds, priority one from 1, the highest",
            "send these, or leave them out",
        )
    every = tuple(range(len(codec.signature.outputs)))
    wanted = Wanted(
        id=identity,
        outputs=every,
        binary=(True,) * len(every),
        timeout_s=timeout / 1e6 if timeout else None,
        priority=priority,
    )
    return RowsRequest([memoryview(raw) for raw in described.rows], described.shared, codec, wanted)


def row_of_json(row: Encoded, number: int) -> dict[str, Any]:
    """A row that was sent as a JSON object.

    Args:
        row: as it was sent.
        number: of it in its request, from 1, for errors.

    Raises:
        WireError: if it is none.
    """
    if len(row) > MAX_ROW_BYTES:
        limit = f"it has {len(row)} bytes, and the limit is {MAX_ROW_BYTES}"
        raise WireError(f"row {number} is too long", limit, "send only the columns of the model", status=413)
    try:
        return _decode_row(row)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise WireError(
            f"row {number} cannot be read", str(error), "send an object of numbers, texts, true, false or null"
        ) from error
