"""The verb `import`, and how the other verbs take a model file: it becomes a bundle that can be trained."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from rushhour.api.inputs import load_data
from rushhour.api.values import StrPath, check_name, read_path
from rushhour.bundle import Bundle, Preprocessing, check_folder, check_place
from rushhour.errors import GoalError
from rushhour.progress import Progress, Silent
from rushhour.system.extras import require
from rushhour.system.storage import try_building
from rushhour.task import Task

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from rushhour.api.inputs import Data
    from rushhour.data import Dataset
    from rushhour.models.importing import Understood

_SUFFIX = ".onnx"
_NAMED = 6


@dataclasses.dataclass(frozen=True)
class ImportResult:
    """A model that was imported. It is a path too: that of its bundle.

    Attributes:
        bundle: ONNX and JSON, and the weights where it can be trained.
        understood: what its file says, what was found out, and what cannot be done with it.
    """

    bundle: Bundle
    understood: Understood

    def __fspath__(self) -> str:
        return str(self.bundle.path)

    def __repr__(self) -> str:
        """Short, for a notebook."""
        why = self.understood.why_untrainable
        return (
            f"<ImportResult {self.bundle.manifest.name}: {'cannot' if why else 'can'} be trained, {self.bundle.path}>"
        )

    def as_dict(self) -> dict[str, Any]:
        """What `rushhour import --json` writes."""
        found: dict[str, Any] = msgspec.to_builtins(self.understood)
        return {**found, "bundle": str(self.bundle.path), "hash": self.bundle.manifest.hash}

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """What was understood, for people: what it is about, and a sentence."""
        found, signature = self.understood, self.bundle.manifest.signature
        wire = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in signature.inputs)
        graph = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in found.signature.inputs)
        answers = ", ".join(f"{spec.name} {spec.dtype}{list(spec.shape)}" for spec in signature.outputs)
        by = f", written by {found.producer}" if found.producer else ""
        task = f"{found.task.kind} of {found.task.outputs} {'classes' if found.task.classes else 'values'}"
        network = ", ".join(f"{count} {kind}" for kind, count in list(found.layers.items())[:_NAMED])
        lines = [
            ("graph", f"opset {found.opset}{by}, {sum(found.operators.values()):,} operators"),
            ("inputs", f"{graph}{f', pictures in {found.layout}' if found.layout else ''}"),
            ("requests", f"{wire} -> {answers}"),
            ("task", f"{task} ({found.task_from})"),
            ("preprocessing", f"{_scaling(found.preprocessing)} ({found.preprocessing_from})"),
            ("parameters", f"{found.parameters:,}"),
            *(("note", note) for note in found.notes),
        ]
        if found.why_untrainable:
            return (*lines, ("training", f"not possible: {found.why_untrainable}"))
        equal = f"answers differ from ONNX Runtime's by {found.difference:.1g} of the largest at most"
        return (*lines, ("training", f"possible: {network}; {equal}"))


def import_model(
    model: StrPath,
    *,
    out: StrPath,
    data: StrPath | Dataset | tuple[ArrayLike, ArrayLike] | Mapping[str, ArrayLike] | None = None,
    classes: str | int | Sequence[str] | None = None,
    scale: float | None = None,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    task: Literal["classification", "regression"] | None = None,
    size: str | tuple[int, int] | None = None,
    skip_corrupt: bool = False,
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ImportResult:
    """Make a bundle of a model file, and say what was understood of it.

    Its torch network is rebuilt from the ONNX graph with the weights of the file, and its answers are compared with
    ONNX Runtime's. Then `train` (which continues from these weights), `compress` and `tune` take the bundle as any
    other. A graph with operators that cannot be converted becomes a bundle that is served and quantised only.

        found = rushhour.import_model("model.onnx", out="runs/imported", data="photos/")
        found.understood.why_untrainable, found.lines

    Args:
        model: an `.onnx` file; weights inside or beside it.
        out: the bundle's folder.
        data: as of `rushhour.train`, that the model is for: gives the names of the classes, real samples, and by its
            labels how pixels have to be scaled.
        classes: their names, `cat,dog`, or their number. Not needed with data, or where the graph ends in a softmax.
        scale: factor of all values of a sample, before the mean is subtracted: `0.00392157` for pixels.
        mean: subtracted from each channel: `0.485,0.456,0.406`.
        std: each channel is divided by it: `0.229,0.224,0.225`.
        task: as of `rushhour.train`.
        size: as of `rushhour.train`; the model's own by default.
        skip_corrupt: as of `rushhour.train`.
        name: of the model, which it keeps through training, compression and tuning; that of the file by default.
        force: replace another bundle at `out`.
        progress: gets the progress, and notes.

    Raises:
        RushhourError: if the file cannot be read or served, or does not fit the data; the message says what to do.
    """
    require("train")
    progress, path, file = progress or Silent(), read_path(out), read_path(model)
    name = check_name(name)
    try_building(path)
    check_folder(path)
    check_place(path, force=force)
    scaling = _preprocessing(scale, mean, std)
    if data is not None:
        if classes is not None:
            raise GoalError("the classes are given twice", "the data has classes too", "leave out --classes")
        result, _ = imported_for(
            file, data, path, progress,
            skip_corrupt=skip_corrupt, size=size, task=task, name=name, preprocessing=scaling,
        )  # fmt: skip
        return result
    if size is not None or task is not None or skip_corrupt:
        raise GoalError("there is no data", "--size, --task and --skip-corrupt are for data", "give --data")
    from rushhour.models import import_onnx

    progress.start(f"Importing {file.name}")
    bundle, understood = import_onnx(file, path, task=_task(classes), preprocessing=scaling, name=name)
    progress.done(_outcome(understood))
    return ImportResult(bundle, understood)


def model_file(model: Any) -> Path | None:
    """The path of a model file that a user named in place of a model; None where it is none."""
    if isinstance(model, str | os.PathLike) and os.fspath(model).lower().endswith(_SUFFIX):
        path = read_path(model)
        return None if path.is_dir() else path
    return None


def imported_for(
    file: Path,
    data: Data,
    out: Path,
    progress: Progress,
    *,
    skip_corrupt: bool,
    size: str | tuple[int, int] | None,
    task: Literal["classification", "regression"] | None,
    name: str | None = None,
    preprocessing: Preprocessing | None = None,
) -> tuple[ImportResult, Dataset]:
    """The bundle of a model file, for data, and the data scaled as the model needs it.

    Args:
        file: an ONNX file.
        data: as of `load_data`.
        out: the bundle's folder.
        progress: hears of it.
        skip_corrupt: as of `load_data`.
        size: as of `load_data`; by default that of the model's input, where it takes pictures.
        task: as of `load_data`.
        name: of the model.
        preprocessing: how pixels are scaled; by default the usual way that is most accurate on the data.

    Raises:
        RushhourError: as `import_model`.
    """
    from rushhour.models.importing import Given, import_onnx, input_of, picture_size

    spec = input_of(file)
    if size is None and isinstance(data, str | os.PathLike) and read_path(data).is_dir():
        size = picture_size(spec)
    dataset = load_data(data, progress, skip_corrupt=skip_corrupt, size=size, task=task)
    given = Given(dataset.train.inputs, dataset.train.targets, dataset.preprocessing)
    progress.start(f"Importing {file.name}")
    bundle, understood = import_onnx(file, out, task=dataset.task, preprocessing=preprocessing, given=given, name=name)
    progress.done(_outcome(understood), good=not understood.why_untrainable)
    if understood.preprocessing != Preprocessing() and preprocessing is None:
        progress.note(f"samples are scaled: {understood.preprocessing_from}")
    own = bundle.manifest.preprocessing
    return ImportResult(bundle, understood), dataclasses.replace(dataset, preprocessing=own)


def _outcome(understood: Understood) -> str:
    return f"it cannot be trained: {understood.why_untrainable}" if understood.why_untrainable else "it can be trained"


def _task(classes: str | int | Sequence[str] | None) -> Task | None:
    if classes is None:
        return None
    if isinstance(classes, str):
        classes = int(classes) if classes.isdecimal() else [each.strip() for each in classes.split(",")]
    names = tuple(map(str, range(min(classes, 10**6)))) if isinstance(classes, int) else tuple(classes)
    return Task.classification(names)


def _preprocessing(
    scale: float | None, mean: str | Sequence[float] | None, std: str | Sequence[float] | None
) -> Preprocessing | None:
    if scale is None and mean is None and std is None:
        return None
    numbers = {"scale": 1.0 if scale is None else scale, "mean": _numbers(mean), "std": _numbers(std)}
    try:
        return msgspec.convert(numbers, type=Preprocessing)
    except msgspec.ValidationError as error:
        raise GoalError("cannot scale samples so", str(error), "give finite numbers, and std above 0") from error


def _numbers(given: str | Sequence[float] | None) -> tuple[float, ...]:
    if given is None:
        return ()
    try:
        return tuple(float(each) for each in (given.split(",") if isinstance(given, str) else given))
    except ValueError as error:
        raise GoalError(f"cannot read {given!r}", "it is a number for each channel", "write 0.5,0.5,0.5") from error


def _scaling(preprocessing: Preprocessing) -> str:
    """In words: `(x * 0.00392 - mean) / std, NHWC->NCHW`."""
    text = "x" if preprocessing.scale == 1 else f"x * {preprocessing.scale:.6g}"
    if preprocessing.mean:
        text = f"{text} - {_listed(preprocessing.mean)}"
    if preprocessing.std:
        text = f"({text}) / {_listed(preprocessing.std)}"
    return text if preprocessing.layout == "none" else f"{text}, {preprocessing.layout}"


def _listed(values: tuple[float, ...]) -> str:
    return f"[{', '.join(f'{value:.4g}' for value in values)}]"
