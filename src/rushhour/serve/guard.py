"""What keeps one client from taking the server from the others: bounds, keys, and patience that ends."""

from __future__ import annotations

import hmac
import ipaddress
import ssl
import zlib
from pathlib import Path
from typing import Annotated

import msgspec

from rushhour.errors import ServeError, WireError

_Positive = Annotated[float, msgspec.Meta(gt=0)]


class Limits(msgspec.Struct, frozen=True):
    """Bounds on what a connection may cost.

    Attributes:
        connections: at once; further ones are answered 503 and closed.
        body_bytes: of a request, compressed or not; of its pictures, decoded.
        header_bytes: of a request, with its target.
        request_s: from a request's first byte to its last. A client that sends slower holds memory for nothing.
        idle_s: without a request; then the connection is closed.
        picture_pixels: of an encoded picture. Each thread that decodes needs 4 bytes for each.
    """

    connections: Annotated[int, msgspec.Meta(ge=1)] = 8192
    body_bytes: Annotated[int, msgspec.Meta(ge=1)] = 64 * 2**20
    header_bytes: Annotated[int, msgspec.Meta(ge=256)] = 32 * 2**10
    request_s: _Positive = 30.0
    idle_s: _Positive = 300.0
    picture_pixels: Annotated[int, msgspec.Meta(ge=1)] = 50_000_000


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


def inflate(body: bytes, encoding: bytes, limit: int) -> bytes:
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
        content = stream.decompress(body, limit + 1)
        if len(content) > limit:
            raise WireError("the body is too large", f"the limit is {limit} bytes unpacked", "split it", status=413)
        if not stream.eof:
            raise zlib.error("it ends too early")
        if stream.unused_data:
            raise zlib.error("something follows its end")
    except zlib.error as error:
        raise WireError(f"the {encoding.decode()} body is damaged", str(error), "compress it again") from error
    return content
