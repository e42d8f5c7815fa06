"""ONNX: a file, or a `ModelProto` in memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from rushhour.models.converted import checked_onnx, read_onnx
from rushhour.models.doors.door import Arrival, Opening
from rushhour.models.open_dimensions import open_dimensions

_IR_VERSION: Final = 0x08
"""The first byte of a model that any tool writes: the version of the form, a small number."""
_NEXT: Final = frozenset({0x12, 0x1A, 0x22, 0x28, 0x32, 0x3A, 0x42, 0x72, 0xA2, 0xCA})
"""The first bytes of the other fields of a model."""
_MOST_VERSIONS: Final = 0x20


class OnnxDoor:
    """Files that end in `.onnx` or begin as one, and objects of `onnx.ModelProto`."""

    takes = "an ONNX file or ModelProto"
    needs_example = False

    def recognises(self, model: Any) -> bool:
        """By its first bytes, or its type."""
        if not isinstance(model, Path):
            return type(model).__name__ == "ModelProto" and type(model).__module__.startswith("onnx")
        if model.is_dir():
            return False
        return model.suffix.lower() == ".onnx" or _begins_as_one(model)

    def open(self, model: Any, opening: Opening) -> Arrival:
        """Its own graph, checked."""
        graph = read_onnx(model) if isinstance(model, Path) else checked_onnx(model, opening.shown)
        dimensions = open_dimensions(graph, opening.shown, longest=opening.length, size=opening.size)
        return Arrival("onnx", graph, dimensions=dimensions)


def _begins_as_one(file: Path) -> bool:
    try:
        with file.open("rb") as opened:
            first = opened.read(3)
    except OSError:
        return False
    return len(first) == 3 and first[0] == _IR_VERSION and 0 < first[1] < _MOST_VERSIONS and first[2] in _NEXT
