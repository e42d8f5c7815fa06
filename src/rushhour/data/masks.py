"""Class maps in files: `images/` and `masks/`, a picture of labels for each picture."""

from __future__ import annotations

from pathlib import Path

from rushhour.data.annotations import Annotated, Annotations, names_in, paired
from rushhour.data.decoded import shown
from rushhour.errors import DataError


def read_masks(folder: Path) -> Annotations:
    """The pictures of a folder and the files of their class maps; names of classes in `classes.txt`, if it is there.

    Raises:
        DataError: if a picture has no class map.
    """
    parts: dict[str, list[Annotated]] = {}
    for part, pairs in paired(folder, "masks").items():
        missing = [picture for picture, mask in pairs if mask is None]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(pairs)} pictures in {shown(folder)} have no class map",
                f"{shown(missing[0].name)} is one of them, and masks/ has no file of that name",
                "add masks/NAME.png, with a label for each pixel, or remove the picture",
            )
        parts[part] = [Annotated(picture, mask) for picture, mask in pairs if mask is not None]
    return Annotations(parts, names_in(folder))
