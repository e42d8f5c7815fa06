"""System shared memory: tensors that a client on this machine writes to /dev/shm instead of sending them.

A region is read and written through its file, never mapped. If the owner of a mapped region truncates it, the next
access ends the process with SIGBUS, so any client could stop the server; a file that is too short is only a short
read. It costs one copy, which a socket costs too.

A client that may send requests may have the server open and read every shared memory object that the server's user may
open. The protocol requires that, and `ServeSettings.shared_memory` can switch it off. Answers are written only into
objects of the server's own user, registered for writing by a program of that user.

Source: triton-inference-server/server, docs/protocol/extension_shared_memory.md.
"""

from __future__ import annotations

import os
import re
import stat
import weakref
from typing import Any, Literal

import msgspec

from rushhour.errors import WireError
from rushhour.wire import Place

_FOLDER = "/dev/shm"
_KEY = re.compile(r"/?(?!\.{1,2}$)[A-Za-z0-9._:+@=-]{1,255}")
_MAX_REGIONS = 512
_MAX_NAME = 256
_LIMIT = 2**63

Access = Literal["read", "write"]
"""What a region is registered for; writing includes reading."""


class Register(msgspec.Struct, frozen=True, tag="register"):
    """Open a region of shared memory; see `SharedMemory.register`."""

    name: str
    key: str
    offset: int
    byte_size: int
    access: Access = "write"


class SharedMemory:
    """The regions that clients have registered, by name.

    Args:
        limit: bytes of one tensor, at most: what is read is held until it is computed.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._regions: dict[str, _Region] = {}

    def register(self, name: str, key: str, offset: int, byte_size: int, access: Access = "write") -> None:
        """Open a region.

        Args:
            name: that requests refer to it by.
            key: of the POSIX shared memory object, as for `shm_open`.
            offset: where in the object the region begins, in bytes.
            byte_size: of the region.
            access: whether answers may be written there, too. They never are in an object of another user.

        Raises:
            WireError: if it does not exist, is too short, or may not be opened.
        """
        if not (0 < len(name) <= _MAX_NAME and name.isprintable()):
            raise WireError("the region's name is not valid", f"a name has 1 to {_MAX_NAME} characters", "take another")
        if name in self._regions:
            raise WireError(f"the region {name!r} is registered already", "", "unregister it first", status=409)
        if len(self._regions) >= _MAX_REGIONS:
            raise WireError("no more regions can be registered", f"the limit is {_MAX_REGIONS}", "unregister some")
        if not _KEY.fullmatch(key):
            raise WireError(
                f"the key {key[:100]!r} is not the key of a shared memory object",
                "a key is a name without slashes, except one in front",
                "give the key that the object was created with",
            )
        self._regions[name] = _Region(name, key, offset, byte_size, access)

    def unregister(self, name: str | None) -> None:
        """Remove a region, or with None all; requests that have read it go on. An unknown name is no error."""
        if name is None:
            self._regions.clear()
        else:
            self._regions.pop(name, None)

    def status(self, name: str | None) -> list[dict[str, Any]]:
        """What is registered: all regions, or the one of this name.

        Raises:
            WireError: if there is none of this name.
        """
        regions = self._regions.values() if name is None else [self._find(name)]
        return [
            {"name": region.name, "key": region.key, "offset": region.offset, "byte_size": region.byte_size}
            for region in regions
        ]

    def check(self, place: Place, *, writes: bool = True) -> None:
        """Raise a `WireError` unless the place lies in a registered region, one that may be written if `writes`."""
        region = self._inside(place)
        if writes and region.why_not:
            raise WireError(
                f"cannot write into the region {place.region!r}",
                region.why_not,
                "register an object of your own for writing, or have the answer sent",
                status=403,
            )

    def _inside(self, place: Place) -> _Region:
        region = self._find(place.region)
        if place.offset + place.byte_size > region.byte_size:
            raise WireError(
                f"bytes {place.offset} to {place.offset + place.byte_size} are not in the region {place.region!r}",
                f"the region has {region.byte_size} bytes",
                "stay inside it, or register a larger one",
            )
        if place.byte_size > self._limit:
            raise WireError(
                f"a tensor in shared memory has {place.byte_size} bytes",
                f"the limit is {self._limit} bytes",
                "split the request",
                status=413,
            )
        return region

    def read(self, place: Place) -> memoryview:
        """The bytes there, as they are now.

        Raises:
            WireError: if the place does not lie in a registered region, or its owner has truncated it.
        """
        region = self._inside(place)
        return memoryview(region.read(place.offset, place.byte_size))

    def write(self, place: Place, content: memoryview | bytes) -> None:
        """Write bytes there, from its beginning.

        Raises:
            WireError: if the place does not lie in a registered region, or is too small, or its owner has truncated it.
        """
        self.check(place, writes=True)
        if len(content) > place.byte_size:
            raise WireError(
                f"an output of {len(content)} bytes does not fit into its shared memory",
                f"shared_memory_byte_size is {place.byte_size}",
                "give it a larger place",
            )
        self._find(place.region).write(place.offset, content)

    def _find(self, name: str) -> _Region:
        region = self._regions.get(name)
        if region is None:
            raise WireError(f"there is no region {name[:100]!r}", "", "register it first", status=404)
        return region


class _Region:
    """A part of an open shared memory object. The file is closed when nothing refers to it any more.

    Attributes:
        why_not: why nothing is written there; empty where writing is allowed.
    """

    def __init__(self, name: str, key: str, offset: int, byte_size: int, access: Access) -> None:
        self.name = name
        self.key = key
        self.offset = offset
        self.byte_size = byte_size
        self.why_not = "it is registered for reading" if access == "read" else ""
        if offset < 0 or byte_size < 1 or offset + byte_size >= _LIMIT:
            raise self._wrong(f"offset {offset} and size {byte_size} are not valid")
        try:
            # Every user may create links in this folder: one that leads elsewhere must not be followed.
            flags = (os.O_RDONLY if access == "read" else os.O_RDWR) | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._file = os.open(os.path.join(_FOLDER, key.removeprefix("/")), flags)
        except OSError as error:
            raise self._wrong(error.strerror or str(error)) from error
        close = weakref.finalize(self, os.close, self._file)
        status, why = os.fstat(self._file), ""
        if not stat.S_ISREG(status.st_mode):
            why = "it is not a shared memory object"
        elif offset + byte_size > status.st_size:
            why = f"bytes {offset} to {offset + byte_size} are requested, and it has {status.st_size}"
        if status.st_uid != os.geteuid():
            self.why_not = "the shared memory belongs to another user than the server"
        if why:
            close()  # at once: the error refers to this region, and may live until the garbage collector runs
            raise self._wrong(why)

    def read(self, offset: int, size: int) -> bytes:
        content = os.pread(self._file, size, self.offset + offset)
        if len(content) != size:
            raise self._wrong("it has become shorter since it was registered")
        return content

    def write(self, offset: int, content: memoryview | bytes) -> None:
        # A write beyond the end would extend an object that its owner has truncated.
        if os.fstat(self._file).st_size < self.offset + offset + len(content):
            raise self._wrong("it has become shorter since it was registered")
        try:
            written = os.pwrite(self._file, content, self.offset + offset)
        except OSError as error:
            raise self._wrong(error.strerror or str(error)) from error
        if written != len(content):
            raise self._wrong("it did not take the whole tensor")

    def _wrong(self, why: str) -> WireError:
        return WireError(f"cannot use the shared memory object {self.key!r}", why, "check its key and size")
