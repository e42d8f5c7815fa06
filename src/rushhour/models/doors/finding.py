"""Which door takes a model."""

from __future__ import annotations

import dataclasses
import os
import zipfile
from pathlib import Path
from typing import Any, Final

from rushhour.bundle import is_bundle
from rushhour.errors import ModelError
from rushhour.models.doors.door import Arrival, Door, Opening
from rushhour.models.doors.hugging_face import HuggingFaceDoor
from rushhour.models.doors.keras import KerasDoor
from rushhour.models.doors.onnx_graph import OnnxDoor
from rushhour.models.doors.saved_model import SavedModelDoor
from rushhour.models.doors.tabular import TabularDoor
from rushhour.models.doors.torch_module import TorchModuleDoor
from rushhour.models.doors.torch_program import TorchProgramDoor
from rushhour.models.imported import name_for

DOORS: Final[tuple[Door, ...]] = (
    OnnxDoor(),
    HuggingFaceDoor(),
    TorchProgramDoor(),
    KerasDoor(),  # before torch's: on that backend, a Keras model is a module too
    SavedModelDoor(),
    TabularDoor(),
    TorchModuleDoor(),
)
"""In the order in which they are asked: the narrower kind before the wider one."""


@dataclasses.dataclass(frozen=True, eq=False)
class Brought:
    """A model, and the door that takes it.

    Attributes:
        model: a path, or an object.
        door: that recognised it.
    """

    model: Any
    door: Door

    @property
    def shown(self) -> str:
        """Names it in messages: its path, or its type."""
        return str(self.model) if isinstance(self.model, Path) else f"the {type(self.model).__name__}"

    @property
    def name(self) -> str:
        """Of the model, where the user gives none."""
        return name_for(self.model if isinstance(self.model, Path) else Path(type(self.model).__name__))

    def open(self, *, trusted: bool = False, name: str | None = None, **known: Any) -> Arrival:
        """The model as an ONNX graph.

        Args:
            trusted: whether code of a file may run; that of an object runs already.
            name: of the model.
            known: the other attributes of `Opening`.

        Raises:
            RushhourError: as `Door.open`.
        """
        is_object = not isinstance(self.model, Path)
        opening = Opening(name or self.name, self.shown, trusted=trusted or is_object, **known)
        return self.door.open(self.model, opening)


def bring(model: Any) -> Brought | None:
    """The model with its door; None where no door takes it.

    Nothing of it is run. A path is judged by what lies there: a text that names nothing on disk may be the name of a
    network, and is left to others.

    Args:
        model: the path of a file or folder, or an object.
    """
    if isinstance(model, str | os.PathLike):
        text = os.path.expanduser(os.fspath(model))
        if not isinstance(text, str) or not text or "\0" in text:
            return None
        model = Path(text)
        if not model.exists() and model.suffix.lower() != ".onnx":
            return None
    return next((Brought(model, door) for door in DOORS if door.recognises(model)), None)


def refuse(model: Any) -> ModelError:
    """The error of a model that no door takes."""
    fix = f"give {', or '.join(door.takes for door in DOORS)}"
    if not isinstance(model, str | os.PathLike):
        what = f"a {type(model).__name__}"
        return ModelError(f"cannot import {what}", f"no door takes {what}", fix)
    path = Path(os.path.expanduser(os.fspath(model)))
    if not path.exists():
        return ModelError(f"cannot import {path}", "there is nothing of that name", fix)
    if is_bundle(path):
        return ModelError(f"cannot import {path}", "it is a bundle already", "use it as it is")
    if _is_saved_by_torch(path):
        return ModelError(
            f"cannot import {path}",
            "it is a pickle of torch.save, which holds weights or objects, but not how a network computes",
            "load it in a function that returns the network, and name that as module:factory",
        )
    return ModelError(f"cannot import {path}", "what it holds is no model that can be read", fix)


def _is_saved_by_torch(path: Path) -> bool:
    """Whether a file is an archive of `torch.save`, or TorchScript."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.rpartition("/")[2] == "data.pkl" for name in archive.namelist())
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False
