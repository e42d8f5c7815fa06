"""What keeps one client from taking the server from the others: bounds, keys, and patience that ends."""

from __future__ import annotations

import asyncio
import hmac
import ipaddress
import ssl
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, TypeVar

import msgspec
import numpy as np

from rushhour.errors import ServeError, WireError
from rushhour.pieces import rest
from rushhour.serve import memory

T = TypeVar("T")

_ASIDE, _UNPACKING = 2, 4
"""Large messages that are read or written, and bodies that are unpacked, at the same time."""
_TRIM_S = 1.0
"""What large messages have left in the allocator goes back so long after the last of them."""
_PACKED_BYTES, _UNPACKED_BYTES = 64 * 2**10, 256 * 2**10
"""That are unpacked in one go, before and after."""
_MOST_UNPACKED = 1033
"""Bytes that come of one, at most, in deflate's format."""

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what a connection may cost.

    Attributes:
        connections: at once; further ones are answered 503 and closed.
        body_bytes: of a request, compressed or not; of its pictures, decoded.
        grpc_bytes: of a message over gRPC as it comes, if that is less. grpcio copies it in one go, and until it has
            nobody is answered: for 16 MiB that takes 5 to 25 ms. Compressed messages are unpacked on threads.
        held_bytes: of all requests in one process: of those that are being read and not yet answered, and of those that
            wait for the engine. Further ones are turned away.
        header_bytes: of a request, with its target.
        request_s: from a request's first byte to its last. A client that sends slower holds memory for nothing.
        idle_s: without a request; then the connection is closed.
        picture_pixels: of an encoded picture. Each thread that decodes needs 4 bytes for each.
    """

    connections: Annotated[int, msgspec.Meta(ge=1)] = 8192
    body_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 * 2**20
    grpc_bytes: Annotated[int, msgspec.Meta(ge=1)] = 16 * 2**20
    held_bytes: Annotated[int, msgspec.Meta(ge=1)] = 512 * 2**20
    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 32 * 2**10
    request_s: _Positive = 30.0
    idle_s: _Positive = 300.0
    picture_pixels: Annotated[int, msgspec.Meta(ge=1)] = 50_000_000


class Budget:
    """Bounds what large requests cost a process together: the bytes that it holds, and the threads that read them.

    Args:
        size: bytes.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.held = 0
        self._threads = asyncio.Semaphore(_ASIDE)
        self._unpacking = asyncio.Semaphore(_UNPACKING)
        self._waiting = 0
        self._trimming: asyncio.TimerHandle | None = None

    def grant(self, size: int = 0) -> Grant:
        """Room for so many bytes, until what is returned is let go.

        Raises:
            WireError: 429 if there is none. The first one is always given.
        """
        grant = Grant(self)
        grant.grow(size)
        return grant

    async def aside(self, function: Callable[..., T], *arguments: object) -> T:
        """Call a function on a thread: one that takes long, and that lets other threads run in between."""
        async with self._threads:
            self._waiting += 1
            try:
                return await asyncio.to_thread(function, *arguments)
            finally:
                self._waiting -= 1
                self.trim_soon()

    async def unpack(self, function: Callable[..., T], *arguments: object) -> T:
        """The same for what takes some tenths of a second at most: it does not wait for the others."""
        async with self._unpacking:
            return await asyncio.to_thread(function, *arguments)

    def trim_soon(self) -> None:
        """Have free memory given back when there is a moment."""
        if self._trimming is not None:
            self._trimming.cancel()
        self._trimming = asyncio.get_running_loop().call_later(_TRIM_S, self._trim)

    def _trim(self) -> None:
        self._trimming = None
        if self._waiting:
            self.trim_soon()
        else:
            asyncio.get_running_loop().run_in_executor(None, memory.trim)


class Grant:
    """Room in a budget, for as long as this object lives."""

    __slots__ = ("_budget", "_size")

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._size = 0

    def grow(self, size: int) -> None:
        """Take room for so many bytes more.

        Raises:
            WireError: 429 if there is none.
        """
        held = self._budget.held
        if held > self._size and held + size > self._budget.size:
            limit = f"they have {held} bytes together, and the limit is {self._budget.size}"
            raise WireError("too many large requests are under way", limit, "try again later", status=429)
        self.take(size)

    def take(self, size: int) -> None:
        """Take it whether it is there or not: for what cannot be turned away any more."""
        self._size += size
        self._budget.held += size

    def __del__(self) -> None:
        self._budget.held -= self._size


