"""What keeps one client from taking the server from the others: bounds, keys, and patience that ends."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import os
import ssl
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec

from rushhour.errors import ServeError, WireError

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_BYTES = "latin-1"
"""Bytes as text, one by one: what stands between the blocks of a PEM file may be in any encoding."""


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what a connection may cost.

    Attributes:
        connections: at once; further ones are answered 503 and closed.
        body_bytes: of a request, compressed or not; of its pictures, decoded.
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
    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 32 * 2**10
    request_s: _Positive = 30.0
    idle_s: _Positive = 300.0
    picture_pixels: Annotated[int, msgspec.Meta(ge=1)] = 50_000_000
    ping_s: Annotated[float, msgspec.Meta(ge=0)] = 0.5
    keepalive_s: _Positive | None = None
    grpc_age_s: _Positive | None = None
    grpc_grace_s: _Positive | None = None


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


def inflate(body: bytes, encoding: bytes, limit: int) -> bytes:
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
        content = stream.decompress(body, limit + 1)
        if len(content) > limit:
            raise WireError("the body is too large", f"the limit is {limit} bytes unpacked", "split it", status=413)
        if not stream.eof:
            raise zlib.error("it ends too early")
    except zlib.error as error:
        raise WireError(f"the {encoding.decode()} body is damaged", str(error), "compress it again") from error
    return content
