"""The graph of a Keras model file, made in another process.

Where this process has imported Keras with another backend, it cannot be exported here: the backend is chosen once.
`python -m rushhour.models.doors.keras.child` reads one line of JSON and writes the graph to a file.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import msgspec
import onnx

from rushhour.errors import ModelError, RushhourError
from rushhour.models.converted import read_onnx
from rushhour.models.doors.door import Opening
from rushhour.models.doors.keras.exporting import graph_of, inputs_of
from rushhour.models.doors.keras.files import describe
from rushhour.models.doors.keras.loading import load

_TIMEOUT_S: Final = 1800
_REFUSED: Final = 2


class _Order(msgspec.Struct, frozen=True):
    """What the child does: the file, the graph's place, and the attributes of `Opening`."""

    file: str
    out: str
    name: str
    shown: str
    size: tuple[int, int] | None
    length: int | None


def graph_from_child(file: Path, opening: Opening, folder: Path) -> onnx.ModelProto:
    """The graph of a file.

    Args:
        file: that `describe` has checked.
        opening: as of the door.
        folder: for the graph.

    Raises:
        ModelError: as `load` and `graph_of`.
    """
    out = folder / "graph.onnx"
    order = _Order(str(file), str(out), opening.name, opening.shown, opening.size, opening.length)
    done = subprocess.run(
        [sys.executable, "-m", __name__],
        input=msgspec.json.encode(order),
        capture_output=True,
        timeout=_TIMEOUT_S,
        env={**os.environ, "KERAS_BACKEND": "torch"},
    )
    if done.returncode == _REFUSED:
        raise ModelError(*msgspec.json.decode(done.stdout.splitlines()[-1], type=tuple[str, str, str]))
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"]
        raise ModelError(
            f"cannot export {opening.shown}", said[-1][:300], "set KERAS_BACKEND=torch before Keras is imported"
        )
    return read_onnx(out)


def main() -> int:
    """The child itself."""
    order = msgspec.json.decode(sys.stdin.buffer.read(), type=_Order)
    opening = Opening(order.name, order.shown, size=order.size, length=order.length)
    try:
        file = Path(order.file)
        model = load(file, describe(file))
        from rushhour.models.doors.keras.loading import keras_module

        keras = keras_module()
        onnx.save(graph_of(keras, model, inputs_of(keras, model, opening), opening), order.out)
    except RushhourError as error:
        print(msgspec.json.encode((error.what, error.why, error.fix)).decode())
        return _REFUSED
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
