"""What users have in place of numpy arrays: lists, tensors, tables. Nothing that it means is lost in silence."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.errors import DataError


def to_array(what: str, values: Any) -> NDArray[Any]:
    """Values as an array.

    Args:
        what: names them in messages.
        values: an array, a list of numbers, a torch tensor, a table: all that numpy reads.

    Raises:
        DataError: if it is no array, or has what an array cannot: masked or sparse values, rows of several lengths.
    """
    if isinstance(values, np.ma.MaskedArray) and np.ma.is_masked(values):
        raise DataError(
            f"{what} has {int(np.ma.getmaskarray(values).sum()):,} masked values",
            "a plain array has no mask, so they would count like all others",
            "fill them (.filled(0)), or remove their samples",
        )
    if hasattr(values, "toarray"):
        raise DataError(f"{what} is sparse", "training takes dense arrays", "convert it with .toarray()")
    try:
        if hasattr(values, "detach"):
            values = values.detach().cpu()
            values = values.float() if str(values.dtype) == "torch.bfloat16" else values
        array = np.asarray(values)
    except Exception as error:  # a user's object may fail in any way
        raise DataError(f"cannot read {what} as an array", str(error), "give numbers of one shape") from error
    if array.ndim == 0:
        raise DataError(
            f"cannot read {what} as an array", f"it is a {type(values).__name__}", "give a list or an array"
        )
    return array
