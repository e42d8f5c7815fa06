"""TLS certificates, which can be replaced while the server runs."""

from __future__ import annotations

import contextlib
import os
import ssl
from collections.abc import Iterator
from pathlib import Path

import msgspec

from rushhour.errors import ServeError

_BYTES = "latin-1"
"""Bytes as text, one by one: the text between the blocks of a PEM file may be in any encoding."""


class Identity(msgspec.Struct, frozen=True):
    """A certificate chain and its private key, both in PEM."""

    chain: str
    key: str

    @property
    def pem(self) -> tuple[bytes, bytes]:
        """The chain and the key as they were read."""
        return self.chain.encode(_BYTES), self.key.encode(_BYTES)

    def context(self) -> ssl.SSLContext:
        """A TLS context with this certificate.

        Raises:
            OSError, ValueError: if they cannot be used; `ssl.SSLError` is an OSError.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        with _in_memory(self.pem[0]) as chain, _in_memory(self.pem[1]) as key:
            # An encrypted key must not prompt for its password: there may be no terminal.
            context.load_cert_chain(chain, key, password=lambda: "")
        return context


class Certificates:
    """The server's side of TLS, over HTTP and gRPC: each handshake uses the certificate that was read last.

    Args:
        identity: the first certificate.

    Attributes:
        identity: the certificate in use.
        context: of the server; stays the same object.
    """

    def __init__(self, identity: Identity) -> None:
        self.identity = identity
        self.context = identity.context()
        # A new context for each: a certificate of another kind (ECDSA, RSA) would only be added to the first.
        self._current = self.context
        self.context.sni_callback = self._use_current  # called in every handshake, with or without a server name

    def renew(self, identity: Identity) -> None:
        """Use another certificate in all further handshakes.

        Raises:
            OSError, ValueError: if it cannot be used; then the old one stays.
        """
        self._current = identity.context()
        self.identity = identity

    def _use_current(
        self, connection: ssl.SSLSocket | ssl.SSLObject, name: str | None, context: ssl.SSLContext
    ) -> None:
        connection.context = self._current


@contextlib.contextmanager
def _in_memory(content: bytes) -> Iterator[str]:
    """The path of a file that exists in this process only: OpenSSL reads nothing but files."""
    descriptor = os.memfd_create("pem", os.MFD_CLOEXEC)
    try:
        with open(descriptor, "wb", closefd=False) as file:
            file.write(content)
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def read_identity(certificate: Path | None, key: Path | None) -> Identity | None:
    """Read a certificate chain and its key, and check that they fit together; None for neither.

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
