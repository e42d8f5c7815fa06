"""ELPV: 2,624 solar cells in electroluminescence, 300x300 grey, from 44 modules (Buerhop-Lutz et al. 2018).

The pictures come with the PyPI package `elpv-dataset`; nothing is downloaded. Their licence is CC BY-NC-SA 4.0: not for
commercial use, so the package is an extra and never a dependency.
"""

from __future__ import annotations

import dataclasses
import importlib.util
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Decoding
from rushhour.data.arrays import from_splits
from rushhour.data.dataset import Dataset, Split
from rushhour.data.splits import stratified
from rushhour.errors import DataError
from rushhour.picture import decode
from rushhour.system.machine import cores

CLASSES = ("functional", "defective")
SIDE = 96
_PACKAGE = "elpv_dataset"
_PICTURES = 2_624
_MAX_PIXELS = 300 * 300
_VALIDATION, _TEST = 0.15, 0.25


def elpv(*, size: tuple[int, int] | None = None, seed: int = 0) -> Dataset:
    """1,574 / 394 / 656 pictures, uint8 `(n, height, width, 1)`, functional or defective.

    A cell counts as defective where its annotated probability of a defect is above one half: 2/3 (defective, the
    annotator was not sure) and 1 do, 0 and 1/3 do not. A quarter is for testing. Both as in Deitsch et al. (Solar
    Energy 185, 2019), who also give the unsure ones less weight; here all have the same. Every part has its share of
    each probability and of mono- and polycrystalline cells. The module of a cell is not annotated, so cells of one
    module may be in several parts.

    Args:
        size: height and width of the samples; 96x96 by default.
        seed: of the split.

    Raises:
        DataError: if the package is not installed, or is damaged.
    """
    folder = _folder()
    names, probabilities, kinds = _annotations(folder)
    pictures = np.empty((len(names), *(size or (SIDE, SIDE)), 1), np.uint8)

    def read(index: int) -> None:
        try:
            decode(folder / names[index], pictures[index], max_pixels=_MAX_PIXELS)
        except DataError as error:
            raise _damaged(f"{names[index]}: {error.why}") from error

    with ThreadPoolExecutor(cores()) as pool:
        for _ in pool.map(read, range(len(names))):
            pass
    stratum = np.rint(3 * probabilities).astype(np.int64) * 2 + (kinds == "poly")
    rows = np.arange(len(names))[:, np.newaxis]
    parts = [part.inputs[:, 0] for part in stratified(Split(rows, stratum), (_VALIDATION, _TEST), seed=seed)]
    defective = (probabilities > 0.5).astype(np.int64)
    train, validation, test = (Split(pictures[part], defective[part]) for part in parts)
    data = from_splits("elpv", train, validation, test, classes=CLASSES)
    return dataclasses.replace(data, preprocessing=msgspec.structs.replace(data.preprocessing, decoding=Decoding()))


def _folder() -> Path:
    """The folder of the package's pictures; it is found, not imported."""
    spec = importlib.util.find_spec(_PACKAGE)
    places = spec.submodule_search_locations if spec else None
    if not places:
        raise DataError(
            "the ELPV pictures are not installed",
            "their licence, CC BY-NC-SA 4.0, forbids commercial use, so they do not come with Rushhour",
            "if you accept it, run `pip install 'rushhour[elpv]'`",
        )
    return Path(next(iter(places))) / "data"


def _annotations(folder: Path) -> tuple[list[str], NDArray[np.float64], NDArray[np.str_]]:
    """Of every picture its file, the probability of a defect, and `mono` or `poly`."""
    try:
        lines = [line.split() for line in (folder / "labels.csv").read_text().splitlines() if line.strip()]
        names, probabilities, kinds = zip(*lines, strict=True)
        chances = np.array([float(value) for value in probabilities])
    except (OSError, ValueError) as error:
        raise _damaged(f"labels.csv: {error}") from error
    if len(names) != _PICTURES or not ((chances >= 0) & (chances <= 1)).all():
        raise _damaged(f"it has {len(names)} annotated pictures, not {_PICTURES:,}")
    return list(names), chances, np.array(kinds)


def _damaged(why: str) -> DataError:
    return DataError(
        "the ELPV pictures cannot be used", why, "run `pip install --force-reinstall --no-deps elpv-dataset`"
    )
