"""Data sets, image folders and arrays: from what a user names to three arrays with a task."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

from rushhour.bundle import Bundle, Text
from rushhour.data.columns import Columns
from rushhour.data.dataset import Dataset, Files, Split
from rushhour.data.table_files import LINES, is_table_file, is_table_folder
from rushhour.data.targets import Kind
from rushhour.errors import DataError, RushhourError
from rushhour.system.working_folder import same_working_folder
from rushhour.task import Task

_VIDEO = (".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".m4v")

__all__ = ["Columns", "Dataset", "Files", "Kind", "Split", "load"]


def load(
    spec: str,
    *,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    on_corrupt: Callable[[DataError], None] | None = None,
    task: Task | None = None,
    kind: Kind | None = None,
    bundle: Bundle | None = None,
    square: bool = False,
    before_reading: Callable[[Task, tuple[int, ...]], None] | None = None,
    on_decoded: Callable[[int, int], None] | None = None,
    columns: Columns | None = None,
) -> Dataset:
    """The data set that `spec` names.

    Args:
        spec: `fashion-mnist`; `elpv`; a folder of pictures with one folder for each class, or with class maps or boxes
            (`rushhour.data.annotated`); a video with boxes (`rushhour.data.frames`); a `.npz` file; a table (`.csv`,
            `.tsv`, `.parquet`, `.arrow`, or a folder of them by part, as Hugging Face's `save_to_disk` writes one), or
            a `.jsonl` file, whose texts become tokens where the bundle has a tokenizer; a `.txt` file of sentences, one
            a line, for MiniLM; or `module:factory`, a callable of the user's own that returns a `Dataset`. It is
            imported, so it must come from the person at the machine, never from a file.
        seed: of the split, where the data is not split already.
        size: height and width of pictures from a folder or of `elpv`.
        on_corrupt: called with the error of each picture in a folder that cannot be read, which is then left out;
            None: that is an error.
        task: for a `.npz` file, that of the model it is for; a bundle's own where one is given.
        kind: what targets are, where they could be labels or values.
        bundle: a model that the data is for: pictures are resized to its size, and labels numbered as its classes.
        square: whether pictures of a folder get equal sides, where no size is given.
        before_reading: called with the task and the sample shape before the pictures of a folder are decoded, which may
            take long; an error that it raises ends the loading.
        on_decoded: called while the pictures of a folder are decoded, with how many are, and of how many.
        columns: what is what in a table.

    Raises:
        DataError: if it does not exist, or cannot be used.
        TaskError: if it has only one class.
    """
    if bundle is not None:
        task = bundle.manifest.task
    path = Path(spec)
    is_table = is_table_file(path) or (bool(spec) and path.is_dir() and is_table_folder(path))
    texts = bundle is not None and isinstance(bundle.manifest.text, Text)
    if texts and (is_table or path.suffix.lower() in LINES):
        from rushhour.data.text_tables import load_text_table

        return load_text_table(path, seed=seed, columns=columns, kind=kind, bundle=bundle)
    if columns is not None and columns.named and not is_table:
        raise DataError(
            f"the data {spec} has no columns", "--target and the like are for tables", "leave them out, or name a table"
        )
    form = None
    if spec and path.is_dir() and not is_table:
        from rushhour.data.annotated import form_of, load_annotated

        form = form_of(path)
    if form is not None:
        if kind not in (None, "segmentation" if form == "masks" else "detection"):
            raise DataError(f"the data {spec} has {form}", f"it is not for {kind}", "leave out --task")
        return load_annotated(
            path,
            form,
            size=size,
            seed=seed,
            on_corrupt=on_corrupt,
            bundle=bundle,
            before_reading=before_reading,
            on_decoded=on_decoded,
        )
    is_folder = bool(spec) and path.is_dir() and not is_table
    if kind not in (None, "classification") and (spec in ("fashion-mnist", "elpv") or is_folder):
        raise DataError(f"the data {spec} has classes", "each of its samples has one of them", "leave out --task")
    if size is not None and (spec == "fashion-mnist" or is_table or path.suffix.lower() in (".npz", ".txt")):
        raise DataError(
            f"cannot resize {spec} to {size[0]}x{size[1]}",
            "only pictures in files can be resized",
            "leave out --size",
        )
    if spec == "fashion-mnist":
        from rushhour.data.fashion import fashion_mnist

        return fashion_mnist()
    if spec == "elpv":
        from rushhour.data.elpv import elpv

        if bundle is not None and (picture := bundle.manifest.signature.picture) is not None:
            size = picture.shape[0], picture.shape[1]
        return elpv(size=size, seed=seed)
    if is_table:
        from rushhour.data.tables import load_tables

        return load_tables(path, seed=seed, columns=columns, kind=kind, bundle=bundle)
    if path.suffix.lower() in _VIDEO and path.is_file():
        from rushhour.data.frames import load_video

        return load_video(
            path, size=size, seed=seed, bundle=bundle, before_reading=before_reading, on_decoded=on_decoded
        )
    if path.suffix.lower() == ".npz":
        from rushhour.data.arrays import load_npz

        return load_npz(path, seed=seed, task=task, kind=kind)
    if path.suffix.lower() == ".txt":
        from rushhour.data.text import load_text

        return load_text(path, seed=seed)
    if spec and path.is_dir():
        from rushhour.data.fashion import cache
        from rushhour.data.folder import load_folder

        return load_folder(
            path,
            size=size,
            seed=seed,
            cached=cache() / "pictures",
            on_corrupt=on_corrupt,
            square=square,
            bundle=bundle,
            before_reading=before_reading,
            on_decoded=on_decoded,
        )
    module, _, factory = spec.partition(":")
    if module.replace(".", "").isidentifier() and factory.isidentifier():
        return _from_factory(module, factory)
    if path.is_file() and path.suffix.lower() in LINES:
        raise DataError(
            f"cannot read the texts {spec}",
            "texts become tokens of a model's own tokenizer, and this one has none",
            "give them to a model with a tokenizer (docs/data.md, Texts with labels)",
        )
    if path.is_file():
        raise DataError(
            f"cannot read the data {spec}",
            f"{path.suffix or 'a file without suffix'} is no kind of data that is read",
            "give a folder of pictures, a .csv or .parquet table, or arrays: numpy.savez('data.npz', x=x, y=y)",
        )
    raise DataError(
        f"there is no data at {spec}",
        "it is neither fashion-mnist, nor elpv, nor a folder of pictures, nor a .npz, .csv, .parquet or .txt file, nor "
        "module:factory",
        "check the path",
    )


def _from_factory(module: str, factory: str) -> Dataset:
    spec = f"{module}:{factory}"
    try:
        with same_working_folder():
            found = getattr(importlib.import_module(module), factory)()
    except RushhourError:
        raise
    except (Exception, SystemExit) as error:  # the user's code can fail in any way
        raise DataError(
            f"cannot load the data {spec}",
            f"{type(error).__name__}: {error}",
            "check the name, and that its folder is on PYTHONPATH",
        ) from error
    if not isinstance(found, Dataset):
        raise DataError(
            f"{spec} returned a {type(found).__name__}", "it must return a rushhour.data.Dataset", "return one"
        )
    return found
