"""Errors that a user can cause. Each says three things in one line: what happened, why, and what to do.

RushhourError
├── GoalError        an SLO, accuracy budget, workload or option that cannot be read or used
├── DataError        missing, damaged or unusable data
├── TaskError        a model and a task that do not fit each other
├── BundleError      a bundle that is missing, damaged or of an unknown form
├── PlanError        a plan that is missing, damaged or of a newer schema
├── ModelError       a model that cannot be built, exported or trained
├── EngineError      an engine that is not installed, or cannot run a graph
├── WireError        a request or an answer that is not valid Open Inference Protocol (has an HTTP status)
├── ServeError       a server that cannot start (port in use, no permission, ...)
├── LoadError        a load test that cannot be run or trusted
├── InstallError     a package that is not installed
└── StorageError     a disk that is full, read-only or missing
"""

from __future__ import annotations

import re

_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control characters, those that turn the direction of a line, and halves of characters."""


def one_line(text: str) -> str:
    """A text as one line of a terminal: names in a user's files may hold line breaks and escape sequences."""
    return _UNSHOWN.sub(lambda found: ascii(found[0])[1:-1], " ".join(text.split()))


class RushhourError(Exception):
    """An error with its reason and its remedy; the command line prints it as one line and exits with 2.

    Args:
        what: what happened, naming the value at fault.
        why: the reason, or the rule that was broken.
        fix: what the reader can do now.
    """

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        self.what = what
        self.why = why
        self.fix = fix
        super().__init__(what, why, fix)

    def __str__(self) -> str:
        line = self.what
        if self.why:
            line += f": {self.why}"
        if self.fix:
            line += f"; {self.fix}"
        return one_line(line)


class GoalError(RushhourError):
    """An SLO, accuracy budget, workload or option that cannot be read or used."""


class DataError(RushhourError):
    """Missing, damaged or unusable data."""


class TaskError(RushhourError):
    """A model and a task that do not fit each other."""


class BundleError(RushhourError):
    """A bundle that is missing, damaged or of an unknown form."""


class PlanError(RushhourError):
    """A plan that is missing, damaged or of a newer schema."""


class ModelError(RushhourError):
    """A model that cannot be built, exported or trained."""


class EngineError(RushhourError):
    """An engine that is not installed, or cannot run a graph."""


class WireError(RushhourError):
    """A request or an answer that is not valid Open Inference Protocol.

    Args:
        status: the HTTP status a server answers with.
    """

    def __init__(self, what: str, why: str = "", fix: str = "", *, status: int = 400) -> None:
        super().__init__(what, why, fix)
        self.status = status


class ServeError(RushhourError):
    """A server that cannot start or keep running."""


class LoadError(RushhourError):
    """A load test that cannot be run or trusted."""


class InstallError(RushhourError):
    """A package that is not installed."""


class StorageError(RushhourError):
    """A disk that is full, read-only or missing."""
