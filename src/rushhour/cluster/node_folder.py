"""A folder of this user on a node, and locks in it: the kernel frees them when their process ends, however it ends."""

from __future__ import annotations

import fcntl
import os
import stat
import tempfile
from pathlib import Path

from rushhour.errors import StorageError
from rushhour.system.storage import explained


def own_folder(purpose: str) -> Path:
    """The folder of this user for one purpose, among those of temporary files; no other user can write there.

    Raises:
        StorageError: if it cannot be made, or belongs to someone else.
    """
    folder = Path(tempfile.gettempdir()) / f"rushhour-{purpose}-{os.getuid()}"
    with explained(f"make the folder {folder}"):
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise StorageError(f"will not use {folder}", "others can write there", "remove it")
    return folder


def locked(file: Path, *, create: bool = True) -> int | None:
    """The handle of a file that this process has locked until it closes it; None where another process holds it.

    Args:
        file: of the lock.
        create: make it, where it is not there.

    Raises:
        OSError: if it cannot be opened.
    """
    handle = os.open(file, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
