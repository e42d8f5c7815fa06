"""The worker on a node: it builds one recipe after another, in a store of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Final

from rushhour.bundle import Bundle
from rushhour.cluster.node_folder import locked, own_folder
from rushhour.cluster.trials.packing import Arrays, Facts, Loader, Made, Order, PackedBundle, pack, unpack
from rushhour.compress import Store, apply, maker
from rushhour.data import Dataset
from rushhour.errors import RushhourError
from rushhour.progress import Silent
from rushhour.system.faults import summary_of
from rushhour.system.machine import cores
from rushhour.system.storage import explained

_LOCK: Final = ".lock"


class TrialWorker:
    """A process on a node, an actor of Ray. Its store lives as long as it."""

    def __init__(self) -> None:
        self._folder, self._lock = _new_folder()
        self._store = Store(self._folder / "store")
        self._dataset: Dataset | None = None

    def facts(self) -> Facts:
        """What this worker is."""
        return Facts(os.getpid(), maker())

    def take(self, given: Arrays | Loader, name: str, content_key: str, model: PackedBundle | None) -> str:
        """Take the data set that all recipes are built with.

        Args:
            given: the arrays, or what reads them here.
            name: of the data set at the head.
            content_key: that it has to have.
            model: that it is read for, where it is a bundle.

        Returns:
            Why it cannot be used; empty where it can.
        """
        try:
            if isinstance(given, Arrays):
                found = given.written(self._folder / "data")
            else:
                found = given(None if model is None else unpack(model, self._folder / "model"))
        except RushhourError as error:
            return str(error)
        except Exception as error:  # a user's own data may fail in any way
            return summary_of(error)
        if found.content_key != content_key:
            return f"{name} has another content there"
        self._dataset = dataclasses.replace(found, name=name)
        return ""

    def build(self, order: Order, reference: PackedBundle, *known: PackedBundle) -> Made:
        """Build a recipe.

        Args:
            order: the recipe.
            reference: what it is applied to.
            known: the bundles of its first steps, which are not made again.
        """
        import torch

        assert self._dataset is not None
        torch.set_num_threads(cores())  # Ray allows one
        began, made = time.monotonic(), list[PackedBundle]()
        try:
            bundle = self._unpacked(reference, self._folder / "references" / reference.sha256[:24])
            for packed in known:
                self._unpacked(packed, self._store.path(packed.name))
            given = {packed.name for packed in known}
            for made_bundle in apply(
                order.recipe,
                bundle,
                self._dataset,
                self._store,
                seed=order.seed,
                max_drop=order.max_drop,
                progress=Silent(),
                trusted=order.trusted,
            ):
                if made_bundle.path.name not in given:
                    made.append(pack(made_bundle))
        except RushhourError as error:
            return Made(tuple(made), time.monotonic() - began, str(error))
        except Exception as error:  # a user's network may fail in any way
            return Made(tuple(made), time.monotonic() - began, summary_of(error))
        return Made(tuple(made), time.monotonic() - began)

    def clean(self) -> None:
        """Remove the store: this worker ends."""
        shutil.rmtree(self._folder, ignore_errors=True)

    @staticmethod
    def _unpacked(packed: PackedBundle, path: Path) -> Bundle:
        with contextlib.suppress(RushhourError):
            return Bundle.open(path)
        return unpack(packed, path)


def _new_folder() -> tuple[Path, int]:
    """A new folder of this process, and the handle that locks it. Those of processes that were killed are removed.

    Raises:
        StorageError: if it cannot be made, or another user can write there.
    """
    above = own_folder("trials")
    with explained(f"make a folder in {above}"):
        for other in above.iterdir():
            if (handle := _left(other)) is not None:
                shutil.rmtree(other, ignore_errors=True)
                os.close(handle)
        folder = Path(tempfile.mkdtemp(dir=above, prefix="."))
        handle = locked(folder / _LOCK)
        assert handle is not None, "nobody else knows of it"
        visible = folder.with_name(folder.name.removeprefix("."))
        folder.rename(visible)  # locked by now: nobody removes it
    return visible, handle


def _left(folder: Path) -> int | None:
    """The handle of the lock of a folder that a dead process left; None where it lives, or is just being made."""
    if folder.name.startswith("."):
        return None
    try:
        return locked(folder / _LOCK, create=False)
    except OSError:
        return None
