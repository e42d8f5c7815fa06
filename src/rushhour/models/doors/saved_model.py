"""TensorFlow's SavedModel: converted by tf2onnx in a Python that the user names, and checked by OpenVINO's reader.

TensorFlow takes 1.6 GB and is no dependency. OpenVINO reads a SavedModel without it, and without running it, but writes
no ONNX: its answers are the check of what tf2onnx made.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from numpy.typing import NDArray

from rushhour.bundle import Preprocessing
from rushhour.errors import InstallError, ModelError
from rushhour.models.converted import read_onnx
from rushhour.models.doors.door import Answers, Arrival, Opening
from rushhour.models.doors.scaling import own_scaling
from rushhour.models.failure import why_failed
from rushhour.system.telemetry import disable_telemetry

_GRAPH: Final = "saved_model.pb"
_OPSET: Final = 18
_OURS: Final = ("PYTHONPATH", "PYTHONHOME", "KERAS_BACKEND")
"""Variables that are for this Python: the other one has packages of its own."""
_TIMEOUT_S: Final = 1800
_RUNS: Final = "TensorFlow runs it when it reads it, and its operators can read and write files"
_EXACT: Final = {"INFERENCE_PRECISION_HINT": "f32"}
"""OpenVINO computes in bfloat16 where the processor can."""
_VENV: Final = "`python -m venv tf && tf/bin/pip install tensorflow-cpu tf2onnx`"


class SavedModelDoor:
    """Folders with a `saved_model.pb`."""

    takes = "a SavedModel folder of TensorFlow"
    needs_example = False

    def recognises(self, model: Any) -> bool:
        """By the file of its graph."""
        return isinstance(model, Path) and (model / _GRAPH).is_file()

    def open(self, model: Any, opening: Opening) -> Arrival:
        """The graph that tf2onnx makes of its signature `serving_default`."""
        if opening.python is None:
            raise ModelError(
                f"cannot import {opening.shown} without TensorFlow",
                "a SavedModel becomes a graph by tf2onnx, which needs it",
                f"give --tensorflow-python PYTHON --trust {opening.shown}, with a Python of its own ({_VENV}); or load "
                "it in Keras and save it as .keras",
            )
        opening.require_trust(_RUNS)
        answers = _answers(model, opening.shown)
        with tempfile.TemporaryDirectory(prefix="rushhour-") as folder:
            graph = _converted(model, opening.python, Path(folder), opening.shown)
        scaling = own_scaling(graph, opening.name)
        return Arrival(
            "savedmodel",
            graph,
            origin="TensorFlow SavedModel",
            answers=answers,
            preprocessing=Preprocessing() if scaling else None,
            preprocessing_from=f"the model scales its samples itself: {scaling}" if scaling else "",
            notes=("its answers are compared with those of OpenVINO, which reads it without TensorFlow",),
        )


def _converted(model: Path, python: Path, folder: Path, shown: str) -> onnx.ModelProto:
    """What tf2onnx makes, in a process of its own whose working folder is empty."""
    out = folder / "graph.onnx"
    command = [os.path.abspath(python), "-m", "tf2onnx.convert", "--saved-model", os.path.abspath(model)]
    command += ["--output", str(out), "--opset", str(_OPSET)]
    kept = {name: value for name, value in os.environ.items() if name not in _OURS}
    environment = {**kept, "TF_CPP_MIN_LOG_LEVEL": "2", "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, cwd=folder, env=environment)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InstallError(f"cannot run {python}", why_failed(error), f"make one by {_VENV}") from error
    if done.returncode or not out.is_file():
        lines = [line for line in done.stderr.decode(errors="replace").splitlines() if line.strip()]
        said = lines[-1][:300] if lines else f"it ended with {done.returncode}"
        missing = "No module named" in said
        raise (InstallError if missing else ModelError)(
            f"tf2onnx cannot convert {shown}", said, f"make a Python with both by {_VENV}" if missing else "check it"
        )
    return read_onnx(out)


def _answers(model: Path, shown: str) -> Answers:
    """What OpenVINO's reader of SavedModels answers.

    Raises:
        ModelError: if it cannot read it.
    """
    disable_telemetry()
    import openvino

    try:
        compiled = openvino.Core().compile_model(openvino.convert_model(model), "CPU", _EXACT)
    except Exception as error:  # its exceptions have no common base class
        raise ModelError(
            f"cannot read {shown}", why_failed(error), "check that it is a whole SavedModel, with its variables"
        ) from error

    def answers(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
        given = [_named(columns, port) for port in compiled.inputs]
        results = compiled([np.ascontiguousarray(each) for each in given])
        return tuple(np.array(results[port]) for port in compiled.outputs)

    return answers


def _named(columns: Mapping[str, NDArray[Any]], port: Any) -> NDArray[Any]:
    """The array of an input of OpenVINO's model, whose names are those of TensorFlow: `serving_default_x:0` for `x`."""
    if len(columns) == 1:
        return next(iter(columns.values()))
    names = {name.partition(":")[0].removeprefix("serving_default_") for name in port.names}
    return next(array for name, array in columns.items() if name.partition(":")[0] in names)
