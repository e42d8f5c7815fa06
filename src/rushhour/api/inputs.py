"""Models and data as a user gives them: names, paths and objects become a bundle or a network, and a data set."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rushhour.api.values import StrPath, check_choice, read_path, read_size
from rushhour.bundle import Bundle, Source, described, is_bundle, joined
from rushhour.errors import DataError, ModelError
from rushhour.progress import Progress

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from rushhour.data import Columns, Dataset, Kind
    from rushhour.task import Task

    Model = StrPath | Bundle | Source | Callable[..., Any]
    Data = StrPath | Dataset | tuple[ArrayLike | Mapping[str, ArrayLike], ArrayLike] | Mapping[str, ArrayLike]
    GivenColumns = Columns | Mapping[str, Any] | str | None

REFERENCES = ("article", "residual", "signal", "kernels", "mlp", "tabular", "deepfm", "unet", "detector", "tagger")
"""The networks of `rushhour.models`, by name; a folder of such a name may be a bundle."""
_MOST_CORRUPT = 5
"""Corrupt pictures that are named, at most."""


def read_model(model: Model) -> str | Bundle | Source:
    """What a user means: a bundle (opened), a source, or the name of a network.

    Args:
        model: a bundle or its folder; a reference network, such as `article`; `module:factory`, or the factory
            itself; or a source.

    Raises:
        BundleError: if the folder is no bundle, or is damaged.
        ModelError: if it is an object that no other process could build again.
    """
    if isinstance(model, Bundle | Source):
        return model
    if isinstance(model, os.PathLike):
        return Bundle.open(read_path(model))
    if isinstance(model, str):
        path = read_path(model)
        if model and path.is_dir() and (model not in REFERENCES or is_bundle(path)):
            return Bundle.open(path)
        if not model.startswith("__main__:"):
            return model
    module, name = getattr(model, "__module__", ""), getattr(model, "__qualname__", "")
    if not name.isidentifier() or module in ("", "__main__"):
        shown = model if isinstance(model, str) else getattr(model, "__qualname__", None) or f"a {type(model).__name__}"
        raise ModelError(
            f"cannot use {shown} as a model",
            "a bundle records by what name a network is built, and a function or class has one only in a module",
            "write a function that returns the network into a file such as mynet.py, and pass mynet.build",
        )
    if getattr(sys.modules.get(module), name, model) is not model:
        raise ModelError(
            f"cannot use {module}.{name} as a model",
            "the module has another object of that name, which would be built in its place",
            f"import it again, and pass {module}.{name}",
        )
    return f"{module}:{name}"


def load_data(
    data: Data,
    progress: Progress,
    model: Model = "",
    *,
    skip_corrupt: bool = False,
    size: str | tuple[int, int] | None = None,
    task: Kind | None = None,
    columns: GivenColumns = None,
    trusted: tuple[str, ...] = (),
) -> Dataset:
    """The data set that a user gave. What was left out or changed is noted on `progress`, a line each.

    Args:
        data: a name or path as of `rushhour.data.load`; a data set; arrays `(x, y)`, where x may be a dictionary with
            an array for each of several inputs; arrays by the names that they have in a `.npz` file
            (`rushhour.data.arrays`); a `Dataset` or `DataLoader` of torch, a `tf.data.Dataset`, a `PyDataset` of Keras,
            or a table of pandas, polars, Arrow or Hugging Face; or a dictionary of such by part.
        progress: hears of it.
        model: that it is for: pictures are brought to a bundle's input and labels to its classes; a network is tried
            before pictures are decoded, which may take long.
        skip_corrupt: leave out pictures that cannot be read, and name them.
        size: of pictures: height and width, or `224x224`.
        task: what targets are, where that cannot be seen from them: `classification`, `multilabel`, `ranking`,
            `regression`, `segmentation`, `detection`, or a class of your own, `module:Class` (`rushhour.task.Kind`).
        columns: what is what in a table: `Columns`, a dictionary with its attributes, or the target's name.
        trusted: code that may be imported, where the model's task is a user's own.

    Raises:
        RushhourError: as `rushhour.data.load`, and if the network does not fit the data.
    """
    from rushhour.data import Columns, Dataset
    from rushhour.data.lineage import check_scale, training_overlap
    from rushhour.data.objects import read_data_object
    from rushhour.data.table_files import is_table_object, tables_of
    from rushhour.data.targets import KINDS
    from rushhour.task import ensure_kind, load_kind

    if task is not None and ":" in task:
        load_kind(task)
    elif task is not None:
        check_choice("task", task, KINDS)
    read = model if isinstance(model, str) and model in REFERENCES else read_model(model)
    bundle = read if isinstance(read, Bundle) else None
    if bundle is not None and ":" in bundle.manifest.task.kind:
        from rushhour.models.trust import trusted_factories

        ensure_kind(bundle.manifest.task.kind, trusted_factories(bundle, trusted))
    said = Columns.read(columns)
    is_table = is_table_object(data)
    if said.named and not (is_table or isinstance(data, str | os.PathLike)):
        raise DataError("cannot name columns of arrays", "`columns` are for tables", "leave them out, or give a table")
    if isinstance(data, Dataset):
        if size is not None or task is not None:
            raise DataError("cannot change a Dataset", "`size` and `task` are for data that is read", "leave them out")
        dataset = data
    elif is_table:
        from rushhour.data.tables import from_tables

        if size is not None:
            raise DataError("cannot resize a table", "`size` is for pictures in files", "leave it out")
        dataset = from_tables(tables_of(data), name="table", columns=said, kind=task, bundle=bundle)
    elif (read_arrays := read_data_object(data)) is not None:
        dataset = _from_arrays(read_arrays, bundle, size, task)
    elif isinstance(data, tuple | Mapping):
        dataset = _from_arrays(data, bundle, size, task)
    elif not isinstance(data, str | os.PathLike):
        raise DataError(
            f"cannot read data from a {type(data).__name__}",
            "data is a name or path, a rushhour.data.Dataset, arrays (x, y), a dictionary of arrays, a table of "
            "pandas, or a data set of torch, TensorFlow or Keras",
            "give for example (x, y), a tuple",
        )
    else:
        name = os.fspath(data)
        dataset = _from_name(name, progress, read, skip_corrupt=skip_corrupt, size=size, task=task, columns=said)
    for note in filter(None, dataset.notes):
        progress.note(note)
    if bundle is None:
        return dataset
    dataset = dataset.fitted_to(bundle.manifest.signature, bundle.manifest.name)
    check_scale(bundle, dataset)
    if bundle.manifest.task.is_binary:
        dataset = dataset.with_classes(bundle.manifest.task)
    if note := training_overlap(bundle, dataset):
        progress.note(note)
    return dataset


def source_of(model: str | Bundle | Source, dataset: Dataset) -> tuple[Source | Bundle, tuple[str, ...]]:
    """The bundle, or the source of the network fitted to the data; and the factories that its user thereby trusts.

    Raises:
        TaskError: if a bundle's answers do not fit the data.
        ModelError: if there is no such network, or it cannot take these samples.
    """
    if isinstance(model, Bundle):
        for spec in model.manifest.signature.outputs[:1]:
            dataset.task.check_output(spec.shape, str(model.path), model.manifest.signature.inputs[0].shape)
        return model, ()
    if isinstance(model, Source):
        return model, (model.factory,)
    from rushhour.models import source_for

    source = source_for(model, dataset.sample_shape, dataset.task, dataset.preprocessing, inputs=dataset.input_shapes)
    return source, ((model,) if ":" in model else ())


def _from_name(
    name: str,
    progress: Progress,
    model: str | Bundle | Source,
    *,
    skip_corrupt: bool,
    size: str | tuple[int, int] | None,
    task: Kind | None,
    columns: Columns,
) -> Dataset:
    from rushhour.data import load

    corrupt: list[str] = []
    decoded = 0

    def on_decoded(done: int, total: int) -> None:
        nonlocal decoded
        if not decoded:
            progress.start(f"Decoding the pictures of {name}", total)
        progress.advance(done - decoded)
        decoded = done

    sides = read_size(size)
    progress.start(f"Loading {name}")
    dataset = load(
        os.path.expanduser(name),
        size=sides,
        on_corrupt=(lambda error: corrupt.append(f"{error.what}: {error.why}")) if skip_corrupt else None,
        kind=task,
        bundle=model if isinstance(model, Bundle) else None,
        square=model == "article",
        before_reading=None if isinstance(model, Bundle) or not model else partial(_try_network, model),
        on_decoded=on_decoded,
        columns=columns,
    )
    sizes = f"{len(dataset.train):,} + {len(dataset.validation):,} + {len(dataset.test):,} samples"
    progress.done(f"{sizes} of {'x'.join(map(str, dataset.sample_shape)) or described(dataset.train.inputs)}")
    for line in corrupt[:_MOST_CORRUPT]:
        progress.note(f"left out: {line}")
    return dataset


def _from_arrays(
    data: tuple[Any, ...] | Mapping[str, Any],
    bundle: Bundle | None,
    size: str | tuple[int, int] | None,
    task: Kind | None,
) -> Dataset:
    from rushhour.data.arrays import from_arrays
    from rushhour.data.conversion import to_array

    if size is not None:
        raise DataError("cannot resize arrays", "`size` is for pictures in files", "leave it out")
    if isinstance(data, tuple):
        if len(data) != 2:
            raise DataError(f"cannot read {len(data)} arrays", "samples and their targets are two", "give (x, y)")
        x, y = data
        if isinstance(x, list | tuple) and x and all(getattr(each, "shape", ())[:1] == (len(y),) for each in x):
            raise DataError(
                f"x is {len(x)} arrays",
                "several inputs are told apart by their names",
                'give a dictionary: ({"user": users, "item": items}, y)',
            )
        data = {"x": data[0], "y": data[1]}
    arrays = {
        name: joined({each: to_array(each, column) for each, column in array.items()})
        if isinstance(array, Mapping) and array
        else to_array(name, array)
        for name, array in data.items()
    }
    known = None if bundle is None else bundle.manifest.task
    return from_arrays(arrays, name="arrays", seed=0, task=known, kind=task)


def _try_network(model: str | Source, task: Task, shape: tuple[int, ...]) -> None:
    """Raise, before any picture is decoded, if a network does not take such pictures."""
    from rushhour.models import check_fits, source_for

    if isinstance(model, Source):
        check_fits(model, task, shape, model.factory, (model.factory,))
    else:
        check_fits(source_for(model, shape, task), task, shape, model, (model,))


def read_logs(folder: StrPath | None, beside: Path, kind: str) -> Path:
    """The folder that a user gave, or the one beside a bundle: `BUNDLE-training`, `BUNDLE-steps`."""
    return beside.with_name(f"{beside.name}-{kind}") if folder is None else read_path(folder)
