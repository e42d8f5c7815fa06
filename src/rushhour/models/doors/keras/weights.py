"""The HDF5 file of a Keras model, checked before Keras reads it: plain arrays, and all of them inside it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, Final

from rushhour.errors import ModelError

MAGIC: Final = b"\x89HDF\r\n\x1a\n"
_MOST_OBJECTS: Final = 200_000
_PLAIN: Final = "biufS"
"""Kinds of numbers, and fixed strings; `V` beside them is bfloat16."""


def check_weights(file: Path | io.BytesIO, shown: str) -> None:
    """Raise unless a file holds only arrays of numbers.

    Raises:
        ModelError: if it is damaged, refers to other files, or is compressed.
    """
    import h5py

    size = file.stat().st_size if isinstance(file, Path) else len(file.getbuffer())
    try:
        with h5py.File(file, "r") as opened:
            _check(h5py, opened, size, shown)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise _refused(shown, f"its weights cannot be read: {error}") from error


def _check(h5py: Any, opened: Any, size: int, shown: str) -> None:
    pending, seen, held = [opened["/"]], set(), 0
    while pending:
        group = pending.pop()
        for name in group:
            link = group.get(name, getlink=True)
            if not isinstance(link, h5py.HardLink):
                raise _refused(shown, f"its part {name!r} is a link to {_target(link)}")
            each = group[name]
            key = h5py.h5o.get_info(each.id).addr
            if key in seen:
                continue
            seen.add(key)
            if len(seen) > _MOST_OBJECTS:
                raise _refused(shown, f"it has more than {_MOST_OBJECTS:,} parts")
            if isinstance(each, h5py.Group):
                pending.append(each)
            elif isinstance(each, h5py.Dataset):
                _check_array(each, name, shown)
                held += each.nbytes
            else:
                raise _refused(shown, f"its part {name!r} is no array")
            if held > size:
                raise _refused(shown, f"its weights take {held:,} bytes, and it has {size:,}")


def _check_array(array: Any, name: str, shown: str) -> None:
    if array.external or array.is_virtual:
        raise _refused(shown, f"the data of its part {name!r} is in another file")
    if array.shape is None or (array.dtype.kind not in _PLAIN and array.dtype.str != "|V2"):
        raise _refused(shown, f"its part {name!r} holds {array.dtype}, and weights are numbers")
    if array.id.get_create_plist().get_nfilters():  # a filter may unpack a byte to thousands
        raise _refused(shown, f"its part {name!r} is compressed, which Keras does not do")


def _target(link: Any) -> str:
    file = getattr(link, "filename", None)
    return f"the file {file}" if file else f"{getattr(link, 'path', 'elsewhere')}"


def _refused(shown: str, why: str) -> ModelError:
    return ModelError(f"will not load {shown}", why, "save the model again with model.save(...)")
