"""`AnswerWriter`: the outputs of a model become an answer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import msgspec
import numpy as np

from rushhour.bundle import Signature, Sizes, TensorSpec
from rushhour.errors import WireError
from rushhour.wire.datatypes import DTYPES, datatype_of
from rushhour.wire.elements import bytes_tensor
from rushhour.wire.pieces import BYTES_AT_ONCE, pause
from rushhour.wire.request import Parts, Regions, Wanted, open_regions
from rushhour.wire.values import AT_ONCE, LIST, json_batches, json_list

MAX_CACHED_HEADERS = 256


class OutputTensor(NamedTuple):
    """One output of an answer.

    Attributes:
        texts: the values of a BYTES tensor for JSON, some at a time; None for any other.
        raw: its bytes; None if they were written to shared memory.
    """

    name: str
    datatype: str
    shape: list[int]
    texts: Iterator[list[str]] | None
    raw: memoryview | bytes | None


class AnswerWriter:
    """Writes the answers of one model.

    Args:
        model: its name, as answers repeat it.
        signature: its inputs and outputs.
        version: as answers repeat it.
        labels: the classes' names, where the model classifies.
        regions: the shared memory of clients; None where it is not used.
    """

    def __init__(
        self, model: str, signature: Signature, version: str, labels: tuple[str, ...], regions: Regions | None
    ) -> None:
        self.model = model
        self.version = version
        self.signature = signature
        self.labels = labels
        self._regions = regions
        self._values = tuple(math.prod(spec.shape) for spec in signature.outputs)
        self._answer_headers: dict[tuple[tuple[int, ...], int, Sizes, str], bytes] = {}
        self.id_at = len(msgspec.json.encode({"model_name": model, "model_version": version})) - 1
        """Where an id is inserted into the JSON header of an answer that has none."""

    def is_large_answer(self, wanted: Wanted, rows: int) -> bool:
        """Whether writing an answer takes long: then it must not be done on the event loop."""
        work = size = 0
        for number, position in enumerate(wanted.outputs):
            values = rows * self._values[position]
            if wanted.shapes:
                values = rows * math.prod(wanted.shapes[position])
            elif wanted.sizes:
                values = rows * math.prod(self.signature.shape(self.signature.outputs[position], wanted.sizes))
            if wanted.top and wanted.top[number]:
                work += values // 16 + 16 * rows * wanted.top[number]
            elif wanted.places and wanted.places[number] is not None:
                size += self.output_bytes(position, rows, wanted.sizes)
            elif not wanted.binary[number]:
                work += values
        return work > AT_ONCE or size > BYTES_AT_ONCE

    def check_json(self, wanted: Wanted) -> None:
        """Raise a `WireError` if JSON cannot hold an output, before anything is computed."""
        for number, position in enumerate(wanted.outputs):
            spec = self.signature.outputs[position]
            other = wanted.binary[number] or (wanted.top and wanted.top[number])
            if spec.dtype == "float16" and not other and not (wanted.places and wanted.places[number]):
                raise WireError(f"the output {spec.name!r} is FP16", "JSON cannot hold it", "request binary data")

    def encode(
        self, wanted: Wanted, rows: int, outputs: Sequence[memoryview], variant: str = ""
    ) -> tuple[int | None, Parts]:
        """Write an answer.

        Args:
            wanted: of the request.
            rows: samples in the answer.
            outputs: the raw rows of each of the signature's outputs, in its order.
            variant: that computed it, for the answer's parameters; empty for none.

        Returns:
            The length of the JSON header where raw bytes follow it (for `Inference-Header-Content-Length`), else
            None; and the parts of the body in order, some of them views of `outputs`.
        """
        if wanted.top or wanted.places or wanted.shapes or not all(wanted.binary):
            return self._encode_each(wanted, rows, outputs, variant)
        header = self._binary_header(wanted, rows, variant)
        return len(header), [header, *[outputs[position] for position in wanted.outputs]]

    def answer_header(self, wanted: Wanted, rows: int, variant: str = "") -> bytes | None:
        """The JSON header of an answer that continues with the outputs' raw rows in the signature's order.

        None for any other answer.
        """
        whole = wanted.outputs == tuple(range(len(self.signature.outputs))) and all(wanted.binary)
        return self._binary_header(wanted, rows, variant) if whole and not (wanted.top or wanted.places) else None

    def _binary_header(self, wanted: Wanted, rows: int, variant: str) -> bytes:
        key = (wanted.outputs, rows, wanted.sizes, variant)
        header = self._answer_headers.get(key)
        if header is None:
            described = [
                dict(zip(("name", "datatype", "shape"), self.describe(position, rows, wanted.sizes), strict=True))
                | {"parameters": {"binary_data_size": self.output_bytes(position, rows, wanted.sizes)}}
                for position in wanted.outputs
            ]
            header = self._answer("", described, variant)
            if len(self._answer_headers) >= MAX_CACHED_HEADERS:
                self._answer_headers.clear()
            self._answer_headers[key] = header
        if not wanted.id:
            return header
        return b'%b,"id":%b%b' % (header[: self.id_at], msgspec.json.encode(wanted.id), header[self.id_at :])

    def outputs(
        self, wanted: Wanted, rows: int, outputs: Sequence[memoryview], *, in_json: bool = False
    ) -> Iterator[OutputTensor]:
        """The outputs of an answer one by one, in the requested order; those for shared memory are written there.

        Args:
            wanted: of the request.
            rows: samples in the answer.
            outputs: the raw rows of each of the signature's outputs, in its order.
            in_json: texts that are not requested as bytes are for JSON.

        Raises:
            WireError: if a place in shared memory no longer exists, or is too small.
        """
        for number, position in enumerate(wanted.outputs):
            spec = self.signature.outputs[position]
            top = wanted.top[number] if wanted.top else 0
            place = wanted.places[number] if wanted.places else None
            described = (spec.name, "BYTES", [rows, top]) if top else self.describe(position, rows, wanted.sizes)
            if top and spec.places == "tokens":
                described = (spec.name, "BYTES", [rows, *self.signature.shape(spec, wanted.sizes)])
            if wanted.shapes and not top:
                described = (*described[:2], [rows, *wanted.shapes[position]])
            texts = self._named(spec, outputs[position], rows, top) if top else None
            if texts is not None and in_json and place is None and not wanted.binary[number]:
                yield OutputTensor(*described, texts, b"")
                continue
            raw = outputs[position] if texts is None else b"".join(map(bytes_tensor, texts))
            if place is not None:
                open_regions(self._regions).write(place, raw)
            yield OutputTensor(*described, None, raw if place is None else None)

    def _named(self, spec: TensorSpec, rows_of: memoryview, rows: int, top: int) -> Iterator[list[str]]:
        if spec.places == "tokens":
            return self._tags(spec, rows_of)
        return (self._found if spec.places == "boxes" else self._likeliest)(spec, rows_of, rows, top)

    def _tags(self, spec: TensorSpec, rows_of: memoryview) -> Iterator[list[str]]:
        """`index:label` of each token of each sample, in their order; of some at a time."""
        labels = np.frombuffer(rows_of, dtype=spec.dtype)
        names = [f"{index}:{label}" for index, label in enumerate(self.labels)]
        for first in range(0, len(labels), AT_ONCE):
            if first:
                pause()
            yield [names[label] for label in labels[first : first + AT_ONCE].tolist()]

    def _likeliest(self, spec: TensorSpec, rows_of: memoryview, rows: int, top: int) -> Iterator[list[str]]:
        """`value:index:label` of the `top` highest values of each sample, highest first; of some samples at a time."""
        values = np.frombuffer(rows_of, dtype=spec.dtype).reshape(rows, -1)
        form = "{}:{}:{}" if values.dtype.kind in "iu" else "{:f}:{}:{}"
        at_once = max(1, AT_ONCE // (16 * top + values.shape[1] // 16))
        for first in range(0, rows, at_once):
            if first:
                pause()
            some = values[first : first + at_once]
            order = np.argsort(-some.astype(np.float64), axis=1, kind="stable")[:, :top]
            yield [
                form.format(some[row, index], index, self.labels[index])
                for row, each in enumerate(order)
                for index in each
            ]

    def _found(self, spec: TensorSpec, rows_of: memoryview, rows: int, top: int) -> Iterator[list[str]]:
        """`score:index:label:x1:y1:x2:y2` of the first `top` boxes of each sample; empty where there is none."""
        for first in range(0, rows, some := max(1, AT_ONCE // (16 * top))):
            if first:
                pause()
            boxes = np.frombuffer(rows_of, dtype=spec.dtype).reshape(rows, *spec.shape)[first : first + some, :top]
            yield [
                f"{score:f}:{label:.0f}:{self.labels[int(label)] if label < len(self.labels) else ''}"
                f":{x1:.2f}:{y1:.2f}:{x2:.2f}:{y2:.2f}"
                if score > 0
                else ""
                for x1, y1, x2, y2, score, label in boxes.reshape(-1, 6).tolist()
            ]

    def _encode_each(
        self, wanted: Wanted, rows: int, outputs: Sequence[memoryview], variant: str
    ) -> tuple[int | None, Parts]:
        described: list[dict[str, Any]] = []
        blobs: list[bytes | memoryview] = []
        lists: list[list[bytes]] = []
        for output, binary in zip(self.outputs(wanted, rows, outputs, in_json=True), wanted.binary, strict=True):
            entry: dict[str, Any] = {"name": output.name, "datatype": output.datatype, "shape": output.shape}
            if output.raw is None:
                pass  # it is in shared memory
            elif binary:
                blobs.append(output.raw)
                entry["parameters"] = {"binary_data_size": len(blobs[-1])}
            elif output.texts is not None:
                entry["data"] = json_list(output.texts, lists)
            else:
                values = np.frombuffer(output.raw, dtype=DTYPES[output.datatype])
                entry["data"] = json_list(json_batches(values), lists)
            described.append(entry)
        header = self._answer(wanted.id, described, variant)
        parts = [header]
        for content in lists:
            before, _, after = parts.pop().partition(LIST)
            parts += [before, *content, after]
        return (sum(map(len, parts)) if blobs else None), [*parts, *blobs]

    def _answer(self, identity: str, described: list[dict[str, Any]], variant: str) -> bytes:
        answer: dict[str, Any] = {"model_name": self.model, "model_version": self.version}
        if identity:
            answer["id"] = identity
        if variant:
            answer["parameters"] = {"variant": variant}
        return msgspec.json.encode(answer | {"outputs": described})

    def describe(self, position: int, rows: int, sizes: Sizes = ()) -> tuple[str, str, list[int]]:
        """The name, datatype and shape of an output in an answer of so many samples, of these sizes."""
        spec = self.signature.outputs[position]
        return spec.name, datatype_of(spec), [rows, *self.signature.shape(spec, sizes)]

    def output_bytes(self, position: int, rows: int, sizes: Sizes = ()) -> int:
        """Bytes of an output in an answer of so many samples, of these sizes."""
        return rows * self.signature.row_bytes(self.signature.outputs[position], sizes)
