"""Samples of several inputs: the order of their fields, and their types, as a model takes them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rushhour.bundle import Signature, TensorSpec, joined
from rushhour.errors import DataError


def ordered(samples: NDArray[Any], names: Sequence[str]) -> NDArray[Any]:
    """Structured samples with their fields in this order."""
    return samples if samples.dtype.names == tuple(names) else joined({name: samples[name] for name in names})


def as_taken(samples: NDArray[Any], signature: Signature, *, model: str, data: str) -> NDArray[Any]:
    """Samples as a model takes them: fields in the order of its inputs, numbers in their types.

    Args:
        samples: `(n, *shape)`, or a structured array with a field for each input.
        signature: of the model.
        model: its name, for messages.
        data: the name of the data, for messages.

    Returns:
        The same array where nothing has to change; samples of a single input are not looked at.

    Raises:
        DataError: if an input is missing or unknown, or has another shape, or numbers that the model's type cannot
            hold.
    """
    specs, names = signature.inputs, samples.dtype.names
    if names is None and len(specs) == 1:
        return samples
    wanted = [spec.name for spec in specs]
    if names is None or set(names) != set(wanted):
        raise DataError(
            f"{data} does not fit the model {model}",
            f"the model takes {_listed(wanted)}, and a sample has {_listed(names)}{_difference(names, wanted)}",
            "give an array for each input, by its name, with a row for each sample",
        )
    if names == tuple(wanted) and all(_is_as_taken(samples, spec, signature) for spec in specs):
        return samples
    return joined({spec.name: _converted(samples[spec.name], spec, signature, model, data) for spec in specs})


def _listed(names: Sequence[str] | None) -> str:
    if names is None:
        return "one array"
    return f"{len(names)} inputs ({', '.join(names)})" if len(names) > 1 else f"one input ({names[0]})"


def _difference(names: Sequence[str] | None, wanted: Sequence[str]) -> str:
    missing = [each for each in wanted if names is not None and each not in names]
    return f": {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing" if missing else ""


def _is_as_taken(samples: NDArray[Any], spec: TensorSpec, signature: Signature) -> bool:
    column = samples[spec.name]
    return column.dtype == spec.dtype and not _why_not(column, spec, signature)


def _converted(column: NDArray[Any], spec: TensorSpec, signature: Signature, model: str, data: str) -> NDArray[Any]:
    why = _why_not(column, spec, signature)
    if why:
        raise DataError(
            f"{data} does not fit the model {model}",
            f"its input {spec.name} takes {why}",
            "give the data that the model was made for",
        )
    return column.astype(spec.dtype, copy=False)


def _why_not(column: NDArray[Any], spec: TensorSpec, signature: Signature) -> str:
    """Why numbers cannot be given to an input; empty where they can. No number may change but by rounding."""
    if not signature.takes(spec, column.shape[1:]):
        shown = signature.described(spec) if signature.dimensions else spec.shape
        return f"samples of shape {shown}, and these have {column.shape[1:]}"
    to, low, high = np.dtype(spec.dtype), column.min(initial=0), column.max(initial=0)
    if to.kind in "iu" and column.dtype.kind in "iu":
        limits = np.iinfo(to)
        below = spec.below if isinstance(spec.below, int) else limits.max + 1
        least = 0 if isinstance(spec.below, int) else limits.min
        return "" if least <= low and high < below else f"whole numbers below {below:,}, and these are {low} to {high}"
    if column.dtype.kind == to.kind or (column.dtype.kind in "biu" and column.dtype != np.uint8 and to.kind == "f"):
        return ""
    if column.dtype.kind == "b" and to.kind in "iu":
        return ""
    scaled = " (pixels that are scaled as for its training)" if column.dtype == np.uint8 and to.kind == "f" else ""
    return f"{to}{scaled}, and these are {column.dtype}"
