"""What `torch.export` gave: an `ExportedProgram` in memory, or a `.pt2` file, which is code."""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from rushhour.errors import ModelError
from rushhour.models.converted import checked_onnx
from rushhour.models.deployed import graph_of_program
from rushhour.models.doors.door import Arrival, Opening
from rushhour.models.failure import why_failed

_MARKS: Final = ("archive_format", "serialized_exported_program.json")
"""Names of files in the archive: of this form, and of the one before."""
_EXPORT: Final = "torch.export.export(net, (x,), dynamic_shapes=({0: torch.export.Dim('batch')},)), with 2 samples in x"


class TorchProgramDoor:
    """Files of `torch.export.save`, and objects of `torch.export.ExportedProgram`."""

    takes = "a torch.export program (.pt2)"
    needs_example = False

    def recognises(self, model: Any) -> bool:
        """By the names of the files in the archive, or by its type."""
        if not isinstance(model, Path):
            return isinstance(model, ExportedProgram)
        if not model.is_file() or not zipfile.is_zipfile(model):
            return False
        try:
            with zipfile.ZipFile(model) as archive:
                return any(name.rpartition("/")[2] in _MARKS for name in archive.namelist())
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            return False

    def open(self, model: Any, opening: Opening) -> Arrival:
        """Its graph, with the batch that it left free."""
        if isinstance(model, Path):
            opening.require_trust("it is a torch.export program, and loading one can run code of the file")
            program = _loaded(model, opening.shown)
        else:
            program = model
        specs = program.graph_signature
        inputs, outputs = _names(specs.user_inputs, "input"), _names(specs.user_outputs, "output")
        _check_batch(program, opening.shown)
        graph = graph_of_program(program, opening.name, inputs, outputs)
        module = program.module()

        def answers(columns: Mapping[str, NDArray[Any]]) -> tuple[NDArray[Any], ...]:
            with torch.no_grad():
                given = (torch.from_numpy(np.ascontiguousarray(columns[name])) for name in inputs)
                raw = module(*given)
            return tuple(each.numpy() for each in pytree.tree_leaves(raw) if isinstance(each, torch.Tensor))

        origin = f"torch {torch.__version__.partition('+')[0]}, exported program"
        return Arrival("pt2", checked_onnx(graph, opening.shown), origin, answers)


def _loaded(file: Path, shown: str) -> ExportedProgram:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.export.load(file)
    except Exception as error:  # a file may be damaged in any way
        raise ModelError(
            f"cannot read the model {shown}",
            why_failed(error),
            "check that it is a whole file of torch.export.save, of this version of torch",
        ) from error


def _names(given: Any, word: str) -> list[str]:
    """`input`, or `input_0`, `input_1` ... of several."""
    count = len(tuple(given))
    return [word] if count == 1 else [f"{word}_{index}" for index in range(count)]


def _check_batch(program: ExportedProgram, shown: str) -> None:
    """Raise if the number of samples is fixed: it cannot be freed any more."""
    names = set(program.graph_signature.user_inputs)
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if node.op != "placeholder" or node.name not in names or not isinstance(value, torch.Tensor):
            continue
        if value.dim() == 0 or isinstance(value.shape[0], int):
            fixed = "it has none" if value.dim() == 0 else f"it is fixed to {value.shape[0]}"
            raise ModelError(
                f"cannot serve {shown}", f"the number of samples of its input {node.name}: {fixed}", f"use {_EXPORT}"
            )
