"""Atomic writes, and disk errors in one line.

A killed process leaves at most a temporary file beside the target, whose name begins with a dot; never a partial file.

Only what Rushhour wrote itself is ever removed or replaced: a folder that `building` replaces holds no file but those
that it writes there, and a folder that Rushhour works in has a mark (`claimed`), which is its lock as well.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from rushhour.errors import StorageError

MARK: Final = ".rushhour"
"""The file that marks a folder that Rushhour works in."""

_REPLACED: Final = ".replaced"
_NAMED: Final = 3
"""Largest number of files that a message names."""

_BLOCK = 4096
ELSEWHERE = "choose another place"
"""The general remedy; the command line adds the option that names the place."""
_ASK = f"ask its owner, or {ELSEWHERE}"
_REASONS = {
    errno.ENOSPC: ("the disk is full", f"free some space or {ELSEWHERE}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space or {ELSEWHERE}"),
    errno.EFBIG: ("the file size limit is reached", f"raise the limit (ulimit -f) or {ELSEWHERE}"),
    errno.EROFS: ("the file system is read-only", ELSEWHERE),
    errno.EACCES: ("permission is denied", _ASK),
    errno.EPERM: ("the operation is not permitted", _ASK),
    errno.ENOENT: ("there is no such file or folder", f"check the path, or {ELSEWHERE}"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", ELSEWHERE),
    errno.EISDIR: ("it is a folder, not a file", ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links form a loop", ELSEWHERE),
    errno.EMFILE: ("this process has too many open files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("the system has too many open files", "close some programs"),
    errno.EIO: ("the device reports an input/output error", "check the disk"),
    errno.ESTALE: ("the network file system is gone", "mount it again"),
}


def reason(error: OSError) -> tuple[str, str] | None:
    """Reason and remedy of a system error; None for those that mean nothing to a user."""
    return _REASONS.get(error.errno or 0)


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError`: `cannot write a`, the reason, the remedy.

    Args:
        doing: what is done inside, as `write a`.

    Raises:
        StorageError: for any `OSError` raised inside.
    """
    try:
        yield
    except OSError as error:
        why, fix = reason(error) or (error.strerror or str(error), "check the path and the disk")
        raise StorageError(f"cannot {doing}", why, fix) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` atomically: a reader sees the old file or the new one. Missing folders are made.

    A device or a pipe (`/dev/null`, `/dev/stdout`) is written to, not replaced; a link is followed.

    Raises:
        StorageError: if it cannot be written; an older file stays.
    """
    with explained(f"write {path}"):
        if _is_special(path):
            path.write_bytes(content)
            return
        path = path.resolve() if path.is_symlink() else path  # the link itself stays
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


def home() -> Path:
    """The user's home folder; a temporary one where there is none, as often in containers."""
    found = os.path.expanduser("~")
    if found != "~":
        return Path(found)
    with contextlib.suppress(OSError):
        ours = Path(tempfile.gettempdir()) / f"rushhour-{os.getuid()}"
        ours.mkdir(mode=0o700, exist_ok=True)
        if ours.lstat().st_uid == os.getuid() and ours.is_dir() and not ours.is_symlink():
            return ours
        return Path(tempfile.mkdtemp(prefix="rushhour-"))
    return Path("/nonexistent")


def try_folder(path: Path) -> None:
    """Check that files can be written to the folder `path`, before work begins.

    The folder is not made. If it is missing, the nearest existing folder above it is checked.

    Raises:
        StorageError: if they cannot.
    """
    with explained(f"write into {path}"):
        _try(path)


def try_file(path: Path) -> None:
    """Check that `write_whole` can write the file `path`.

    Raises:
        StorageError: if it cannot be written.
    """
    with explained(f"write {path}"):
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        if _is_special(path):
            if not os.access(path, os.W_OK):
                raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
            return
        path = path.resolve() if path.is_symlink() else path
        _try(path.parent, path.name)


def try_building(path: Path) -> None:
    """Check that `building` can write the folder `path`.

    Raises:
        StorageError: if its parent cannot be written to, or `path` has no name of its own.
    """
    with explained(f"write {path}"):
        path = path.resolve() if path.is_symlink() else path
        if path.name in ("", ".."):
            raise StorageError(f"cannot write {path}", "the whole folder would be replaced", "name a folder in it")
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _try(path.parent, path.name)


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _try(folder: Path, name: str = "") -> None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    # The name is as long as any that is written beside it, and the file as large as one block.
    with tempfile.NamedTemporaryFile(prefix=f".{name}.tried-", suffix=".before-work", dir=folder) as file:
        file.write(bytes(_BLOCK))
        file.flush()


def check_own(path: Path, names: Collection[str], is_own: Callable[[Path], bool]) -> None:
    """Raise unless the folder `path` may be written or replaced: it is missing, empty, or written by Rushhour.

    Written by Rushhour is a folder without other files than `names` for which `is_own` holds.

    Args:
        path: of the folder.
        names: of the files that Rushhour writes to such a folder.
        is_own: whether a folder that is not empty is Rushhour's, by the content of its files.

    Raises:
        StorageError: if it is a file, or a folder with other files.
    """
    there = _names_in(path)
    left_over = tuple(f".{name}." for name in names)
    others = [name for name in there if name not in names and not name.startswith(left_over)]
    if there and not others and not is_own(path):
        others = there
    if others:
        raise _not_ours(path, others)


def _names_in(folder: Path) -> list[str]:
    """The names in a folder; none where it is missing. Raises if it is no folder."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise StorageError(f"cannot make the folder {folder}", "there is a file of that name", ELSEWHERE)
    with explained(f"read {folder}"):
        return sorted(entry.name for entry in folder.iterdir())


def write_own(path: Path, content: bytes, is_own: Callable[[bytes], bool]) -> None:
    """`write_whole` that replaces only a file that Rushhour wrote itself; see `check_own_file`.

    Raises:
        StorageError: if there is another file, or it cannot be written; an older file stays.
    """
    check_own_file(path, is_own)
    write_whole(path, content)


def check_own_file(path: Path, is_own: Callable[[bytes], bool]) -> None:
    """Raise unless the file `path` may be written: it is missing, or Rushhour wrote it.

    Args:
        path: of the file. A device or pipe such as /dev/stdout may always be written.
        is_own: whether a file of this content is Rushhour's; an empty one may always be replaced.

    Raises:
        StorageError: if there is another file.
    """
    with explained(f"write {path}"):
        if path.is_dir():
            raise StorageError(f"cannot write {path}", "it is a folder", "name a file")
        if not path.is_file():
            return
        content = path.read_bytes()
    if content and not is_own(content):
        raise StorageError(
            f"will not replace {path}", "Rushhour did not write it", "name another file, or move that one away"
        )


@contextlib.contextmanager
def building(path: Path, names: Collection[str], is_own: Callable[[Path], bool]) -> Iterator[Path]:
    """A temporary folder that becomes `path` at the end of the block, and is removed after an error.

    Only a folder that Rushhour wrote is replaced. Temporary folders that a killed run left beside it are removed.

    Args:
        path: the folder; a link is followed.
        names: as for `check_own`.
        is_own: as for `check_own`.

    Raises:
        StorageError: if there is anything else at `path`, or it cannot be written, inside the block or at the move;
            `path` then stays unchanged.
    """
    path = path.resolve() if path.is_symlink() else path
    check_own(path, names, is_own)
    with explained(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob(f".{glob.escape(path.name)}.building-*"):
            if left_over.name.endswith(_REPLACED) and not os.path.lexists(path):
                left_over.rename(path)  # a run was killed between the two renames
                continue
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.building-", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            check_own(path, names, is_own)  # it may have changed
            if path.exists():
                replaced = temporary.with_name(f"{temporary.name}{_REPLACED}")
                path.rename(replaced)
                temporary.rename(path)
                shutil.rmtree(replaced, ignore_errors=True)
            else:
                temporary.rename(path)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def check_claim(folder: Path) -> None:
    """Raise unless `claimed` can take the folder: it is missing, empty or marked.

    Raises:
        StorageError: if it is a file, or holds files that Rushhour did not write.
    """
    there = _names_in(folder)
    if there and MARK not in there:
        raise _not_ours(folder, there)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Make the folder, mark it as Rushhour's, and hold its lock: only this process works in it.

    The mark stays. If nothing else was written, folder and mark are removed.

    Raises:
        StorageError: if it holds files that Rushhour did not write, another process works in it, or it cannot be
            written.
    """
    check_claim(folder)
    mark = folder / MARK
    with _folders(folder), _locked(mark, folder):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if [entry.name for entry in folder.iterdir()] == [MARK]:
                    mark.unlink()


@contextlib.contextmanager
def alone_at(path: Path) -> Iterator[None]:
    """Hold a lock beside `path`, so that no other process writes it; the lock is removed at the end.

    Raises:
        StorageError: if another process holds it, or it cannot be written.
    """
    lock = path.parent / f".{path.name}.lock"
    with _folders(path.parent), _locked(lock, path):
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()


@contextlib.contextmanager
def _folders(folder: Path) -> Iterator[None]:
    """Make the folder and those above it; at the end, remove those of them that are empty."""
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    with explained(f"make the folder {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            for each in made:
                each.rmdir()


@contextlib.contextmanager
def _locked(file: Path, what: Path) -> Iterator[None]:
    """Make a file and hold its lock."""
    while True:
        with explained(f"lock {what}"), contextlib.ExitStack() as stack:
            lock = stack.enter_context(file.open("a"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise StorageError(
                    f"another process works in {what}",
                    "its lock is held",
                    "wait for it, stop it, or choose another --out",
                ) from error
            if _is_at(lock.fileno(), file):
                held = stack.pop_all()
                break
    with held:
        yield


def _is_at(handle: int, file: Path) -> bool:
    """Whether the open file is still at that path: the last holder of its lock may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _not_ours(folder: Path, names: Sequence[str]) -> StorageError:
    listed = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return StorageError(
        f"will not write to {folder}",
        f"it holds files that Rushhour did not write: {listed}",
        "name a new or empty folder, or move that away",
    )
