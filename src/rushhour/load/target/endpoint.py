"""An endpoint: a URL taken apart, for anything that answers HTTP or gRPC there."""

from __future__ import annotations

import dataclasses
import urllib.parse

from rushhour.errors import LoadError
from rushhour.load.generator.job import Protocol


@dataclasses.dataclass(frozen=True)
class Endpoint:
    """Anything that answers HTTP at a URL; nothing is known about its answers except their status.

    Attributes:
        url: as it was given, without a slash at the end.
        host: its host, as a client connects to it.
        port: its port.
        prefix: the URL's path; in front of `/v2` for a model server, mostly empty.
    """

    url: str
    host: str
    port: int
    prefix: str

    @property
    def protocol(self) -> Protocol:
        """Of its requests and answers."""
        return "grpc" if self.url.startswith("grpc://") else "http"

    @property
    def outputs(self) -> tuple[str, ...] | None:
        """Names of the outputs in an answer; None where answers are not decoded."""
        return None

    @property
    def authority(self) -> str:
        """`host:port`, an IPv6 address in brackets."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def endpoint(url: str) -> Endpoint:
    """A URL taken apart. No request is sent.

    Raises:
        LoadError: if the URL cannot be used.
    """
    try:
        parts = urllib.parse.urlsplit(url.strip().rstrip("/"))
        host, port = parts.hostname, parts.port
        if host is not None and not host.isascii():
            host = host.encode("idna").decode()
    except ValueError as error:  # UnicodeError, too
        raise unusable_url(url, str(error)) from error
    user, has_user, _ = parts.netloc.rpartition("@")
    if has_user:
        hidden = url.replace(f"{user}@", "***@", 1)
        raise unusable_url(hidden, "it holds a user or a password, which are not sent")
    if parts.scheme == "https":
        raise LoadError(
            f"cannot load {url}", "https is not supported: its encryption would be timed too", "use http://"
        )
    if parts.scheme not in ("http", "grpc") or not host:
        raise unusable_url(url, "it is not of the form http://host:port")
    if parts.query or parts.fragment:
        raise unusable_url(url, "it has more than a host, a port and a path")
    if parts.scheme == "grpc" and (parts.path or port is None):
        raise unusable_url(url, "the URL of a gRPC server has a host and a port only")
    if not (parts.path.isascii() and parts.path.isprintable() and " " not in parts.path):
        raise unusable_url(url, "its path holds characters that have to be percent-encoded")
    return Endpoint(parts.geturl(), host, 80 if port is None else port, parts.path)


def unusable_url(url: str, why: str) -> LoadError:
    """The error for a URL that cannot be used."""
    return LoadError(f"cannot use the URL {url!r}", why, "write for example http://localhost:8000")
