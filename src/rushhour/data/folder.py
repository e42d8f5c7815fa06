"""A folder of pictures, one folder for each class; optionally with train/, validation/ and test/ above the classes.

Every file below the folder is either read, or counted as left out, with the reason.
"""

from __future__ import annotations

import dataclasses
import os
import stat
import unicodedata
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec

from rushhour.bundle import Bundle, Decoding, is_bundle
from rushhour.data.arrays import from_splits
from rushhour.data.dataset import Dataset, Files
from rushhour.data.decoded import Listing, OnCorrupt, OnDecoded, Tally, read, shown
from rushhour.data.probing import SUFFIXES, decoding_of, probed, shape_of
from rushhour.data.splits import PART_OF, Part
from rushhour.data.table_files import is_table_file
from rushhour.errors import DataError, TaskError
from rushhour.system.storage import MARK, explained
from rushhour.task import Task

_LITTER = {"__macosx", "@eadir", "$recycle.bin", "system volume information", "lost+found", "thumbs.db", "desktop.ini"}
"""Files and folders that operating systems create, besides names that begin with a dot."""
_NAMED_KINDS = 3

BeforeReading = Callable[[Task, tuple[int, ...]], None]
"""Called with the task and the sample shape before all pictures are decoded; an error ends the loading."""


def load_folder(
    folder: Path,
    *,
    size: tuple[int, int] | None,
    seed: int,
    cached: Path | None = None,
    on_corrupt: OnCorrupt | None = None,
    square: bool = False,
    bundle: Bundle | None = None,
    before_reading: BeforeReading | None = None,
    on_decoded: OnDecoded | None = None,
) -> Dataset:
    """The pictures below `folder` as a data set.

    Args:
        folder: `CLASS/picture.png`, split by content into about 80 / 10 / 10; or `train/CLASS/...` with `val/`, `test/`
            or both, by any of their usual names. A part that is missing is held out of `train`.
        size: height and width of the samples. By default that of the pictures if all are equal, else the median, at
            most 224.
        seed: of the split.
        cached: a folder for decoded pictures, where they are many: the arrays are then mapped from its files, take no
            memory of their own, and need no decoding the next time. None: all in memory, decoded each time.
        on_corrupt: see `OnCorrupt`. None: a picture that cannot be read is an error.
        square: whether the default size has equal sides.
        bundle: a model that the data is for: it decides size, channels, classes and the value of white.
        before_reading: see `BeforeReading`.
        on_decoded: see `OnDecoded`.

    Raises:
        DataError: if there are no classes, a class is empty, or a picture cannot be read.
        TaskError: if there is only one class, or the model knows others.
    """
    if not folder.is_dir():
        raise DataError(f"there is no data at {folder}", "the folder does not exist", "check the path")
    tree = _Tree(folder)
    classes = tree.classes
    if bundle is not None and bundle.manifest.task.kind == "classification":
        classes = bundle.manifest.task.classes
        if strange := [name for name in tree.classes if name not in classes]:
            raise TaskError(
                f"{shown(folder)} has classes that {bundle.manifest.name} does not know: {', '.join(strange[:5])}",
                f"it knows {', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}",
                "give the data that it was made for",
            )
    task = Task.classification(classes)  # one class is refused before all its pictures are read
    with warnings.catch_warnings():
        # here and not around each picture: the filters are global, and threads that set them would undo each other
        warnings.simplefilter("ignore")
        found = probed(tree.files)
        shape = shape_of(found, size, square=square, bundle=bundle, folder=folder)
        if before_reading is not None:
            before_reading(task, shape)
        decoding, is_fixed = decoding_of(found, bundle)
        listing = Listing(folder, tree.parts, classes, shape, seed, decoding, is_fixed)
        parts, tally = read(listing, cached, on_corrupt, on_decoded)
    data = from_splits(shown(folder.resolve().name), *parts, classes=classes)
    count = len(tree.files)
    left_out = {**_short(tree.left_out), **({"unreadable": len(tally.corrupt)} if tally.corrupt else {})}
    files = Files(count + sum(tree.left_out.values()), count - len(tally.corrupt), left_out)
    changes = _changes(
        tally, files.read, shape, is_asked=size is not None, model=None if bundle is None else bundle.manifest.name
    )
    return dataclasses.replace(
        data,
        preprocessing=msgspec.structs.replace(data.preprocessing, decoding=tally.decoding),
        notes=(*tree.notes, *changes, *((str(files),) if left_out else ())),
        files=files,
    )


