"""`HeaderReader`: a request's header is checked against the model, and becomes a layout."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Final, TypeGuard

import numpy as np

from rushhour.bundle import Signature, Sizes
from rushhour.errors import WireError
from rushhour.wire.datatypes import datatype_of
from rushhour.wire.elements import from_elements
from rushhour.wire.header import InputHeader, OutputHeader, RequestHeader, shown
from rushhour.wire.json_pieces import JsonTensor
from rushhour.wire.pieces import assembled
from rushhour.wire.protobuf_pieces import Packed, Texts
from rushhour.wire.request import Layout, Place, Regions, Wanted, open_regions
from rushhour.wire.values import converted, converted_batch, flat

TEXT: Final = "text"
"""The name of the input that texts are sent as."""
ROW: Final = "row"
"""The same of rows of named values, each as JSON."""


class HeaderReader:
    """Reads the headers of requests for one model.

    Args:
        model: its name, for errors.
        signature: its inputs and outputs.
        max_rows: samples in one request, at most.
        labels: the classes' names, where the model classifies.
        regions: the shared memory of clients; None where it is not used.
        pictures: encoded pictures in one request, at most; 0 where the model takes none.
        texts: texts in one request, likewise.
        rows: rows of named values in one request, likewise.
    """

    def __init__(
        self,
        model: str,
        signature: Signature,
        max_rows: int,
        labels: tuple[str, ...],
        regions: Regions | None,
        pictures: int,
        texts: int = 0,
        rows: int = 0,
    ) -> None:
        self.model = model
        self.signature = signature
        self.max_rows = max_rows
        self.labels = labels
        self._pictures = pictures
        self._texts = texts or rows
        self._item = TEXT if texts else ROW
        self._regions = regions
        self._inputs = {spec.name: position for position, spec in enumerate(signature.inputs)}
        self._outputs = {spec.name: position for position, spec in enumerate(signature.outputs)}
        self._bounded = any(isinstance(spec.below, int) for spec in signature.inputs)

    def arrange(self, header: RequestHeader) -> Layout:
        """Check a header and return its layout.

        Raises:
            WireError: if it is not a valid request for this model.
        """
        by_position = self._match_inputs(header.inputs)
        rows = self._rows_of(by_position)
        sizes = self._sizes_of(by_position)
        layout = Layout(rows, self._wanted(header, rows, sizes))
        layout.checked = self._bounded
        for position, entry in by_position.items():
            layout.encoded = entry.datatype == "BYTES"
            size = None if layout.encoded else rows * self.signature.row_bytes(self.signature.inputs[position], sizes)
            stated, place = entry.parameters.get("binary_data_size"), self._place(entry, size)
            given = (stated, entry.data, place).count(None)
            if given != 2:
                raise WireError(
                    f"the input {entry.name!r} has {'no data' if given == 3 else 'data twice'}",
                    "an input has 'data', or the parameter 'binary_data_size', or 'shared_memory_region'",
                    "send exactly one of them",
                )
            if place is not None:
                layout.places[position] = place
            elif stated is None and size is None:
                layout.pictures = from_elements(entry, of_texts=bool(self._texts))
            elif stated is None:
                layout.inline[position] = self._from_values(entry, position)
            elif not is_size(stated) or size not in (None, stated):
                has = f"{stated} bytes" if is_size(stated) else f"binary_data_size {shown(stated)}"
                raise WireError(
                    f"the input {entry.name!r} has {has}",
                    f"shape {entry.shape} of {entry.datatype} is {size or 'any number of'} bytes",
                    "send the tensor's exact size",
                )
            else:
                layout.slices[position] = (layout.total, layout.total + stated)
                layout.total += stated
        return layout.finish()

    def _place(self, entry: InputHeader | OutputHeader, size: int | None = None) -> Place | None:
        """The place in shared memory that an input or output names, if any; `size` is what it must have."""
        region = entry.parameters.get("shared_memory_region")
        if region is None:
            return None
        open_regions(self._regions)
        offset = entry.parameters.get("shared_memory_offset", 0)
        byte_size = entry.parameters.get("shared_memory_byte_size")
        if not (isinstance(region, str) and is_size(offset) and is_size(byte_size)):
            raise WireError(
                f"the place of {shown(entry.name)} in shared memory is not valid",
                f"region {shown(region)}, offset {shown(offset)}, byte size {shown(byte_size)}",
                "send shared_memory_region, shared_memory_byte_size and, if it is not 0, shared_memory_offset",
            )
        if size is not None and byte_size != size:
            raise WireError(
                f"the input {entry.name!r} has shared_memory_byte_size {byte_size}",
                f"a tensor of its shape and type is {size} bytes",
                "send the tensor's exact size",
            )
        return Place(region, offset, byte_size)

    def _match_inputs(self, inputs: list[InputHeader]) -> dict[int, InputHeader]:
        """Position -> input; every input of the model exactly once, with its type and shape; texts stand for all."""
        found: dict[int, InputHeader] = {}
        if self._texts and len(inputs) == 1 and inputs[0].name == self._item and inputs[0].datatype == "BYTES":
            self._check_encoded(inputs[0], f"{self._item}s", self._texts)
            return {0: inputs[0]}
        for entry in inputs:
            position = self._inputs.get(entry.name)
            if position is None or position in found:
                raise WireError(
                    f"the input {shown(entry.name)} is {'unknown' if position is None else 'given twice'}",
                    f"{self.model} takes {', '.join(self._inputs)}{self._or_text}",
                    f"see GET v2/models/{self.model}",
                )
            spec = self.signature.inputs[position]
            if entry.datatype == "BYTES" and self._pictures:
                self._check_encoded(entry, "encoded pictures", self._pictures)
            elif entry.datatype != datatype_of(spec):
                raise WireError(
                    f"the input {entry.name!r} has datatype {shown(entry.datatype)}",
                    f"{self.model} takes {datatype_of(spec)}",
                    "convert it, or send another input",
                )
            elif not entry.shape or not self.signature.takes(spec, entry.shape[1:]):
                raise WireError(
                    f"the input {entry.name!r} has shape {shown(entry.shape)}",
                    f"{self.model} takes {self.signature.described(spec)}, where -1 is the number of samples",
                    "send that shape",
                )
            found[position] = entry
        for name, position in self._inputs.items():
            if position not in found:
                raise WireError(
                    f"the input {name!r} is missing",
                    f"{self.model} takes {', '.join(self._inputs)}{self._or_text}",
                    f"see GET v2/models/{self.model}",
                )
        return found

    def _sizes_of(self, inputs: Mapping[int, InputHeader]) -> Sizes:
        """The sizes of the open dimensions in a request; empty while its texts or pictures are encoded.

        Raises:
            WireError: if inputs that share one differ in it.
        """
        found: list[int] = []
        for dimension in self.signature.dimensions:
            sizes = {
                entry.name: entry.shape[1 + dimension.axes[entry.name]]
                for entry in inputs.values()
                if entry.name in dimension.axes and entry.datatype != "BYTES"
            }
            if not sizes:
                return ()
            if len(set(sizes.values())) > 1:
                raise WireError(
                    f"the inputs differ in {dimension.name}",
                    ", ".join(f"{name!r} has {size}" for name, size in sizes.items()),
                    f"send all with the same {dimension.name}, padded in a request of several samples",
                )
            found.append(next(iter(sizes.values())))
        return tuple(found)

    def _rows_of(self, inputs: Mapping[int, InputHeader]) -> int:
        counts = {entry.shape[0] for entry in inputs.values()}
        if len(counts) != 1:
            raise WireError(
                f"the inputs have {sorted(counts)} samples",
                "all inputs of a request must have the same number",
                "send the same number",
            )
        (rows,) = counts
        self.check_rows(rows)
        return rows

    def check_rows(self, rows: int) -> None:
        """Raise a `WireError` if a request may not have this number of samples."""
        if not 1 <= rows <= self.max_rows:
            raise WireError(
                f"the request has {rows} samples", f"a request has 1 to {self.max_rows}", "split it into several"
            )

    @property
    def _or_text(self) -> str:
        return f", or {self._item} (BYTES) alone" if self._texts else ""

    def _check_encoded(self, entry: InputHeader, what: str, most: int) -> None:
        """Raise a `WireError` unless these are no more pictures or texts than a request may have."""
        if len(entry.shape) not in (1, 2) or entry.shape[1:] not in ([], [1]):
            raise WireError(
                f"the input {entry.name!r} has shape {shown(entry.shape)}",
                f"{what} have [-1] or [-1, 1], where -1 is their number",
                "send that shape",
            )
        if entry.shape[0] > most:
            what = what.rpartition(" ")[2]
            raise WireError(
                f"the request has {entry.shape[0]} {what}",
                f"decoded, {most} of them have the largest size of a request",
                "split it into several",
                status=413,
            )

    def _from_values(self, entry: InputHeader, position: int) -> memoryview:
        spec = self.signature.inputs[position]
        count = math.prod(entry.shape)
        try:
            if isinstance(entry.data, JsonTensor | Packed | Texts):
                array = assembled(entry.data, count, spec.dtype, partial(converted_batch, spec))
                return array.reshape(-1).view(np.uint8).data
            values = flat(entry.data, spec)
            if len(values) != count:
                raise ValueError(f"found {len(values)} values for shape {entry.shape}")
            array = converted(spec, values)
        except (ValueError, TypeError, OverflowError, FloatingPointError) as error:
            raise WireError(
                f"the data of the input {entry.name!r} cannot be read",
                str(error),
                f"send {math.prod(entry.shape)} numbers of type {datatype_of(spec)}, flat or nested",
            ) from error
        return memoryview(array.tobytes())

    def _wanted(self, header: RequestHeader, rows: int, sizes: Sizes) -> Wanted:
        all_binary = _truth(header.parameters, "binary_data_output", default=False)
        asked = header.outputs or [OutputHeader(name) for name in self._outputs]
        positions: list[int] = []
        binary, top = [], []
        places: list[Place | None] = []
        for output in asked:
            position = self._outputs.get(output.name)
            if position is None or position in positions:
                raise WireError(
                    f"the output {shown(output.name)} is {'unknown' if position is None else 'given twice'}",
                    f"{self.model} gives {', '.join(self._outputs)}",
                    f"see GET v2/models/{self.model}",
                )
            positions.append(position)
            binary.append(_truth(output.parameters, "binary_data", default=all_binary))
            top.append(self._top(output, position))
            size = rows * self.signature.row_bytes(self.signature.outputs[position], sizes)
            place = self._place(output)
            if place is not None and not top[-1] and size > place.byte_size:
                raise WireError(
                    f"the output {output.name!r} does not fit into its shared memory",
                    f"it has {size} bytes, and shared_memory_byte_size is {place.byte_size}",
                    "give it a larger place",
                )
            places.append(place)
        timeout, priority = header.parameters.get("timeout"), header.parameters.get("priority", 0)
        if timeout is not None and not is_size(timeout):
            raise WireError(
                f"the timeout is {shown(timeout)}", "it is a whole number of microseconds", "send 0 or more"
            )
        if not is_size(priority):
            raise WireError(f"the priority is {shown(priority)}", "1 is the highest, larger is lower", "send 0 or more")
        return Wanted(
            id=header.id,
            outputs=tuple(positions),
            binary=tuple(binary),
            timeout_s=timeout / 1e6 if timeout else None,
            priority=priority,
            top=tuple(top) if any(top) else (),
            places=tuple(places) if any(places) else (),
            sizes=sizes,
        )

    def _top(self, output: OutputHeader, position: int) -> int:
        """How many classes of an output are wanted as text."""
        asked, spec = output.parameters.get("classification", 0), self.signature.outputs[position]
        if not is_size(asked):
            raise WireError(
                f"the output {output.name!r} asks for classification {shown(asked)}",
                "it is a number of classes",
                "send a whole number, 0 for the tensor itself",
            )
        if spec.places == "boxes":
            return min(asked, spec.shape[0])
        if spec.places == "tokens" and self.labels:
            return min(asked, 1)
        if asked and (math.prod(spec.shape) != len(self.labels) or spec.name in self.signature.open_axes):
            raise WireError(
                f"the output {output.name!r} asks for classification",
                f"it has no class labels in {self.model}",
                "request the tensor itself",
            )
        return min(asked, len(self.labels))


def _truth(parameters: Mapping[str, object], name: str, *, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise WireError(f"the parameter {name} is {shown(value)}", "it is true or false", "send one of them")
    return value


def is_size(value: object) -> TypeGuard[int]:
    """Whether a value from JSON is a whole number that fits into 63 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
