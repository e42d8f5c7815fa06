"""Where the trials of a search are built: on this machine, or on the nodes of a cluster."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from rushhour.api.inputs import load_data
from rushhour.api.values import StrPath
from rushhour.bundle import Bundle, Source
from rushhour.errors import GoalError
from rushhour.progress import Progress, Silent

if TYPE_CHECKING:
    from rushhour.compress import Builder
    from rushhour.data import Dataset


class NamedData(msgspec.Struct, frozen=True):
    """Data that a node reads by its name, as this machine has read it.

    Attributes:
        name: as of `rushhour.data.load`; a path is absolute.
        model: the network that it is for; None where that is the bundle which the node is given.
        reading: the other arguments of `load_data`.
    """

    name: str
    model: str | Source | None
    reading: dict[str, Any]

    def __call__(self, bundle: Bundle | None) -> Dataset:
        """Read it."""
        model = bundle if self.model is None else self.model
        return load_data(self.name, Silent(), "" if model is None else model, **self.reading)


@contextlib.contextmanager
def built_by(
    cluster: str | None,
    dataset: Dataset,
    progress: Progress,
    *,
    given: Any,
    model: str | Source | Bundle,
    reading: dict[str, Any] | None,
) -> Iterator[Builder | None]:
    """The builder of a search's trials; None for this machine.

    Args:
        cluster: `HOST:PORT` of a Ray cluster, `auto` for the one that runs on this machine, or None.
        dataset: that was read.
        progress: hears which nodes take part.
        given: the data as the user gave it: what has a name is read on each node, all else is sent.
        model: that it was read for.
        reading: the other arguments of `load_data`; None where the data set is not what they give.

    Raises:
        InstallError: if Ray is not installed.
        GoalError: if no Ray answers, or none of its nodes can build.
        DataError: if no node has the data.
    """
    if cluster is None:
        yield None
        return
    if not isinstance(cluster, str) or not cluster:
        raise GoalError(f"cannot use the cluster {cluster!r}", "it is HOST:PORT, or auto", 'write for example "auto"')
    from rushhour.cluster.trials import trial_builder

    bundle = model if isinstance(model, Bundle) else None
    load = None
    if reading is not None and isinstance(given, str | os.PathLike):
        load = NamedData(_absolute(given), None if isinstance(model, Bundle) else model, reading)
    with trial_builder(cluster, dataset, progress, load=load, model=bundle if load is not None else None) as builder:
        yield builder


def _absolute(data: StrPath) -> str:
    """A path as other processes find it; a name of something else as it is."""
    name = os.path.expanduser(os.fspath(data))
    return os.path.abspath(name) if Path(name).exists() else name
