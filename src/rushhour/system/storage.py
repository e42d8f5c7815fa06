"""Files that are there whole or not at all, and a disk whose failures are said in one line.

A killed process leaves at most a dot-named temporary beside the target, never half of what was asked for.

Only what Rushhour made itself is ever removed or replaced: a folder that `building` replaces holds nothing but files of
the names that it puts there, and one that is worked in bears a mark (`claimed`), which is its lock as well.
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
"""The file that a folder bears in which Rushhour works."""

_REPLACED: Final = ".replaced"
_NAMED: Final = 3
"""Files that a message names, at most."""

_BLOCK = 4096
ELSEWHERE = "choose another place"
"""How advice on a place ends that has no better: who knows the option for it says that, too."""
_ASK = f"ask its owner, or {ELSEWHERE}"
_REASONS = {
    errno.ENOSPC: ("the disk is full", f"free some space or {ELSEWHERE}"),
    errno.EDQUOT: ("the disk quota is used up", f"free some space or {ELSEWHERE}"),
    errno.EFBIG: ("a file may not be so large here", f"raise the limit (ulimit -f) or {ELSEWHERE}"),
    errno.EROFS: ("the file system is read-only", ELSEWHERE),
    errno.EACCES: ("permission is denied", _ASK),
    errno.EPERM: ("the operation is not permitted", _ASK),
    errno.ENOENT: ("there is no such file or folder", f"check the path, or {ELSEWHERE}"),
    errno.ENOTDIR: ("a part of the path is a file, not a folder", ELSEWHERE),
    errno.EISDIR: ("it is a folder, not a file", ELSEWHERE),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("its symbolic links lead in a circle", ELSEWHERE),
    errno.EMFILE: ("this process may open no more files", "raise the limit (ulimit -n)"),
    errno.ENFILE: ("the system may open no more files", "close some programs"),
    errno.EIO: ("the device reports an input/output error", "check the disk"),
    errno.ESTALE: ("the file system of another machine has gone", "mount it again"),
}


def reason(error: OSError) -> tuple[str, str] | None:
    """Why the system refused and what to do about it; None where that is nothing that a user would know."""
    return _REASONS.get(error.errno or 0)


@contextlib.contextmanager
def explained(doing: str) -> Iterator[None]:
    """Turn an `OSError` into a `StorageError` that says what was being done (`"write a"`), why it failed, what to do.

    Raises:
        StorageError: for any `OSError` raised inside.
    """
    try:
        yield
    except OSError as error:
        why, fix = reason(error) or (error.strerror or str(error), "check the path and the disk")
        raise StorageError(f"cannot {doing}", why, fix) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write `content` to `path` so that a reader sees the old file or the new one, never a part. Folders are made.

    A device or a pipe (`/dev/null`, `/dev/stdout`) is written to, not replaced; of a link, what it leads to.

    Raises:
        StorageError: if the disk does not take it; what was there before stays.
    """
    with explained(f"write {path}"):
        if _is_special(path):
            path.write_bytes(content)
            return
        path = path.resolve() if path.is_symlink() else path  # the link stays
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
    """The user's home; one among the temporary files where there is none, as for many users in containers."""
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
    """See whether files can be made in the folder `path`, before anything is done that would be lost if not.

    It is not made here. Where it is missing, the first folder above it that is there is tried in its place.

    Raises:
        StorageError: if not.
    """
    with explained(f"write into {path}"):
        _try(path)