class _Tree:
    """The content of a folder: the pictures of each class in each part, and the files that are left out.

    Attributes:
        parts: as in `Listing`.
        classes: their names, in order.
        left_out: why -> files.
        notes: on the parts, for the user.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.left_out: Counter[str] = Counter()
        self.notes: list[str] = []
        self._nested = 0
        self._root = _identity(folder.stat())
        folders = self._folders(folder)
        named: dict[Part, dict[str, Path]] = {}
        for name, path in folders.items():
            if (part := PART_OF.get(name.lower())) is not None:
                named.setdefault(part, {})[name] = path
        # a folder `train` with pictures but no folders in it is a class: there are pictures of trains, too
        if "train" in named and any(self._is_split(path) for path in named["train"].values()):
            self.parts = self._split(folders, named)
        else:
            if folders and sum(map(len, named.values())) == len(folders):
                self._refuse_without_train(list(folders))
            self.parts = {"all": self._classes(folder, folders)}
        first = next(iter(self.parts.values()))
        self.classes = tuple(first)
        if len(self.classes) == 1 and "all" in self.parts:
            self._hint_at_nested()
        if self._nested:
            self.notes.append(
                f"{self._nested:,} pictures are deeper, in folders of class folders: they are of that class"
            )

    @property
    def files(self) -> list[Path]:
        """All pictures, in order."""
        return [file for by_class in self.parts.values() for files in by_class.values() for file in files]

    def _split(self, folders: dict[str, Path], named: dict[Part, dict[str, Path]]) -> dict[str, dict[str, list[Path]]]:
        for part, paths in named.items():
            if len(paths) > 1:
                raise DataError(
                    f"{shown(self._folder)} has {len(paths)} folders for {part}: {', '.join(paths)}",
                    "only one of them can be meant",
                    "rename or remove the others",
                )
        for name, path in folders.items():
            if name.lower() not in PART_OF:
                self.left_out[f"in {name}/, which is not a part"] += _count(path)
        parts: dict[str, dict[str, list[Path]]] = {}
        (train,) = named["train"].values()
        parts["train"] = self._classes(train, self._folders(train))
        classes = tuple(parts["train"])
        for part in ("validation", "test"):
            for name, path in named.get(part, {}).items():
                inner = self._folders(path)
                if not inner:
                    self.notes.append(f"{name}/ has no class folders: it is left out")
                    continue
                by_class = self._classes(path, inner, may_be_empty=True)
                if set(by_class) - set(classes):
                    raise DataError(
                        f"{shown(path)} has the classes {', '.join(by_class)}",
                        f"train has {', '.join(classes)}",
                        "give every part the same classes",
                    )
                if absent := [each for each in classes if not by_class.get(each)]:
                    self.notes.append(f"{name}/ has no pictures of {', '.join(absent[:5])}")
                if any(by_class.values()):
                    parts[part] = {each: by_class.get(each, []) for each in classes}
        missing = [part for part in ("validation", "test") if part not in parts]
        if missing == ["validation", "test"]:
            return {"all": parts["train"]}
        if missing:
            self.notes.append(f"there is no {missing[0]} part: about a tenth of train is held out for it")
        return parts

    def _refuse_without_train(self, names: list[str]) -> None:
        raise DataError(
            f"{shown(self._folder)} has {', '.join(names)}, but no folder train with a folder for each class",
            "a data set that is split needs train, and may have validation and test",
            "name its folders so, or put the class folders side by side to have them split",
        )

    def _hint_at_nested(self) -> None:
        (name,) = self.classes
        inner = self._folder / name
        if (
            inner.is_dir()
            and len([path for path in inner.iterdir() if path.is_dir() and not _is_hidden(path.name)]) > 1
        ):
            raise TaskError(
                f"{shown(self._folder)} has only the class {name!r}",
                "that folder has folders in it, which may be the classes",
                f"name {shown(inner)} itself",
            )

    def _is_split(self, folder: Path) -> bool:
        with explained(f"read {shown(folder)}"):
            return any(path.is_dir() and not _is_hidden(path.name) for path in folder.iterdir())

    def _folders(self, folder: Path) -> dict[str, Path]:
        """The folders in a folder, by their names as text; files beside them are left out."""
        found: dict[str, Path] = {}
        with explained(f"read {shown(folder)}"):
            for path in sorted(folder.iterdir()):
                if _is_hidden(path.name):
                    self.left_out["hidden"] += _count(path)
                elif path.is_dir() and (is_bundle(path) or (path / MARK).is_file()):
                    self.left_out["made by Rushhour"] += _count(path)
                elif path.is_dir() and _identity(path.stat()) in {self._root, _identity(folder.stat())}:
                    self.left_out["circular links"] += 1
                elif path.is_dir():
                    # the same name, however the operating system encodes accents
                    name = unicodedata.normalize("NFC", shown(path.name))
                    if name in found:
                        raise DataError(
                            f"{shown(folder)} has two folders {name!r}",
                            "they differ only in how the operating system encodes accents",
                            "merge them, or rename one",
                        )
                    found[name] = path
                elif path.exists():
                    self.left_out["outside class folders"] += 1
                else:
                    self.left_out["broken links"] += 1
        return found

    def _classes(self, folder: Path, folders: dict[str, Path], *, may_be_empty: bool = False) -> dict[str, list[Path]]:
        """Class -> its pictures, both in order of their names."""
        found: dict[str, list[Path]] = {}
        for name, path in folders.items():
            with explained(f"read {shown(path)}"):
                above = frozenset(map(_identity, (self._folder.stat(), folder.stat(), path.stat())))
                found[name] = self._pictures(path, above)
        if not found:
            tables = [path for path in sorted(folder.iterdir()) if is_table_file(path)]
            put = f"put the pictures of each class into {shown(folder)}/CLASS/"
            raise DataError(
                f"{shown(folder)} has no classes",
                "it holds no folders",
                f"for the table in it name {shown(tables[0])}" if tables else put,
            )
        for name, pictures in found.items():
            if not pictures and not may_be_empty:
                raise DataError(
                    f"the class {name!r} in {shown(folder)} is empty",
                    f"it has no file that ends in {', '.join(sorted(SUFFIXES))}",
                    "add pictures, or remove the folder",
                )
        return found

    def _pictures(self, folder: Path, above: frozenset[tuple[int, int]], depth: int = 0) -> list[Path]:
        """All pictures below a class's folder; `above` are the folders that contain it, and itself."""
        found: list[Path] = []
        for path in sorted(folder.iterdir()):
            if _is_hidden(path.name):
                self.left_out["hidden"] += _count(path)
                continue
            try:
                about = path.stat()
            except OSError:
                self.left_out["broken links"] += 1
                continue
            if stat.S_ISDIR(about.st_mode):
                if _identity(about) in above:
                    self.left_out["circular links"] += 1
                else:
                    inner = self._pictures(path, above | {_identity(about)}, depth + 1)
                    self._nested += 0 if depth else len(inner)
                    found += inner
            elif not stat.S_ISREG(about.st_mode):
                self.left_out["pipes, sockets or devices"] += 1
            elif path.suffix.lower() not in SUFFIXES:
                self.left_out[shown(path.suffix.lower()) or "without a suffix"] += 1
            else:
                found.append(path)
        return found


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _LITTER


