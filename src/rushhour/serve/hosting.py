"""Which models a server has: their names and weights, where they are, and whether memory holds them together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import msgspec

from rushhour.errors import ServeError
from rushhour.serve.settings import Served
from rushhour.serve.target import Target, is_target, needed_bytes, open_planned, open_target
from rushhour.system.machine import describe
from rushhour.system.storage import explained

_GIB: Final = 2**30


class Folder:
    """A repository on disk: each folder in it is a run or a bundle, and its name is the model's.

    Hidden folders and files are none.

    Args:
        path: of the repository.
        weights: of models, by their names; 1 for all others.
    """

    def __init__(self, path: Path, weights: Mapping[str, float] | None = None) -> None:
        self._path = path
        self._weights = weights or {}

    def names(self) -> list[str]:
        """The models that are there now, in order."""
        try:
            found = [each.name for each in self._path.iterdir() if not each.name.startswith(".") and is_target(each)]
        except OSError:
            return []
        return sorted(found)

    def find(self, name: str) -> tuple[Served, Target]:
        """A model, as it is there now, and what is read of it.

        Raises:
            ServeError: if it is not there.
            PlanError, BundleError: as `open_target`.
        """
        if name not in self.names():
            raise ServeError(f"there is no model {name[:100]!r} in {self._path}", "", "see the index of the repository")
        path = self._path / name
        target = open_target(path)
        return Served(str(path), name, self._weights.get(name, 1.0)), target

    def all(self, loaded: Sequence[str] = ()) -> tuple[Served, ...]:
        """All models that are there.

        Args:
            loaded: the names of those that are loaded at the start; all where there are none.

        Raises:
            ServeError: if it cannot be read, a folder in it is no model, or one of the names is not there.
        """
        if not self._path.is_dir():
            why = "it is a file" if self._path.exists() else "it does not exist"
            raise ServeError(f"there is no repository at {self._path}", why, "give a folder of runs and bundles")
        with explained(f"read {self._path}"):
            folders = sorted(each for each in self._path.iterdir() if each.is_dir() and not each.name.startswith("."))
        for each in folders:
            if not is_target(each):
                why = "it has neither a bundle.json nor a plan.json"
                raise ServeError(f"{each} is no model", why, "move it out of the repository, or `rushhour import` it")
        if not folders:
            why = "it has no folder in it"
            raise ServeError(f"there is no model in {self._path}", why, "give a folder of runs and bundles")
        names = [each.name for each in folders]
        for name in loaded:
            _check_there(name, names, "--load-model")
        for name in self._weights:
            _check_there(name, names, "--weight")
        return tuple(
            Served(str(each), each.name, self._weights.get(each.name, 1.0), bool(loaded) and each.name not in loaded)
            for each in folders
        )


def hosted(
    paths: Sequence[Path], names: Sequence[str] = (), weights: Mapping[str, float] | None = None
) -> tuple[Served, ...]:
    """The models of a server, in the order of their paths.

    Args:
        paths: of runs, plans and bundles.
        names: for clients, in the same order; the models' own where there are none.
        weights: by these names; 1 for all others.

    Raises:
        ServeError: if two have the same name, or names or weights do not fit the paths.
        PlanError, BundleError: as `open_target`.
    """
    if names and len(names) != len(paths):
        raise ServeError(
            f"there are {len(names)} names for {len(paths)} models", "each needs one", "give --model-name once for each"
        )
    targets = [open_target(path) for path in paths]  # what is wrong with one is said now
    names = list(names) or [target.name for target in targets]
    for name, count in Counter(names).items():
        if count > 1:
            both = " and ".join(str(path) for path, other in zip(paths, names, strict=True) if other == name)
            raise ServeError(f"two models have the name {name}", both, "give --model-name once for each of the models")
    for name in weights or {}:
        _check_there(name, names, "--weight")
    return tuple(
        Served(str(path), name, (weights or {}).get(name, 1.0)) for path, name in zip(paths, names, strict=True)
    )


def _check_there(name: str, names: Sequence[str], option: str) -> None:
    if name not in names:
        said = f"the models are {', '.join(names)}" if names else "there are no models"
        raise ServeError(f"{option} names {name!r}, which is no model of this server", said, "correct the name")


def open_served(served: Served) -> Target:
    """The target of one of a server's models: what its plan names, or what is at its path.

    Raises:
        PlanError, BundleError: as `open_target`.
    """
    if served.plan is None:
        return open_target(Path(served.path))
    return open_planned(Path(served.path), served.plan, Path(served.folder))


def with_plan(served: Served, target: Target) -> Served:
    """The same for worker processes: they serve this target, whatever is at its path by then."""
    plan = msgspec.structs.replace(target.plan, evidence=None)
    return msgspec.structs.replace(served, plan=plan, folder=str(target.folder))


def check_memory(targets: Mapping[str, Target], cells: int) -> None:
    """Refuse models that memory cannot hold together.

    Args:
        targets: that are loaded, by the names of the models.
        cells: worker processes, each of which loads all of them.

    Raises:
        ServeError: naming the largest.
    """
    each = {name: cells * needed_bytes(target) for name, target in targets.items()}
    needed, memory = sum(each.values()), describe().memory_gb * _GIB
    if memory and needed > memory / 2:
        largest = max(each, key=each.__getitem__)
        raise ServeError(
            f"{len(each)} models cannot be served together here",
            f"they need about {needed / _GIB:.3g} GiB in {cells} worker processes, {largest} {each[largest] / _GIB:.3g}"
            f" of it, and this machine has {memory / _GIB:.3g}",
            "serve fewer on this machine, with fewer --cells, or load only some with --load-model",
        )
