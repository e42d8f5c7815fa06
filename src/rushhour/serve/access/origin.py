"""Where a request comes from: no web page may change the server through a browser that can reach it."""

from __future__ import annotations

import ipaddress
import re
import socket
from collections.abc import Mapping
from typing import NamedTuple

from rushhour.errors import WireError
from rushhour.serve.access.exposure import is_loopback

ORIGIN_FIELDS = frozenset((b"host", b"origin", b"content-type", b"user-agent", b"sec-fetch-site"))
"""Header fields that say where a request comes from."""
_OTHER_TYPES = (b"libcurl-agent/", b"Python/")
"""User agents of the protocol's own clients (in C++; on aiohttp) that label JSON as another type. No browser sends
these, and no page can make one send them."""
_AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/@?#\s]+))(?::\d*)?")


class Client(NamedTuple):
    """The sender of a request, as far as its header and its connection say.

    Attributes:
        fields: those of `ORIGIN_FIELDS` that its header has, by their names in lower case.
        peer: address and port of the client's end of the connection; None where that is not known.
        here: address and port of the server's end.
    """

    fields: Mapping[bytes, bytes] = {}
    peer: tuple[str, int] | None = None
    here: tuple[str, int] | None = None


class OriginCheck:
    """Refuses changes that a web page asks for, where the server has no API keys.

    A page's script may send any `POST` that looks like a form's to any address, this machine's own among them. With a
    name of its own that suddenly resolves to that address (DNS rebinding) it can also read the answers. Browsers report
    both: `Host` is the name that the page used, `Origin` is where the page comes from. And browsers do not send JSON to
    another origin without a preflight request, which this server never grants.

    gRPC needs none of this: no page can send it without TLS.

    Sources: Fetch Standard, 3.2 (`Origin`) and 2.2.2 (methods and types that need no preflight); RFC 6454.

    Args:
        host: the address that the server listens on.
        names: further names of the server, for example behind a proxy.
    """

    def __init__(self, host: str, names: tuple[str, ...] = ()) -> None:
        self._given = frozenset(name.lower().rstrip(".") for name in names)
        self._names = self._given | {host.lower(), socket.gethostname().lower()}
        # An address cannot be rebound. Beyond loopback any may be this machine's: machines and containers have several.
        self._any_address = not is_loopback(host)

    def check(self, client: Client) -> None:
        """Raise a `WireError` if a request for a change comes from a web page of another origin."""
        self.check_origin(client)
        fields, origin = client.fields, client.fields.get(b"origin")
        kind = fields.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind == b"application/json" or (not kind and origin is None):
            return
        if origin is None and fields.get(b"user-agent", b"").startswith(_OTHER_TYPES):
            return
        shown = kind[:100].decode("latin-1") or "missing"
        raise WireError(
            f"the content type is {shown}", "requests for changes are JSON", "send application/json", status=415
        )

    def check_origin(self, client: Client) -> None:
        """The same without a check of the content type."""
        fields = client.fields
        host, origin = fields.get(b"host"), fields.get(b"origin")
        if host is not None and not self._knows(_name_of(host)):
            raise self._foreign("the host is not a name of this server", host)
        if origin is not None and not self._is_own(origin, host):
            raise self._foreign("a web page cannot change this server", origin)
        if fields.get(b"sec-fetch-site", b"same-origin") not in (b"same-origin", b"none"):
            raise self._foreign("a web page cannot change this server", fields[b"sec-fetch-site"])

    def _knows(self, name: str) -> bool:
        if name in self._names:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return name == "localhost" or name.endswith(".localhost")
        mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
        return self._any_address or (mapped or address).is_loopback

    def _is_own(self, origin: bytes, host: bytes | None) -> bool:
        """Whether a page of this origin was served by this server, under the name that the request was sent to."""
        scheme, _, place = origin.strip().lower().partition(b"://")
        if scheme not in (b"http", b"https"):
            return False
        return (host is not None and place == host.strip().lower()) or _name_of(place) in self._given

    def _foreign(self, what: str, value: bytes) -> WireError:
        return WireError(
            f"{what}: {value[:100].decode('latin-1')!r}",
            "without API keys, the server accepts changes only under its own names",
            "send the request to localhost or to the server's address, or start the server with --known-as NAME",
            status=403,
        )


def _name_of(authority: bytes) -> str:
    """The host in `host:port`, in lower case and without the brackets of an address; empty where it is not one."""
    found = _AUTHORITY.fullmatch(authority.strip().decode("latin-1").lower())
    return "" if found is None else (found[1] or found[2]).rstrip(".")


def is_host(name: str) -> bool:
    """Whether a text is a host name or an address, without scheme, port, brackets and path."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name.isascii() and _name_of(name.encode()) == name.lower().rstrip(".") != ""
    return True
