"""A run as one package: plan and bundles, named by its hash, opened with every byte checked. Never a pickle."""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import tempfile
import zipfile
from pathlib import Path, PurePosixPath
from typing import Final

from rushhour.cluster.deployment import Deployment, write_run
from rushhour.errors import BundleError
from rushhour.plan import PLAN
from rushhour.system.storage import explained

_TIME: Final = (1980, 1, 1, 0, 0, 0)
_COMPLETE: Final = ".complete"


def pack(deployment: Deployment) -> bytes:
    """Plan and bundles of a deployment; equal runs give equal bytes.

    Raises:
        StorageError: if a file cannot be read.
    """
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory(prefix="rushhour-") as temporary, explained("read the run"):
        folder = Path(temporary) / "run"
        folder.mkdir()
        write_run(folder, deployment)
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:  # weights do not get smaller
            for file in sorted(path for path in folder.rglob("*") if path.is_file()):
                entry = zipfile.ZipInfo(file.relative_to(folder).as_posix(), _TIME)
                archive.writestr(entry, file.read_bytes())
    return packed.getvalue()


def plan_of(package: bytes) -> str:
    """The SHA-256 of the plan's file in a package."""
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        return digest(archive.read(PLAN))


def digest(content: bytes) -> str:
    """The SHA-256 in hexadecimal."""
    return hashlib.sha256(content).hexdigest()


def unpack(package: bytes, sha256: str, into: Path) -> Path:
    """The run's folder, `into` / its hash. One that is complete there is used again.

    Args:
        package: from `pack`.
        sha256: that it must have.
        into: the folder of runs on this machine, for this user alone.

    Raises:
        BundleError: if the package is another one, or names a file outside its folder.
        StorageError: if it cannot be written.
    """
    folder = into / sha256
    if (folder / _COMPLETE).is_file():
        return folder
    if digest(package) != sha256:
        why = f"its SHA-256 begins with {digest(package)[:12]}, not with {sha256[:12]}"
        raise BundleError("the package of the run is damaged", why, "deploy it again")
    with explained(f"write {folder}"):
        temporary = Path(tempfile.mkdtemp(prefix=".unpacking-", dir=into))
        try:
            _extract(package, temporary)
            (temporary / _COMPLETE).touch()
            if folder.exists():
                shutil.rmtree(folder)  # of a replica that was killed
            temporary.rename(folder)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            if not (folder / _COMPLETE).is_file():  # else another replica was faster
                raise
    return folder


def _extract(package: bytes, folder: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        for entry in archive.infolist():
            parts = PurePosixPath(entry.filename).parts
            if not parts or entry.is_dir() or any(part in ("..", "/") or os.sep in part for part in parts):
                raise BundleError(
                    f"the package of the run names the file {entry.filename!r}",
                    "a file of a run is inside its folder",
                    "deploy it again",
                )
            place = folder.joinpath(*parts)
            place.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(entry) as source, place.open("wb") as target:
                shutil.copyfileobj(source, target)