def try_file(path: Path) -> None:
    """The same for a file that `write_whole` is to write.

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
    """The same for a folder that `building` is to put in its place as a whole.

    Raises:
        StorageError: if the folder that it lies in takes nothing, or it has no name there.
    """
    with explained(f"write {path}"):
        path = path.resolve() if path.is_symlink() else path
        if path.name in ("", ".."):
            raise StorageError(f"cannot write {path}", "the folder is replaced as a whole", "name a folder in it")
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR))
        _try(path.parent, path.name)


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file() and not path.is_dir()


def _try(folder: Path, name: str = "") -> None:
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    # With a name as long as any that is written beside it, and as large as the smallest file that takes room.
    with tempfile.NamedTemporaryFile(prefix=f".{name}.tried-", suffix=".before-work", dir=folder) as file:
        file.write(bytes(_BLOCK))
        file.flush()


def check_own(path: Path, names: Collection[str], is_own: Callable[[Path], bool]) -> None:
    """Raise unless something new may be put in the place of `path`: it is free, or Rushhour's own.

    Its own is a folder with no file but those of `names`, and `is_own`; an empty one is free.

    Args:
        path: of a folder that is to be made.
        names: of the files that Rushhour puts into such a folder.
        is_own: whether a folder that is not empty is one of those, by what its files say.

    Raises:
        StorageError: if it is a file, or a folder with anything else in it.
    """
    there = _names_in(path)
    left_over = tuple(f".{name}." for name in names)
    others = [name for name in there if name not in names and not name.startswith(left_over)]
    if there and not others and not is_own(path):
        others = there
    if others:
        raise _not_ours(path, others)


def _names_in(folder: Path) -> list[str]:
    """What lies in the place of a folder that is to be made; nothing where it is free. Raises if it is no folder."""
    if not os.path.lexists(folder):
        return []
    if not folder.is_dir():
        raise StorageError(f"cannot make the folder {folder}", "there is something else of that name", ELSEWHERE)
    with explained(f"read {folder}"):
        return sorted(entry.name for entry in folder.iterdir())


def write_own(path: Path, content: bytes, is_own: Callable[[bytes], bool]) -> None:
    """`write_whole`, where only a file that Rushhour wrote itself is replaced; see `check_own_file`.

    Raises:
        StorageError: if there is another one, or the disk does not take it; what was there before stays.
    """
    check_own_file(path, is_own)
    write_whole(path, content)


def check_own_file(path: Path, is_own: Callable[[bytes], bool]) -> None:
    """Raise unless a file may be written to `path`: nothing is there, or what Rushhour wrote itself.

    Args:
        path: of the file. What is no file, as /dev/stdout, can be written to.
        is_own: whether a file of this content was written by Rushhour; an empty one may always be replaced.

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
    """A temporary folder that becomes `path` when the block ends well, and disappears when it does not.

    Rushhour's own folder at `path` is replaced, and nothing else. What an earlier, killed run left half-built beside it
    is removed.

    Args:
        path: the folder; where it is a link, what that leads to.
        names: as for `check_own`.
        is_own: as for `check_own`.

    Raises:
        StorageError: if there is anything else at `path`, or the disk does not take it, inside the block or at the
            move; `path` stays as it was.
    """
    path = path.resolve() if path.is_symlink() else path
    check_own(path, names, is_own)
    with explained(f"write {path}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        for left_over in path.parent.glob(f".{glob.escape(path.name)}.building-*"):
            if left_over.name.endswith(_REPLACED) and not os.path.lexists(path):
                left_over.rename(path)  # killed between the two moves
                continue
            shutil.rmtree(left_over, ignore_errors=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.building-", dir=path.parent))
        temporary.chmod(0o755)
        try:
            yield temporary
            check_own(path, names, is_own)  # it may be another by now
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
    """Raise unless `claimed` would find the folder free or Rushhour's own.

    Raises:
        StorageError: if it is a file, or holds what Rushhour did not put there.
    """
    there = _names_in(folder)
    if there and MARK not in there:
        raise _not_ours(folder, there)


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """A folder to work in, for this process alone: made, marked as Rushhour's, and locked meanwhile.

    The mark stays, so that the folder is known again. Where nothing else was put into it, both disappear.

    Raises:
        StorageError: if it holds what Rushhour did not put there, another process works in it, or it cannot be written.
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
    """No other process makes `path` meanwhile: a lock beside it, which disappears.

    Raises:
        StorageError: if another one does, or nothing can be written there.
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
    """The folder with all above it; those that were made for it disappear again where nothing was put into them."""
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
    """Hold the lock of a file, which is made."""
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
    """Whether the open file is still the one of that name: who held its lock before may have removed it."""
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _not_ours(folder: Path, names: Sequence[str]) -> StorageError:
    said = ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")
    return StorageError(
        f"{folder} is not Rushhour's to write to",
        f"it holds what Rushhour did not put there: {said}",
        "name a new or empty folder, or move that away",
    )
