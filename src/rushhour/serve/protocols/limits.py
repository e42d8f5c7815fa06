"""What keeps one client from taking the server from the others: bounds, keys, and patience that ends."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import ipaddress
import os
import re
import socket
import ssl
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, NamedTuple, TypeVar

import msgspec
import numpy as np

from rushhour.errors import ServeError, WireError
from rushhour.serve.processes import allocator as memory
from rushhour.wire.pieces import rest

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
_BYTES = "latin-1"
"""Bytes as text, one by one: what stands between the blocks of a PEM file may be in any encoding."""

ASKER_FIELDS = frozenset((b"host", b"origin", b"content-type", b"user-agent", b"sec-fetch-site"))
"""Header fields that tell who asks."""
_OTHER_TYPES = (b"libcurl-agent/", b"Python/")
"""How those of the protocol's own clients call themselves (in C++; on aiohttp) that label JSON as something else. No
browser does, and no page can make one do it."""
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/@?#\s]+))(?::\d*)?")
_TIME_WAIT = "06"


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
        ping_s: how often a gRPC client may ping, to see whether the connection lives; one that does so more often is
            disconnected (GOAWAY, too_many_pings). 0 lets it.
        keepalive_s: after so long without a word a gRPC client is pinged, and its connection closed if it does not
            answer; None never does.
        grpc_age_s: after so long a gRPC connection is renewed: calls under way go on, further ones are made on another
            connection, which may lead to another cell. None takes 60 s where there are several cells, else never.
        grpc_grace_s: how long calls may go on then; those that take longer, streams above all, are cancelled. None lets
            them take as long as they do.
    """

    connections: Annotated[int, msgspec.Meta(ge=1)] = 8192
    body_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 * 2**20
    grpc_bytes: Annotated[int, msgspec.Meta(ge=1)] = 16 * 2**20
    held_bytes: Annotated[int, msgspec.Meta(ge=1)] = 512 * 2**20
    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 32 * 2**10
    request_s: _Positive = 30.0
    idle_s: _Positive = 300.0
    picture_pixels: Annotated[int, msgspec.Meta(ge=1)] = 50_000_000
    ping_s: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    keepalive_s: _Positive | None = None
    grpc_age_s: _Positive | None = None
    grpc_grace_s: _Positive | None = None


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
            lines = [line.strip() for line in file.read_text("utf-8").splitlines()]
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

    def renew(self, keys: tuple[str, ...]) -> None:
        """Accept these from now on, and no others."""
        self._keys = tuple(key.encode() for key in keys)

    def admit(self, authorization: bytes | None) -> bool:
        """Whether this `Authorization` field carries one of the keys; a near miss takes as long as any other."""
        if not self._keys:
            return True
        scheme, _, key = (authorization or b"").partition(b" ")
        matches = [hmac.compare_digest(known, key.strip()) for known in self._keys]
        return scheme.lower() == b"bearer" and any(matches)


class Asker(NamedTuple):
    """Who sends a request, as far as its header and its connection say.

    Attributes:
        fields: those of `ASKER_FIELDS` that its header has, by their names in lower case.
        peer: address and port of the other end of the connection; None where that is not known.
        here: the same of this end.
    """

    fields: Mapping[bytes, bytes] = {}
    peer: tuple[str, int] | None = None
    here: tuple[str, int] | None = None


class KnownAs:
    """The names that a server without keys goes by: no web page is to drive it through a browser that can reach it.

    A page's script may send any `POST` that looks like a form's to any address, this machine's own among them, and
    with a name of its own that suddenly resolves to that address (DNS rebinding) read the answers, too. Browsers tell
    on both: `Host` is the name that the page used, `Origin` where the page comes from. And what is labelled as JSON
    they do not send to another origin without asking first, which is never granted here.

    gRPC needs none of this: no page can send it, least of all without TLS.

    Sources: Fetch Standard, 3.2 (`Origin`) and 2.2.2 (methods and types that need no preflight); RFC 6454.

    Args:
        host: that it listens on.
        names: others, by which users know it: behind a proxy, for example.
    """

    def __init__(self, host: str, names: tuple[str, ...] = ()) -> None:
        self._given = frozenset(name.lower().rstrip(".") for name in names)
        self._names = self._given | {host.lower(), socket.gethostname().lower()}
        # An address cannot be rebound. Beyond loopback any may be ours: machines and containers have several.
        self._any_address = not is_loopback(host)

    def check(self, asker: Asker) -> None:
        """Raise a `WireError` unless who asks for a change is no web page, or one that this server has sent itself."""
        self.check_origin(asker)
        fields, origin = asker.fields, asker.fields.get(b"origin")
        kind = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind == b"application/json" or (not kind and origin is None):
            return
        if origin is None and fields.get(b"user-agent", b"").startswith(_OTHER_TYPES):
            return
        said = kind[:100].decode("latin-1") or "missing"
        raise WireError(
            f"the content type is {said}", "changes are asked for in JSON", "send application/json", status=415
        )

    def check_origin(self, asker: Asker) -> None:
        """The same, whatever the content type says."""
        fields = asker.fields
        host, origin = fields.get(b"host"), fields.get(b"origin")
        if host is not None and not self._knows(_name_of(host)):
            raise self._foreign("this server is not known", host)
        if origin is not None and not self._is_own(origin, host):
            raise self._foreign("changes are not taken from a web page", origin)
        if fields.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
            raise self._foreign("changes are not taken from a web page", fields[b"sec-fetch-site"])

    def _knows(self, name: str) -> bool:
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or name.endswith(".localhost") or name in self._names
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return self._any_address or (mapped or address).is_loopback

    def _is_own(self, origin: bytes, host: bytes | None) -> bool:
        """Whether a page of this origin came from here, as the name tells that it was asked under."""
        scheme, _, place = origin.strip().lower().partition(b"://")
        if scheme not in (b"http", b"https"):
            return False
        return (host is not None and place == host.strip().lower()) or _name_of(place) in self._given

    def _foreign(self, what: str, said: bytes) -> WireError:
        return WireError(
            f"{what}: {said[:100].decode('latin-1')!r}",
            "without API keys, what changes the server is taken under its own name only",
            "ask it as localhost or by its address, or start it with --known-as NAME",
            status=403,
        )


