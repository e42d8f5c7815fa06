"""Whether answers are valid: in form, and where it is asked for, in content."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from rushhour.errors import WireError
from rushhour.load.generator.job import Job
from rushhour.wire import json_of

Decode = Callable[[bytes, int | None], Mapping[str, NDArray[Any]]]
"""Output name -> array, of a body and the length of its JSON header."""

_MOST_LENGTHS = 64
"""Lengths of bodies that are each decoded once. A server whose answers have more lengths writes numbers as text: of
further ones it is only checked that they have outputs."""
_OUTPUTS = b'"outputs"'


class AnswerCheck:
    """Checks the answers of one run.

    Args:
        job: its outputs, the answers it expects and their tolerance.
        decode: of the protocol.
    """

    def __init__(self, job: Job, decode: Decode) -> None:
        self._outputs = job.outputs
        self._tolerance = job.tolerance
        self._decode = decode
        self._is_given = bool(job.expected)
        self._expected: dict[int, tuple[bytes, int | None]] = {
            position: (body, None) for position, body in enumerate(job.expected)
        }
        self._with_numbers: set[int] = set()
        self._valid: set[tuple[int, int | None]] = set()

    def fault_of(self, body: bytes, header_length: int | None) -> str:
        """Why a body is not a valid answer; empty if it is. One body of each length is decoded: answers to requests of
        one shape that have the same length have the same form."""
        key = (len(body), header_length)
        if self._outputs is None or key in self._valid:
            return ""
        many = len(self._valid) >= _MOST_LENGTHS
        if many and (header_length is not None or _OUTPUTS in body):
            return ""
        try:
            outputs = self._decode(body, header_length)
        except (WireError, RecursionError) as error:
            return getattr(error, "why", str(error))
        missing = [name for name in self._outputs if name not in outputs]
        if missing:
            return f"it has no output {missing[0]!r}"
        if not many:
            self._valid.add(key)
        return ""

    def deviation(self, position: int, body: bytes, header_length: int | None) -> str:
        """What is wrong with the content of an answer; empty if nothing is.

        Args:
            position: of the request. Where no answer is expected beforehand, its first answer becomes the expected one.
            body: of the answer.
            header_length: as in `Decode`.
        """
        expected, its_header = self._expected.setdefault(position, (body, header_length))
        if its_header is None:  # an answer given beforehand has no header length of its own
            its_header = header_length
        if position not in self._with_numbers:
            if self._is_void(expected, its_header):
                if not self._is_given:
                    del self._expected[position]
                return "holds no finite number"
            self._with_numbers.add(position)
        if body == expected:
            return ""
        if self._outputs is not None:
            try:
                right, given = self._decode(expected, its_header), self._decode(body, header_length)
                if _equal_within(right, given, self._tolerance):
                    return ""
            except (WireError, RecursionError):
                pass
        return "is not the one expected"

    def _is_void(self, body: bytes, header_length: int | None) -> bool:
        """Whether an output has only NaN and infinities: a broken model answers so to every request."""
        try:
            if self._outputs is None:
                return _has_void(json_of(body))
            outputs = self._decode(body, header_length)
        except (WireError, msgspec.DecodeError, RecursionError):
            return False
        return any(each.dtype.kind == "f" and each.size and not np.isfinite(each).any() for each in outputs.values())


def _equal_within(right: Mapping[str, NDArray[Any]], given: Mapping[str, NDArray[Any]], tolerance: float) -> bool:
    """Whether two answers are equal: floats up to a share of the largest in their output, all else exactly."""
    if right.keys() != given.keys():
        return False
    for name, wanted in right.items():
        found = given[name]
        if wanted.shape != found.shape or wanted.dtype != found.dtype:
            return False
        if wanted.dtype.kind != "f":
            if not np.array_equal(wanted, found):
                return False
            continue
        finite = np.isfinite(wanted)
        if not np.array_equal(finite, np.isfinite(found)):
            return False
        if not np.array_equal(wanted[~finite], found[~finite], equal_nan=True):
            return False
        numbers = wanted[finite].astype(np.float64)
        if numbers.size and np.abs(found[finite] - numbers).max() > tolerance * np.abs(numbers).max():
            return False
    return True


def _has_void(answer: object) -> bool:
    """Whether a value in an answer of any form is numbers, none of which is finite."""
    waiting = [answer]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            waiting += value.values()
            continue
        leaves = value if isinstance(value, list) else [value]
        while any(isinstance(each, list) for each in leaves):
            leaves = [leaf for each in leaves for leaf in (each if isinstance(each, list) else [each])]
        numbers = [each for each in leaves if isinstance(each, float | int) and not isinstance(each, bool)]
        if numbers and not any(isinstance(each, int) or math.isfinite(each) for each in numbers):
            return True
        waiting += [each for each in leaves if isinstance(each, dict)]
    return False
