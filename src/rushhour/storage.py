"""Files that are there whole or not at all, and a disk whose failures are said in one line.

A killed process leaves at most a dot-named temporary beside the target, never half of what was asked for.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from rushhour.errors import StorageError

_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space or choose another place with --out, then run again"),
    errno.EDQUOT: (
        "the disk quota is used up",
        "free some space or choose another place with --out, then run again",
    ),
    errno.EROFS: ("the file system is read-only", "choose another place with --out"),
    errno.EACCES: ("permission is denied", "choose a place you may write to with --out"),
    errno.EPERM: ("the operation is not permitted", "choose a place you may write to with --out"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", "choose another place with --out"),
    errno.EIO: ("the device reports an input/output error", "check the disk"),
}


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what was being done (`"write a"`), why it failed, what to do.

    Raises:
        StorageError: for any `OSError` raised inside.
    """
    try:
        yield
    except OSError as error:
        why, fix = _REASONS.get(error.errno or 0, (error.strerror or str(error), "check the path and the disk"))
        raise StorageError(f"cannot {doing}", why, fix) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part. Folders are made.

    Raises:
        StorageError: if the disk does not take it; what was there before stays.
    """
    with explained(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def building(path: Path) -> Iterator[Path]:
    """A temporary folder that becomes `path` when the block ends well, and disappears when it does not.

    An existing folder at `path` is replaced. What an earlier, killed run left half-built beside it is removed.

    Raises:
        StorageError: if the disk does not take it, inside the block or at the move; `path` stays as it was.
    """
    with explained(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob(f".{path.name}.building-*"):
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.building-", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            if path.exists():
                replaced = temporary.with_name(f"{temporary.name}.replaced")
                path.rename(replaced)
                temporary.rename(path)
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