class Keys:
    """The API keys that are accepted. None accepts everybody.

    Args:
        keys: as clients send them: `Authorization: Bearer KEY`.
    """

    def __init__(self, keys: tuple[str, ...]) -> None:
        self._keys = tuple(key.encode() for key in keys)

    def __bool__(self) -> bool:
        return bool(self._keys)

    @classmethod
    def read(cls, file: Path) -> tuple[str, ...]:
        """The keys in a file, one a line; empty lines and lines that begin with # are left out.

        Raises:
            ServeError: if the file cannot be read, or holds no key of 16 characters or more.
        """
        try:
            lines = [line.strip() for line in file.read_text().splitlines()]
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(f"cannot read the API keys in {file}", str(error), "check the path") from error
        keys = tuple(line for line in lines if line and not line.startswith("#"))
        if not keys or any(len(key) < 16 or not key.isascii() for key in keys):
            raise ServeError(
                f"the API keys in {file} cannot be used",
                "it needs at least one, each of 16 ASCII characters or more",
                "make one with: python3 -c 'import secrets; print(secrets.token_urlsafe())'",
            )
        return keys

    def admit(self, authorization: bytes | None) -> bool:
        """Whether this `Authorization` field carries one of the keys; a near miss takes as long as any other."""
        if not self._keys:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        matches = [hmac.compare_digest(known, key.strip()) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


def tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    """The TLS context for a certificate chain and its key; None for neither.

    Raises:
        ServeError: if only one is given, or they cannot be read.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ServeError("TLS needs a certificate and a key", "only one was given", "give --tls-cert and --tls-key")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise ServeError(
            f"cannot use the certificate {certificate} with the key {key}", str(error), "check both files"
        ) from error
    return context


def check_exposure(host: str, keys: tuple[str, ...], *, exposed: bool) -> None:
    """Refuse to listen where others can reach the server, unless there are keys or the user says it is meant.

    Raises:
        ServeError: if it is neither.
    """
    if not (is_loopback(host) or keys or exposed):
        raise ServeError(
            f"will not listen on {host} for everybody",
            "anyone who reaches it could use and reload the model",
            "give --api-key-file, or say --expose if something in front of it keeps the door",
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens there."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def without_frames(error: BaseException) -> BaseException:
    """Forget where an error and its causes came from: their frames would keep all that was in them alive."""
    seen: BaseException | None = error
    while seen is not None and seen.__traceback__ is not None:
        seen.__traceback__ = None
        seen = seen.__cause__ or seen.__context__
    return error


def inflate(body: bytes | bytearray | memoryview, encoding: bytes, limit: int) -> memoryview:
    """A body as it was before `gzip` or `deflate`.

    Args:
        body: compressed.
        encoding: the `Content-Encoding`, lower case.
        limit: bytes it may have afterwards; no more are ever produced.

    Raises:
        WireError: 415 for another encoding, 413 beyond the limit, 400 for damaged data.
    """
    if encoding not in (b"gzip", b"deflate"):
        raise WireError(
            f"the body is compressed with {encoding[:40].decode('latin-1')}",
            "this server reads gzip and deflate",
            "use one of them, or none",
            status=415,
        )
    try:
        stream = zlib.decompressobj(wbits=31 if encoding == b"gzip" else 15)
        content = np.empty(min(limit, len(body) * _MOST_UNPACKED), np.uint8).data  # takes memory as it is filled
        packed = memoryview(body)
        left: bytes | memoryview = b""
        at = size = 0
        while not stream.eof:
            if not left:
                left = packed[at : at + _PACKED_BYTES]
                at += len(left)
            part = stream.decompress(left, _UNPACKED_BYTES)
            if size + len(part) > limit:
                raise WireError("the body is too large", f"the limit is {limit} bytes unpacked", "split it", status=413)
            if not (part or left or stream.eof):
                raise zlib.error("it ends too early")
            content[size : size + len(part)] = part
            size += len(part)
            left = stream.unconsumed_tail
            if size > _UNPACKED_BYTES:
                rest()
    except zlib.error as error:
        raise WireError(f"the {encoding.decode()} body is damaged", str(error), "compress it again") from error
    return content[:size]