def _name_of(authority: bytes) -> str:
    """The host in `host:port`, in lower case and without the brackets of an address; empty where it is not one."""
    found = _AUTHORITY.fullmatch(authority.strip().decode("latin-1").lower())
    return "" if found is None else (found[1] or found[2]).rstrip(".")


def user_of(peer: tuple[str, int], here: tuple[str, int]) -> int | None:
    """The user whose program is at the other end of a connection within this machine; None where that is not said.

    Reads the system's tables of connections, which takes milliseconds where there are many.

    Args:
        peer: address and port of the other end.
        here: of this end.
    """
    try:
        for table, ends in _listed(peer, here).items():
            with open(f"/proc/net/{table}", encoding="ascii") as lines:
                for line in lines:
                    fields = line.split(maxsplit=8)
                    if fields[1:3] == ends and fields[3] != _TIME_WAIT:
                        return int(fields[7])
    except (OSError, ValueError, IndexError):
        return None
    return None


def _listed(peer: tuple[str, int], here: tuple[str, int]) -> dict[str, list[str]]:
    """Both ends as the tables have them, where they may be: a socket for IPv6 can have an address of IPv4."""
    tables: dict[str, list[str]] = {}
    for host, port in (peer, here):
        address = ipaddress.ip_address(host)
        wide = address if isinstance(address, ipaddress.IPv6Address) else ipaddress.IPv6Address(f"::ffff:{address}")
        narrow = address if isinstance(address, ipaddress.IPv4Address) else address.ipv4_mapped
        for table, form in (("tcp", narrow), ("tcp6", wide)):
            if form is not None:
                tables.setdefault(table, []).append(f"{_words(form.packed)}:{port:04X}")
    return tables


def _words(packed: bytes) -> str:
    """An address in words of 32 bits, each in the machine's own order of bytes."""
    return "".join(f"{int.from_bytes(packed[at : at + 4], sys.byteorder):08X}" for at in range(0, len(packed), 4))


class Identity(msgspec.Struct, frozen=True):
    """A certificate chain and its private key, both in PEM."""

    chain: str
    key: str

    @property
    def pem(self) -> tuple[bytes, bytes]:
        """The chain and the key as they were read."""
        return self.chain.encode(_BYTES), self.key.encode(_BYTES)

    def context(self) -> ssl.SSLContext:
        """A context for TLS with it.

        Raises:
            OSError, ValueError: if they cannot be used; `ssl.SSLError` is an OSError.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        with _in_memory(self.pem[0]) as chain, _in_memory(self.pem[1]) as key:
            # An encrypted key must not ask for its password: there may be nobody at the terminal.
            context.load_cert_chain(chain, key, password=lambda: "")
        return context


class Certificates:
    """The server's side of TLS, over HTTP and gRPC: each handshake is made with what was read last.

    Args:
        identity: to begin with.

    Attributes:
        identity: in use.
        context: for the server, once and for all.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.context = identity.context()
        # Another context for each: a certificate of another kind (ECDSA, RSA) would only be added to the first.
        self._current = self.context
        self.context.sni_callback = self._turn  # called in every handshake, whether the client names a server or not

    def renew(self, identity: Identity) -> None:
        """Use another one in all further handshakes.

        Raises:
            OSError, ValueError: if it cannot be used; then the old one stays.
        """
        self._current = identity.context()
        self.identity = identity

    def _turn(self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext) -> None:
        connection.context = self._current


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file that exists in this process alone: OpenSSL reads nothing else."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def tls(certificate: Path | None, key: Path | None) -> Identity | None:
    """Read a certificate chain and its key, and see whether they can be used together; None for neither.

    Raises:
        ServeError: if only one is given, or they cannot be read or used.
    """
    if certificate is None and key is None:
        return None
    if certificate is None or key is None:
        raise ServeError("TLS needs a certificate and a key", "only one was given", "give --tls-cert and --tls-key")
    try:
        identity = Identity(certificate.read_text(_BYTES), key.read_text(_BYTES))
        identity.context()
    except (OSError, ValueError) as error:
        raise ServeError(
            f"cannot use the certificate {certificate} with the key {key}", str(error), "check both files"
        ) from error
    return identity


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
    if encoding not in (b"gzip", b"x-gzip", b"deflate"):
        raise WireError(
            f"the body is compressed with {encoding[:40].decode('latin-1')}",
            "this server reads gzip and deflate",
            "use one of them, or none",
            status=415,
        )
    try:
        stream = zlib.decompressobj(wbits=15 if encoding == b"deflate" else 31)
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
        if stream.unused_data or at < len(packed):
            raise zlib.error("something follows its end")
    except zlib.error as error:
        raise WireError(f"the {encoding.decode()} body is damaged", str(error), "compress it again") from error
    return content[:size]
