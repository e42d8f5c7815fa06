"""The verb `import`, and how the other verbs take a model from elsewhere: it becomes a bundle that can be trained."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rushhour.api.inputs import REFERENCES, load_data
from rushhour.api.values import StrPath, check_name, read_path, read_size, read_texts
from rushhour.bundle import (
    Bundle,
    Preprocessing,
    Signature,
    Source,
    TensorSpec,
    Tiling,
    check_folder,
    check_place,
    is_bundle,
    joined,
)
from rushhour.bundle.tiling import read_tiling
from rushhour.errors import GoalError, RushhourError
from rushhour.progress import Progress, Silent
from rushhour.system.extras import require
from rushhour.system.storage import try_building
from rushhour.task import Task

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

    from rushhour.api.inputs import Data, GivenColumns
    from rushhour.data import Dataset
    from rushhour.models.doors import Arrival, Brought
    from rushhour.models.importing import Understood

_NAMED = 6
_EXAMPLES = 4


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
        wire, graph = _tensors(signature, signature.inputs), _tensors(found.signature, found.signature.inputs)
        answers = _tensors(signature, signature.outputs)
        by = f", written by {found.producer}" if found.producer else ""
        task = f"{found.task.kind} of {found.task.outputs} {'classes' if found.task.classes else 'values'}"
        if found.task.is_binary:
            task = f"classification by one output: the probability of {''.join(found.task.classes) or 'yes'}"
        network = ", ".join(f"{count} {kind}" for kind, count in list(found.layers.items())[:_NAMED])
        lines = [
            *([("model", found.origin)] if found.origin else []),
            ("graph", f"opset {found.opset}{by}, {sum(found.operators.values()):,} operators"),
            ("inputs", f"{graph}{f', pictures in {found.layout}' if found.layout else ''}"),
            ("requests", f"{wire} -> {answers}"),
            ("task", f"{task} ({found.task_from})"),
            ("preprocessing", f"{_scaling(found.preprocessing)} ({found.preprocessing_from})"),
            ("parameters", f"{found.parameters:,}"),
            *(("note", note) for note in found.notes),
        ]
        if found.from_original is not None:
            equal = f"they differ by {found.from_original:.1g} of the largest at most, in batches of 1, 3 and 8"
            lines.append(("answers", f"compared with the model's own: {equal}"))
        if found.why_untrainable:
            return (*lines, ("training", f"not possible: {found.why_untrainable}"))
        equal = f"answers differ from ONNX Runtime's by {found.difference:.1g} of the largest at most"
        return (*lines, ("training", f"possible: {network}; {equal}"))


def _tensors(signature: Signature, specs: Sequence[TensorSpec]) -> str:
    return ", ".join(f"{spec.name} {spec.dtype}[{signature.described(spec)[5:-1]}]" for spec in specs)


def import_model(
    model: Any,
    *,
    out: StrPath,
    data: StrPath
    | Dataset
    | tuple[ArrayLike | Mapping[str, ArrayLike], ArrayLike]
    | Mapping[str, ArrayLike]
    | None = None,
    example: ArrayLike | Mapping[str, ArrayLike] | None = None,
    classes: str | int | Sequence[str] | None = None,
    scale: float | None = None,
    mean: str | Sequence[float] | None = None,
    std: str | Sequence[float] | None = None,
    task: str | None = None,
    size: str | tuple[int, int] | None = None,
    length: int | None = None,
    tiles: str | Tiling | None = None,
    columns: GivenColumns = None,
    skip_corrupt: bool = False,
    tensorflow_python: StrPath | None = None,
    trust: str | Sequence[str] = (),
    name: str | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ImportResult:
    """Make a bundle of a model from elsewhere, and say what was understood of it.

    It becomes an ONNX graph, whose answers are compared with the model's own. Its torch network is rebuilt from the
    graph with its weights. Then `train` (which continues from these weights), `compress` and `tune` take the bundle as
    any other. A graph with operators that cannot be converted becomes a bundle that is served and quantised only.

        found = rushhour.import_model("model.onnx", out="runs/imported", data="photos/")
        found.understood.why_untrainable, found.lines

    Args:
        model: an `.onnx` file, with weights inside or beside it, or an `onnx.ModelProto`; a `torch.nn.Module`; a `.pt2`
            file or an `ExportedProgram` of `torch.export`; a `keras.Model`, or its `.keras` or `.h5` file; a SavedModel
            folder; a folder of Hugging Face transformers; a fitted estimator of scikit-learn, LightGBM or XGBoost, or
            its `.joblib` file. It is recognised by what it holds.
        out: the bundle's folder.
        data: as of `rushhour.train`, that the model is for: gives the names of the classes, real samples, and by its
            labels how pixels have to be scaled.
        example: a few samples as the network takes them, `(k, *shape)`, for a network that does not say what it takes;
            of several inputs a dictionary with an array for each. Not needed with data.
        classes: their names, `cat,dog`, or their number. Not needed with data, or where the graph ends in a softmax.
        scale: factor of all values of a sample, before the mean is subtracted: `0.00392157` for pixels.
        mean: subtracted from each channel: `0.485,0.456,0.406`.
        std: each channel is divided by it: `0.229,0.224,0.225`.
        task: as of `rushhour.train`.
        size: as of `rushhour.train`; the model's own by default.
        length: tokens of every text, for a network that takes any number; without it the length stays open where it
            can. Of an ONNX graph with open dimensions, their largest size.
        tiles: cut pictures or recordings larger than the model's input, and merge the answers of the tiles:
            `mean,overlap=32`, or a `rushhour.bundle.Tiling`, which explains the settings. Without it pictures are
            brought to the input's size.
        columns: as of `rushhour.train`; a bundle knows its own.
        skip_corrupt: as of `rushhour.train`.
        tensorflow_python: a Python with TensorFlow and tf2onnx, for models that only these can read.
        trust: the model's path, where reading it runs its code.
        name: of the model, which it keeps through training, compression and tuning; that of the file by default.
        force: replace another bundle at `out`.
        progress: gets the progress, and notes.

    Raises:
        RushhourError: if the model cannot be read or served, or does not fit the data; the message says what to do.
    """
    require("train")
    from rushhour.models.doors import refuse

    progress, path, name = progress or Silent(), read_path(out), check_name(name)
    tiling = read_tiling(tiles) if isinstance(tiles, str) else tiles
    brought = brought_of(model)
    if brought is None:
        raise refuse(model)
    try_building(path)
    check_folder(path)
    check_place(path, force=force)
    scaling = _preprocessing(scale, mean, std)
    if data is not None and classes is not None:
        raise GoalError("the classes are given twice", "the data has classes too", "leave out --classes")
    if data is None and (task is not None or skip_corrupt):
        raise GoalError("there is no data", "--task and --skip-corrupt are for data", "give --data")
    given = Known(trust, name, length, None if tensorflow_python is None else read_path(tensorflow_python))
    if data is not None:
        result, _ = imported_for(
            brought, data, path, progress,
            skip_corrupt=skip_corrupt, size=size, task=task, columns=columns, known=given, preprocessing=scaling,
        )  # fmt: skip
        return _tiled(result, tiling)
    array = None
    if example is not None:
        from rushhour.data.conversion import to_array

        if isinstance(example, Mapping):
            array = joined({each: to_array(each, column) for each, column in example.items()})
        else:
            array = to_array("example", example)
    progress.start(f"Importing {brought.shown}")
    meant = _task(classes)
    outputs = None if meant is None else meant.outputs
    arrival = given.opened(brought, size=read_size(size), example=array, outputs=outputs)
    result = _imported(brought, arrival, path, name, progress, task=meant, preprocessing=scaling)
    return _tiled(result, tiling)


def _tiled(result: ImportResult, tiling: Tiling | None) -> ImportResult:
    """The bundle with these tiles; if its answers cannot be merged so, it is not kept.

    Raises:
        BundleError: in that case.
    """
    if tiling is None:
        return result
    try:
        return dataclasses.replace(result, bundle=result.bundle.with_tiles(tiling))
    except RushhourError:
        shutil.rmtree(result.bundle.path, ignore_errors=True)
        raise


def brought_of(model: Any) -> Brought | None:
    """A model from elsewhere that a user gave in place of a network, with the door that takes it; else None.

    None for the name of a network, a factory, a source, and a bundle. Nothing of the model is run.

    Raises:
        ModelError: if it is a file that no door takes.
    """
    if isinstance(model, Bundle | Source) or model is None:
        return None
    if isinstance(model, str | os.PathLike):
        path = read_path(model)
        if (model in REFERENCES and not path.is_dir()) or is_bundle(path):
            return None
    from rushhour.models.doors import bring, refuse

    brought = bring(model)
    if brought is None and isinstance(model, str | os.PathLike) and path.is_file() and path.suffix != ".py":
        raise refuse(model)
    return brought


@dataclasses.dataclass(frozen=True)
class Known:
    """What a user says about a model from elsewhere.

    Attributes:
        trust: paths of models whose code may run.
        name: of the model.
        length: tokens of a text.
        python: a Python with TensorFlow.
    """

    trust: str | Sequence[str] = ()
    name: str | None = None
    length: int | None = None
    python: Path | None = None

    def opened(
        self,
        brought: Brought,
        *,
        size: tuple[int, int] | None = None,
        example: NDArray[Any] | None = None,
        outputs: int | None = None,
    ) -> Arrival:
        """The model as a graph.

        Raises:
            RushhourError: as `rushhour.models.doors.Door.open`.
        """
        allowed = {os.path.realpath(os.path.expanduser(each)) for each in read_texts(self.trust)}
        return brought.open(
            trusted=isinstance(brought.model, Path) and os.path.realpath(brought.model) in allowed,
            name=self.name,
            size=size,
            length=self.length,
            python=self.python,
            example=example,
            outputs=outputs,
        )


def imported_for(
    brought: Brought,
    data: Data,
    out: Path,
    progress: Progress,
    *,
    skip_corrupt: bool,
    size: str | tuple[int, int] | None,
    task: str | None,
    columns: GivenColumns = None,
    known: Known | None = None,
    preprocessing: Preprocessing | None = None,
    one_size: bool = False,
) -> tuple[ImportResult, Dataset]:
    """The bundle of a model from elsewhere, for data, and the data scaled as the model needs it.

    Args:
        brought: the model.
        data: as of `load_data`.
        out: the bundle's folder.
        progress: hears of it.
        skip_corrupt: as of `load_data`.
        size: as of `load_data`; by default that of the model's input, where it takes pictures.
        task: as of `load_data`.
        columns: as of `load_data`.
        known: what the user said.
        preprocessing: how pixels are scaled; by default as the model says, or the usual way that is most accurate on
            the data.
        one_size: whether open dimensions get the sizes of the data, so that it can be trained.

    Raises:
        RushhourError: as `import_model`.
    """
    from rushhour.models.importing import at_one_size, picture_size, signature_of_arrival

    known, arrival, sides = known or Known(), None, read_size(size)
    if not brought.door.needs_example:
        progress.start(f"Reading {brought.shown}")
        arrival = known.opened(brought, size=sides)
        if size is None and isinstance(data, str | os.PathLike) and read_path(data).is_dir():
            size = picture_size(signature_of_arrival(arrival, brought.shown).inputs[0])
    dataset = load_data(data, progress, skip_corrupt=skip_corrupt, size=size, task=task, columns=columns)
    if arrival is not None and arrival.task is not None:
        dataset = dataset.with_classes(arrival.task)
    progress.start(f"Importing {brought.shown}")
    if arrival is None:
        arrival = known.opened(brought, size=sides, example=_as_network_takes(dataset), outputs=dataset.task.outputs)
    dataset = dataset.fitted_to(signature_of_arrival(arrival, brought.shown), brought.name)
    if one_size:
        arrival, note = at_one_size(arrival, dataset.train.inputs, brought.shown)
        if note:
            progress.note(note)
    result = _imported(
        brought, arrival, out, known.name, progress, task=dataset.task, preprocessing=preprocessing, dataset=dataset
    )
    understood = result.understood
    if understood.preprocessing != Preprocessing() and preprocessing is None:
        progress.note(f"samples are scaled: {understood.preprocessing_from}")
    own = result.bundle.manifest
    return result, dataclasses.replace(dataset.with_classes(own.task), preprocessing=own.preprocessing)


def _imported(
    brought: Brought,
    arrival: Arrival,
    out: Path,
    name: str | None,
    progress: Progress,
    *,
    task: Task | None,
    preprocessing: Preprocessing | None,
    dataset: Dataset | None = None,
) -> ImportResult:
    from rushhour.models.importing import Given, import_arrival

    given = None
    if dataset is not None:
        given = Given(dataset.train.inputs, dataset.train.targets, dataset.preprocessing)
    bundle, understood = import_arrival(
        arrival, out, shown=brought.shown, name=name or brought.name, task=task, preprocessing=preprocessing,
        given=given,
    )  # fmt: skip
    progress.done(_outcome(understood), good=not understood.why_untrainable)
    return ImportResult(bundle, understood)


def _as_network_takes(dataset: Dataset) -> NDArray[Any]:
    """A few samples in torch's layout."""
    import torch

    from rushhour.models import Preprocess

    samples = dataset.train.inputs[:_EXAMPLES]
    if samples.dtype.names:
        return samples  # several inputs are taken as they are
    taken: NDArray[Any] = Preprocess(dataset.preprocessing)(torch.from_numpy(samples)).contiguous().numpy()
    return taken


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