def _identity(about: os.stat_result) -> tuple[int, int]:
    return about.st_dev, about.st_ino


def _count(path: Path) -> int:
    """Files at or below a path, links not followed."""
    if path.is_symlink() or not path.is_dir():
        return 1
    return sum(len(files) + sum((Path(at) / each).is_symlink() for each in folders)
               for at, folders, files in os.walk(path))  # fmt: skip


def _short(left_out: Counter[str]) -> dict[str, int]:
    """The same, with the few most frequent suffixes of file names alone."""
    endings = [reason for reason, _ in left_out.most_common() if reason.startswith(".")]
    rare = endings[_NAMED_KINDS:]
    short = {reason: count for reason, count in left_out.most_common() if count and reason not in rare}
    return short | ({"of other kinds": sum(left_out[reason] for reason in rare)} if rare else {})


def _changes(tally: Tally, read_: int, shape: tuple[int, int, int], *, is_asked: bool, model: str | None) -> list[str]:
    """How the pictures were changed beyond what was asked for."""
    height, width, _ = shape
    notes = []
    if tally.resized and not is_asked:
        stretched = f", which stretches {tally.stretched:,} of them" if tally.stretched else ""
        notes.append(
            f"{tally.resized:,} of {read_:,} pictures have another size than {height}x{width} (height x width): they "
            f"are resized to it{stretched}; {'--size HxW sets another' if model is None else f'{model} takes that'}"
        )
    if tally.deep and tally.decoding.deep != Decoding().deep:
        notes.append(f"{tally.deep:,} pictures have 16 bits of grey: {tally.decoding.deep} is taken as white")
    if tally.real:
        notes.append(f"{tally.real:,} pictures are in floats: {tally.decoding.real:g} is taken as white")
    if tally.greyed:
        notes.append(f"{tally.greyed:,} pictures are converted to grey")
    if tally.framed:
        notes.append(f"{tally.framed:,} pictures have several frames: the first is read")
    for part, count in tally.repeated.items():
        notes.append(f"{count:,} pictures of the part {part} are in train too: they show nothing new")
    if tally.contradicting:
        one, other = tally.contradiction
        notes.append(
            f"{tally.contradicting:,} pictures are in several classes, such as {one} and {other}: a picture has one "
            "label"
        )
    return notes
